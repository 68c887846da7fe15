"""Measure: `python -m tools.bench speedrun|train|decode|cache`. `--help` after one lists its options.

Each prints what it measures as it goes, and writes a JSON file and a picture into --out_dir. Times are of
whole processes or medians of repeated steps; a peer is measured in the same session, in turns with us.
"""

from __future__ import annotations

import importlib.util
import json
import pickle
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from backends import accelerate
from model import GPT, GPTConfig
from nanokv import checkpoint
from nanokv import distributed as parallel
from nanokv.config import UserError, cli, parse, run_python
from nanokv.dataset import open_dataset
from nanokv.device import keep_freed_memory, pick_device, pick_dtype
from nanokv.loss import LanguageModelLoss
from nanokv.metrics import flops_per_token, n_params, peak_memory
from nanokv.optim import make_optimizers
from nanokv.plots import draw_speedrun, draw_train
from sample import load_run
from tools.bench_cache import ATTENTION_KNOBS, cache, decode, machine, write

ROOT = Path(__file__).resolve().parents[1]
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
class TrainOptions:
    peer: str | None = None  # a nanoGPT checkout whose model is measured at the same shape
    attentions: str = "mha,mqa,gqa,mla"  # which to measure
    block_sizes: str = "64,256,1024"  # contexts; the batch shrinks so that a step has the same tokens
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
    output = run_python(command, cwd=cwd, stdout=subprocess.PIPE)
    return time.perf_counter() - begin, output


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
    options = parse(TrainOptions, argv, "python -m tools.bench train [--peer=DIR] [--key=value ...]")
    if parallel.launch() is not None:
        with parallel.process_group():
            return train_on_ranks(options)
    sides = options.attentions.split(",") + (["nanoGPT"] if options.peer else [])
    rows = []
    print(f"{'':8} {'context':>8} {'params':>12} {'tokens/s':>10} {'GFLOP/s':>8} {'peak MB':>8}")
    for block_size in map(int, options.block_sizes.split(",")):
        for side in sides:
            command = ["-m", "tools.bench", "_step", side, str(block_size), json.dumps(asdict(options))]
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
            run = parallel.parallelize(
                accelerate(LanguageModelLoss(model), dtype), device, dtype, options.compile
            )
            optimizers = make_optimizers(model, optimizer=options.optimizer)
            _, rows = parallel.share(1, max(options.tokens // block_size, 1))
            idx = torch.randint(options.vocab_size, (rows, block_size + 1), device=device)
            gradient = torch.zeros(n_params(model), device=device)
            same_shape = defaultdict(list)
            groups = optimizers[0].param_groups if options.optimizer == "muon" else []
            for p in (p for group in groups for p in group["params"]):
                same_shape[p.shape].append(p.detach())

            def communicate(gradient=gradient, same_shape=same_shape) -> None:
                if parallel.size() > 1:
                    torch.distributed.all_reduce(gradient)
                    for matrices in same_shape.values():
                        parallel.each_matrix_once(torch.clone, matrices, matrices)

            clip = partial(parallel.clip_grad_norm, list(model.parameters()))
            step_s = statistics.median(step_times(run, clip, optimizers, idx, dtype, options.steps))
            share = statistics.median(times(communicate, device, options.steps)) / step_s
            row = {"ranks": parallel.size(), "side": side, "context": block_size, "params": n_params(model)}
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


def step_times(run, clip: Callable, optimizers: list, idx: torch.Tensor, dtype, steps: int) -> list[float]:
    """Seconds of training steps, in which `run` gives the loss of inputs and targets, on idx (B, T + 1)."""

    def train_step() -> None:
        with torch.autocast(idx.device.type, dtype, enabled=dtype != torch.float32):
            loss = run(idx[:, :-1], idx[:, 1:].contiguous())
        loss.backward()
        clip(max_norm=1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return times(train_step, idx.device, steps)


def step_config(side: str, block_size: int, options: TrainOptions) -> GPTConfig:
    """The model of one side, mha's for nanoGPT; the others' MLPs make parameters equal within 1 %."""
    shape = [f"--{name}={getattr(options, name)}" for name in ("n_layer", "n_head", "n_embd", "vocab_size")]
    shape += [f"--block_size={block_size}"]
    mlp = f"--intermediate_size={options.intermediate_size}"
    config = base = parse(GPTConfig, [*shape, "--qk_norm=False", mlp])
    if side not in ("mha", "nanoGPT"):
        knobs = [] if side == "mla" else ["--qk_norm=False"]
        shape += [f"--attention={side}", *ATTENTION_KNOBS[side], *knobs]
        config = parse(GPTConfig, [*shape, f"--intermediate_size={base.intermediate_size}"])
        sizes = [n_params(checkpoint.on_meta(partial(GPT, shape))) for shape in (base, config)]
        missing = sizes[0] - sizes[1]
        columns = missing / (3 * base.n_embd * base.n_layer)
        whole = 8 * round(columns / 8)  # products of odd widths are slow
        within = abs(whole - columns) < base.intermediate_size / 100
        config.intermediate_size += whole if within else round(columns)
    return config


def step(argv: list[str]) -> None:
    """One measurement of `train`, in a process of its own so that peak memory is its own."""
    side, block_size, options = argv[0], int(argv[1]), TrainOptions(**json.loads(argv[2]))
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    config = step_config(side, block_size, options)
    torch.manual_seed(0)
    if side == "nanoGPT":
        model, optimizers = nanogpt_model(Path(options.peer), config, device)
        clip = partial(torch.nn.utils.clip_grad_norm_, list(model.parameters()))
        matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2) - block_size * config.n_embd
        flops = 6 * (matrices + 2 * config.n_layer * config.n_embd * block_size)
    else:
        keep_freed_memory()  # as a run does
        model = GPT(config).to(device)
        optimizers = make_optimizers(model, optimizer=options.optimizer)
        clip = partial(parallel.clip_grad_norm, list(model.parameters()))
        flops = flops_per_token(model, block_size)
    loss_model = NanoGPTLoss(model) if side == "nanoGPT" else LanguageModelLoss(model)
    loss_model = accelerate(loss_model, dtype)
    run = torch.compile(loss_model) if options.compile else loss_model
    idx = torch.randint(
        options.vocab_size, (max(options.tokens // block_size, 1), block_size + 1), device=device
    )
    rate = idx[:, 1:].numel() / statistics.median(
        step_times(run, clip, optimizers, idx, dtype, options.steps)
    )
    row = {"side": side, "context": block_size, "params": sum(p.numel() for p in model.parameters())}
    print(
        json.dumps(
            row | {"tokens_per_s": rate, "flops_per_s": rate * flops, "peak_bytes": peak_memory(device)}
        )
    )


class NanoGPTLoss(LanguageModelLoss):
    """The loss as nanoGPT's own model computes it."""

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.model(idx, targets)[1]


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


COMMANDS = {"speedrun": speedrun, "train": train, "decode": decode, "cache": cache, "_step": step}


def main(argv: list[str]) -> None:
    if not argv or argv[0] not in COMMANDS:
        names = ", ".join(name for name in COMMANDS if not name.startswith("_"))
        if argv and argv[0] in ("--help", "-h"):
            print(f"{__doc__}\ncommands: {names}")
            return
        raise UserError(f"which measurement? python -m tools.bench COMMAND, one of {names}")
    COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    cli(main, ranks=sys.argv[1:2] == ["train"])
