"""What a small cache forgets: `python -m tools.recall`.

Multi-query associative recall (Zoology, Arora et al. 2023; data/mqar): a model reads pairs of a key and a
value, then is asked for the value of each key. Small models of each attention and cache size are trained on
each number of pairs, side by side and resumable as any sweep; the share of right answers is what counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from compare import markdown, put_into
from nanokv import checkpoint
from nanokv.config import cli, parse, run_python
from nanokv.dataset import open_dataset
from nanokv.plots import draw_lines
from sample import load_run
from tools.sweep import ROOT, read_list, run_all
from train import read_knobs

RECIPE = [
    *("--n_layer=2", "--n_head=2", "--n_embd=64", "--rope_theta=100", "--batch_size=128", "--max_iters=600"),
    *("--learning_rate=0.001", "--weight_decay=0", "--warmup_iters=20", "--cooldown=0.2", "--seed=1"),
    *("--eval_interval=600", "--log_interval=50", "--sample_tokens=0", "--device=cpu"),
]


@dataclass
class Options:
    list: str = "config/recall.txt"  # the models: a name and knobs a line
    pairs: tuple[int, ...] = (2, 4, 8)  # of an example, whose length is four tokens a pair; one sweep for each number
    out_dir: str = "out/recall"  # the data sets and the runs
    picture: str = "out/recall/recall.png"  # where the picture goes
    into: str = ""  # a Markdown file, whose text from <!-- recall --> to <!-- /recall --> becomes the table
    jobs: int = 0  # runs side by side; 0: as many as there are cores

    def __post_init__(self):
        if not self.pairs or not all(1 <= n <= 16 for n in self.pairs):
            raise ValueError("pairs should be numbers from 1 to 16 with commas between")


def data_set(n_pairs: int, folder: Path) -> Path:
    """The folder of examples of n_pairs pairs, made if it is not there."""
    if not (folder / "meta.json").exists():
        sizes = [f"--seq_len={4 * n_pairs}", "--vocab_size=64", "--n_train=80000", "--n_val=1000"]
        run_python([str(ROOT / "data/mqar/prepare.py"), f"--n_pairs={n_pairs}", *sizes, f"--out_dir={folder}"])
    return folder


@torch.inference_mode()
def accuracy(run_dir: Path) -> float:
    """The share of a run's validation answers whose right value is the model's likeliest token."""
    model, _ = load_run(run_dir, device="cpu", dtype="float32", which="last")
    dataset = open_dataset(checkpoint.read_config(run_dir)["dataset"])
    right = asked = 0
    for x, y in dataset.val_batches(model.config.block_size, 256):  # (B, T), -1: no answer
        found = model(x)[0].argmax(-1)
        right, asked = right + int((found == y).sum()), asked + int((y >= 0).sum())
    return right / asked


def table(rows: list[dict], pairs: tuple[int, ...]) -> str:
    """Markdown: a model a row, a number of pairs a column."""
    titles = ["model", "cache B/token", *(f"{n} pairs" for n in pairs)]
    return markdown([titles, *([r["model"], f"{r['cache']:,}", *(f"{r[n]:.1%}" for n in pairs)] for r in rows)])


def main(argv: list[str]) -> None:
    options = parse(Options, argv, "python -m tools.recall [--key=value ...]")
    out_dir, models, runs = Path(options.out_dir), read_list(Path(options.list)), {}
    for n in options.pairs:
        data = [f"--dataset={data_set(n, out_dir / f'data-{n}')}", f"--block_size={4 * n}"]
        runs |= {f"{name}-of-{n}": [*RECIPE, *data, *knobs] for name, knobs in models.items()}
    run_all(runs, out_dir, options.jobs)
    rows = []
    for name in models:
        config, _ = read_knobs(out_dir / f"{name}-of-{options.pairs[0]}")
        row = {"model": name, "attention": config.attention, "cache": config.kv_bytes_per_token()}
        rows.append(row | {n: accuracy(out_dir / f"{name}-of-{n}") for n in options.pairs})
    rows.sort(key=lambda row: row["cache"])
    print(table(rows, options.pairs))
    if options.into:
        put_into(Path(options.into), table(rows, options.pairs), "recall")
    labels = dict(xlabel="KV cache, bytes a token (bf16)", ylabel="values recalled", ylim=(0, 1.05))
    panels = [(rows, "cache", n, labels | {"title": f"{n} pairs"}) for n in options.pairs]
    draw_lines(Path(options.picture), "attention", panels)


if __name__ == "__main__":
    cli(main)
