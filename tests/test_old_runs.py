"""Run folders that an earlier version wrote (commit b132cf5) still resume, sample, compare and convert.

tests/runs/ holds two of six steps each, stopped at step 3 but with the summary of the end: an mla, and a gqa
with a window. Their data is that of the `corpus` fixture.
"""

import json
import shutil
from pathlib import Path

import pytest

import compare
import train
from nanokv.generate import generate_lists
from sample import load_run
from tools import convert

RUNS = sorted(Path(__file__).with_name("runs").iterdir())
every_run = pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)


@every_run
def test_it_resumes_to_the_same_end(run, corpus, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    expected = json.loads((run / "summary.json").read_text())
    where = [f"--out_dir={tmp_path / 'run'}", f"--dataset={corpus}", "--init_from=resume"]
    summary = train.train(where)
    assert summary["step"] == 6
    for key in ("final/val_loss", "final/val_bpb", "kv_cache/bytes_per_token", "params/total", "flops"):
        assert summary[key] == pytest.approx(expected[key], rel=1e-5), key


@every_run
def test_it_samples(run):
    model, tokenizer = load_run(run, device="cpu", dtype="float32")
    (ids,) = generate_lists(model, [tokenizer.encode_ordinary("the cat")], 20, temperature=0)
    assert len(ids) == 20 and tokenizer.decode(ids)


def test_they_compare(capsys):
    compare.main([*map(str, RUNS), "--picture="])
    table = capsys.readouterr().out
    assert "mla" in table and "gqa" in table and "7.91" in table


def test_it_converts(tmp_path):
    (mla,) = (run for run in RUNS if run.name == "mla")
    convert.main(["to-hf", str(mla), str(tmp_path / "hf")])
    convert.main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "back")])
    ours, back = (load_run(path, device="cpu", dtype="float32")[0] for path in (mla, tmp_path / "back"))
    assert all((a == b).all() for a, b in zip(ours.parameters(), back.parameters(), strict=True))
