"""Run folders and a data set that earlier versions wrote still resume, sample, compare and convert.

tests/runs/ holds runs of six steps each, stopped at step 3 but with the summary of the end: an mla and a gqa with
a window, of commit b132cf5, on the data of the `corpus` fixture; and `bpe`, of commit d771343, on tests/sets/bpe.
That was the last commit at which bpe split numbers by two digits, and kept a newline with the indent after it.
"""

import json
import shutil
from pathlib import Path

import pytest

import compare
import train
from data.text import prepare
from nanokv import tokenizer
from nanokv.dataset import Dataset
from nanokv.generate import generate_lists
from sample import load_run
from tools import convert

OLD_BPE = Path(__file__).with_name("sets") / "bpe"
RUNS = sorted(Path(__file__).with_name("runs").iterdir())
OLD_TEXT = "\n        return 1990  # it's\n"
OLD_IDS = [10, 293, 281, 32, 303, 367, 32, 276, 289, 282, 10]  # 303 and 367 are 19 and 90
every_run = pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)


@every_run
def test_it_resumes_to_the_same_end(run, corpus, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    expected = json.loads((run / "summary.json").read_text())
    dataset = OLD_BPE if run.name == "bpe" else corpus
    where = [f"--out_dir={tmp_path / 'run'}", f"--dataset={dataset}", "--init_from=resume"]
    summary = train.train(where)
    assert summary["step"] == 6
    for key in ("final/val_loss", "final/val_bpb", "kv_cache/bytes_per_token", "params/total", "flops"):
        assert summary[key] == pytest.approx(expected[key], rel=1e-5), key


@every_run
def test_it_samples(run):
    model, tok = load_run(run, device="cpu", dtype="float32")
    (ids,) = generate_lists(model, [tok.encode_ordinary("the cat")], 20, temperature=0)
    assert len(ids) == 20 and tok.decode(ids)


def test_they_compare(capsys):
    compare.main([*map(str, RUNS), "--picture="])
    table = capsys.readouterr().out
    assert "mla" in table and "gqa" in table and "7.91" in table


@pytest.mark.parametrize("name", ["mla", "bpe"])
def test_it_converts(name, tmp_path):
    (run,) = (run for run in RUNS if run.name == name)
    convert.main(["to-hf", str(run), str(tmp_path / "hf")])
    convert.main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "back")])
    (ours, tok), (back, _) = (load_run(path, device="cpu", dtype="float32") for path in (run, tmp_path / "back"))
    assert all((a == b).all() for a, b in zip(ours.parameters(), back.parameters(), strict=True))
    text = OLD_TEXT if name == "bpe" else "the cat"
    assert tokenizer.load(tmp_path / "back").encode_ordinary(text) == tok.encode_ordinary(text)


@pytest.mark.parametrize("folder", [OLD_BPE, *(run for run in RUNS if run.name == "bpe")], ids=["set", "run"])
def test_an_old_bpe_encodes_as_before(folder):
    assert tokenizer.load(folder).encode_ordinary(OLD_TEXT) == OLD_IDS


def test_a_set_prepared_under_an_old_tokenizer_has_the_same_tokens(tmp_path):
    old = Dataset(OLD_BPE)
    parts = (old.tokenizer.decode(split.read(0, 10**6).tolist()) for split in (old.train, old.val))
    text = "".join(part.removeprefix("<|endoftext|>") for part in parts)
    (tmp_path / "text.txt").write_bytes(text.encode())
    flags = [f"--input={tmp_path / 'text.txt'}", f"--tokenizer={OLD_BPE}", "--val_fraction=0.2"]
    prepare.main([*flags, f"--out_dir={tmp_path / 'set'}"])
    new = Dataset(tmp_path / "set")
    assert new.meta == old.meta
    assert (new.train.read(0, 10**6) == old.train.read(0, 10**6)).all()
