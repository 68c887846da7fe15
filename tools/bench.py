"""Measure: `python -m tools.bench speedrun|train|decode|cache`. `--help` after one lists its options.

Each prints what it measures as it goes, and writes a JSON file and a picture into --out_dir. Times are of
whole processes or medians of repeated steps; a peer is measured in the same session, in turns with us.
"""

from __future__ import annotations

import multiprocessing
import pickle
import runpy
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import nn

from backends import accelerate
from model import GPT, GPTConfig
from nanokv import distributed as parallel
from nanokv.config import UserError, cli, parse, run_python
from nanokv.dataset import open_dataset
from nanokv.device import keep_freed_memory, pick_device, pick_dtype
from nanokv.loss import LanguageModelLoss
from nanokv.metrics import evaluate, flops_per_token, match_params, peak_memory
from nanokv.optim import make_optimizers
from nanokv.plots import draw_lines
from sample import load_run
from tools.bench_cache import cache, decode, model_config, print_row, write

ROOT = Path(__file__).resolve().parents[1]
NANOGPT_RECIPE = [  # the README's command for a CPU
    *("train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20"),
    *("--log_interval=1", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128"),
    *("--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
]
SPEEDRUN_COLUMNS = ["side", "seconds", "nanogpt_estimate", "full_pass"]
TRAIN_COLUMNS = ["side", "context", "params", "tokens_per_s", "flops_per_s", "peak_bytes"]
RANK_COLUMNS = [*TRAIN_COLUMNS[:-1], "ranks", "step_s", "communication_share"]


@dataclass
class SpeedrunOptions:
    peer: str | None = None  # a nanoGPT checkout to race against, in turns
    pairs: int = 5  # runs of each side
    text: str = "data/shakespeare_char/input.txt"  # any text; 90 % of its characters train, 10 % validate
    config: str = "config/speedrun.py"  # our recipe
    out_dir: str = "out/bench"  # where speedrun.json and speedrun.png go


@dataclass
class TrainOptions:
    peer: str | None = None  # a nanoGPT checkout whose model is measured at the same shape
    attentions: tuple[str, ...] = ("mha", "mqa", "gqa", "mla")  # which to measure
    block_sizes: tuple[int, ...] = (64, 256, 1024)  # contexts; a step has the same tokens in each
    tokens: int = 4096  # tokens a step, at least one row of a context
    n_layer: int = 4  # blocks
    n_head: int = 4  # heads
    n_embd: int = 128  # width
    intermediate_size: int | None = None  # width of mha's MLP; the others' are such that parameters are equal
    vocab_size: int = 2048  # token ids
    optimizer: str = "adamw"  # adamw, which the peer has too, or muon
    steps: int = 10  # timed steps, after 3 to warm up
    device: str = "auto"  # cpu, cuda, cuda:N, mps
    dtype: str = "auto"  # float32, bfloat16, float16
    compile: bool = False  # torch.compile both sides
    out_dir: str = "out/bench"  # where train.json and train.png go


def speedrun(argv: list[str]) -> None:
    """Whole-process time to nanoGPT's loss, alone or in turns with nanoGPT."""
    options = parse(SpeedrunOptions, argv, "python -m tools.bench speedrun [--peer=DIR] [--key=value ...]")
    out_dir = Path(options.out_dir).resolve()
    folder, run_dir = nanogpt_folder(Path(options.text), out_dir / "text"), out_dir / "speedrun"
    ours = ["train.py", options.config, f"--dataset={folder}", f"--out_dir={run_dir}", "--overwrite=True"]
    theirs = [*NANOGPT_RECIPE, f"--dataset={folder}", f"--out_dir={out_dir / 'nanogpt'}"]
    rows, result = [], {"runs": {"ours": [], "nanoGPT": []}}
    sides = ["ours", "nanoGPT"] if options.peer else ["ours"]
    for i, side in product(range(options.pairs), sides):
        if side == "ours":
            seconds, _ = timed([*ours, f"--seed={i}"], ROOT)
            found = losses(run_dir, folder)
        else:
            seconds, output = timed(theirs, Path(options.peer or ""))
            found = {"nanogpt_estimate": float(output.rsplit("val loss ", 1)[1].split()[0])}
        rows.append({"side": side, "seconds": seconds, **found})
        print_row(rows[-1], SPEEDRUN_COLUMNS, first=len(rows) == 1)
    for side in sides:
        runs = result["runs"][side] = [row for row in rows if row["side"] == side]
        seconds = result[f"{side}/seconds"] = statistics.median(run["seconds"] for run in runs)
        loss = result[f"{side}/val_loss"] = statistics.median(run["nanogpt_estimate"] for run in runs)
        print(f"{side}: median {seconds:.1f} s, val loss {loss:.4f}")
    if options.peer:
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(*result["runs"].values(), strict=True)]
        ratio = result["ratio"] = statistics.median(ratios)
        print(f"nanoGPT takes {ratio:.2f} times as long (median of pairs; {min(ratios):.2f} at least)")
    write(out_dir / "speedrun.json", options, result)
    settings = dict(xlabel="whole process, seconds", ylabel="val loss, nats a character", xscale="linear")
    draw_lines(out_dir / "speedrun.png", "side", [(rows, "seconds", "nanogpt_estimate", settings)], linestyle="none")


def nanogpt_folder(text: Path, folder: Path) -> Path:
    """A text by characters in nanoGPT's own format, which both sides read: train.bin, val.bin, meta.pkl."""
    if not text.is_file():
        raise UserError(f"no text at {text}; put one there, or name another with --text")
    content = text.read_text(encoding="utf-8")
    ids = {c: i for i, c in enumerate(sorted(set(content)))}
    folder.mkdir(parents=True, exist_ok=True)
    train, val = np.split(np.array([ids[c] for c in content], np.uint16), [int(len(content) * 0.9)])
    train.tofile(folder / "train.bin")
    val.tofile(folder / "val.bin")
    meta = {"vocab_size": len(ids), "stoi": ids, "itos": dict(enumerate(ids))}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder.resolve()


def timed(command: list[str], cwd: Path) -> tuple[float, str]:
    """Wall time of a whole Python process, and what it printed."""
    begin = time.perf_counter()
    output = run_python(command, cwd=cwd, stdout=subprocess.PIPE)
    return time.perf_counter() - begin, output or ""


@torch.no_grad()
def losses(run_dir: Path, folder: Path) -> dict[str, float | None]:
    """Val loss of a run's last weights: in nanoGPT's way (20 batches of 12 random windows), and over all."""
    model, _ = load_run(run_dir, device="cpu", which="last")
    dataset, block_size = open_dataset(str(folder)), model.config.block_size
    shape, generator = (20, 12), torch.Generator().manual_seed(1337)
    starts = torch.randint(len(dataset.val) - block_size, shape, generator=generator)
    windows = [torch.from_numpy(dataset.val.windows(row.numpy(), block_size + 1)) for row in starts]
    estimate = statistics.mean(model(rows[:, :-1], rows[:, 1:])[1].item() for rows in windows)
    whole = evaluate(LanguageModelLoss(model), dataset, (block_size, 128, 0), nullcontext())
    return {"nanogpt_estimate": estimate, "full_pass": whole["val/loss"]}


def train(argv: list[str]) -> None:
    """Tokens a second, MFU and peak memory of a training step, by attention and context.

    Under torchrun: tokens a second of all ranks together, and what of a step is communication.
    """
    options = parse(TrainOptions, argv, "python -m tools.bench train [--peer=DIR] [--key=value ...]")
    rows, out_dir = [], Path(options.out_dir)
    with parallel.process_group():
        ranks = parallel.size()
        sides = [*options.attentions, *(["nanoGPT"] if options.peer and ranks == 1 else [])]
        for point in product(options.block_sizes, sides):
            if ranks > 1:
                rows.append(train_row(options, *point))
            else:  # in a process of its own, so that its peak memory is its own
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    rows.append(pool.apply(train_row, (options, *point)))
            if parallel.rank() == 0:
                print_row(rows[-1], RANK_COLUMNS if ranks > 1 else TRAIN_COLUMNS, first=len(rows) == 1)
        if parallel.rank() == 0:
            write(out_dir / (f"train_{ranks}_ranks.json" if ranks > 1 else "train.json"), options, {"rows": rows})
    if ranks == 1:
        speed = rows, "context", "tokens_per_s", dict(xlabel="context, tokens", ylabel="training tokens/s")
        memory = rows, "context", "peak_bytes", dict(xlabel="context, tokens", ylabel="peak memory, bytes")
        draw_lines(out_dir / "train.png", "side", [speed, memory])


def train_row(options: TrainOptions, block_size: int, side: str) -> dict:
    """One measurement of `train`, on this rank."""
    device = parallel.own_device(pick_device(options.device))
    dtype, config = pick_dtype(options.dtype, device), step_config(side, block_size, options)
    torch.manual_seed(0)
    if side == "nanoGPT":
        model, optimizers = nanogpt_model(Path(options.peer or ""), config, device)
        clip, loss_model = nn.utils.clip_grad_norm_, lambda idx, targets: model(idx, targets)[1]
        loss_model = torch.compile(loss_model) if options.compile else loss_model
        matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2) - block_size * config.n_embd
        flops = 6 * (matrices + 2 * config.n_layer * config.n_embd * block_size)
    else:
        keep_freed_memory()  # as a run does
        model = GPT(config).to(device)
        clip, loss_model = parallel.clip_grad_norm, accelerate(LanguageModelLoss(model), dtype)
        loss_model = parallel.parallelize(loss_model, device, dtype, options.compile)
        optimizers = make_optimizers(model, optimizer=options.optimizer)
        flops = flops_per_token(model, block_size)
    params = list(model.parameters())
    _, rows = parallel.share(1, max(options.tokens // block_size, 1))
    idx = torch.randint(options.vocab_size, (rows, block_size + 1), device=device)

    def train_step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_model(idx[:, :-1], idx[:, 1:].contiguous())
        loss.backward()
        clip(params, max_norm=1.0)
        for optimizer in optimizers:
            optimizer.step()  # pyright: ignore[reportAttributeAccessIssue]
            optimizer.zero_grad()

    seconds, ranks = median_seconds(train_step, device, options.steps), parallel.size()
    rate = ranks * rows * block_size / seconds
    row = {"side": side, "context": block_size, "params": sum(p.numel() for p in params)}
    row |= {"tokens_per_s": rate, "flops_per_s": rate * flops}
    if ranks == 1:
        return row | {"peak_bytes": peak_memory(device)}
    gradient = torch.zeros(row["params"], device=device)
    exchanged = optimizers[0].param_groups if options.optimizer == "muon" else []
    communicating = median_seconds(partial(communicate, gradient, exchanged), device, options.steps)
    row |= {"ranks": ranks, "step_s": seconds, "communication_share": communicating / seconds}
    return row | {"gradient_bytes": gradient.nbytes}


@torch.no_grad()
def communicate(gradient: torch.Tensor, groups: list[dict]) -> None:
    """What ranks exchange in a step: the gradient (parameters,), and with Muon the updates of matrices."""
    torch.distributed.all_reduce(gradient)
    same_shape = defaultdict(list)
    for p in (p for group in groups for p in group["params"]):
        same_shape[p.shape].append(p)
    for matrices in same_shape.values():
        parallel.each_matrix_once(torch.clone, matrices, matrices)


def median_seconds(run: Callable[[], None], device: torch.device, steps: int) -> float:
    """The median of `steps` calls, after 3 to warm up."""
    seconds = []
    for _ in range(3 + steps):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[3:])


def step_config(side: str, block_size: int, options: TrainOptions) -> GPTConfig:
    """The model of one side, mha's for nanoGPT; the others' MLPs make parameters equal within 1 %."""
    shape = {name: getattr(options, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    base = model_config("mha", block_size=block_size, intermediate_size=options.intermediate_size, **shape)
    if side in ("mha", "nanoGPT"):
        return base
    config = model_config(side, block_size=block_size, **shape)
    match_params(GPT, config, base)
    return config


def nanogpt_model(folder: Path, config, device: torch.device):
    """nanoGPT's model and optimizer at the shape of `config`, from a checkout of it."""
    path = folder / "model.py"
    if not path.exists():
        raise UserError(f"{folder} is not a nanoGPT checkout: it has no model.py")
    peer = runpy.run_path(str(path), run_name="nanogpt")
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    knobs = {name: getattr(config, name) for name in names}
    model = peer["GPT"](peer["GPTConfig"](**knobs, bias=False)).to(device)
    return model, [model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type)]


COMMANDS = {"speedrun": speedrun, "train": train, "decode": decode, "cache": cache}


def main(argv: list[str]) -> None:
    if argv[:1] in (["--help"], ["-h"]):
        return print(f"{__doc__}\ncommands: {', '.join(COMMANDS)}")
    if not argv or argv[0] not in COMMANDS:
        raise UserError(f"which measurement? python -m tools.bench COMMAND, one of {', '.join(COMMANDS)}")
    COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    cli(main, ranks=sys.argv[1:2] == ["train"])
