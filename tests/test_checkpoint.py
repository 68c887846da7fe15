"""Checkpoints: whole or not at all, verified when read, and never code."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

import checkpoint
from checkpoint import Checkpoint
from config import Config, UserError

ROOT = Path(__file__).parent.parent


def example(step: int) -> Checkpoint:
    return Checkpoint(
        {"w": torch.full((4, 3), float(step))}, {"w.momentum": torch.randn(4, 3)}, {"step": step, "time": 1.5}
    )


def test_what_is_saved_is_what_is_loaded(tmp_path):
    saved = example(7)
    checkpoint.save(tmp_path, "last", saved)
    loaded = checkpoint.load(tmp_path, "last")
    assert loaded.state == saved.state
    assert torch.equal(loaded.model["w"], saved.model["w"])
    assert torch.equal(loaded.optimizer["w.momentum"], saved.optimizer["w.momentum"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last"]


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

    for owner, name in (
        (Path, "rename"),
        (Path, "mkdir"),
        (os, "replace"),
        (os, "fsync"),
        (checkpoint, "save_file"),
    ):
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
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "pickle"])
def test_damage_is_refused_in_one_line(tmp_path, part, damage):
    checkpoint.save(tmp_path, "last", example(1))
    path = tmp_path / "last" / part
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(pickle.dumps(Bomb(tmp_path / "bang")))
    with pytest.raises(UserError) as fault:
        checkpoint.load(tmp_path, "last")
    assert "\n" not in str(fault.value) and part in str(fault.value)
    assert not (tmp_path / "bang").exists()


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
    checkpoint.write_config(tmp_path / "run", Config())
    checkpoint.claim(tmp_path / "run", resume=False, overwrite=False)  # without a checkpoint no run is lost
    checkpoint.write_config(tmp_path / "run", Config())
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
    config = Config(attention="mla", kv_lora_rank=24, vocab_size=99)
    checkpoint.write_config(tmp_path, config)
    assert checkpoint.read_config(tmp_path) == config
    for content, word in (("{", "not valid JSON"), ("[]", "no JSON object"), ('{"n_heads": 4}', "n_head")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=word):
            checkpoint.read_config(tmp_path)
    with pytest.raises(UserError, match="not a run folder"):
        checkpoint.read_config(tmp_path / "nowhere")


def test_nothing_of_ours_unpickles():
    """torch.load and pickle.load run code; only the data loader's refusing unpickler may appear."""
    for path in ROOT.glob("*.py"):
        source = path.read_text()
        assert not any(word in source for word in ("torch.load", "pickle.load", "Unpickler")), path
