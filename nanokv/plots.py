"""Pictures: their common style, line plots for the tools, and the picture of compare.py."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

from nanokv.config import UserError

CACHE = "kv_cache/bytes_per_token"
MOST_NAMES = 30  # rows that are named in the picture of compare.py
# color, marker and line of each attention; each of the three identifies it
STYLES = {"mha": ("#000000", "o", "-"), "gqa": ("#0072b2", "^", "--")}
STYLES |= {"mqa": ("#e69f00", "s", ":"), "mla": ("#d55e00", "D", "-.")}
MORE_STYLES = (("#009e73", "v", (0, (5, 1))), ("#cc79a7", "P", (0, (1, 1))), ("#56b4e9", "X", (0, (8, 2))))


def pyplot() -> Any:
    """matplotlib.pyplot, with our settings. Raises UserError if it is not installed."""
    try:
        import adjustText  # noqa: F401 (for name_points)
        import matplotlib.pyplot as plt
    except ImportError as e:
        raise UserError("a picture needs packages: pip install matplotlib adjustText") from e
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "grid.linewidth": 0.5})
    plt.rcParams.update({"legend.fontsize": 8, "legend.handlelength": 3, "figure.constrained_layout.use": True})
    return plt


def save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)
    pyplot().close(figure)
    print(f"wrote {path}", file=sys.stderr)


def styles_of(attentions: Iterable[str]) -> dict[str, tuple]:
    """Color, marker and line of each attention, the known ones first and in their order."""
    names = set(attentions)
    new = dict(zip(sorted(names - set(STYLES)), cycle(MORE_STYLES)))  # noqa: B905 (one of them is endless)
    return {name: style for name, style in (STYLES | new).items() if name in names}


def draw_lines(path: Path, by: str, panels: list[tuple], **look) -> None:
    """A picture with a line for each value of rows[by] in each panel. A panel is: rows (dicts), their keys for x and y,
    and arguments of Axes.set. The x axis is in powers of two by default. A row's "name" is written beside its point.
    """
    figure, axes = pyplot().subplots(1, len(panels), figsize=(1 + 4 * len(panels), 3.5), squeeze=False)
    for axis, (rows, x, y, settings) in zip(axes[0], panels, strict=True):
        for i, (name, (color, marker, line)) in enumerate(styles_of(row[by] for row in rows).items()):
            points = sorted((row[x], row[y]) for row in rows if row[by] == name)
            hollow = dict(markerfacecolor="none", markersize=max(11 - 2 * i, 5))  # coinciding points show
            style = dict(color=color, marker=marker, linestyle=line, label=name) | hollow | look
            axis.plot(*zip(*points, strict=True), **style)
        if "xscale" not in settings:
            powers_of_two(axis)
        axis.set(**settings)
        axis.legend()
        if named := [(row[x], row[y], row["name"]) for row in rows if "name" in row]:
            name_points(axis, named)
    save(figure, path)


def powers_of_two(axis) -> None:
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def draw_compare(rows: list, key: str, path: Path) -> None:
    """The picture of compare.py's rows: quality (`key`) against cache, with the frontier as a staircase and the spread
    of seeds as bars; loss curves; and, if runs have it, the loss by the number of tokens before a target.
    """
    names = ["tokens", "time"] + ["context"] * any(row.losses_at() for row in rows)
    mosaic = [["quality", name] for name in names]
    figure, panels = pyplot().subplot_mosaic(mosaic, figsize=(9, 2.3 * len(names)), width_ratios=(3, 2))
    axes = panels["quality"]
    powers_of_two(axes)
    stairs = [(row[CACHE], row[key]) for row in rows if row.frontier]
    stairs.append((max(row[CACHE] for row in rows) * 1.25, stairs[-1][1]))
    axes.step(*zip(*stairs, strict=True), where="post", color="0.8", linewidth=3, zorder=0, label="frontier")
    for name, (color, marker, line) in styles_of(row["attention"] for row in rows).items():
        mine = [row for row in rows if row["attention"] == name]
        points = [(row[CACHE], row[key], row.spread(key) or 0.0) for row in mine]
        look = dict(color=color, marker=marker, markersize=6)
        axes.errorbar(*zip(*points, strict=True), capsize=3, elinewidth=1, linestyle="none", **look)
        axes.plot([], [], label=name, linestyle=line, **look)  # for the legend
        for losses in filter(None, (row.losses_at() for row in mine)):
            panels["context"].plot(
                *zip(*losses, strict=True), **look | dict(linestyle=line, linewidth=1.2, markersize=3)
            )
        best = min(mine, key=lambda row: row[key]).runs[0].curve
        for panel, unit in (("tokens", 1e6), ("time", 60)):
            x, y = [e[panel] / unit for e in best], [e["train/loss"] for e in best]
            panels[panel].plot(x, y, color=color, linestyle=line, linewidth=1.2)
    n = max(len(row.runs) for row in rows)
    bars = f"; bars: ± standard deviation, {n} seeds" if n > 1 else ""
    unit = "bits per byte" if key == "best/val_bpb" else "loss, nats a token"
    axes.set(xlabel="KV cache, bytes a token (bf16, all layers)", ylabel=f"val {unit}{bars}")
    axes.legend(loc="upper right")
    panels["tokens"].set(xlabel="training tokens, millions", ylabel="train loss")
    panels["time"].set(xlabel="training time, minutes", ylabel="train loss")
    if "context" in names:
        powers_of_two(panels["context"])
        panels["context"].set(xlabel="context, tokens (at most)", ylabel="val loss")
    if losses := sorted(e["train/loss"] for row in rows for e in row.runs[0].curve):
        for name in ("tokens", "time"):  # leave out the first steps: their range hides the differences between runs
            panels[name].set_ylim(losses[0] - 0.05, losses[int(0.8 * (len(losses) - 1))] + 0.05)
    if len(rows) <= MOST_NAMES:
        name_points(axes, [(row[CACHE], row[key], row.name) for row in rows])
    save(figure, path)


def name_points(axes, points: list[tuple[float, float, str]]) -> None:
    """Write a name beside each point (x, y, name), at a place where it covers no point, other name or legend."""
    from adjustText import adjust_text

    axes.figure.draw_without_rendering()  # so that the layout is final
    texts = [axes.text(*point, fontsize=8) for point in points]
    line = dict(arrowstyle="-", color="0.6", linewidth=0.5)  # joins a name that was moved to its point
    adjust_text(texts, objects=[axes.get_legend()], ax=axes, expand=(1.2, 1.6), iter_lim=500, arrowprops=line)
