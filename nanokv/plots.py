"""Pictures: how all of them look, and those of bench.py."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

from nanokv.cache import CACHE_FORMATS
from nanokv.config import UserError

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
