"""Generate text from a run: `python sample.py out/mla --start="def " --num_samples=3`. `--help` lists all.

As a library: `model, tokenizer = load_run("out/mla")`, then `nanokv.text.generate_text`, or
`nanokv.generate.generate` for token ids as they come.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch

from backends import accelerate
from model import GPT, GPTConfig
from nanokv import checkpoint
from nanokv import tokenizer as tokenizers
from nanokv.cache import CACHE_FORMATS
from nanokv.config import UserError, check_range, cli, only_fields, parse
from nanokv.device import pick_device, pick_dtype
from nanokv.generate import DraftModel, PromptLookup, Stats, check_sampling, generate
from nanokv.text import TextStream, encode_prompt, stop_ids
from nanokv.tokenizer import Tokenizer

SEPARATOR = "---------------"
USAGE = """python sample.py RUN [--key=value ...]

Samples go to standard output, what they cost to standard error."""


@dataclass
class Options:
    """The command line. Raises ValueError, one line, if a value is out of its range."""

    out_dir: str  # the run folder, or best/ or last/ in it; --out_dir= may be omitted
    which: Literal["best", "last"] = "best"  # which checkpoint; last if the run has no best
    device: str = "auto"  # cpu, cuda, cuda:N, mps; auto: the best available
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # dtype of the weights
    cache_dtype: Literal["auto", "fp32", "bf16", "fp16", "int8", "fp8", "int4"] = "auto"  # auto: dtype of the weights
    # prompts
    start: str = ""  # the prompt: text, FILE:path, or - for stdin; empty: a new document
    split_lines: bool = False  # each non-empty line of --start is a prompt; all run as one batch
    num_samples: int = 1  # samples of each prompt; sample i uses seed + i
    batch_size: int = 64  # samples that run at a time; bounds the memory of their cache
    # sampling
    max_new_tokens: int = 500  # tokens of a sample; it ends earlier at <|endoftext|> or at a stop string
    temperature: float = 0.8  # below 1: likelier tokens more often; 0: greedy
    greedy: bool = False  # always the likeliest token, as --temperature=0
    top_k: int = 200  # draw from the k likeliest tokens; 0: from all
    top_p: float = 1.0  # draw from the smallest set of likeliest tokens with this total probability
    min_p: float = 0.0  # draw from tokens at least min_p times as likely as the likeliest
    stop: str = ""  # end a sample at this text, which is not printed; || between several, \n for a newline
    seed: int = 1337  # of the sampling
    draft: str | None = None  # speculative decoding: a smaller run that proposes tokens, or lookup (in the text)

    def __post_init__(self):
        check_sampling(self.temperature, self.top_k, self.top_p, self.min_p)
        check_range(self, "num_samples batch_size max_new_tokens", at_least=1)
        check_range(self, "seed", at_least=0)
        if self.greedy:
            self.temperature = 0.0


def load_run(path: str | Path, device: str = "auto", dtype: str = "auto", which: str = "best") -> tuple[GPT, Tokenizer]:
    """The model, in eval mode on `device`, and the tokenizer of a run.

    `path` is the run folder, or best/ or last/ in it. `which` chooses the checkpoint if `path` is the run folder; it
    falls back to last if there is no best. Raises UserError if `path` is not a run or is damaged.
    """
    (run_dir, which), place = checkpoint.find(path, which), pick_device(device)
    config = only_fields(GPTConfig, checkpoint.read_config(run_dir), str(run_dir / "config.json"))
    weights = checkpoint.load_weights(run_dir, which)
    try:
        if config.n_layer > len(weights):  # n_layer is damaged: to build so many layers would take forever
            raise RuntimeError(f"{len(weights)} tensors do not fill {config.n_layer} layers")
        model = checkpoint.build(partial(GPT, config), weights)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the weights in {run_dir / which} do not fit its config.json") from error
    tokenizer = tokenizers.load(run_dir)
    if tokenizer.n_vocab > config.vocab_size:
        raise UserError(f"the tokenizer in {run_dir} is not this run's: it has more ids than the model")
    return cast(GPT, accelerate(model.to(place, pick_dtype(dtype, place)))), tokenizer


def read_prompts(start: str, split_lines: bool) -> list[str]:
    """The prompts that --start gives. Raises UserError if they cannot be read or there are none."""
    where = start if start.startswith("FILE:") else "on standard input" if start == "-" else "--start"
    try:
        if start == "-":
            text = sys.stdin.buffer.read().decode()
        elif start.startswith("FILE:"):
            text = Path(start.removeprefix("FILE:")).read_bytes().decode()
        else:
            text = os.fsencode(start).decode()
    except OSError as error:
        raise UserError(f"cannot read the prompt {where}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt {where} is not UTF-8 text") from error
    prompts = [line for line in text.splitlines() if line.strip()] if split_lines else [text]
    if where != "--start" and not text or not prompts:
        raise UserError(f"the prompt {where} is empty; leave --start out to begin a new document")
    return prompts


def print_samples(steps: Iterator[list[int | None]], prompts: list[str], streams: list[TextStream]) -> None:
    """Print samples one after another, each while it is generated. The text of later ones is held until their turn."""
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
    decode_rate = stats.decode_tokens / stats.decode_seconds if stats.decode_seconds else 0.0
    prefill = f"prefill {stats.prompt_tokens:,} tokens, {stats.prompt_tokens / stats.prefill_seconds:,.0f} tokens/s"
    decode = f"decode {stats.decode_tokens:,} tokens, {decode_rate:,.0f} tokens/s; batch of {rows}"
    per_token, name = config.kv_bytes_per_token(dtype), str(dtype).removeprefix("torch.")
    held = f"{per_token:,} bytes a token, {stats.cache_bytes:,} bytes allocated"
    draft = f"\ndraft: {stats.accepted:,} of {stats.drafted:,} drafted tokens accepted" if stats.drafted else ""
    return f"{prefill}; {decode}\nkv cache ({config.attention}, {name}) {held}{draft}"


def print_all(options: Options, model: GPT, tokenizer: Tokenizer, prompts: list[list[int]]) -> str:
    """Generate and print every sample; returns the report on speed and cache. Ctrl-C ends it early."""
    # print a prompt as it was encoded, without the <|endoftext|> that stands for an empty one
    shown = ["" if tuple(ids) == stop_ids(tokenizer) else tokenizer.decode(ids) for ids in prompts]
    stop = [text for text in options.stop.replace("\\n", "\n").split("||") if text]
    cache_dtype = CACHE_FORMATS.get(options.cache_dtype, model.embed_tokens.weight.dtype)
    drafter = None
    if options.draft not in (None, "lookup"):
        drafter, its_tokenizer = load_run(options.draft, options.device, options.dtype)
        if tokenizers.sha256(its_tokenizer) != tokenizers.sha256(tokenizer):
            raise UserError(f"{options.draft} cannot draft for {options.out_dir}: it has another tokenizer")
    stats, total = Stats(), len(prompts) * options.num_samples
    at_once = 1 if options.draft else options.batch_size
    knobs = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    knobs |= dict(stop_ids=stop_ids(tokenizer), n_vocab=tokenizer.n_vocab, cache_dtype=cache_dtype, stats=stats)
    try:
        for first in range(0, total, at_once):
            rows = [i // options.num_samples for i in range(first, min(first + at_once, total))]
            draft = PromptLookup() if options.draft == "lookup" else drafter and DraftModel(drafter)
            own = {"seed": options.seed + first, "draft": draft}
            steps = generate(model, [prompts[row] for row in rows], options.max_new_tokens, **own, **knobs)
            if first:
                print(SEPARATOR)
            print_samples(steps, [shown[row] for row in rows], [TextStream(tokenizer, stop) for _ in rows])
    except KeyboardInterrupt:
        print()
    return report(stats, model.config, cache_dtype, min(at_once, total))


def main(argv: list[str]) -> None:
    options = parse(Options, argv, USAGE, bare=1)
    sys.stdout.reconfigure(errors="replace")  # pyright: ignore (a terminal may lack a character)
    texts = read_prompts(options.start, options.split_lines)
    model, tokenizer = load_run(options.out_dir, options.device, options.dtype, options.which)
    prompts = [encode_prompt(tokenizer, text) for text in texts]
    block_size, longest = model.config.block_size, max(map(len, prompts))
    if longest > block_size:
        print(f"a prompt of {longest} tokens is cut to its last {block_size}, the context", file=sys.stderr)
    print(print_all(options, model, tokenizer, prompts), file=sys.stderr)


if __name__ == "__main__":
    cli(main)
