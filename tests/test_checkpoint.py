"""Checkpoints: whole or not at all, verified when read, and never code."""

import concurrent.futures
import json
import math
import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
from conftest import split_knobs

from nanokv import checkpoint
from nanokv.checkpoint import Checkpoint
from nanokv.config import UserError
from train import read_knobs

ROOT = Path(__file__).parent.parent


def example(step: int) -> Checkpoint:
    state = {"step": step, "samples": 4 * step, "time": 1.5, "evaluated": None, "best": {}}
    state |= {"skipped_steps": 0, "corpus_sha256": "ab", "scaler": {}}
    return Checkpoint({"w": torch.full((4, 3), float(step))}, {"w.momentum": torch.randn(4, 3)}, state)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    saved = example(7)
    checkpoint.save(tmp_path, "last", saved)
    loaded = checkpoint.load(tmp_path, "last")
    assert loaded.state == saved.state
    assert torch.equal(loaded.model["w"], saved.model["w"])
    assert torch.equal(loaded.optimizer["w.momentum"], saved.optimizer["w.momentum"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last"]
    for path in (tmp_path / "last").iterdir():
        os.truncate(path, 0)  # what is loaded no longer needs it
    assert torch.equal(loaded.model["w"], saved.model["w"])


@pytest.mark.parametrize("call", range(1, 40))
def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path, monkeypatch, call):
    """Every call that changes the folder is counted; the process 'dies' in one of them."""
    checkpoint.save(tmp_path, "last", example(1))
    calls = 0

    def dying(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls >= call:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return wrapper

    for owner, name in ((Path, "rename"), (Path, "mkdir"), (os, "replace"), (os, "fsync"), (checkpoint, "save_file")):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    monkeypatch.setattr(checkpoint.shutil, "rmtree", dying(checkpoint.shutil.rmtree))
    try:
        checkpoint.save(tmp_path, "last", example(2))
        finished = True
    except KeyboardInterrupt:
        finished = False
    monkeypatch.undo()
    loaded = checkpoint.load(tmp_path, "last")
    assert loaded.state["step"] == 2 if finished else loaded.state["step"] in (1, 2)
    assert loaded.model["w"][0, 0] == loaded.state["step"]
    checkpoint.save(tmp_path, "last", example(3))
    assert checkpoint.load(tmp_path, "last").state["step"] == 3


@pytest.mark.parametrize("part", [*checkpoint.PARTS, "manifest.json"])
@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "pickle"])
def test_damage_is_refused_in_one_line(tmp_path, part, how):
    checkpoint.save(tmp_path, "last", example(1))
    damage(tmp_path / "last" / part, how)
    with pytest.raises(UserError) as fault:
        checkpoint.load(tmp_path, "last")
    assert "\n" not in str(fault.value) and part in str(fault.value)
    assert not (tmp_path / "bang").exists()


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif how == "missing":
        path.unlink()
    else:
        path.write_bytes(pickle.dumps(Bomb(path.parents[1] / "bang")))


@pytest.mark.parametrize("part", [*checkpoint.PARTS, "manifest.json"])
@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "pickle"])
def test_a_damaged_last_falls_back_to_the_newest_that_is_whole(tmp_path, capsys, part, how):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, "last", example(step))
    damage(tmp_path / "last" / part, how)
    loaded = checkpoint.load_newest(tmp_path)
    assert loaded.state["step"] == loaded.model["w"][0, 0] == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "last.old, step 2" in line and "is damaged" in line and str(tmp_path / "last/") in line and part in line
    checkpoint.save(tmp_path, "best", example(3))  # newer than last's predecessor
    assert checkpoint.load_newest(tmp_path).state["step"] == 3
    checkpoint.save(tmp_path, "last", example(4))
    capsys.readouterr()
    assert checkpoint.load_newest(tmp_path).state["step"] == 4
    for name in ("last", "best"):
        damage(tmp_path / name / part, how)
    with pytest.raises(UserError, match="damaged.* no other is whole"):
        checkpoint.load_newest(tmp_path)
    assert not (tmp_path / "bang").exists() and capsys.readouterr().err == ""


def test_what_a_killed_save_leaves_is_finished_or_cleared(tmp_path):
    checkpoint.save(tmp_path, "last", example(1))
    (tmp_path / "last.new").mkdir()  # killed early: no manifest
    (tmp_path / "last.new/model.safetensors").write_bytes(b"half")
    assert checkpoint.load_newest(tmp_path).state["step"] == 1
    checkpoint.save(tmp_path, "last", example(2))
    shutil.copytree(tmp_path / "last", tmp_path / "kept")
    checkpoint.save(tmp_path, "last", example(3))
    (tmp_path / "last").rename(tmp_path / "last.new")  # killed late: whole, not swapped in
    (tmp_path / "kept").rename(tmp_path / "last")
    assert checkpoint.load_newest(tmp_path).state["step"] == 3
    (tmp_path / "last.new/keep").touch()
    with pytest.raises(UserError, match="step 4 is not saved"):
        checkpoint.save(tmp_path, "last", nan(4))
    assert checkpoint.load_newest(tmp_path).state["step"] == 3
    checkpoint.save(tmp_path, "last", example(4))
    assert checkpoint.load(tmp_path, "last").state["step"] == 4
    assert (tmp_path / "last.old/keep").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "last.old"]


def nan(step: int) -> Checkpoint:
    broken = example(step)
    broken.model["w"][2, 1] = math.nan
    return broken


def test_a_saver_saves_what_was_when_it_was_called(tmp_path, monkeypatch):
    go = threading.Event()
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args: (go.wait(10), save(*args)))
    saver, saved = checkpoint.Saver(tmp_path), example(1)
    saver.save(["best", "last"], saved)
    assert not list(tmp_path.iterdir())  # it did not wait
    saved.model["w"] += 1
    saved.optimizer["w.momentum"].zero_()
    saved.state["step"] = 2
    go.set()
    saver.wait()
    for name in ("best", "last"):
        loaded = checkpoint.load(tmp_path, name)
        assert loaded.state["step"] == loaded.model["w"][0, 0] == 1 and loaded.optimizer["w.momentum"].any()


@pytest.mark.parametrize("call", ["check", "wait", "save"])
def test_what_a_saver_cannot_write_is_raised_by_its_next_call(tmp_path, call):
    saver = checkpoint.Saver(tmp_path / "run")
    saver.save(["last"], example(1))  # there is no such folder
    concurrent.futures.wait([saver.pending])
    with pytest.raises(UserError, match="cannot write .*last: No such file"):
        saver.save(["last"], example(2)) if call == "save" else getattr(saver, call)()
    saver.wait()  # said once


def test_a_disk_that_does_not_hold_what_was_written(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, "last", example(1))
    save_file = checkpoint.save_file

    def flipping(tensors, path):
        save_file(tensors, path)
        damage(Path(path), "flipped")

    monkeypatch.setattr(checkpoint, "save_file", flipping)
    with pytest.raises(UserError, match="does not hold what was written"):
        checkpoint.save(tmp_path, "last", example(2))
    assert checkpoint.load_newest(tmp_path).state["step"] == 1


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("part", ["model.safetensors", "optimizer.safetensors"])
def test_a_pickle_that_the_manifest_vouches_for_is_refused(tmp_path, part):
    checkpoint.save(tmp_path, "last", example(1))
    path = tmp_path / "last" / part
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "bang")))
    pickle.loads(path.read_bytes())  # the bomb works
    (tmp_path / "bang").unlink()
    manifest = json.loads((tmp_path / "last/manifest.json").read_text())
    manifest[part] = checkpoint._fingerprint(path)
    (tmp_path / "last/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="not a safetensors file"):
        checkpoint.load(tmp_path, "last")
    assert not (tmp_path / "bang").exists()


def test_a_run_is_not_overwritten_in_silence(tmp_path):
    checkpoint.claim(tmp_path / "run", resume=False, overwrite=False)
    checkpoint.write_config(tmp_path / "run", *split_knobs())
    checkpoint.claim(tmp_path / "run", resume=False, overwrite=False)  # without a checkpoint no run is lost
    checkpoint.write_config(tmp_path / "run", *split_knobs())
    checkpoint.save(tmp_path / "run", "best", example(1))
    (tmp_path / "run/best").rename(tmp_path / "run/best.old")  # as a kill in the middle of a save leaves it
    (tmp_path / "run/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already holds a run"):
        checkpoint.claim(tmp_path / "run", resume=False, overwrite=False)
    assert (tmp_path / "run/config.json").exists()
    checkpoint.claim(tmp_path / "run", resume=False, overwrite=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_out_dir_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="cannot write to out_dir"):
        checkpoint.claim(tmp_path / "run", resume=False, overwrite=False)


def test_config_round_trip_and_its_faults(tmp_path):
    configs = split_knobs(attention="mla", kv_lora_rank=24, vocab_size=99, seed=3)
    checkpoint.write_config(tmp_path, *configs)
    assert checkpoint.read_config(tmp_path)["kv_lora_rank"] == 24
    assert read_knobs(tmp_path) == configs
    for content, word in (("{", "not valid JSON"), ("[]", "no JSON object"), ('{"n_heads": 4}', "n_head")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=word):
            read_knobs(tmp_path)
    with pytest.raises(UserError, match="not a run folder"):
        read_knobs(tmp_path / "nowhere")


def test_nothing_of_ours_unpickles():
    """torch.load and pickle.load run code; only the data loader's refusing unpickler may appear."""
    folders = ("", "nanokv/", "backends/", "tools/", "data/*/")
    for path in (path for folder in folders for path in ROOT.glob(f"{folder}*.py")):
        source = path.read_text()
        assert not any(word in source for word in ("torch.load", "pickle.load")), path
        assert "Unpickler" not in source or path == ROOT / "nanokv/dataset.py", path
