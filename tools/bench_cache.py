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
from model import ATTENTIONS, GPT, GPTConfig
from nanokv import checkpoint
from nanokv import tokenizer as tokenizers
from nanokv.cache import CACHE_FORMATS, kv_bytes
from nanokv.config import UserError, check_range, from_dict, load, parse
from nanokv.dataset import Dataset, open_dataset
from nanokv.device import pick_device, pick_dtype
from nanokv.generate import Stats, decode_one_token, generate, prefill
from nanokv.metrics import decode_probe, kv_bytes_in_context
from nanokv.plots import draw_lines
from sample import load_run
from tools.hugging_face import hf_config, hf_state_dict
from train import TrainConfig

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
PEERS = ("dynamic", "static")  # the caches of transformers' `generate`
COLUMNS = ["model", "batch", "context", "prefill/tokens_per_s", "decode/tokens_per_s", "bytes_per_token"]
COLUMNS += ["share_of_bandwidth"]
PEER_COLUMNS = [f"hf_{cache}/tokens_per_s" for cache in PEERS]
CACHE_COLUMNS = ["format", "window", "sink_tokens", "bytes_per_token", "val/loss", "worse", "kl", "top1"]
CACHE_COLUMNS += ["decode/tokens_per_s"]


@dataclass
class DecodeOptions:
    out_dir: tuple[str, ...] = ()  # runs to measure; results go into the first
    config: tuple[str, ...] = ()  # config files whose models to measure, with random weights
    hf: bool = False  # also transformers' `generate` on the equivalent model, of the same weights and prompts
    contexts: tuple[int, ...] = (64, 1024, 4096, 16384)  # tokens in each row of the cache
    batches: tuple[int, ...] = (1, 32)  # rows
    prefill: int = 8192  # tokens of a batch that are computed; a larger cache is filled with random numbers
    max_cache: float = 4.0  # GB; what needs more is left out
    n: int = 16  # tokens of each of the 5 timings of which the median counts, after n to warm up
    generate: int = 0  # also the time to generate this many tokens and a half, a quarter, an eighth of them
    # the models, if neither out_dir nor config names them
    attentions: tuple[str, ...] = tuple(ATTENTIONS)  # gqa has 2 groups, mla's latent a third of n_embd
    n_layer: int = 6  # blocks
    n_head: int = 6  # heads
    n_embd: int = 384  # width
    vocab_size: int = 2048  # token ids
    qk_norm: bool = False  # of attentions that have it; mha's equivalent is Qwen3 with it, Llama without
    # machine
    device: str = "auto"  # cpu, cuda, cuda:N, mps
    dtype: str = "auto"  # float32, bfloat16, float16


@dataclass
class CacheOptions:
    out_dir: tuple[str, ...]  # the runs; cache.json and cache.png go into the first
    formats: tuple[str, ...] = tuple(CACHE_FORMATS)  # what to hold the cache in
    windows: tuple[int, ...] = ()  # windows put on every layer, in tokens; none: 1/2 and 1/4 of block_size
    sinks: tuple[int, ...] = (0, 4)  # first tokens that stay in sight besides these windows
    tokens: int = 32768  # validation tokens to read, evenly spread
    batch_size: int = 16  # rows of block_size tokens, read side by side
    chunk: int = 16  # tokens fed at a time; all but the first chunk see what the cache holds of the others
    which: Literal["best", "last"] = "best"  # which checkpoint
    device: str = "auto"  # cpu, cuda, cuda:N, mps
    dtype: Dtype = "auto"  # of the weights

    def __post_init__(self):
        check_range(self, "tokens batch_size chunk", at_least=1)
        if unknown := set(self.formats) - set(CACHE_FORMATS):
            raise ValueError(f"formats are {', '.join(CACHE_FORMATS)}, not {unknown.pop()!r}")
        if not self.out_dir or min(*self.windows, *self.sinks, 1, 1) < 0:
            raise ValueError("out_dir is at least one run; windows and sinks are at least 0")


def print_row(row: dict, keys: list[str], first: bool) -> None:
    """A line of a table that grows, under the keys if it is the first; - where the row lacks a value."""
    cells = []
    for value in map(row.get, keys):
        if type(value) in (int, float):
            value = f"{value:.5g}" if type(value) is float and abs(value) < 100 else f"{value:,.0f}"
        cells.append("-" if value is None else str(value))
    for line in [keys] * first + [cells]:
        right = [cell.rjust(max(len(key), 8)) for key, cell in zip(keys[1:], line[1:], strict=True)]
        print(line[0].ljust(8), *right, sep="  ", flush=True)


def model_config(attention: str, qk_norm: bool = False, **knobs) -> GPTConfig:
    """The config of any attention: knobs that only others declare are left out; 2 groups if it needs a number."""
    own = getattr(ATTENTIONS.get(attention), "KNOBS", ())
    foreign = {knob for cls in ATTENTIONS.values() for knob in cls.KNOBS} - set(own)
    knobs = {"attention": attention, "qk_norm": qk_norm} | knobs
    knobs = {knob: value for knob, value in knobs.items() if knob not in foreign}
    try:
        return from_dict(knobs, f"--attentions={attention}", GPTConfig)[0]
    except UserError as e:
        if "needs n_kv_head" not in str(e):
            raise
        return from_dict(knobs | {"n_kv_head": 2}, f"--attentions={attention}", GPTConfig)[0]


def cache(argv: list[str]) -> None:
    """Quality through the cache: bits per byte, bytes and speed of every format and window."""
    options = parse(CacheOptions, argv, "python -m tools.bench cache --out_dir=RUN[,RUN...] [--key=value ...]")
    rows = [row for run in options.out_dir for row in cache_rows(Path(run), options)]
    out_dir = Path(options.out_dir[0])
    write(out_dir / "cache.json", options, {"rows": rows})
    quality, unit = ("val/bpb", "bits per byte") if rows[0]["val/bpb"] else ("val/loss", "loss, nats a token")
    formats, windows = [], []
    for row in rows:
        run = Path(row["run"]).name
        if all(row[knob] == rows[0][knob] for knob in ("window", "sink_tokens")):
            formats.append(row | {"run": run, "name": row["format"]})
        elif row["format"] == options.formats[0]:
            held = {"held": row["window"] + row["sink_tokens"], "percent": 100 * row["worse"]}
            windows.append(row | held | {"run": f"{run}, {row['sink_tokens']} sinks"})
    left = dict(xlabel="cache, bytes a token", ylabel=unit, title="formats")
    right = dict(xlabel="tokens that a layer holds", ylabel="worse by, %", title="windows at inference")
    panels = [(formats, "bytes_per_token", quality, left), (windows, "held", "percent", right)]
    draw_lines(out_dir / "cache.png", "run", panels)


def cache_rows(run: Path, options: CacheOptions) -> list[dict]:
    """Measure one run, and print it as it goes: a row for each format, under the run's own window and others.

    Differences are to the unquantized cache without a window that the run was not trained with.
    """
    model, tokenizer = load_run(run, options.device, options.dtype, options.which)
    config, knobs = model.config, checkpoint.read_config(checkpoint.find(run)[0])
    dataset = open_dataset(knobs["dataset"], knobs.get("tokenizer"))
    if tokenizers.sha256(dataset.tokenizer) != tokenizers.sha256(tokenizer):
        raise UserError(f"{knobs['dataset']} is not the data that {run} was trained on: another tokenizer")
    windows = [w for w in options.windows if w] or [config.block_size // 2, config.block_size // 4]
    shapes = [{name: getattr(config, name) for name in ("window", "sink_tokens", "window_pattern")}]
    shapes += [dict(window=w, sink_tokens=s, window_pattern="S") for w, s in product(windows, options.sinks or [0])]
    variants = []  # (row, model, dtype of the cache)
    for shape, name in product(shapes, options.formats):
        changed, dtype = copy.copy(model), CACHE_FORMATS[name]  # the same weights under another config
        changed.config = replace(config, **shape)
        row = {"run": str(run), "attention": config.attention, "format": name} | shape
        variants.append((row | {"bytes_per_token": kv_bytes_in_context(changed.config, dtype)}, changed, dtype))
    weights = model.embed_tokens.weight.dtype
    measured = through_the_cache([(model, weights)] + [v[1:] for v in variants], dataset, options)
    base, bytes_per_token = measured.pop(0), dataset.val_bytes_per_token
    print(f"{run}: {config.attention}, cached in {weights}: val loss {base['loss']:.4f}")
    for (row, changed, dtype), result in zip(variants, measured, strict=True):
        probe = decode_probe(changed, config.block_size // 2, cache_dtype=dtype)
        bpb = result["loss"] / math.log(2) / bytes_per_token if bytes_per_token else None
        row |= {"val/loss": result["loss"], "val/bpb": bpb}
        row |= {"worse": result["loss"] / base["loss"] - 1, "kl": result["kl"], "top1": result["top1"]}
        row["decode/tokens_per_s"] = probe["decode/tokens_per_s"]
        print_row(row, CACHE_COLUMNS, first=row is variants[0][0])
    return [row for row, *_ in variants]


@torch.inference_mode()
def through_the_cache(variants: list[tuple[GPT, torch.dtype]], dataset: Dataset, options: CacheOptions) -> list[dict]:
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
    usage = "python -m tools.bench decode [--out_dir=RUN | --config=FILE] [--key=value ...]"
    options = parse(DecodeOptions, argv, usage)
    out_dir, device = Path((*options.out_dir, "out/bench")[0]), pick_device(options.device)
    bandwidth, rows, lengths = read_bandwidth(device), [], []
    columns = [*COLUMNS, *([*PEER_COLUMNS, "ratio", "same_tokens"] if options.hf else [])]
    print(f"memory is read at {bandwidth / 1e9:.1f} GB/s")
    for name, model in decode_models(options, device):
        for batch, context in product(options.batches, options.contexts):
            largest = batch * kv_bytes(model.config.kv_layouts(), context + 6 * options.n, torch.float32)
            if largest <= options.max_cache * 1e9:
                row = {"model": name, "batch": batch, "context": context}
                rows.append(row | decode_row(model, batch, context, bandwidth, options))
                print_row(rows[-1], columns, first=len(rows) == 1)
        if options.generate:
            times = our_steps(model, torch.zeros(1, 1, dtype=torch.long), options.generate)[0]
            marks = [options.generate >> shift for shift in (3, 2, 1, 0)]
            lengths += [{"model": name, "n": n, "seconds": times[n] - times[0]} for n in marks]
            seconds = ", ".join(f"{row['n']} in {row['seconds']:.2f} s" for row in lengths[-len(marks) :])
            print(f"{name:12} tokens generated: {seconds}", flush=True)
    write(out_dir / "decode.json", options, {"read_bytes_per_s": bandwidth, "rows": rows, "generate": lengths})
    rate, labels = "decode/tokens_per_s", dict(yscale="log", xlabel="context, tokens", ylabel="decode, tokens/s")
    for row in [row for row in rows if "ratio" in row]:  # transformers with its faster cache
        rows.append(row | {"model": f"{row['model']}, transformers", rate: row[rate] / row["ratio"]})
    by_batch = {batch: [row for row in rows if row["batch"] == batch] for batch in options.batches}
    panels = [(points, "context", rate, labels | {"title": f"batch {n}"}) for n, points in by_batch.items()]
    draw_lines(out_dir / "decode.png", "model", panels)


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
    room = max(options.contexts) + 6 * options.n + options.generate + 2
    for run in options.out_dir:
        model = load_run(run, options.device, options.dtype)[0]
        model.config.block_size = max(model.config.block_size, room)  # RoPE has no limit of its own
        yield Path(run).name, model
    shape = {name: getattr(options, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    for name in () if options.out_dir else options.config or options.attentions:
        if options.config:
            config, _ = load([name, f"--block_size={room}"], GPTConfig, TrainConfig)
        else:
            shape["kv_lora_rank"] = max(options.n_embd // 3, 1)
            config = model_config(name, options.qk_norm, block_size=room, **shape)
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
        for cache in PEERS:
            times, theirs = hf_steps(peer, idx.to(model.embed_tokens.weight.device), n, cache)
            row[f"hf_{cache}/tokens_per_s"] = batch * median_rate(times)
            same.append(theirs == tokens)
        row["same_tokens"] = all(same)
        row["ratio"] = row["decode/tokens_per_s"] / max(row[name] for name in PEER_COLUMNS)
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
    times = []

    def clock(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores.argmax(-1).tolist()  # waits for the device
        times.append(time.perf_counter())
        return scores

    options = {"do_sample": False, "use_cache": True, "pad_token_id": 0, "max_new_tokens": n + 1}
    options |= {"attention_mask": torch.ones_like(idx), "logits_processor": [clock]}
    options |= {} if cache == "dynamic" else {"cache_implementation": cache}
    with torch.inference_mode():
        out = peer.generate(idx, **options)
    return times, out[:, idx.size(1) :].tolist()


def machine() -> dict:
    """What the figures were measured on."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.open() if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"cpu": cpu, "threads": torch.get_num_threads(), "gpu": gpu, **versions, "date": time.strftime("%F")}


def write(path: Path, options, result: dict) -> None:
    """A JSON file of what was measured, with the options (a dataclass) and the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(path, {"machine": machine(), "options": asdict(options)} | result)
    print(f"wrote {path}")
