"""Pictures: how all of them look, and those of compare.py and tools.bench."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import cycle, product
from pathlib import Path

from nanokv.cache import CACHE_FORMATS
from nanokv.config import UserError

CACHE = "kv_cache/bytes_per_token"
MOST_NAMES = 30  # rows that are named in the picture of compare.py
STYLES = {  # of an attention: colour, marker and line, any of which tells it apart
    "mha": ("#000000", "o", "-"),
    "gqa": ("#0072b2", "^", "--"),
    "mqa": ("#e69f00", "s", ":"),
    "mla": ("#d55e00", "D", "-."),
}
MORE_STYLES = (("#009e73", "v", (0, (5, 1))), ("#cc79a7", "P", (0, (1, 1))), ("#56b4e9", "X", (0, (8, 2))))


def pyplot():
    """matplotlib.pyplot, with our settings. Raises UserError if it is not installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as e:
        raise UserError("a picture needs a package: pip install matplotlib") from e
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)
    pyplot().close(figure)
    print(f"wrote {path}", file=sys.stderr)


def styles_of(attentions: Iterable[str]) -> dict[str, tuple]:
    """Colour, marker and line of each attention, the known ones first and in their order."""
    names = set(attentions)
    new = dict(zip(sorted(names - set(STYLES)), cycle(MORE_STYLES)))  # noqa: B905 (one of them is endless)
    return {name: style for name, style in (STYLES | new).items() if name in names}


def draw_speedrun(result: dict, path: Path) -> None:
    """Loss against time, a point a run."""
    figure, axes = pyplot().subplots(figsize=(6, 3.5), layout="constrained")
    for (side, runs), marker in zip(result["runs"].items(), "os", strict=True):
        if runs:
            seconds = [run["seconds"] for run in runs]
            axes.plot(seconds, [run["nanogpt_estimate"] for run in runs], marker, label=side)
    axes.set(xlabel="whole process, seconds", ylabel="val loss, nats a character", xlim=(0, None))
    axes.legend()
    save(figure, path)


def draw_train(rows: list[dict], path: Path) -> None:
    """Throughput and peak memory against the context."""
    figure, panels = pyplot().subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for side, marker in zip(dict.fromkeys(row["side"] for row in rows), "os^vD", strict=False):
        mine = [row for row in rows if row["side"] == side]
        contexts = [row["context"] for row in mine]
        panels[0].plot(contexts, [row["tokens_per_s"] for row in mine], marker=marker, label=side)
        panels[1].plot(contexts, [row["peak_bytes"] / 1e6 for row in mine], marker=marker, label=side)
    panels[0].set(xlabel="context, tokens", ylabel="training tokens/s", xscale="log", ylim=(0, None))
    panels[1].set(xlabel="context, tokens", ylabel="peak memory, MB", xscale="log", ylim=(0, None))
    panels[0].legend()
    save(figure, path)


def draw_cache(rows: list[dict], path: Path) -> None:
    """What is lost against the bytes it takes: of the formats, and of windows in the first format."""
    figure, panels = pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
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
    save(figure, path)


def draw_decode(rows: list[dict], path: Path) -> None:
    """Tokens a second against the context, a panel a batch; transformers with its faster cache dashed."""
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    figure, panels = pyplot().subplots(
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
    save(figure, path)


def draw_compare(rows: list, key: str, path: Path) -> None:
    """Quality against cache, the frontier as a staircase, seeds as bars; the loss curve of each attention.

    rows: those of compare.py; key: the figure that stands for quality.
    """
    plt = pyplot()
    styles = styles_of(row["attention"] for row in rows)
    mosaic = [["quality", "tokens"], ["quality", "time"]]
    figure, panels = plt.subplot_mosaic(mosaic, figsize=(9, 4.6), width_ratios=(3, 2), layout="constrained")
    axes = panels["quality"]
    stairs = [(row[CACHE], row[key]) for row in rows if row.frontier]
    stairs.append((max(row[CACHE] for row in rows) * 1.25, stairs[-1][1]))
    axes.step(*zip(*stairs, strict=True), where="post", color="0.8", linewidth=3, zorder=0, label="frontier")
    for name, (colour, marker, line) in styles.items():
        look = dict(color=colour, marker=marker, linestyle=line, markersize=6)
        mine = [row for row in rows if row["attention"] == name]
        at = (
            [row[CACHE] for row in mine],
            [row[key] for row in mine],
            [row.spread(key) or 0.0 for row in mine],
        )
        axes.errorbar(*at, capsize=3, elinewidth=1, **look | {"linestyle": "none"})
        axes.plot([], [], label=name, **look)  # for the legend
        best = min(mine, key=lambda row: row[key]).runs[0]
        for panel, unit in (("tokens", 1e6), ("time", 60)):
            x, y = [e[panel] / unit for e in best.curve], [e["train/loss"] for e in best.curve]
            panels[panel].plot(x, y, color=colour, linestyle=line, linewidth=1.2)
    n = max(len(row.runs) for row in rows)
    bars = f"; bars: ± standard deviation, {n} seeds" if n > 1 else ""
    unit = "bits per byte" if key == "best/val_bpb" else "loss, nats a token"
    axes.set(xlabel="KV cache, bytes a token (bf16, all layers)", ylabel=f"val {unit}{bars}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.legend(loc="upper right", fontsize=8, handlelength=3)
    panels["tokens"].set(xlabel="training tokens, millions", ylabel="train loss")
    panels["time"].set(xlabel="training time, minutes", ylabel="train loss")
    losses = sorted(e["train/loss"] for row in rows for e in row.runs[0].curve)
    for name, panel in panels.items():
        panel.grid(alpha=0.3, linewidth=0.5)
        if losses and name != "quality":  # not the first steps, beside which the runs look alike
            panel.set_ylim(losses[0] - 0.05, losses[int(0.8 * (len(losses) - 1))] + 0.05)
    if len(rows) <= MOST_NAMES:
        name_points(figure, axes, rows, key)
    save(figure, path)


def name_points(figure, axes, rows: list, key: str) -> None:
    """Write names beside points, each where it covers least of points, bars, stairs and other names."""
    figure.canvas.draw()  # so that places in pixels are known
    frame, taken = axes.get_window_extent().extents, [axes.get_legend().get_window_extent().extents]
    pixels = axes.transData.transform([(row[CACHE], row[key]) for row in rows])
    for row, (x, y) in zip(rows, pixels, strict=True):
        bar = axes.transData.transform((row[CACHE], row[key] + (row.spread(key) or 0.0)))[1] - y
        taken += [(x - 8, y - 8, x + 8, y + 8), (x - 5, y - bar, x + 5, y + bar)]
    stairs = [at for row, at in zip(rows, pixels, strict=True) if row.frontier]
    stairs.append((frame[2], stairs[-1][1]))
    for (x0, y0), (x1, y1) in zip(stairs, stairs[1:], strict=False):
        taken += [(x0, y0 - 2, x1, y0 + 2), (x1 - 2, y1, x1 + 2, y0)]
    for row in rows:
        tries = []
        for dx, dy in product((8, -8, 0), (0, 8, -8, 16, -16)):
            align = {"ha": ("center", "left", "right")[(dx > 0) - (dx < 0)]}
            align["va"] = ("center", "bottom", "top")[(dy > 0) - (dy < 0)]
            place = dict(xytext=(dx, dy), textcoords="offset points", fontsize=8, **align)
            text = axes.annotate(row.name, (row[CACHE], row[key]), **place)
            box = text.get_window_extent().extents
            outside = overlap(box, box) - overlap(box, frame)
            tries.append((10 * outside + sum(overlap(box, other) for other in taken), len(tries), text, box))
        best = min(tries)
        taken.append(best[3])
        for other in tries:
            if other is not best:
                other[2].remove()


def overlap(a, b) -> float:
    """Area that two boxes (left, bottom, right, top) share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
