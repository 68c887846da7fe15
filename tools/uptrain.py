"""What a change of attention costs, and how soon it is made good: `python -m tools.uptrain out/mha`.

Converts a run to other attentions; trains each, side by side, for some shares of the run's tokens, and the
same model from scratch for the largest share. Prints a table of validation losses, also into --out_dir. A
second call goes on where the first one stopped. Learning rates are the run's own; those of uptraining are
times --lr_scale and fall to nothing in a straight line.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from compare import NOT_THE_EXPERIMENT, markdown
from nanokv import checkpoint
from nanokv.config import cli, parse
from nanokv.dataset import open_dataset
from nanokv.loss import LanguageModelLoss
from nanokv.metrics import evaluate, kv_elements_per_token_layer
from sample import load_run
from tools import convert
from tools.sweep import run_all
from train import TrainConfig, read_knobs

OF_A_RUN = {  # knobs that are each run's own, not taken from the source
    *(NOT_THE_EXPERIMENT - {"seed"}),
    *("init_from", "sample_tokens", "max_iters", "eval_only", "eval_interval", "eval_iters"),
    *("schedule", "warmup_iters", "cooldown", "lr_decay_iters", "min_lr"),
}


@dataclass
class Options:
    run: str  # the run to convert, best of mha without QK-norm; may be given without its name
    n_kv_heads: tuple[int, ...] = (2, 1)  # key and value heads to pool to
    kv_lora_ranks: tuple[int, ...] = (64, 32)  # latents to factorize into
    shares: tuple[float, ...] = (1, 2, 5, 10)  # of the run's tokens, in percent, to train a converted model for
    lr_scale: float = 0.3  # learning rates of uptraining, relative to those of the run
    eval_iters: int = 0  # val batches an evaluation; 0: the whole val split
    out_dir: str = "out/uptrain"  # where the runs and table.json go


def main(argv: list[str]) -> None:
    options = parse(Options, argv, "python -m tools.uptrain RUN [--key=value ...]", bare=1)
    (_, source), out = read_knobs(Path(options.run)), Path(options.out_dir)
    targets = {f"n_kv_head={n}": "to-gqa" for n in options.n_kv_heads}
    targets |= {f"kv_lora_rank={rank}": "to-mla" for rank in options.kv_lora_ranks}
    runs = {}
    for target, command in targets.items():
        converted = out / target / "converted"
        if not (converted / "last").exists():
            convert.main([command, options.run, str(converted), f"--{target}", "--overwrite=True"])
        config, _ = read_knobs(converted)
        rates = {name: getattr(source, name) * options.lr_scale for name in ("learning_rate", "muon_lr")}
        further = rates | {"min_lr": 0.0, "cooldown": 1.0, "init_from": converted}
        for share in options.shares:
            runs[f"{target}/{share:g}"] = arguments(source, share, options, further)
        runs[f"{target}/scratch"] = arguments(source, options.shares[-1], options, asdict(config))
    run_all(runs, out)
    before, rows = val_loss(Path(options.run), source, options), []
    for target in targets:
        cached = kv_elements_per_token_layer(read_knobs(out / target / "converted")[0])
        row = {"target": target, "cached": cached, "before": before}
        row["converted"] = val_loss(out / target / "converted", source, options)
        for name in [f"{share:g}" for share in options.shares] + ["scratch"]:
            summary = checkpoint.read_json(out / target / name / "summary.json")
            row[name if name == "scratch" else f"{name} %"] = summary["final/val_loss"]
        rows.append(row)
    checkpoint.write_json(out / "table.json", {"options": asdict(options), "before": before, "rows": rows})
    print(table(rows))


def arguments(source: TrainConfig, share: float, options: Options, own: dict) -> list[str]:
    """Of train.py: the source's data and optimizer, a share (in percent) of its steps, and `own` knobs."""
    steps = max(round(source.max_iters * share / 100), 1)
    knobs = {k: v for k, v in asdict(source).items() if k not in OF_A_RUN} | {"eval_iters": options.eval_iters}
    knobs |= {"max_iters": steps, "eval_interval": steps, "warmup_iters": steps // 10, "sample_tokens": 0}
    return [f"--{name}={value}" for name, value in (knobs | own).items()]


def val_loss(run_dir: Path, source: TrainConfig, options: Options) -> float | None:
    model, _ = load_run(run_dir, source.device, "float32")
    dataset = open_dataset(source.dataset, source.tokenizer)
    windows = model.config.block_size, source.batch_size, options.eval_iters
    return evaluate(LanguageModelLoss(model), dataset, windows, nullcontext())["val/loss"]


def table(rows: list[dict]) -> str:
    lines = [[f"{value:.3f}" if type(value) is float else str(value) for value in row.values()] for row in rows]
    return markdown([list(rows[0]), *lines])


if __name__ == "__main__":
    cli(main)
