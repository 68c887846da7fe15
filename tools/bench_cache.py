"""The commands `decode` and `cache` of bench.py: how fast models decode, what a cache's format costs."""

from __future__ import annotations

import copy
import math
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

import torch

from backends import accelerate
from model import GPT, GPTConfig
from nanokv import checkpoint
from nanokv import tokenizer as tokenizers
from nanokv.cache import CACHE_FORMATS, kv_bytes
from nanokv.config import UserError, load, parse
from nanokv.dataset import Dataset, open_dataset
from nanokv.device import pick_device, pick_dtype
from nanokv.generate import Stats, decode_one_token, generate, prefill
from nanokv.metrics import decode_probe, kv_bytes_in_context
from nanokv.plots import draw_cache, draw_decode
from sample import load_run
from tools.hugging_face import hf_config, hf_state_dict
from train import TrainConfig

ATTENTION_KNOBS = {"mha": [], "mqa": [], "gqa": ["--n_kv_head=2"], "mla": []}


@dataclass
class DecodeOptions:
    out_dir: str | None = None  # runs to measure, comma separated; results go into the first
    config: str | None = None  # config files whose models to measure, with random weights, comma separated
    hf: bool = (
        False  # also transformers' `generate` on the equivalent model, with the same weights and prompts
    )
    contexts: str = "64,1024,4096,16384"  # tokens in each row of the cache
    batches: str = "1,32"  # rows
    prefill: int = 8192  # tokens of a batch that are computed; a larger cache is filled with random numbers
    max_cache: float = 4.0  # GB; what needs more is left out
    n: int = 16  # tokens of each of the 5 timings of which the median counts, after n to warm up
    generate: int = 0  # also the time to generate this many tokens and a half, a quarter, an eighth of them
    # the models, if neither out_dir nor config names them
    attentions: str = "mha,mqa,gqa,mla"  # gqa with 2 groups, mla with a latent of a third of the width
    n_layer: int = 6  # blocks
    n_head: int = 6  # heads
    n_embd: int = 384  # width
    vocab_size: int = 2048  # token ids
    qk_norm: bool = False  # of mha, mqa and gqa; their equivalent is Qwen3 with it, Llama without
    # machine
    device: str = "auto"  # cpu, cuda, cuda:N, mps
    dtype: str = "auto"  # float32, bfloat16, float16


@dataclass
class CacheOptions:
    out_dir: str  # the run, or several with commas between; cache.json and cache.png go into the first
    formats: str = "fp32,bf16,fp16,int8,fp8"  # what to hold the cache in
    windows: str = ""  # windows put on every layer, in tokens; empty: a half and a quarter of block_size
    sinks: str = "0,4"  # first tokens that stay in sight besides these windows
    tokens: int = 32768  # validation tokens to read, evenly spread
    batch_size: int = 16  # rows of block_size tokens, read side by side
    chunk: int = 16  # tokens fed at a time; all but the first chunk see what the cache holds of the others
    which: Literal["best", "last"] = "best"  # which checkpoint
    device: str = "auto"  # cpu, cuda, cuda:N, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights

    def __post_init__(self):
        unknown = set(self.formats.split(",")) - set(CACHE_FORMATS)
        if unknown:
            raise ValueError(f"formats are {', '.join(CACHE_FORMATS)}, not {unknown.pop()!r}")
        if min(self.tokens, self.batch_size, self.chunk) < 1:
            raise ValueError("tokens, batch_size and chunk must be at least 1")
        for name in ("windows", "sinks"):
            if not all(number.isdecimal() for number in filter(None, getattr(self, name).split(","))):
                raise ValueError(f"{name} is whole numbers with commas between, not {getattr(self, name)!r}")


def cache(argv: list[str]) -> None:
    """Quality through the cache: bits per byte, bytes and speed of every format and window."""
    options = parse(
        CacheOptions, argv, "python -m tools.bench cache --out_dir=RUN[,RUN...] [--key=value ...]"
    )
    rows = []
    for run in options.out_dir.split(","):
        rows += cache_rows(Path(run), options)
    out_dir = Path(options.out_dir.split(",")[0])
    write({"machine": machine(), "options": asdict(options), "rows": rows}, out_dir / "cache.json")
    draw_cache(rows, out_dir / "cache.png")


def cache_rows(run: Path, options: CacheOptions) -> list[dict]:
    """Measure one run, and print it as it goes: a row for each format, under the run's own window and others.

    Differences are to the unquantized cache without a window that the run was not trained with.
    """
    model, tokenizer = load_run(run, options.device, options.dtype, options.which)
    config, knobs = model.config, checkpoint.read_config(checkpoint.find(run)[0])
    dataset = open_dataset(knobs["dataset"], knobs.get("tokenizer"))
    if tokenizers.sha256(dataset.tokenizer) != tokenizers.sha256(tokenizer):
        raise UserError(
            f"{knobs['dataset']} here is not the data that {run} was trained on: another tokenizer"
        )
    windows = [int(n) for n in options.windows.split(",") if n.strip("0")]
    windows = windows or [config.block_size // 2, config.block_size // 4]
    sinks = [int(n) for n in options.sinks.split(",") if n]
    shapes = [(config.window, config.sink_tokens, config.window_pattern)]
    shapes += [(w, s, "S") for w, s in product(windows, sinks or [0])]
    variants = []  # (row, model, dtype of the cache)
    for (window, sinks, pattern), name in product(shapes, options.formats.split(",")):
        changed, dtype = copy.copy(model), CACHE_FORMATS[name]  # the same weights under another config
        changed.config = replace(config, window=window, sink_tokens=sinks, window_pattern=pattern)
        row = {"run": str(run), "attention": config.attention, "format": name}
        row |= {"window": window, "sink_tokens": sinks, "window_pattern": pattern}
        row["bytes_per_token"] = kv_bytes_in_context(changed.config, dtype)
        variants.append((row, changed, dtype))
    weights = model.embed_tokens.weight.dtype
    measured = through_the_cache([(model, weights)] + [v[1:] for v in variants], dataset, options)
    base, bytes_per_token = measured.pop(0), dataset.val_bytes_per_token
    unit = math.log(2) * (bytes_per_token or 1 / math.log(2))  # nats a token, where the set is no text
    print(
        f"{run}: {config.attention}, cached in the weights' {str(weights).removeprefix('torch.')}: "
        f"{base['loss'] / unit:.4f} {'bits per byte' if bytes_per_token else 'nats a token'}\n"
        f"{'format':>6} {'window':>7} {'sinks':>5} {'bytes/token':>11} {'quality':>8} {'worse by':>9} "
        f"{'KL, nats':>9} {'top-1':>7} {'decode tok/s':>12}"
    )
    for (row, changed, dtype), result in zip(variants, measured, strict=True):
        probe = decode_probe(changed, config.block_size // 2, cache_dtype=dtype)
        row["val/loss"], row["val/bpb"] = result["loss"], result["loss"] / unit if bytes_per_token else None
        row |= {"worse": result["loss"] / base["loss"] - 1, "kl": result["kl"], "top1": result["top1"]}
        row["decode/tokens_per_s"] = probe["decode/tokens_per_s"]
        print(
            f"{row['format']:>6} {row['window'] or 'all':>7} {row['sink_tokens']:5} "
            f"{row['bytes_per_token']:11,.1f} {result['loss'] / unit:8.4f} {row['worse']:+9.3%} "
            f"{row['kl']:9.2e} {row['top1']:7.2%} {row['decode/tokens_per_s']:12,.0f}",
            flush=True,
        )
    return [row for row, *_ in variants]


@torch.inference_mode()
def through_the_cache(
    variants: list[tuple[GPT, torch.dtype]], dataset: Dataset, options: CacheOptions
) -> list[dict[str, float]]:
    """Teacher-forced loss, in nats a token, of each (model, dtype of its cache); and how far each is from the
    first one: the mean KL divergence, and how often both find the same token the likeliest.
    """
    T, device = variants[0][0].config.block_size, variants[0][0].embed_tokens.weight.device
    totals, count = torch.zeros(len(variants), 3, dtype=torch.float64, device=device), 0
    batches = max(options.tokens // (options.batch_size * T), 1)
    for x, y in dataset.val_batches(T, options.batch_size, batches):
        x, y = x.to(device), y.to(device)
        count += int((y >= 0).sum())
        caches = [model.new_cache(len(x), T, dtype) for model, dtype in variants]
        for new, targets in zip(x.split(options.chunk, 1), y.split(options.chunk, 1), strict=True):
            kept, first = targets >= 0, None
            for i, ((model, _), kv_cache) in enumerate(zip(variants, caches, strict=True)):
                logp = model(new, cache=kv_cache)[0][kept].double().log_softmax(-1)  # (tokens, V)
                first = logp if first is None else first
                totals[i, 0] -= logp.gather(-1, targets[kept][:, None]).sum()
                totals[i, 1] += (first.exp() * (first - logp)).sum()
                totals[i, 2] += (first.argmax(-1) == logp.argmax(-1)).sum()
    return [dict(zip(("loss", "kl", "top1"), row, strict=True)) for row in (totals / count).tolist()]


def decode(argv: list[str]) -> None:
    """Tokens a second by context and batch, the bytes of each, and the share of the memory's bandwidth."""
    options = parse(
        DecodeOptions, argv, "python -m tools.bench decode [--out_dir=RUN | --config=FILE] [--key=value ...]"
    )
    out_dir = Path(options.out_dir.split(",")[0] if options.out_dir else "out/bench")
    device = pick_device(options.device)
    bandwidth, rows, lengths = read_bandwidth(device), [], []
    print(f"memory is read at {bandwidth / 1e9:.1f} GB/s")
    columns = f"{'':12} batch context prefill/s decode/s MB/token of read"
    peer = "  dynamic   static  ratio same tokens"
    print(columns + (peer if options.hf else ""))
    for name, model in decode_models(options, device):
        for batch, context in product(numbers(options.batches), numbers(options.contexts)):
            if (
                kv_bytes(model.config.kv_layouts(), context + 6 * options.n, torch.float32) * batch
                <= options.max_cache * 1e9
            ):
                rows.append({"model": name, "batch": batch, "context": context})
                rows[-1] |= decode_row(model, batch, context, bandwidth, options)
                print(decode_line(rows[-1]), flush=True)
        if options.generate:
            times = our_steps(model, torch.zeros(1, 1, dtype=torch.long), options.generate)[0]
            marks = [options.generate >> shift for shift in (3, 2, 1, 0)]
            lengths += [{"model": name, "n": n, "seconds": times[n] - times[0]} for n in marks]
            seconds = ", ".join(f"{row['n']} in {row['seconds']:.2f} s" for row in lengths[-len(marks) :])
            print(f"{name:12} tokens generated: {seconds}", flush=True)
    result = {"machine": machine(), "options": asdict(options), "read_bytes_per_s": bandwidth}
    write(result | {"rows": rows, "generate": lengths}, out_dir / "decode.json")
    draw_decode(rows, out_dir / "decode.png")


def numbers(text: str) -> list[int]:
    """A list on the command line."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"{text!r} is not a list of whole numbers such as 64,1024") from None


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second at which memory is read: the best of 5 sums over 256 MB, far more than caches hold."""
    x, seconds = torch.ones(64 * 2**20, device=device), []
    for _ in range(6):
        begin = time.perf_counter()
        x.sum().item()
        seconds.append(time.perf_counter() - begin)
    return x.nbytes / min(seconds[1:])


def decode_models(options: DecodeOptions, device: torch.device) -> Iterator[tuple[str, GPT]]:
    """The models to measure, by name, with room for every context."""
    dtype = pick_dtype(options.dtype, device)
    room = max(numbers(options.contexts)) + 6 * options.n + options.generate + 2
    if options.out_dir:
        for run in options.out_dir.split(","):
            model = load_run(run, options.device, options.dtype)[0]
            model.config.block_size = max(model.config.block_size, room)  # RoPE has no limit of its own
            yield Path(run).name, model
        return
    shape = [f"--{name}={getattr(options, name)}" for name in ("n_layer", "n_head", "n_embd", "vocab_size")]
    for name in (options.config or options.attentions).split(","):
        if options.config:
            argv = [name]
        elif name == "mla":
            argv = ["--attention=mla", f"--kv_lora_rank={max(options.n_embd // 3, 1)}", *shape]
        else:
            argv = [
                f"--attention={name}",
                f"--qk_norm={options.qk_norm}",
                *ATTENTION_KNOBS.get(name, []),
                *shape,
            ]
        config, _ = load([*argv, f"--block_size={room}"], GPTConfig, TrainConfig)
        torch.manual_seed(0)
        model = GPT(config).eval()
        for p in model.parameters():  # as they are initialised, what a block adds and all logits are zero
            if p.ndim == 2:
                torch.nn.init.normal_(p, std=p.size(1) ** -0.5)
        yield Path(name).stem, accelerate(model.to(device, dtype))


def decode_row(model: GPT, batch: int, context: int, bandwidth: float, options: DecodeOptions) -> dict:
    """One measurement of `decode`, beside transformers' if asked for."""
    n, config = 6 * options.n, model.config
    weights = sum(p.nbytes for p in model.parameters())
    if not config.tie_embeddings:
        weights -= model.embed_tokens.weight.nbytes  # a look-up
    cached = kv_bytes(config.kv_layouts(), context + n // 2, model.embed_tokens.weight.dtype)
    row = {"bytes_per_token": weights / batch + cached}
    idx = torch.randint(config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(0))
    if batch * context <= options.prefill:
        times, tokens, seconds = our_steps(model, idx, n)
        row["prefill/tokens_per_s"] = idx.numel() / seconds
    else:
        times = filled_steps(model, batch, context, n)
    row["decode/tokens_per_s"] = batch * median_rate(times)
    row["share_of_bandwidth"] = row["bytes_per_token"] * row["decode/tokens_per_s"] / bandwidth
    if options.hf and batch * context <= options.prefill:
        peer, same = hugging_face(model), []
        for cache in ("dynamic", "static"):
            times, theirs = hf_steps(peer, idx.to(model.embed_tokens.weight.device), n, cache)
            row[f"hf_{cache}/tokens_per_s"] = batch * median_rate(times)
            same.append(theirs == tokens)
        row["same_tokens"] = all(same)
        row["ratio"] = row["decode/tokens_per_s"] / max(
            row[f"hf_{c}/tokens_per_s"] for c in ("dynamic", "static")
        )
    return row


def median_rate(times: list[float]) -> float:
    """Steps a second: the median of 5 equal parts of the time stamps, after one to warm up."""
    n = (len(times) - 1) // 6
    return n / statistics.median(times[(i + 1) * n] - times[i * n] for i in range(1, 6))


def our_steps(model: GPT, idx: torch.Tensor, n: int) -> tuple[list[float], list[list[int]], float]:
    """Time stamps of n + 1 greedy tokens after the prompts idx (B, T), the tokens, and seconds of prefill."""
    times, steps, stats = [], [], Stats()
    for tokens in generate(model, idx.tolist(), n + 1, temperature=0, stats=stats):
        times.append(time.perf_counter())
        steps.append(tokens)
    return times, [list(row) for row in zip(*steps, strict=True)], stats.prefill_seconds


@torch.inference_mode()
def filled_steps(model: GPT, batch: int, context: int, n: int) -> list[float]:
    """Time stamps of n + 1 steps over a cache that was filled, not computed."""
    cache = model.new_cache(batch, context + n + 2)
    ids = prefill(model, [[0]] * batch, cache).argmax(-1)
    for layer in cache.layers:
        for buffer in layer.buffers.values():
            buffer.normal_()
    cache.advance(batch, context - 1)  # count them as held
    times = []
    for _ in range(n + 1):
        ids = decode_one_token(model, ids, cache).argmax(-1)
        ids.tolist()
        times.append(time.perf_counter())
    return times


def hugging_face(model: GPT):
    """The equivalent model of transformers, with the same weights."""
    import transformers

    fields = hf_config(model.config)
    cls = getattr(transformers, fields["architectures"][0])
    weight = model.embed_tokens.weight
    peer = cls(cls.config_class(**fields)).to(weight.device, weight.dtype).eval()
    peer.load_state_dict(hf_state_dict(model, model.config), strict=False)  # a tied head is not in it
    return peer


def hf_steps(peer, idx: torch.Tensor, n: int, cache: str) -> tuple[list[float], list[list[int]]]:
    """Time stamps of n + 1 greedy tokens from transformers' own loop, and the tokens."""
    import transformers

    class Clock(transformers.LogitsProcessor):
        times = []

        def __call__(self, input_ids, scores):
            scores.argmax(-1).tolist()  # waits for the device
            self.times.append(time.perf_counter())
            return scores

    clock, settings = Clock(), {"do_sample": False, "use_cache": True, "pad_token_id": 0}
    kind = {} if cache == "dynamic" else {"cache_implementation": cache}
    with torch.inference_mode():
        mask = torch.ones_like(idx)
        out = peer.generate(
            idx, attention_mask=mask, max_new_tokens=n + 1, logits_processor=[clock], **settings, **kind
        )
    return clock.times, out[:, idx.size(1) :].tolist()


def decode_line(row: dict) -> str:
    prefilled = row.get("prefill/tokens_per_s", math.nan)
    line = f"{row['model']:12} {row['batch']:5} {row['context']:7} {prefilled:9,.0f} "
    line += f"{row['decode/tokens_per_s']:8,.1f} {row['bytes_per_token'] / 1e6:8,.2f} "
    line += f"{row['share_of_bandwidth']:7.0%}"
    if "ratio" not in row:
        return line
    peers = " ".join(f"{row[f'hf_{cache}/tokens_per_s']:8,.1f}" for cache in ("dynamic", "static"))
    return f"{line} {peers} {row['ratio']:6.2f} {row['same_tokens']!s:>11}"


def machine() -> dict:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.open() if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        **versions,
        "date": time.strftime("%F"),
    }


def write(result: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(path, result)
    print(f"wrote {path}")
