"""What a small cache forgets: `python -m tools.recall`.

Multi-query associative recall (Zoology, Arora et al. 2023; data/mqar): a model reads pairs of a key and a
value, then is asked for the value of each key. Small models of each attention and cache size are trained on
each number of pairs, side by side and resumable as any sweep; the share of right answers is what counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from compare import put_into
from model import GPTConfig
from nanokv import checkpoint
from nanokv.config import cli, parse, run_python
from nanokv.dataset import open_dataset
from nanokv.plots import pyplot, save, styles_of
from sample import load_run
from tools.sweep import ROOT, run_all
from train import read_knobs

MODELS = {  # knobs by name: attention and width of a head, or of MLA's latent and rope key
    "mha-32": ["--attention=mha"],
    "mha-8": ["--attention=mha", "--head_dim=8"],
    "gqa-16": ["--attention=gqa", "--n_head=4", "--n_kv_head=2"],
    "gqa-8": ["--attention=gqa", "--n_head=4", "--n_kv_head=2", "--head_dim=8"],
    "mqa-32": ["--attention=mqa"],
    "mqa-16": ["--attention=mqa", "--head_dim=16"],
    "mqa-8": ["--attention=mqa", "--head_dim=8"],
    "mla-32+16": ["--attention=mla", "--kv_lora_rank=32", "--qk_rope_head_dim=16"],
    "mla-16+8": ["--attention=mla", "--kv_lora_rank=16", "--qk_rope_head_dim=8"],
    "mla-8+8": ["--attention=mla", "--kv_lora_rank=8", "--qk_rope_head_dim=8"],
}
RECIPE = [
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=64",
    "--rope_theta=100",
    "--batch_size=128",
    "--max_iters=600",
]
RECIPE += ["--learning_rate=0.001", "--weight_decay=0", "--warmup_iters=20", "--cooldown=0.2", "--seed=1"]
RECIPE += ["--eval_interval=600", "--log_interval=50", "--sample_tokens=0", "--device=cpu"]


@dataclass
class Options:
    pairs: str = "2,4,8"  # of an example, whose length is four tokens a pair; one sweep for each number
    out_dir: str = "out/recall"  # the data sets and the runs
    picture: str = "out/recall/recall.png"  # where the picture goes
    into: str = ""  # a Markdown file, whose text from <!-- recall --> to <!-- /recall --> becomes the table
    jobs: int = 0  # runs side by side; 0: as many as there are cores

    def __post_init__(self):
        if not all(word.isdecimal() and 1 <= int(word) <= 16 for word in self.pairs.split(",")):
            raise ValueError(f"pairs should be numbers from 1 to 16 with commas between, not {self.pairs!r}")


def data_set(n_pairs: int, folder: Path) -> Path:
    """The folder of examples of n_pairs pairs, made if it is not there."""
    if not (folder / "meta.json").exists():
        sizes = [f"--seq_len={4 * n_pairs}", "--vocab_size=64", "--n_train=80000", "--n_val=1000"]
        run_python(
            [str(ROOT / "data/mqar/prepare.py"), f"--n_pairs={n_pairs}", *sizes, f"--out_dir={folder}"]
        )
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


def table(results: list[tuple[str, GPTConfig, dict[int, float]]]) -> str:
    """Markdown: a model a row, a number of pairs a column."""
    lines = [f"| model | cache B/token | {' | '.join(f'{n} pairs' for n in results[0][2])} |"]
    lines.append(f"|---|{'---:|' * (1 + len(results[0][2]))}")
    for name, config, of in results:
        shares = " | ".join(f"{share:.1%}" for share in of.values())
        lines.append(f"| {name} | {config.kv_bytes_per_token():,} | {shares} |")
    return "\n".join(lines)


def draw(results: list[tuple[str, GPTConfig, dict[int, float]]], path: Path) -> None:
    """Accuracy against cache, a panel for each number of pairs, a line for each attention."""
    plt = pyplot()
    pairs = list(results[0][2])
    shape = dict(figsize=(min(9, 3 + 3 * len(pairs)), 3), sharey=True, squeeze=False, layout="constrained")
    figure, panels = plt.subplots(1, len(pairs), **shape)
    styles = styles_of(config.attention for _, config, _ in results)
    for panel, n in zip(panels[0], pairs, strict=True):
        for i, (attention, (colour, marker, line)) in enumerate(styles.items()):
            mine = [(c.kv_bytes_per_token(), 100 * of[n]) for _, c, of in results if c.attention == attention]
            look = dict(color=colour, marker=marker, linestyle=line, label=attention)
            hollow = dict(markerfacecolor="none", markersize=11 - 2 * i)  # so that points which coincide show
            panel.plot(*zip(*sorted(mine), strict=True), **look, **hollow)
        panel.set_title(f"{n} pairs", fontsize=9)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        panel.set(xlabel="KV cache, bytes a token (bf16)", ylim=(0, 105))
        panel.grid(alpha=0.3, linewidth=0.5)
    panels[0][0].set_ylabel("values recalled, %")
    panels[0][-1].legend(loc="lower right", fontsize=8, handlelength=3)
    save(figure, path)


def main(argv: list[str]) -> None:
    options = parse(Options, argv, "python -m tools.recall [--key=value ...]")
    out_dir, runs, pairs = Path(options.out_dir), {}, [int(n) for n in options.pairs.split(",")]
    for n in pairs:
        data = [f"--dataset={data_set(n, out_dir / f'data-{n}')}", f"--block_size={4 * n}"]
        runs |= {f"{name}-of-{n}": [*RECIPE, *data, *knobs] for name, knobs in MODELS.items()}
    run_all(runs, out_dir, options.jobs)
    results = []
    for name in MODELS:
        config, _ = read_knobs(out_dir / f"{name}-of-{pairs[0]}")
        results.append((name, config, {n: accuracy(out_dir / f"{name}-of-{n}") for n in pairs}))
    results.sort(key=lambda result: result[1].kv_bytes_per_token())
    print(table(results))
    if options.into:
        put_into(Path(options.into), table(results), "recall")
    draw(results, Path(options.picture))


if __name__ == "__main__":
    cli(main)
