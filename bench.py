"""Measure: `python bench.py speedrun`, `train`, `decode` or `cache`. `--help` after one lists its options.

Each prints what it measures as it goes, and writes a JSON file and a picture into --out_dir. Times are of
whole processes or medians of repeated steps; a peer is measured in the same session, in turns with us.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import pickle
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import checkpoint
import parallel
from cache import CACHE_FORMATS
from config import Config, UserError, cli, load, parse, pick_device, pick_dtype
from convert import hf_config, hf_state_dict
from data import Dataset, open_dataset
from data import tokenizer as tokenizers
from model import GPT
from optim import make_optimizers
from sample import Stats, decode_one_token, decode_probe, generate, load_run, prefill

ROOT = Path(__file__).resolve().parent
ATTENTION_KNOBS = {"mha": [], "mqa": [], "gqa": ["--n_kv_head=2"], "mla": []}
NANOGPT_RECIPE = [  # the README's command for a CPU
    *("train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20"),
    *("--log_interval=1", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128"),
    *("--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
]


@dataclass
class SpeedrunOptions:
    peer: str | None = None  # a nanoGPT checkout to race against, in turns
    pairs: int = 5  # runs of each side
    text: str = "data/shakespeare_char/input.txt"  # any text; 90 % of its characters train, 10 % validate
    config: str = "config/speedrun.py"  # our recipe
    out_dir: str = "out/bench"  # where speedrun.json and speedrun.png go


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
class TrainOptions:
    peer: str | None = None  # a nanoGPT checkout whose model is measured at the same shape
    attentions: str = "mha,mqa,gqa,mla"  # which to measure
    block_sizes: str = "64,256,1024"  # contexts; the batch shrinks so that a step has the same tokens
    tokens: int = 4096  # tokens a step, at least one row of a context
    n_layer: int = 4  # blocks
    n_head: int = 4  # heads
    n_embd: int = 128  # width
    vocab_size: int = 2048  # token ids
    optimizer: str = "adamw"  # adamw, which the peer has too, or muon
    steps: int = 10  # timed steps, after 3 to warm up
    device: str = "auto"  # cpu, cuda, cuda:N, mps
    dtype: str = "auto"  # float32, bfloat16, float16
    compile: bool = False  # torch.compile both sides
    out_dir: str = "out/bench"  # where train.json and train.png go


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


def speedrun(argv: list[str]) -> None:
    """Whole-process time to nanoGPT's loss, alone or in turns with nanoGPT."""
    options = parse(SpeedrunOptions, argv, "python bench.py speedrun [--peer=DIR] [--key=value ...]")
    out_dir = Path(options.out_dir).resolve()
    folder = nanogpt_folder(Path(options.text), out_dir / "text")
    runs = {"ours": [], "nanoGPT": []}
    for i in range(options.pairs):
        run_dir = out_dir / "speedrun"
        command = [
            "train.py",
            options.config,
            f"--dataset={folder}",
            f"--out_dir={run_dir}",
            "--overwrite=True",
        ]
        runs["ours"].append({"seconds": timed([*command, f"--seed={i}"], ROOT)[0], **losses(run_dir, folder)})
        print(f"{i + 1}: ours    {describe(runs['ours'][-1])}", flush=True)
        if options.peer:
            command = [*NANOGPT_RECIPE, f"--dataset={folder}", f"--out_dir={out_dir / 'nanogpt'}"]
            seconds, output = timed(command, Path(options.peer))
            loss = float(output.rsplit("val loss ", 1)[1].split()[0])
            runs["nanoGPT"].append({"seconds": seconds, "nanogpt_estimate": loss})
            print(f"{i + 1}: nanoGPT {describe(runs['nanoGPT'][-1])}", flush=True)
    result = {"machine": machine(), "options": asdict(options), "runs": runs}
    for side, of_side in runs.items():
        if of_side:
            result[f"{side}/seconds"] = statistics.median(run["seconds"] for run in of_side)
            result[f"{side}/val_loss"] = statistics.median(run["nanogpt_estimate"] for run in of_side)
            print(
                f"{side}: median {result[f'{side}/seconds']:.1f} s, val loss {result[f'{side}/val_loss']:.4f}"
            )
    if runs["nanoGPT"]:
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(*runs.values(), strict=True)]
        result["ratio"] = statistics.median(ratios)
        print(
            f"nanoGPT takes {result['ratio']:.2f} times as long (median of pairs; {min(ratios):.2f} at least)"
        )
    write(result, out_dir / "speedrun.json")
    draw_speedrun(result, out_dir / "speedrun.png")


def describe(run: dict) -> str:
    full = f", full pass {run['full_pass']:.4f}" if "full_pass" in run else ""
    return f"{run['seconds']:6.1f} s, val loss {run['nanogpt_estimate']:.4f} by nanoGPT's estimate{full}"


def nanogpt_folder(text: Path, folder: Path) -> Path:
    """A text by characters in nanoGPT's own format, which both sides read: train.bin, val.bin, meta.pkl."""
    if not text.is_file():
        raise UserError(f"no text at {text}; put one there, or name another with --text")
    content = text.read_text(encoding="utf-8")
    chars = sorted(set(content))
    ids = {c: i for i, c in enumerate(chars)}
    data = np.array([ids[c] for c in content], np.uint16)
    folder.mkdir(parents=True, exist_ok=True)
    cut = int(len(data) * 0.9)
    data[:cut].tofile(folder / "train.bin")
    data[cut:].tofile(folder / "val.bin")
    meta = {"vocab_size": len(chars), "stoi": ids, "itos": dict(enumerate(chars))}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder.resolve()


def timed(command: list[str], cwd: Path) -> tuple[float, str]:
    """Wall time of a whole Python process, and what it printed."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise UserError(
            f"{' '.join(command[:2])} failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}"
        )
    return seconds, done.stdout


@torch.no_grad()
def losses(run_dir: Path, folder: Path) -> dict[str, float]:
    """Val loss of a run's last weights: in nanoGPT's way (20 batches of 12 random windows), and over all."""
    model, _ = load_run(run_dir, device="cpu", which="last")
    dataset, block_size = open_dataset(str(folder)), model.config.block_size
    starts = torch.randint(
        len(dataset.val) - block_size, (20, 12), generator=torch.Generator().manual_seed(1337)
    )
    windows = [torch.from_numpy(dataset.val.windows(row.numpy(), block_size + 1)) for row in starts]
    estimate = statistics.mean(model(rows[:, :-1], rows[:, 1:])[1].item() for rows in windows)
    total = count = 0
    for x, y in dataset.val_batches(block_size, 128):
        n = int((y >= 0).sum())
        total, count = total + model(x, y)[1].item() * n, count + n
    return {"nanogpt_estimate": estimate, "full_pass": total / count}


def train(argv: list[str]) -> None:
    """Tokens a second, MFU and peak memory of a training step, by attention and context."""
    options = parse(TrainOptions, argv, "python bench.py train [--peer=DIR] [--key=value ...]")
    if parallel.launch() is not None:
        with parallel.joined():
            return train_on_ranks(options)
    sides = options.attentions.split(",") + (["nanoGPT"] if options.peer else [])
    rows = []
    print(f"{'':8} {'context':>8} {'params':>12} {'tokens/s':>10} {'GFLOP/s':>8} {'peak MB':>8}")
    for block_size in map(int, options.block_sizes.split(",")):
        for side in sides:
            command = ["bench.py", "_step", side, str(block_size), json.dumps(asdict(options))]
            rows.append(json.loads(timed(command, ROOT)[1].splitlines()[-1]))
            row = rows[-1]
            print(
                f"{side:8} {block_size:8} {row['params']:12,} {row['tokens_per_s']:10,.0f} "
                f"{row['flops_per_s'] / 1e9:8,.0f} {row['peak_bytes'] / 1e6:8,.0f}",
                flush=True,
            )
    out_dir = Path(options.out_dir)
    write({"machine": machine(), "options": asdict(options), "rows": rows}, out_dir / "train.json")
    draw_train(rows, out_dir / "train.png")


def train_on_ranks(options: TrainOptions) -> None:
    """`train` under torchrun: tokens a second of all ranks together, and what of a step is communication.

    That is the reduction of the gradients and, with Muon, the exchange of updates, measured by themselves.
    """
    device = parallel.own_device(pick_device(options.device))
    dtype = pick_dtype(options.dtype, device)
    out = []
    for block_size in map(int, options.block_sizes.split(",")):
        for side in options.attentions.split(","):
            config = step_config(side, block_size, options)
            torch.manual_seed(0)
            model = GPT(config).to(device)
            wrapped = parallel.wrap(model, config, device, dtype, options.compile)
            run = partial(wrapped, want_logits=False)
            optimizers = make_optimizers(model, config)
            _, rows = parallel.share(1, max(options.tokens // block_size, 1))
            idx = torch.randint(options.vocab_size, (rows, block_size + 1), device=device)
            gradient = torch.zeros(model.n_params(), device=device)
            same_shape = defaultdict(list)
            groups = optimizers[0].param_groups if options.optimizer == "muon" else []
            for p in (p for group in groups for p in group["params"]):
                same_shape[p.shape].append(p.detach())

            def communicate(gradient=gradient, same_shape=same_shape) -> None:
                if parallel.size() > 1:
                    torch.distributed.all_reduce(gradient)
                    for matrices in same_shape.values():
                        parallel.each_matrix_once(torch.clone, matrices, matrices)

            step_s = statistics.median(step_times(run, model, optimizers, idx, dtype, options.steps))
            share = statistics.median(times(communicate, device, options.steps)) / step_s
            row = {"ranks": parallel.size(), "side": side, "context": block_size, "params": model.n_params()}
            row |= {"tokens_per_s": parallel.size() * rows * block_size / step_s, "step_s": step_s}
            out.append(row | {"communication_share": share, "gradient_bytes": gradient.nbytes})
            if parallel.rank() == 0:
                print(
                    f"{side:8} {block_size:8} {row['params']:12,} {row['tokens_per_s']:10,.0f} tokens/s of "
                    f"{parallel.size()} ranks, {step_s * 1e3:,.1f} ms a step, {share:.1%} communication",
                    flush=True,
                )
    if parallel.rank() == 0:
        result = {"machine": machine(), "options": asdict(options), "rows": out}
        write(result, Path(options.out_dir) / f"train_{parallel.size()}_ranks.json")


def times(run: Callable[[], None], device: torch.device, steps: int) -> list[float]:
    """Seconds of each of `steps` calls, after 3 to warm up."""
    seconds = []
    for _ in range(3 + steps):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return seconds[3:]


def step_times(run, model: GPT, optimizers: list, idx: torch.Tensor, dtype, steps: int) -> list[float]:
    """Seconds of training steps of `model`, called as `run`, on the tokens idx (B, T + 1)."""

    def train_step() -> None:
        with torch.autocast(idx.device.type, dtype, enabled=dtype != torch.float32):
            loss = run(idx[:, :-1], idx[:, 1:].contiguous())[1]
        loss.backward()
        parallel.clip_grad_norm(model, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return times(train_step, idx.device, steps)


def step_config(side: str, block_size: int, options: TrainOptions) -> Config:
    shape = [f"--{name}={getattr(options, name)}" for name in ("n_layer", "n_head", "n_embd", "vocab_size")]
    attention = [] if side == "nanoGPT" else [f"--attention={side}", *ATTENTION_KNOBS[side]]
    return load([*shape, f"--block_size={block_size}", f"--optimizer={options.optimizer}", *attention])


def step(argv: list[str]) -> None:
    """One measurement of `train`, in a process of its own so that peak memory is its own."""
    side, block_size, options = argv[0], int(argv[1]), TrainOptions(**json.loads(argv[2]))
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    config = step_config(side, block_size, options)
    torch.manual_seed(0)
    if side == "nanoGPT":
        model, optimizers = nanogpt_model(Path(options.peer), config, device)
        matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2) - block_size * config.n_embd
        flops = 6 * (matrices + 2 * config.n_layer * config.n_embd * block_size)
    else:
        model = GPT(config).to(device)
        optimizers = make_optimizers(model, config)
        flops = model.flops_per_token(block_size)
    run = torch.compile(model) if options.compile else model
    idx = torch.randint(
        options.vocab_size, (max(options.tokens // block_size, 1), block_size + 1), device=device
    )
    if side != "nanoGPT":
        run = partial(run, want_logits=False)
    rate = idx[:, 1:].numel() / statistics.median(
        step_times(run, model, optimizers, idx, dtype, options.steps)
    )
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    row = {"side": side, "context": block_size, "params": sum(p.numel() for p in model.parameters())}
    print(json.dumps(row | {"tokens_per_s": rate, "flops_per_s": rate * flops, "peak_bytes": peak}))


def nanogpt_model(folder: Path, config, device: torch.device):
    """nanoGPT's model and optimizer at the shape of `config`, from a checkout of it."""
    path = folder / "model.py"
    if not path.exists():
        raise UserError(f"{folder} is not a nanoGPT checkout: it has no model.py")
    spec = importlib.util.spec_from_file_location("nanogpt", path)
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    model = peer.GPT(peer.GPTConfig(**{name: getattr(config, name) for name in names}, bias=False)).to(device)
    return model, [model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type)]


def cache(argv: list[str]) -> None:
    """Quality through the cache: bits per byte, bytes and speed of every format and window."""
    options = parse(CacheOptions, argv, "python bench.py cache --out_dir=RUN[,RUN...] [--key=value ...]")
    rows = []
    for run in options.out_dir.split(","):
        rows += cache_rows(Path(run), options)
    out_dir = Path(options.out_dir.split(",")[0])
    write({"machine": machine(), "options": asdict(options), "rows": rows}, out_dir / "cache.json")
    draw_cache(rows, out_dir / "cache.png")


def cache_rows(run: Path, options: CacheOptions) -> list[dict]:
    """Measure one run, and print it as it goes: a row for each format, under the run's own window and others.

    Differences are to the unquantised cache without a window that the run was not trained with.
    """
    model, tokenizer = load_run(run, options.device, options.dtype, options.which)
    config = model.config
    dataset = open_dataset(config.dataset, config.tokenizer)
    if tokenizers.sha256(dataset.tokenizer) != tokenizers.sha256(tokenizer):
        raise UserError(f"{config.dataset} here is not the data that {run} was trained on: another tokenizer")
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
        row["bytes_per_token"] = changed.config.kv_bytes(config.block_size, dtype) / config.block_size
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
        DecodeOptions, argv, "python bench.py decode [--out_dir=RUN | --config=FILE] [--key=value ...]"
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
                model.config.kv_bytes(context + 6 * options.n, torch.float32) * batch
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
        config = load([*argv, f"--block_size={room}"])
        torch.manual_seed(0)
        model = GPT(config).eval()
        for p in model.parameters():  # as they are initialised, what a block adds and all logits are zero
            if p.ndim == 2:
                torch.nn.init.normal_(p, std=p.size(1) ** -0.5)
        yield Path(name).stem, model.to(device, dtype)


def decode_row(model: GPT, batch: int, context: int, bandwidth: float, options: DecodeOptions) -> dict:
    """One measurement of `decode`, beside transformers' if asked for."""
    n, config = 6 * options.n, model.config
    weights = sum(p.nbytes for p in model.parameters())
    if not config.tie_embeddings:
        weights -= model.embed_tokens.weight.nbytes  # a look-up
    cached = config.kv_bytes(context + n // 2, model.embed_tokens.weight.dtype)
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
    cache.lengths = [context] * batch
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


def draw_speedrun(result: dict, path: Path) -> None:
    """Loss against time, a point a run."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for (side, runs), marker in zip(result["runs"].items(), "os", strict=True):
        if runs:
            seconds = [run["seconds"] for run in runs]
            axes.plot(seconds, [run["nanogpt_estimate"] for run in runs], marker, label=side)
    axes.set(xlabel="whole process, seconds", ylabel="val loss, nats a character", xlim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def draw_train(rows: list[dict], path: Path) -> None:
    """Throughput and peak memory against the context."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for side, marker in zip(dict.fromkeys(row["side"] for row in rows), "os^vD", strict=False):
        mine = [row for row in rows if row["side"] == side]
        contexts = [row["context"] for row in mine]
        panels[0].plot(contexts, [row["tokens_per_s"] for row in mine], marker=marker, label=side)
        panels[1].plot(contexts, [row["peak_bytes"] / 1e6 for row in mine], marker=marker, label=side)
    panels[0].set(xlabel="context, tokens", ylabel="training tokens/s", xscale="log", ylim=(0, None))
    panels[1].set(xlabel="context, tokens", ylabel="peak memory, MB", xscale="log", ylim=(0, None))
    panels[0].legend()
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def draw_cache(rows: list[dict], path: Path) -> None:
    """What is lost against the bytes it takes: of the formats, and of windows in the first format."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    quality = "val/bpb" if rows[0]["val/bpb"] else "val/loss"
    own = [row for row in rows if all(row[k] == rows[0][k] for k in ("window", "sink_tokens"))]
    markers = dict(zip(CACHE_FORMATS, "os^Dv", strict=True))
    for run, style in zip(
        dict.fromkeys(row["run"] for row in rows), ["-", "--", "-.", ":"] * 9, strict=False
    ):
        mine = sorted((row for row in own if row["run"] == run), key=lambda row: row["bytes_per_token"])
        x, y = [row["bytes_per_token"] for row in mine], [row[quality] for row in mine]
        panels[0].plot(x, y, style, color="0.3", label=Path(run).name)
        for row in mine:
            panels[0].plot(row["bytes_per_token"], row[quality], markers[row["format"]], color="k", mfc="w")
        for sinks, marker in zip(dict.fromkeys(row["sink_tokens"] for row in rows), "os^Dv", strict=False):
            cut = [row for row in rows if row["run"] == run and row["format"] == mine[-1]["format"]]
            cut = [row for row in cut if row not in own and row["sink_tokens"] == sinks]
            label = f"{Path(run).name}, {sinks} sinks"
            x, y = [row["window"] + sinks for row in cut], [100 * row["worse"] for row in cut]
            panels[1].plot(x, y, style + marker, color="0.3", mfc="w", label=label)
    for name in dict.fromkeys(row["format"] for row in rows):
        panels[0].plot([], [], markers[name], color="k", mfc="w", label=name)
    unit = "bits per byte" if quality == "val/bpb" else "loss, nats a token"
    panels[0].set(xlabel="cache, bytes a token", ylabel=unit, title="formats")
    panels[0].set_xscale("log", base=2)
    panels[0].xaxis.set_major_formatter("{x:,.0f}")
    panels[1].set(
        xlabel="tokens that a layer holds", ylabel="worse by, %", title="windows put on at inference"
    )
    for panel in panels:
        panel.legend(fontsize=7, handlelength=4)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def draw_decode(rows: list[dict], path: Path) -> None:
    """Tokens a second against the context, a panel a batch; transformers with its faster cache dashed."""
    import matplotlib.pyplot as plt

    batches = list(dict.fromkeys(row["batch"] for row in rows))
    figure, panels = plt.subplots(
        1, len(batches), figsize=(5 * len(batches), 4), layout="constrained", squeeze=False
    )
    for panel, batch in zip(panels[0], batches, strict=True):
        models = dict.fromkeys(row["model"] for row in rows)
        for name, marker, grey in zip(
            models, cycle("os^vD"), cycle(("0", "0.25", "0.45", "0.6")), strict=False
        ):
            mine = [row for row in rows if (row["model"], row["batch"]) == (name, batch)]
            style = {"marker": marker, "color": grey}
            rates = [row["decode/tokens_per_s"] for row in mine]
            panel.plot([row["context"] for row in mine], rates, label=name, **style)
            theirs = [row for row in mine if "ratio" in row]
            rates = [row["decode/tokens_per_s"] / row["ratio"] for row in theirs]
            if theirs:
                contexts = [row["context"] for row in theirs]
                panel.plot(contexts, rates, "--", label=f"{name}, transformers", fillstyle="none", **style)
        panel.set(
            xscale="log",
            yscale="log",
            xlabel="context, tokens",
            ylabel="decode, tokens/s",
            title=f"batch {batch}",
        )
        panel.grid(which="both", color="0.9")
    panels[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


COMMANDS = {"speedrun": speedrun, "train": train, "decode": decode, "cache": cache, "_step": step}


def main(argv: list[str]) -> None:
    if not argv or argv[0] not in COMMANDS:
        names = ", ".join(name for name in COMMANDS if not name.startswith("_"))
        if argv and argv[0] in ("--help", "-h"):
            print(f"{__doc__}\ncommands: {names}")
            return
        raise UserError(f"which measurement? python bench.py COMMAND, one of {names}")
    COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    cli(main, ranks=sys.argv[1:2] == ["train"])
