"""Compare runs: how much quality does each byte of KV cache buy? `python compare.py out/*`

Prints a table sorted by cache and draws the picture. A * marks the Pareto frontier: no other run is as good with as
few bytes. Runs that differ only in their seed are one row: mean ± standard deviation over seeds. Runs that differ in
code, data, dtype, device or backend are separate rows: a column shows the difference, and a line what all share.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeGuard

from model import GPTConfig
from nanokv import checkpoint
from nanokv.config import UserError, cli, parse
from nanokv.plots import CACHE, draw_compare, styles_of

USAGE = """python compare.py RUN_FOLDER... [--key=value ...]

The table goes to standard output. What cannot be compared is named on standard error, a line each."""
REQUIRED = ("attention", "tokens", "params/total", "kv_cache/bytes_per_token", "kv_cache/ratio_to_mha")
REQUIRED += ("best/val_loss", "final/val_loss")  # final/val_loss is written when a run ends
MEASURED = ("best/val_loss", "best/val_bpb", "decode/tokens_per_s", "train/tokens_per_s")
NOT_THE_EXPERIMENT = {"seed", "out_dir", "overwrite", "wandb_log", "wandb_project", "wandb_run_name", "match_params"}
NOT_THE_EXPERIMENT |= {"wandb_entity", "wandb_group", "wandb_tags"}
ORIGIN = {"code": "code_sha256", "data": "corpus_sha256"}  # column: key of what produced a row's figures
ORIGIN |= {what: f"resolved/{what}" for what in ("dtype", "device", "backend")}  # not the knobs, which may be auto
DEFAULTS = {field.name: field.default for field in fields(GPTConfig)}  # of knobs that earlier versions did not have
LOSS_AT = re.compile(r"val/loss_at/(\d+)")
CURVE_POINTS = 400  # points that are read of a curve; a picture cannot show more
MARK = b'"train/loss"'  # marks the lines of metrics.jsonl that are points of the curve


@dataclass
class Options:
    format: Literal["text", "markdown", "json"] = "text"  # of the table
    picture: str = "compare.png"  # file of the picture; empty: no picture
    into: str = ""  # a Markdown file: the table replaces its text from <!-- compare --> to <!-- /compare -->
    wandb: str = ""  # ENTITY/PROJECT: the finished runs of a W&B project instead of folders
    workspace: bool = False  # also save a workspace with the scatter panel in that project


@dataclass
class Run:
    name: str
    config: dict
    summary: dict  # the keys of metrics.jsonl, last values, and the facts of the run
    curve: list[dict]  # training events in order, thinned: tokens, time, train/loss, train/tokens_per_s
    id: str = ""  # in W&B

    def __post_init__(self):
        missing = [key for key in REQUIRED if self.summary.get(key) is None]
        if missing == ["final/val_loss"]:
            step = self.summary.get("step")
            raise UserError(f"{self.name}: not finished; stopped, or still running, at step {step}")
        if missing:
            raise UserError(f"{self.name}: its summary has no {', '.join(missing)}")
        bad = [key for key in REQUIRED[1:] if not is_number(self.summary[key])]
        if bad or not self.summary[CACHE] > 0 or not self.summary["params/total"] > 0:
            raise UserError(f"{self.name}: {', '.join(bad) or CACHE} should be a number above 0")
        numbers = ("tokens", "time", "train/loss")
        self.curve = [event for event in self.curve if all(is_number(event.get(key)) for key in numbers)]
        if rates := [rate for e in self.curve if is_number(rate := e.get("train/tokens_per_s"))]:
            self.summary = self.summary | {"train/tokens_per_s": statistics.median(rates)}


@dataclass
class Row:
    """Runs that differ only in their seed."""

    runs: list[Run]
    experiment: str  # their knobs and sizes; rows with the same ones differ only in ORIGIN
    name: str = ""
    frontier: bool = False

    def __post_init__(self):
        names = [Path(run.name).name for run in self.runs]
        self.name = names[0]
        if len(names) > 1:  # the common part of the names: mla for mla-s1 and mla-s2
            self.name = re.sub(r"[-_.]*(seed|s)?[-_.]*$", "", os.path.commonprefix(names)) or names[0]

    def __getitem__(self, key: str) -> Any:
        """For a key in MEASURED: the mean over seeds, None if no run has it. For others: the first run's value."""
        if key not in MEASURED:
            return self.runs[0].summary.get(key)
        return statistics.fmean(values) if (values := self.values(key)) else None

    def values(self, key: str) -> list[float]:
        """The values of `key` in the runs that have it."""
        return [value for run in self.runs if is_number(value := run.summary.get(key))]

    def spread(self, key: str) -> float | None:
        """Sample standard deviation over seeds; None for a single run."""
        return statistics.stdev(values) if len(values := self.values(key)) > 1 else None

    def losses_at(self) -> list[tuple[int, float]]:
        """The mean over seeds of `val/loss_at/N`, by N, at the last evaluation; empty for runs of earlier versions."""
        found = [match for run in self.runs for match in map(LOSS_AT.fullmatch, run.summary) if match]
        ends = sorted({int(match[1]) for match in found})
        means = {end: self.values(f"val/loss_at/{end}") for end in ends}
        return [(end, statistics.fmean(values)) for end, values in means.items() if values]


def is_number(value) -> TypeGuard[float]:
    return type(value) in (int, float) and abs(value) < float("inf")


def read_folder(path: Path) -> Run:
    config = checkpoint.read_config(path)
    if not (path / "summary.json").exists():
        raise UserError(f"{path}: stopped before its first checkpoint, it has no summary.json")
    summary = checkpoint.read_json(path / "summary.json")
    if not isinstance(summary, dict):
        raise UserError(f"{path}: damaged, summary.json is no JSON object")
    return Run(str(path), config, summary, read_curve(path / "metrics.jsonl"))


def read_curve(path: Path) -> list[dict]:
    """Training events of a metrics.jsonl: about CURVE_POINTS of them, the last included."""
    lines = [line for line in path.read_bytes().splitlines() if MARK in line] if path.exists() else []
    events = []
    for line in reversed(lines[:: -max(len(lines) // CURVE_POINTS, 1)]):
        with suppress(ValueError):  # a line cut short when the run was killed
            events.append(json.loads(line))
    return [event for event in events if isinstance(event, dict)]


@contextmanager
def wandb_errors(task: str) -> Iterator[None]:
    """Turns W&B's errors into UserErrors: no package, no key, no network, no such project."""
    try:
        yield
    except ImportError as e:
        package = str(e.name).partition(".")[0].replace("_", "-")
        raise UserError(f"cannot {task} without a package: pip install {package}") from e
    except Exception as e:  # of several libraries
        raise UserError(f"cannot {task}: {one_line(e)}") from e


def wandb_sources(project: str, api=None) -> list[Callable[[], Run]]:
    """The runs of ENTITY/PROJECT; `api` takes the place of wandb.Api(). Raises UserError."""
    with wandb_errors(f"read {project} from W&B"):
        import wandb

        return [partial(read_wandb, run) for run in (api or wandb.Api(timeout=20)).runs(project)]


def read_wandb(run) -> Run:
    keys = ["tokens", "time", "train/loss", "train/tokens_per_s"]
    with wandb_errors(f"read {run.name} from W&B"):
        config, summary = dict(run.config), dict(run.summary)
        curve = run.history(samples=CURVE_POINTS, keys=keys, pandas=False)
    return Run(run.name, config, config | summary, curve, run.id)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def read_all(sources: list[Callable[[], Run]]) -> list[Run]:
    """The runs that can be compared; a line on standard error for each source that raises a UserError instead."""
    runs = []
    for source in sources:
        try:
            runs.append(source())
        except UserError as e:
            print(f"left out {one_line(e)}", file=sys.stderr)
    if not runs:
        raise UserError("no finished run to compare; name run folders, such as out/*")
    return runs


def make_rows(runs: list[Run]) -> list[Row]:
    """Group runs into rows, sorted by cache and then by quality, with the Pareto frontier marked."""
    groups, repeats = {}, Counter()
    for run in runs:
        knobs = DEFAULTS | run.config  # W&B's config has facts beside the knobs, such as git_sha and params/total
        experiment = {k: v for k, v in knobs.items() if k not in NOT_THE_EXPERIMENT and not re.search("/|_sha", k)}
        if experiment.get("init_from") == "resume":  # a resumed run keeps the init_from of its start
            experiment["init_from"] = "scratch"
        sizes, origin = (
            [run.summary.get(key) for key in keys] for keys in (("tokenizer_sha256", "tokens", CACHE), ORIGIN.values())
        )
        same, seed = json.dumps([experiment, sizes], sort_keys=True, default=str), run.summary.get("seed")
        key = same, str(origin), seed
        groups.setdefault((*key[:2], repeats[key]), []).append(run)
        repeats[key] += 1  # a second run of the same seed is a repetition and gets its own row
    rows = [Row(group, same) for (same, *_), group in groups.items()]
    for row in rows:
        if sum(other.name == row.name for other in rows) > 1:
            row.name = row.runs[0].name
    key = quality_key(rows)
    rows.sort(key=lambda row: (row[CACHE], row[key]))
    best = float("inf")
    for row in rows:
        row.frontier = row[key] < best
        best = min(best, row[key])
    return rows


def quality_key(rows: list[Row]) -> str:
    """Bits per byte, which can be compared across tokenizers; the loss if the data is not text."""
    return "best/val_bpb" if all(row["best/val_bpb"] is not None for row in rows) else "best/val_loss"


def warnings(rows: list[Row]) -> list[str]:
    """Why rows are not comparable, a line for each reason. Each row is compared with the most common value."""
    lines = []
    for key, what in (("corpus_sha256", "other data"), ("tokens", "another number of tokens")):
        usual = statistics.mode(row[key] for row in rows)
        if odd := [f"{row.name} ({shorten(row[key])})" for row in rows if row[key] != usual]:
            lines.append(f"not comparable, {what} than the rest ({shorten(usual)}): {', '.join(odd)}")
    codes = Counter(experiment for experiment, _ in {(row.experiment, row["code_sha256"]) for row in rows})
    apart = [row for row in rows if codes[row.experiment] > 1]
    if odd := [f"{row.name} ({shorten(row['code_sha256'] or 'unknown')})" for row in apart]:
        lines.append(f"rows kept apart because their code differs: {', '.join(odd)}")
    middle = statistics.median_low(row["params/total"] for row in rows)
    off = {row.name: row["params/total"] - middle for row in rows}
    if odd := [f"{name} ({n / middle:+.1%})" for name, n in off.items() if abs(n) > 0.01 * middle]:
        lines.append(f"not comparable, parameters more than 1 % off the median {middle:,}: {', '.join(odd)}")
    return lines


def shorten(value) -> str:
    return f"{value:,}" if is_number(value) else str(value)[:8]


def cells(row: Row) -> dict[str, str]:
    """A row of the table, by column."""

    def measured(key: str, digits: str, spread: bool = True) -> str:
        if row[key] is None:
            return "-"
        deviation = row.spread(key) if spread else None
        return f"{row[key]:{digits}}" + ("" if deviation is None else f" ± {deviation:{digits}}")

    return {
        "run": row.name + (" *" if row.frontier else ""),
        "attention": row["attention"],
        "parameters": f"{row['params/total']:,}",
        "cache B/token": f"{row[CACHE]:,}",
        "fixed B/row": f"{row['kv_cache/fixed_bytes'] or 0:,}",  # the last tokens that kv_conv keeps
        "of MHA": f"{row['kv_cache/ratio_to_mha']:.1%}",
        "val loss": measured("best/val_loss", ".4f"),
        "bits/byte": measured("best/val_bpb", ".4f"),
        "seeds": str(len(row.runs)),
        "decode tok/s": measured("decode/tokens_per_s", ",.0f", spread=False),
        "train tok/s": measured("train/tokens_per_s", ",.0f", spread=False),
    }


def origins(rows: list[Row]) -> list[dict[str, str]]:
    """The code, data, dtype, device and backend of each row, by column; "-" if unknown."""
    names = [{title: str(row[key] or "-") for title, key in ORIGIN.items()} for row in rows]
    return [name | {hashed: name[hashed][:8] for hashed in ("code", "data")} for name in names]


def table(rows: list[Row]) -> list[list[str]]:
    """The titles of the columns, and a line for each row. Leaves out origins that all rows share, and zero columns."""
    lines = [cells(row) | origin for row, origin in zip(rows, origins(rows), strict=True)]
    used = {title: {line[title] for line in lines} for title in lines[0]}
    same = {title for title in ORIGIN if len(used[title]) == 1} | {title for title in used if used[title] == {"0"}}
    titles = [title for title in used if title not in same]
    return [titles, *([line[title] for title in titles] for line in lines)]


def in_common(rows: list[Row]) -> str:
    """The origins that all rows share, as a paragraph to follow the table; empty if there are none."""
    first, *others = origins(rows)
    same = {title: name for title, name in first.items() if all(other[title] == name for other in others)}
    shared = [f"{title} {name}" for title, name in same.items() if name != "-"]
    return f"\n\nAll runs: {'; '.join(shared)}." if shared else ""


def as_text(rows: list[Row]) -> str:
    columns = [list(column) for column in zip(*table(rows), strict=True)]
    for i, (title, *column) in enumerate(columns):
        width, pad = max(map(len, columns[i])), str.ljust if i < 2 else str.rjust
        columns[i] = [pad(cell, width) for cell in (title, "-" * width, *column)]
    return "\n".join(map("  ".join, zip(*columns, strict=True)))


def markdown(lines: list[list[str]], words: int = 1) -> str:
    """A table whose first line has the titles; all but the first `words` columns are numbers."""
    sides = ["---"] * words + ["---:"] * (len(lines[0]) - words)
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], sides, *lines[1:]))


def as_json(rows: list[Row]) -> str:
    facts = [*REQUIRED[:5], "kv_cache/elements_per_token_layer", "params/non_embedding", "dataset"]
    facts += [*ORIGIN.values(), "decode/context"]
    out = []
    for row in rows:
        entry = {"name": row.name, "frontier": row.frontier, "runs": [run.name for run in row.runs]}
        entry["seeds"] = [run.summary.get("seed") for run in row.runs]
        entry |= {key: row[key] for key in (*facts, *MEASURED)}
        out.append(entry | {f"{key}/spread": row.spread(key) for key in MEASURED})
    return json.dumps({"rows": out, "warnings": warnings(rows)}, indent=2)


def put_into(path: Path, table: str, mark: str = "compare") -> None:
    """Replace the table in a Markdown file. Raises UserError if the file has no marks around a table."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    if not 0 <= text.find(begin) < text.find(end):
        raise UserError(f"{path} has no lines {begin} and {end}, between which the table goes")
    head, tail = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    path.write_text(f"{head}\n{table}\n{tail}", encoding="utf-8")


def save_workspace(project: str, runs: list[Run]) -> str:
    """Save a view of ENTITY/PROJECT with the scatter panel, runs colored by attention; returns its address.

    Raises UserError.
    """
    with wandb_errors(f"save a workspace in {project}"):
        import wandb_workspaces.reports.v2 as panels  # pyright: ignore[reportMissingImports]
        import wandb_workspaces.workspaces as workspaces  # pyright: ignore[reportMissingImports]

        styles = styles_of(run.summary["attention"] for run in runs)
        x, y = panels.SummaryMetric(CACHE), panels.SummaryMetric("best/val_bpb")
        scatter = panels.ScatterPlot(title="quality against cache", x=x, y=y, log_x=True)
        curves = [panels.LinePlot(x=panels.Metric(x), y=["val/loss"]) for x in ("tokens", "time")]
        section = workspaces.Section(name="Comparison", panels=[scatter, *curves], is_open=True)
        colors = {run.id: workspaces.RunSettings(color=styles[run.summary["attention"]][0]) for run in runs}
        settings, names = workspaces.RunsetSettings(run_settings=colors), project.split("/")
        workspace = workspaces.Workspace(*names, "Quality against cache", [section], runset_settings=settings)
        return workspace.save().url


def main(argv: list[str]) -> None:
    options = parse(Options, [arg for arg in argv if arg.startswith("-")], USAGE)
    folders = [Path(arg) for arg in argv if not arg.startswith("-")]
    if options.workspace and not options.wandb:
        raise UserError("--workspace belongs to a W&B project; name it with --wandb=ENTITY/PROJECT")
    if bool(folders) == bool(options.wandb):
        raise UserError("name run folders, such as out/*, or else --wandb=ENTITY/PROJECT")
    if options.wandb and not re.fullmatch(r"[^/\s]+/[^/\s]+", options.wandb):
        raise UserError(f"--wandb should be ENTITY/PROJECT, not {options.wandb}")
    runs = read_all(wandb_sources(options.wandb) if options.wandb else [partial(read_folder, f) for f in folders])
    rows = make_rows(runs)
    page = markdown(table(rows), words=2) + in_common(rows)
    print({"text": as_text(rows) + in_common(rows), "markdown": page, "json": as_json(rows)}[options.format])
    for line in warnings(rows):
        print(f"warning: {line}", file=sys.stderr)
    if options.into:
        put_into(Path(options.into), page)
    if options.picture:
        draw_compare(rows, quality_key(rows), Path(options.picture))
    if options.workspace:
        print(f"wrote {save_workspace(options.wandb, runs)}", file=sys.stderr)


if __name__ == "__main__":
    cli(main)
