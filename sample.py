"""Generate text from a run: `python sample.py out/mla --start="def " --num_samples=3`. `--help` lists all.

As a library: `model, tokenizer = load_run("out/mla")`, then `generate_text`, or `generate.generate` for token
ids as they come.
"""

from __future__ import annotations

import codecs
import os
import statistics
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model import GPT, GPTConfig
from nanokv import checkpoint
from nanokv import tokenizer as tokenizers
from nanokv.cache import CACHE_FORMATS
from nanokv.config import UserError, cli, parse, pick_device, pick_dtype
from nanokv.generate import (
    DraftModel,
    Lookup,
    Stats,
    check_sampling,
    decode_one_token,
    generate,
    generate_lists,
    prefill,
)

SEPARATOR = "---------------"
USAGE = """python sample.py RUN [--key=value ...]

Samples go to standard output, what they cost to standard error."""


@dataclass
class Options:
    """The command line. Raises ValueError, one line, if a value is out of its range."""

    out_dir: str  # the run: its folder, or the best/ or last/ in it; --out_dir= may be left out
    which: Literal["best", "last"] = "best"  # which checkpoint; last where there is no best
    device: str = "auto"  # cpu, cuda, cuda:N, mps; auto: the best there is
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # dtype of the weights
    cache_dtype: Literal["auto", "fp32", "bf16", "fp16", "int8", "fp8"] = "auto"  # auto: as the weights
    # prompts
    start: str = ""  # the prompt: text, FILE:path, or - for stdin; empty: a new document
    split_lines: bool = False  # each line of --start that is not empty is a prompt; all run as one batch
    num_samples: int = 1  # samples of each prompt; sample i draws with seed + i
    batch_size: int = 64  # samples that run at a time; bounds the memory of their cache
    # sampling
    max_new_tokens: int = 500  # tokens of a sample; it ends earlier at <|endoftext|> or at a stop string
    temperature: float = 0.8  # below 1: likelier tokens more often; 0: greedy
    greedy: bool = False  # always the likeliest token, as --temperature=0
    top_k: int = 200  # draw from the k likeliest tokens; 0: from all
    top_p: float = 1.0  # draw from the fewest likeliest tokens that have this share of the probability
    min_p: float = 0.0  # draw from tokens at least min_p times as likely as the likeliest
    stop: str = ""  # end a sample at this text, which is not printed; || between several, \n for a newline
    seed: int = 1337  # of the sampling
    draft: str | None = None  # what guesses ahead, to be faster: a smaller run, or lookup in the text so far

    def __post_init__(self):
        check_sampling(self.temperature, self.top_k, self.top_p, self.min_p)
        for name in ("num_samples", "batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, not {self.seed}")
        if self.greedy:
            self.temperature = 0.0


class TextStream:
    """The text of one sample, from its tokens, as far as it is certain; it may end at a stop string.

    Bytes of an unfinished character wait for the rest of it, and what may be the beginning of a stop string
    waits until it is one or is not. Bytes that are no UTF-8 become U+FFFD.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, stop: Collection[str] = ()):
        self.tokenizer, self.stop, self.ended = tokenizer, stop, False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""

    def push(self, token: int) -> str:
        """The text that this token makes certain; nothing once the stream has ended."""
        return self._release(self.tokenizer.decode_single_token_bytes(token))

    def close(self) -> str:
        """End the stream: the text still held."""
        return self._release(b"", last=True)

    def _release(self, new: bytes, last: bool = False) -> str:
        if self.ended:
            return ""
        self.held += self.decoder.decode(new, last)
        found = [at for stop in self.stop if (at := self.held.find(stop)) >= 0]
        self.ended = last or bool(found)
        maybe = 0 if last else max((self._overlap(stop) for stop in self.stop), default=0)
        cut = min(found, default=len(self.held) - maybe)
        text, self.held = self.held[:cut], self.held[cut:]
        return text

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        return next((n for n in range(len(stop) - 1, 0, -1) if self.held.endswith(stop[:n])), 0)


def inference_model(config: GPTConfig, weights: dict[str, Tensor]) -> GPT:
    """A model in eval mode whose parameters are `weights` themselves, not copies.

    Raises RuntimeError if their names or shapes do not fit.
    """
    if config.n_layer > len(weights):  # a damaged number, which would take for ever to build
        raise RuntimeError(f"{len(weights)} tensors do not fill {config.n_layer} layers")
    model = empty_model(config)
    model.load_state_dict(weights, assign=True)
    return model.eval()


class NotInitialised(TorchFunctionMode):
    """Skips torch.nn.init, which on meta tensors would first import torch's compiler: two seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        skipped = getattr(func, "__module__", None) == "torch.nn.init"
        return None if skipped else func(*args, **(kwargs or {}))


def empty_model(config: GPTConfig) -> GPT:
    """A model of names and shapes alone, without memory."""
    with torch.device("meta"), NotInitialised():
        return GPT(config)


def load_run(
    path: str | Path, device: str = "auto", dtype: str = "auto", which: str = "best"
) -> tuple[GPT, tokenizers.Tokenizer]:
    """Model, in eval mode on `device`, and tokenizer of a run.

    `path` is the run's folder, or the best/ or last/ in it; `which` counts for the former, and falls back to
    last where there is no best. Raises UserError if it is no run, or a damaged one.
    """
    run_dir, device = Path(path), pick_device(device)
    if run_dir.absolute().name in ("best", "last") and not (run_dir / "config.json").exists():
        run_dir, which = run_dir.absolute().parent, run_dir.absolute().name
    elif which == "best" and checkpoint.best_or_last(run_dir) == "last":
        which = "last"
    config = checkpoint.read_config(run_dir)
    weights = checkpoint.load_weights(run_dir, which)
    try:
        model = inference_model(config, weights)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the weights in {run_dir / which} do not fit the model in its config.json"
        ) from error
    tokenizer = tokenizers.load(run_dir)
    if tokenizer.n_vocab > config.vocab_size:
        raise UserError(f"the tokenizer in {run_dir} is not this run's: it has more ids than the model")
    return model.to(device, pick_dtype(dtype, device)), tokenizer


def encode_prompt(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    """Token ids of a prompt. An empty one begins a document: with <|endoftext|>, else as in nanoGPT with a
    newline, else with id 0. Raises UserError if the tokenizer cannot encode the text.
    """
    if text:
        ids = tokenizer.encode_ordinary(text)
        if not ids:
            raise UserError(f"the prompt {text!r} holds no token; give another --start")
        return ids
    if tokenizer.eot_token is not None:
        return [tokenizer.eot_token]
    with suppress(UserError):
        return tokenizer.encode_ordinary("\n") or [0]
    return [0]


def stop_ids(tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The token that ends a document, if the tokenizer has one."""
    return () if tokenizer.eot_token is None else (tokenizer.eot_token,)


def generate_text(
    model: GPT, tokenizer: tokenizers.Tokenizer, max_new_tokens: int, start: str = "", **options
) -> str:
    """One sample as text, `start` included; options as for `generate`, with the defaults of the command."""
    model = inference_model(model.config, model.state_dict())
    options = dict(temperature=Options.temperature, top_k=Options.top_k) | options
    options |= dict(stop_ids=stop_ids(tokenizer), n_vocab=tokenizer.n_vocab)
    (tokens,) = generate_lists(model, [encode_prompt(tokenizer, start)], max_new_tokens, **options)
    stream = TextStream(tokenizer)
    return start + "".join(map(stream.push, tokens)) + stream.close()


def decode_probe(
    model: GPT,
    context: int,
    n: int = 32,
    dtype: torch.dtype | None = None,
    repeats: int = 5,
    cache_dtype: torch.dtype | None = None,
) -> dict[str, float | int]:
    """Decoding speed at batch 1 over a cache of `context` random tokens, weights and cache in `dtype`.

    The median of `repeats` timings of n tokens each; the keys are those of metrics.jsonl.
    """
    model = inference_model(model.config, model.state_dict()).to(dtype or model.embed_tokens.weight.dtype)
    random = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (context,), generator=random).tolist()
    cache = model.new_cache(1, context + n, cache_dtype)
    seconds = []
    for _ in range(1 + repeats):  # the first one warms up
        cache.rewind([0])
        ids = prefill(model, [prompt], cache).argmax(-1)
        ids.tolist()  # waits for the device
        clock = time.perf_counter()
        for _ in range(n):
            ids = decode_one_token(model, ids, cache).argmax(-1)
            ids.tolist()
        seconds.append(time.perf_counter() - clock)
    return {
        "decode/tokens_per_s": n / statistics.median(seconds[1:]),
        "decode/context": context,
        "kv_cache/allocated_bytes": cache.nbytes,
    }


def read_prompts(start: str, split_lines: bool) -> list[str]:
    """The prompts that --start stands for. Raises UserError if they cannot be read or there are none."""
    where = start if start.startswith("FILE:") else "on standard input" if start == "-" else "--start"
    try:
        if start == "-":
            raw = sys.stdin.buffer.read()
        elif start.startswith("FILE:"):
            raw = Path(start.removeprefix("FILE:")).read_bytes()
        else:
            raw = os.fsencode(start)
        text = raw.decode()
    except OSError as error:
        raise UserError(f"cannot read the prompt {where}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt {where} is not UTF-8 text") from error
    prompts = [line for line in text.splitlines() if line.strip()] if split_lines else [text]
    if where != "--start" and not text or not prompts:
        raise UserError(f"the prompt {where} is empty; leave --start out to begin a new document")
    return prompts


def print_samples(steps: Iterator[list[int | None]], prompts: list[str], streams: list[TextStream]) -> None:
    """Print samples one after another, each as it comes; what the next ones have meanwhile waits its turn."""
    ready = list(prompts)  # of each row, the text not yet printed
    current = 0

    def flush() -> None:
        nonlocal current
        while current < len(ready):
            sys.stdout.write(ready[current])
            ready[current] = ""
            if not streams[current].ended:
                break
            current += 1
            sys.stdout.write("\n" if current == len(ready) else f"\n{SEPARATOR}\n")
        sys.stdout.flush()

    flush()
    for tokens in steps:
        for row, token in enumerate(tokens):
            ready[row] += streams[row].close() if token is None else streams[row].push(token)
        flush()
        if current == len(ready):
            return
    for row, stream in enumerate(streams):
        ready[row] += stream.close()
    flush()


def report(stats: Stats, config: GPTConfig, dtype: torch.dtype, rows: int) -> str:
    """Lines on speed, on the cache (in dtype), and on the draft if there was one."""
    prefill_rate = stats.prompt_tokens / stats.prefill_seconds
    decode_rate = stats.decode_tokens / stats.decode_seconds if stats.decode_seconds else 0.0
    per_token = config.kv_bytes_per_token(dtype)
    return (
        f"prefill {stats.prompt_tokens:,} tokens, {prefill_rate:,.0f} tokens/s; "
        f"decode {stats.decode_tokens:,} tokens, {decode_rate:,.0f} tokens/s; batch of {rows}\n"
        f"kv cache ({config.attention}, {str(dtype).removeprefix('torch.')}) {per_token:,} bytes a token, "
        f"{stats.cache_bytes:,} bytes allocated"
        + (f"\ndraft: {stats.right:,} of {stats.guessed:,} guesses were right" if stats.guessed else "")
    )


def load_draft(options: Options, tokenizer: tokenizers.Tokenizer) -> GPT:
    """The model of the run that --draft names. Raises UserError if it has other tokens."""
    model, its_tokenizer = load_run(options.draft, options.device, options.dtype)
    if tokenizers.sha256(its_tokenizer) != tokenizers.sha256(tokenizer):
        raise UserError(f"{options.draft} cannot draft for {options.out_dir}: it has another tokenizer")
    return model


def main(argv: list[str]) -> None:
    if argv and not argv[0].startswith("-"):
        argv = [f"--out_dir={argv[0]}", *argv[1:]]
    options = parse(Options, argv, USAGE)
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character
    texts = read_prompts(options.start, options.split_lines)
    model, tokenizer = load_run(options.out_dir, options.device, options.dtype, options.which)
    prompts = [encode_prompt(tokenizer, text) for text in texts]
    block_size, longest = model.config.block_size, max(map(len, prompts))
    if longest > block_size:
        print(f"a prompt of {longest} tokens is cut to its last {block_size}, the context", file=sys.stderr)
    # what is printed is what was encoded; an empty prompt's <|endoftext|> is not text
    shown = ["" if tuple(ids) == stop_ids(tokenizer) else tokenizer.decode(ids) for ids in prompts]
    stop = [text for text in options.stop.replace("\\n", "\n").split("||") if text]
    cache_dtype = CACHE_FORMATS.get(options.cache_dtype, model.embed_tokens.weight.dtype)
    drafter = None if options.draft in (None, "lookup") else load_draft(options, tokenizer)
    stats, total, at_once = Stats(), len(prompts) * options.num_samples, options.batch_size
    if options.draft:
        at_once = 1
    try:
        for first in range(0, total, at_once):
            rows = [i // options.num_samples for i in range(first, min(first + at_once, total))]
            steps = generate(
                model,
                [prompts[row] for row in rows],
                options.max_new_tokens,
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                min_p=options.min_p,
                seed=options.seed + first,
                stop_ids=stop_ids(tokenizer),
                n_vocab=tokenizer.n_vocab,
                cache_dtype=cache_dtype,
                stats=stats,
                draft=Lookup() if options.draft == "lookup" else drafter and DraftModel(drafter),
            )
            if first:
                print(SEPARATOR)
            print_samples(steps, [shown[row] for row in rows], [TextStream(tokenizer, stop) for _ in rows])
    except KeyboardInterrupt:
        print()
    print(report(stats, model.config, cache_dtype, min(at_once, total)), file=sys.stderr)


if __name__ == "__main__":
    cli(main)
