"""What a run writes and reads back.

A run folder holds `config.json` (every knob, resolved), `metrics.jsonl` (a line an event), `summary.json`,
the tokenizer, and the checkpoints `last/` and `best/`, each of them

    model.safetensors      the weights
    optimizer.safetensors  optimizer and random-number state
    state.json             step, best loss and other counters
    manifest.json          size and SHA-256 of the three; written last

A checkpoint is written aside, synced, and swapped in; it is verified when read. Nothing that is read here can
execute code: safetensors and JSON only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from config import Config, UserError, from_dict

CHECKPOINTS = tuple(name + suffix for name in ("last", "best") for suffix in ("", ".new", ".old"))
RUN_FILES = ("config.json", "metrics.jsonl", "summary.json", "wandb_id", *CHECKPOINTS)
PARTS = ("model.safetensors", "optimizer.safetensors", "state.json")


@dataclass
class Checkpoint:
    model: dict[str, Tensor]  # by parameter name
    optimizer: dict[str, Tensor]  # by name of parameter and state; random-number state under "rng."
    state: dict  # plain JSON values


def write_json(path: Path, value) -> None:
    """Replace a JSON file in one step, so that a reader sees the old one or the new one, whole."""
    aside = path.with_name(path.name + ".new")
    with open(aside, "w") as f:
        json.dump(value, f, indent=2)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)


def read_json(path: Path):
    """Raises UserError if the file is missing or no JSON."""
    try:
        return json.loads(path.read_text())
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged: it is not valid JSON") from e


def claim(run_dir: Path, resume: bool, overwrite: bool) -> None:
    """Make `run_dir` ready to be written. A run that is there survives, unless `overwrite` gives it up.

    Without a checkpoint there is no run to lose. Raises UserError if there is one that would be overwritten,
    or no way to write there.
    """
    try:
        exists = any((run_dir / name).exists() for name in CHECKPOINTS)
    except (OSError, ValueError) as e:
        raise UserError(f"out_dir is not a usable path: {e}") from e
    if exists and not resume and not overwrite:
        raise UserError(
            f"{run_dir} already holds a run; continue it with --init_from=resume, choose another --out_dir, "
            "or give it up with --overwrite=True"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".writable"
        probe.touch()
        probe.unlink()
        if not resume:
            for name in RUN_FILES:
                _remove(run_dir / name)
    except OSError as e:
        raise UserError(f"cannot write to out_dir {run_dir}: {e.strerror}; choose another --out_dir") from e


def is_finished(run_dir: Path) -> bool:
    """Whether a run came to its end and reported."""
    path = run_dir / "summary.json"
    return path.exists() and "final/val_loss" in read_json(path)


def write_config(run_dir: Path, config: Config) -> None:
    write_json(run_dir / "config.json", asdict(config))


def read_config(run_dir: Path) -> Config:
    """Raises UserError if the folder is no run, or its config is damaged."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a run folder: no such folder")
    if not (run_dir / "config.json").exists():
        raise UserError(f"{run_dir} is not a run folder: it has no config.json")
    values = read_json(run_dir / "config.json")
    if not isinstance(values, dict):
        raise UserError(f"{run_dir / 'config.json'} is damaged: it is no JSON object")
    return from_dict(Config, values, str(run_dir / "config.json"))


def save(run_dir: Path, name: str, checkpoint: Checkpoint) -> None:
    """Write `run_dir/name`; until it is whole the one before stays in place."""
    target, new, old = (run_dir / (name + suffix) for suffix in ("", ".new", ".old"))
    if not target.exists() and (new / "manifest.json").exists():
        new.rename(target)  # the process before was stopped just short of this
    _remove(new)
    new.mkdir()
    for part, tensors in zip(PARTS, (checkpoint.model, checkpoint.optimizer), strict=False):
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, new / part)
    write_json(new / "state.json", checkpoint.state)
    write_json(new / "manifest.json", {part: _fingerprint(new / part) for part in PARTS})
    for path in (*new.iterdir(), new):
        _sync(path)
    _remove(old)
    if target.exists():
        target.rename(old)
    new.rename(target)
    _sync(run_dir)
    _remove(old)


def load(run_dir: Path, name: str, device="cpu") -> Checkpoint:
    """Read and verify `run_dir/name`. Raises UserError if it is missing or damaged."""
    folder = _verified(run_dir, name, PARTS)
    weights, optimizer = (_read_tensors(folder / part, device) for part in PARTS[:2])
    state = read_json(folder / "state.json")
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {folder} is damaged: state.json is no JSON object")
    return Checkpoint(weights, optimizer, state)


def best_or_last(run_dir: Path) -> str:
    """The name of the checkpoint to use of a run: last where there is no best."""
    return (
        "best"
        if any((run_dir / name).exists() for name in CHECKPOINTS if name.startswith("best"))
        else "last"
    )


def load_weights(run_dir: Path, name: str, device="cpu") -> dict[str, Tensor]:
    """The weights alone, a third of a checkpoint. Raises UserError if they are missing or damaged."""
    return _read_tensors(_verified(run_dir, name, PARTS[:1]) / PARTS[0], device)


def _verified(run_dir: Path, name: str, parts: tuple[str, ...]) -> Path:
    """The folder of a checkpoint whose `parts` are what its manifest says."""
    folder = run_dir / name
    if not folder.exists():  # stopped between the two renames of `save`
        aside = (run_dir / (name + suffix) for suffix in (".new", ".old"))
        folder = next((path for path in aside if (path / "manifest.json").exists()), None)
        if folder is None:
            raise UserError(f"{run_dir} has no checkpoint {name}/")
    if not (folder / "manifest.json").exists():
        raise UserError(f"checkpoint {folder} is damaged: it has no manifest.json; use another one")
    manifest = read_json(folder / "manifest.json")
    for part in parts:
        try:
            sound = manifest[part] == _fingerprint(folder / part)
        except (OSError, KeyError, TypeError):
            sound = False
        if not sound:
            raise UserError(
                f"checkpoint {folder} is damaged: {part} does not match its manifest; use another one"
            )
    return folder


def _read_tensors(path: Path, device) -> dict[str, Tensor]:
    try:
        return load_file(path, device=str(device))
    except SafetensorError as e:
        raise UserError(f"{path} is damaged: not a safetensors file; use another checkpoint") from e


def _fingerprint(path: Path) -> dict:
    with open(path, "rb") as f:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError):
            path.unlink()
