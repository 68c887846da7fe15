"""What a change of attention costs, and how soon it is made good: `python -m tools.uptrain out/mha`.

Converts a run, by convert.py, to other attentions; trains each for some shares of the run's own tokens, and
the same model from scratch for the largest share. Prints a table of validation losses, and writes it to
--out_dir. A second call goes on where the first one stopped. Learning rates are the run's own; those of
uptraining are times --lr_scale and fall to nothing in a straight line.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from model import GPTConfig
from nanokv import checkpoint
from nanokv.config import cli, parse, run_python
from nanokv.metrics import kv_elements_per_token_layer
from train import TrainConfig, read_knobs

ROOT = Path(__file__).resolve().parents[1]
OF_A_RUN = {  # knobs that are each run's own, not taken from the source
    *("out_dir", "overwrite", "init_from", "wandb_log", "wandb_run_name", "sample_tokens"),
    *("max_iters", "eval_only", "eval_interval", "eval_iters"),
    *("schedule", "warmup_iters", "cooldown", "lr_decay_iters", "min_lr"),
}


@dataclass
class Options:
    run: str  # the run to convert, best of mha without QK-norm; may be given without its name
    n_kv_heads: str = "2,1"  # key and value heads to pool to
    kv_lora_ranks: str = "64,32"  # latents to factorise into
    shares: str = "1,2,5,10"  # of the run's tokens, in per cent, to train a converted model for
    lr_scale: float = 0.3  # learning rates of uptraining, relative to those of the run
    eval_iters: int = 0  # val batches an evaluation; 0: the whole val split
    out_dir: str = "out/uptrain"  # where the runs and table.json go


def main(argv: list[str]) -> None:
    if argv and not argv[0].startswith("-"):
        argv = [f"--run={argv[0]}", *argv[1:]]
    options = parse(Options, argv, "python -m tools.uptrain RUN [--key=value ...]")
    (model_config, source), out = read_knobs(Path(options.run)), Path(options.out_dir)
    shares = [float(share) for share in options.shares.split(",")]
    targets = {f"{n} key/value heads": ["to-gqa", f"--n_kv_head={n}"] for n in options.n_kv_heads.split(",")}
    targets |= {f"latent of {r}": ["to-mla", f"--kv_lora_rank={r}"] for r in options.kv_lora_ranks.split(",")}
    before = evaluate(options.run, source, options)
    cached = kv_elements_per_token_layer(model_config)
    print(
        f"{options.run}: {model_config.attention}, {cached} numbers cached, val loss {before:.4f}", flush=True
    )
    rows = []
    for name, command in targets.items():
        folder = out / command[1].removeprefix("--").replace("=", "-")
        if not (folder / "converted" / "last").exists():
            run(
                [
                    "-m",
                    "tools.convert",
                    command[0],
                    options.run,
                    str(folder / "converted"),
                    command[1],
                    "--overwrite=True",
                ]
            )
        config, _ = read_knobs(folder / "converted")
        row = {
            "target": name,
            "cached": kv_elements_per_token_layer(config),
            "converted": evaluate(folder / "converted", source, options),
        }
        for share in shares:
            steps = max(round(source.max_iters * share / 100), 1)
            knobs = [
                f"--{knob}={getattr(source, knob) * options.lr_scale}"
                for knob in ("learning_rate", "muon_lr")
            ]
            knobs += ["--min_lr=0.0", "--cooldown=1.0", f"--init_from={folder / 'converted'}"]
            row[f"{share:g} %"] = train(folder / f"{share:g}", source, steps, knobs, options)
        model = [f"--{field.name}={getattr(config, field.name)}" for field in fields(GPTConfig)]
        row["scratch"] = train(folder / "scratch", source, steps, model, options)
        rows.append(row)
        print(
            ", ".join(
                f"{key}: {value if type(value) is not float else round(value, 4)}"
                for key, value in row.items()
            )
        )
        sys.stdout.flush()
    checkpoint.write_json(out / "table.json", {"options": asdict(options), "before": before, "rows": rows})
    print(table(rows, before, f"scratch, {shares[-1]:g} %"))


def inherited(source: TrainConfig) -> list[str]:
    """The source's knobs of data and optimizer, as arguments."""
    names = [field.name for field in fields(TrainConfig) if field.name not in OF_A_RUN]
    return [f"--{name}={getattr(source, name)}" for name in names]


def evaluate(run_dir: str | Path, source: TrainConfig, options: Options) -> float:
    knobs = [f"--init_from={run_dir}", "--eval_only=True", f"--eval_iters={options.eval_iters}"]
    return float(run(["train.py", *inherited(source), *knobs]).rsplit("val loss ", 1)[1].split(",")[0])


def train(run_dir: Path, source: TrainConfig, steps: int, knobs: list[str], options: Options) -> float:
    """Val loss after training for `steps` into `run_dir`, where that is not done yet."""
    if not checkpoint.is_finished(run_dir):
        own = [
            f"--out_dir={run_dir}",
            "--overwrite=True",
            "--sample_tokens=0",
            f"--eval_iters={options.eval_iters}",
        ]
        own += [f"--max_iters={steps}", f"--eval_interval={steps}", f"--warmup_iters={steps // 10}"]
        run(["train.py", *inherited(source), *own, *knobs])
    return checkpoint.read_json(run_dir / "summary.json")["final/val_loss"]


def run(command: list[str]) -> str:
    return run_python(command, cwd=ROOT, stdout=subprocess.PIPE)


def table(rows: list[dict], before: float, scratch: str) -> str:
    """The rows as Markdown."""
    names = ["target", "cached", "before", *list(rows[0])[2:-1], scratch]
    lines = [names, ["---", *["---:"] * (len(names) - 1)]]
    for row in rows:
        target, numbers, *losses = row.values()
        lines.append([target, str(numbers), *(f"{loss:.3f}" for loss in (before, *losses))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    cli(main)
