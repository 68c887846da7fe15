"""compare.py: which runs it compares, what it says of them, and what it draws."""

import json
import os
import sys
import time
import types

import pytest

import compare
from nanokv import plots
from nanokv.config import UserError

FACTS = {"corpus_sha256": "c0ffee", "tokens": 4000, "step": 10, "params/total": 1000, "seed": 1}


def make_run(folder, attention="mha", bpb=1.5, cache=2048, config=None, lines=20, **summary):
    """A finished run as train.py leaves it; a summary value of None leaves that key out."""
    folder.mkdir(parents=True)
    summary = {
        **FACTS,
        "attention": attention,
        "kv_cache/bytes_per_token": cache,
        "kv_cache/ratio_to_mha": cache / 2048,
        **{f"{which}/{name}": bpb * factor for which in ("best", "final")
           for name, factor in (("val_loss", 2), ("val_bpb", 1))},
        "decode/tokens_per_s": 500.0,
        **summary,
    }  # fmt: skip
    summary = {key: value for key, value in summary.items() if value is not None}
    config = {"attention": attention, "seed": summary.get("seed"), "out_dir": str(folder), **(config or {})}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps(summary))
    with open(folder / "metrics.jsonl", "w") as f:
        for i in range(1, lines + 1):
            event = {"step": i, "tokens": 400 * i, "time": i / 2, "train/loss": 3 + 5 / i}
            f.write(json.dumps(event | {"train/tokens_per_s": 800.0 + i}) + "\n")
    return folder


def rows_of(*folders):
    return compare.make_rows(compare.read_all([lambda f=f: compare.read_folder(f) for f in folders]))


def test_seeds_are_one_row_and_other_runs_are_not(tmp_path):
    folders = [make_run(tmp_path / f"mha-s{i}", bpb=b, seed=i) for i, b in enumerate((1.5, 1.6, 1.4))]
    folders.append(make_run(tmp_path / "deep", bpb=1.3, cache=4096, config={"n_layer": 8}))
    folders.append(make_run(tmp_path / "long", bpb=1.2, tokens=8000))
    folders.append(make_run(tmp_path / "resplit", bpb=1.2, tokenizer_sha256="c0de"))
    rows = {row.name: row for row in rows_of(*folders)}
    assert rows.keys() == {"mha", "deep", "long", "resplit"}
    assert rows["mha"]["best/val_bpb"] == pytest.approx(1.5)
    assert rows["mha"].spread("best/val_bpb") == pytest.approx(0.1)
    assert rows["deep"].spread("best/val_bpb") is None
    assert compare.cells(rows["mha"])["bits/byte"] == "1.5000 ± 0.1000"
    assert compare.cells(rows["mha"])["train tok/s"] == "810"  # median of 801 .. 820


def test_a_run_that_was_resumed_is_the_same_experiment(tmp_path):
    a = make_run(tmp_path / "mla-1", config={"init_from": "scratch"})
    b = make_run(tmp_path / "mla-2", config={"init_from": "resume"}, seed=2)
    c = make_run(tmp_path / "other", config={"init_from": "out/mla"}, seed=3)
    assert sorted(len(row.runs) for row in rows_of(a, b, c)) == [1, 2]


def test_a_run_of_an_earlier_version_differs_by_no_knob_that_it_did_not_have(tmp_path):
    old = make_run(tmp_path / "mla-s1", "mla", config={"n_layer": 2})
    new = {"n_layer": 2, "kv_conv": None, "rope_scaling": None, "rope_factor": 1.0, "score_factor": 1.0}
    rows = rows_of(old, make_run(tmp_path / "mla-s2", "mla", config=new, seed=2, code_sha256="a" * 64))
    assert len(rows) == 2 and any("their code differs" in line for line in compare.warnings(rows))
    assert len(rows_of(old, make_run(tmp_path / "conv", "mla", config=new | {"kv_conv": 2}, seed=3))) == 2


def test_where_a_run_is_logged_is_not_part_of_the_experiment(tmp_path):
    knobs = [{"wandb_tags": [tag], "wandb_entity": tag, "wandb_group": tag} for tag in "ab"]
    (row,) = rows_of(*(make_run(tmp_path / f"mla-s{i}", config=knobs[i], seed=i) for i in range(2)))
    assert len(row.runs) == 2


ORIGIN = {
    "code_sha256": "a" * 64,
    "resolved/dtype": "float32",
    "resolved/device": "cpu",
    "resolved/backend": "cpu: norm in C",
}


@pytest.mark.parametrize("key", [*ORIGIN, "corpus_sha256"])
def test_seeds_of_different_origin_are_never_averaged(tmp_path, key):
    a, b = (make_run(tmp_path / f"mha-s{i}", seed=i, **ORIGIN) for i in (1, 2))
    (row,) = rows_of(a, b)
    assert "code" not in compare.table([row])[0] and compare.warnings([row]) == []
    assert compare.in_common([row]).endswith(
        "code aaaaaaaa; data c0ffee; dtype float32; device cpu; backend cpu: norm in C."
    )
    other = [make_run(tmp_path / f"mha-s{i}", seed=i, **ORIGIN | {key: "bfloat16"}) for i in (3, 4)]
    old = make_run(tmp_path / "mha-s5", seed=5)  # of a version that did not write these
    rows = rows_of(a, b, *other, old)
    assert sorted(len(row.runs) for row in rows) == [1, 2, 2]
    table = compare.table(rows)
    column = table[0].index({"corpus_sha256": "data", "code_sha256": "code"}.get(key, key.removeprefix("resolved/")))
    assert "bfloat16" in {line[column] for line in table[1:]}
    (apart,) = [line for line in compare.warnings(rows) if "their code differs" in line]
    assert "mha-s1 (aaaaaaaa)" in apart and "mha-s5 (unknown)" in apart
    lines = compare.warnings(rows_of(a, b, *other))
    assert any("their code differs" in line for line in lines) == (key == "code_sha256")


def test_bytes_that_do_not_grow_have_a_column_where_there_are_any(tmp_path):
    plain = make_run(tmp_path / "mha")
    assert "fixed B/row" not in compare.table(rows_of(plain))[0]
    titles, *lines = compare.table(rows_of(plain, make_run(tmp_path / "conv", **{"kv_cache/fixed_bytes": 1536})))
    assert {line[titles.index("fixed B/row")] for line in lines} == {"0", "1,536"}


def test_frontier_and_order(tmp_path):
    shapes = {"a": (256, 1.60), "b": (512, 1.55), "c": (512, 1.54), "d": (640, 1.54), "e": (2048, 1.50)}
    rows = rows_of(*(make_run(tmp_path / name, cache=c, bpb=b) for name, (c, b) in shapes.items()))
    assert [row.name for row in rows] == ["a", "c", "b", "d", "e"]
    assert [row.name for row in rows if row.frontier] == ["a", "c", "e"]
    assert compare.warnings(rows) == []


def test_loss_is_the_quality_where_a_run_has_no_bits_per_byte(tmp_path):
    a = make_run(tmp_path / "a", cache=256, **{"best/val_bpb": None, "best/val_loss": 0.1})
    b = make_run(tmp_path / "b", cache=512, **{"best/val_loss": 0.5})
    rows = rows_of(a, b)
    assert compare.quality_key(rows) == "best/val_loss"
    assert [row.frontier for row in rows] == [True, False]
    assert compare.cells(rows[0])["bits/byte"] == "-"


def test_what_is_not_comparable_is_named(tmp_path, capsys):
    usual = [make_run(tmp_path / f"run{i}", cache=256 * i) for i in range(1, 4)]
    data = make_run(tmp_path / "data", corpus_sha256="badc0de1234")
    short = make_run(tmp_path / "short", tokens=1234)
    big = make_run(tmp_path / "big", **{"params/total": 1011})
    near = make_run(tmp_path / "near", config={"n_layer": 3}, **{"params/total": 1010})
    lines = compare.warnings(rows_of(*usual, data, short, big, near))
    assert len(lines) == 3
    assert "other data" in lines[0] and "data (badc0de1)" in lines[0]
    assert "tokens" in lines[1] and "short (1,234)" in lines[1] and "4,000" in lines[1]
    assert "parameters" in lines[2] and "big (+1.1%)" in lines[2] and "near" not in lines[2]
    compare.main([*map(str, [*usual, big]), "--picture="])
    assert capsys.readouterr().err.startswith("warning: not comparable, parameters")


def test_what_is_no_run_gets_a_line_and_the_rest_is_compared(tmp_path, capsys):
    good = [make_run(tmp_path / "good1"), make_run(tmp_path / "good2", cache=512)]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "young").mkdir()
    (tmp_path / "young/config.json").write_text("{}")
    bad = {
        "empty": "no config.json",
        "file": "no such folder",
        "missing": "no such folder",
        "young": "before its first checkpoint",
        "half": "not finished; stopped, or still running, at step 10",
        "cut": "not valid JSON",
        "list": "no JSON object",
        "keys": "no attention, params/total",
        "text": "tokens should be a number",
        "zero": "kv_cache/bytes_per_token should be a number above 0",
    }
    make_run(tmp_path / "half", **{"final/val_loss": None})
    (make_run(tmp_path / "cut") / "summary.json").write_text('{"attention": "mh')
    (make_run(tmp_path / "list") / "summary.json").write_text("[1]")
    make_run(tmp_path / "keys", attention=None, **{"params/total": None})
    make_run(tmp_path / "text", tokens="many")
    make_run(tmp_path / "zero", cache=0)
    with open(good[0] / "metrics.jsonl", "ab") as f:
        f.write(b'[]\n{"train/loss": "high", "tokens": 1, "time": 2}\n{"train/loss": 1, "tok\xff')
    (good[1] / "metrics.jsonl").unlink()
    compare.main([*(str(tmp_path / name) for name in bad), *map(str, good), f"--picture={tmp_path / 'p.png'}"])
    out, err = capsys.readouterr()
    lines = err.splitlines()
    for line, (name, fault) in zip(lines, bad.items(), strict=False):
        assert line.startswith("left out ") and name in line and fault in line
    assert lines[len(bad) :] == [f"wrote {tmp_path / 'p.png'}"]
    assert [line.split()[0] for line in out.splitlines()[2:4]] == ["good2", "good1"]
    with pytest.raises(UserError, match="no finished run"):
        compare.main([str(tmp_path / "empty")])


def test_200_runs_of_10000_points_take_less_than_10_seconds(tmp_path):
    """As 200 folders that share the two files' contents, which are read 200 times all the same."""
    first = make_run(tmp_path / "run0", lines=10_000)
    summary, config = (json.loads((first / f"{name}.json").read_text()) for name in ("summary", "config"))
    folders = [first]
    for i in range(1, 200):
        folder = tmp_path / f"run{i}"
        folder.mkdir()
        os.link(first / "metrics.jsonl", folder / "metrics.jsonl")
        (folder / "config.json").write_text(json.dumps(config | {"n_embd": i}))
        (folder / "summary.json").write_text(json.dumps(summary | {"best/val_bpb": 1 + 1 / i}))
        folders.append(folder)
    begin = time.process_time()
    compare.main([*map(str, folders), "--format=json", f"--picture={tmp_path / 'p.png'}"])
    assert time.process_time() - begin < 10
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_markdown_and_json_say_what_the_text_says(tmp_path, capsys):
    folders = [str(make_run(tmp_path / f"mla-s{i}", "mla", 1.5 + i / 10, 640, seed=i)) for i in range(2)]
    tables = {}
    for style in ("text", "markdown", "json"):
        compare.main([*folders, f"--format={style}", "--picture="])
        tables[style] = capsys.readouterr().out
    header, _, row = [line.strip("| ").split(" | ") for line in tables["markdown"].splitlines()[:3]]
    assert [word for cell in row for word in cell.split()] == tables["text"].splitlines()[2].split()
    assert row[header.index("bits/byte")] == "1.5500 ± 0.0707"
    (entry,) = json.loads(tables["json"])["rows"]
    assert entry["best/val_bpb"] == pytest.approx(1.55) and entry["seeds"] == [0, 1] and entry["frontier"]


def test_the_table_goes_into_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- compare -->\nold\n<!-- /compare -->\nafter\n")
    run = str(make_run(tmp_path / "run"))
    compare.main([run, "--picture=", f"--into={page}"])
    once = page.read_text()
    assert once.startswith("before\n<!-- compare -->\n| run | attention |") and "old" not in once
    assert once.endswith("|\n\nAll runs: data c0ffee.\n<!-- /compare -->\nafter\n")
    compare.main([run, "--picture=", f"--into={page}"])
    assert page.read_text() == once
    page.write_text("no marks")
    with pytest.raises(UserError, match="has no lines"):
        compare.main([run, "--picture=", f"--into={page}"])


def test_names_in_the_picture_do_not_overlap(tmp_path):
    import matplotlib.pyplot as plt

    shapes = [(256, 1.53), (256, 1.531), (512, 1.52), (512, 1.519), (640, 1.515), (1024, 1.51), (2048, 1.5)]
    names = ["mha", "gqa", "mqa", "mla"]
    rows = rows_of(*(make_run(tmp_path / f"a-long-name-{i}", names[i % 4], b, c) for i, (c, b) in enumerate(shapes)))
    figure, axes = plt.subplots(figsize=(5, 4))
    axes.set_xscale("log", base=2)
    axes.plot([row["kv_cache/bytes_per_token"] for row in rows], [row["best/val_bpb"] for row in rows], "o")
    axes.legend(["runs"])
    plots.name_points(axes, [(row["kv_cache/bytes_per_token"], row["best/val_bpb"], row.name) for row in rows])
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    frame = axes.get_window_extent()
    assert len(boxes) == len(shapes)
    for i, box in enumerate(boxes):
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        assert box.count_overlaps(boxes[:i]) == 0
    plt.close(figure)


def test_a_panel_shows_the_loss_by_context_of_runs_that_have_it(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    a = [make_run(tmp_path / f"mha-s{i}", seed=i, **{"val/loss_at/32": 3.0 + i, "val/loss_at/16": 5.0}) for i in (1, 2)]
    b = make_run(tmp_path / "mla", "mla", cache=640, **{"val/loss_at/8": 4.0, "val/loss_at/16": None})
    old = make_run(tmp_path / "old", "mqa", cache=256, **{"val/loss_at/x": 1.0})
    plots.draw_compare(rows_of(*a, b, old), "best/val_bpb", tmp_path / "p.png")
    plots.draw_compare(rows_of(old), "best/val_bpb", tmp_path / "p.png")
    *_, panel = figures[0].axes
    assert panel.get_xlabel().startswith("context") and panel.get_xscale() == "log"
    lines = [list(zip(*line.get_data(), strict=True)) for line in panel.lines]
    assert sorted(lines) == [[(8, 4.0)], [(16, 5.0), (32, 4.5)]]
    assert [len(figure.axes) for figure in figures] == [4, 3]
    for figure in figures:
        plots.pyplot().close(figure)


def test_every_attention_has_a_look_of_its_own():
    styles = plots.styles_of(["gta", "mla", "mha", "new", "mqa", "gqa"])
    assert list(styles)[:4] == ["mha", "gqa", "mqa", "mla"] and set(styles) >= {"gta", "new"}
    for part in range(3):
        assert len({style[part] for style in styles.values()}) == 6


class FakeRun:
    def __init__(self, name, config, summary):
        self.name, self.id, self.config, self.summary = name, name + "-id", config, summary

    def history(self, samples, keys, pandas):
        assert not pandas
        return [{"tokens": 400 * i, "time": i, "train/loss": 3.0, "train/tokens_per_s": 7.0} for i in range(9)]


class FakeApi:
    def __init__(self, folder):
        self.folder = folder

    def runs(self, path):
        assert path == "team/nanokv"
        for run in sorted(self.folder.iterdir()):
            config, summary = (json.loads((run / f"{n}.json").read_text()) for n in ("config", "summary"))
            facts = {key: summary.pop(key) for key in ("attention", "corpus_sha256", *ORIGIN) if key in summary}
            yield FakeRun(run.name, config | {"git_sha": run.name} | facts, summary)


def test_runs_from_wandb_are_those_of_folders(tmp_path, capsys):
    for i in range(2):
        make_run(tmp_path / f"mla-s{i}", "mla", 1.4 + i / 10, 640, seed=i)
    make_run(tmp_path / "mha", "mha", 1.3)
    make_run(tmp_path / "running", "mha", **{"final/val_loss": None})
    runs = compare.read_all(compare.wandb_sources("team/nanokv", FakeApi(tmp_path)))
    assert "running: not finished" in capsys.readouterr().err
    rows = compare.make_rows(runs)
    folders = rows_of(*(tmp_path / name for name in ("mla-s0", "mla-s1", "mha")))
    ours, theirs = ([compare.cells(row) for row in table] for table in (folders, rows))
    for row in (*ours, *theirs):
        del row["train tok/s"]
    assert ours == theirs
    assert rows[0]["train/tokens_per_s"] == 7.0


def test_runs_from_wandb_are_kept_apart_by_code_as_those_of_folders(tmp_path):
    for i in range(4):
        make_run(tmp_path / f"mla-s{i}", "mla", seed=i, **ORIGIN | {"code_sha256": "ab"[i // 2] * 64})
    rows = compare.make_rows(compare.read_all(compare.wandb_sources("team/nanokv", FakeApi(tmp_path))))
    assert [len(row.runs) for row in rows] == [2, 2]
    assert any("their code differs" in line for line in compare.warnings(rows))


def test_wandb_faults_are_one_line(monkeypatch):
    class Broken:
        def runs(self, path):
            raise RuntimeError("no such project\nor no network")

    with pytest.raises(UserError, match="cannot read team/x from W&B: no such project or no network"):
        compare.wandb_sources("team/x", Broken())
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        compare.wandb_sources("team/x")


def test_workspace(tmp_path, monkeypatch):
    """Through stand-ins for wandb-workspaces' classes that keep what they were given."""
    saved = []

    class Kept(types.SimpleNamespace):
        def __init__(self, *args, **fields):
            super().__init__(args=args, **fields)

        def save(self):
            if self.args[0] == "offline":
                raise OSError("no network")
            saved.append(self)
            return types.SimpleNamespace(url="https://wandb.ai/team/nanokv?nw=1")

    with monkeypatch.context() as without:
        without.setitem(sys.modules, "wandb_workspaces", None)
        with pytest.raises(UserError, match="pip install wandb-workspaces"):
            compare.save_workspace("team/nanokv", [])
    for name, classes in {
        "wandb_workspaces": [],
        "wandb_workspaces.reports": [],
        "wandb_workspaces.reports.v2": ["SummaryMetric", "Metric", "ScatterPlot", "LinePlot"],
        "wandb_workspaces.workspaces": ["Section", "RunSettings", "RunsetSettings", "Workspace"],
    }.items():
        module = types.ModuleType(name)
        for one in classes:
            setattr(module, one, Kept)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    for i, attention in enumerate(("mha", "mla", "mla")):
        make_run(tmp_path / f"run{i}", attention)
    runs = compare.read_all(compare.wandb_sources("team/nanokv", FakeApi(tmp_path)))
    assert compare.save_workspace("team/nanokv", runs).startswith("https://")
    (workspace,) = saved
    scatter = workspace.args[3][0].panels[0]
    assert scatter.x.args == ("kv_cache/bytes_per_token",) and scatter.y.args == ("best/val_bpb",)
    colours = {run: settings.color for run, settings in workspace.runset_settings.run_settings.items()}
    assert colours["run0-id"] != colours["run1-id"] == colours["run2-id"]
    with pytest.raises(UserError, match="cannot save a workspace in offline/x: no network"):
        compare.save_workspace("offline/x", runs)


@pytest.mark.parametrize(
    "argv,fault",
    [
        ([], "name run folders"),
        (["out/a", "--wandb=team/x"], "name run folders"),
        (["--wandb=team"], "ENTITY/PROJECT"),
        (["out/a", "--workspace"], "--wandb=ENTITY/PROJECT"),
        (["out/a", "--format=html"], "markdown"),
        (["out/a", "--pictures=x"], "did you mean 'picture'"),
    ],
)
def test_faults_on_the_command_line(argv, fault):
    with pytest.raises(UserError, match=fault):
        compare.main(argv)
