"""The files of a run: checkpoints and config, written and read back.

A run folder holds `config.json` (every knob, resolved), `metrics.jsonl` (one line per event), `summary.json`,
the tokenizer, and the checkpoints `last/` and `best/`. Each checkpoint has model.safetensors (the weights),
optimizer.safetensors (the optimizers' state), state.json (step, best loss and other counters) and
manifest.json (size and SHA-256 of these three; written last).

A checkpoint is written to `last.new/`, synced, read back and compared, and then renamed to `last/`. It is
verified when it is read. The checkpoint before stays as `last.old/`, so that a run can resume from it if
`last/` is damaged on disk. Reading never executes code: the files are safetensors and JSON only.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nanokv.config import UserError, replace_json

CHECKPOINTS = ("last", "last.new", "last.old", "best", "best.new", "best.old")
RUN_FILES = ("config.json", "metrics.jsonl", "summary.json", "wandb_id", "launch_id", *CHECKPOINTS)
PARTS = ("model.safetensors", "optimizer.safetensors", "state.json")
# what state.json must hold; evaluated: the step of the last evaluation
STATE = {"step": int, "samples": int, "time": float, "evaluated": int | None, "best": dict}
STATE |= {"skipped_steps": int, "corpus_sha256": str, "scaler": dict}


@dataclass
class Checkpoint:
    model: dict[str, Tensor]  # by parameter name
    optimizer: dict[str, Tensor]  # by the names of parameter and state
    state: dict  # plain JSON values: the keys of STATE and more


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an error in writing `path`, such as a full disk, into a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or str(e).rpartition("I/O error: ")[2]
        remedy = "what was there stays; mend it and go on with --init_from=resume"
        raise UserError(f"cannot write {path}: {reason}; {remedy}") from e


def write_json(path: Path, value) -> None:
    """Replace a JSON file in one step. Raises UserError."""
    with writing(path):
        replace_json(path, value)


def read_json(path: Path):
    """Raises UserError if the file is missing or not JSON."""
    try:
        return json.loads(path.read_text())
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged: it is not valid JSON") from e


def claim(run_dir: Path, resume: bool, overwrite: bool, launch: str | None = None) -> None:
    """Make `run_dir` the folder of `launch`. UserError if it is not writable, or has a run and not `overwrite`."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".writable"
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"cannot write to out_dir {run_dir}: {reason}; choose another --out_dir") from e
    if holds_checkpoint(run_dir) and not resume and not overwrite:
        remedy = "continue it with --init_from=resume, give it up with --overwrite, or choose another --out_dir"
        raise UserError(f"{run_dir} already holds a run; {remedy}")
    with writing(run_dir):
        for name in RUN_FILES if not resume else ():
            _remove(run_dir / name)
        if launch is not None:
            (run_dir / "launch_id").write_text(launch)


def holds_checkpoint(run_dir: Path, of: str = "") -> bool:
    """Whether a folder holds a checkpoint, finished or not, whose name begins with `of`."""
    return any((run_dir / name).exists() for name in CHECKPOINTS if name.startswith(of))


def launched_by(run_dir: Path) -> str | None:
    """The launch that claimed `run_dir` last; None if there is no checkpoint, or if the launch had no name."""
    path = run_dir / "launch_id"
    return path.read_text() if holds_checkpoint(run_dir) and path.exists() else None


def is_finished(run_dir: Path) -> bool:
    """Whether a run has finished and written its report."""
    path = run_dir / "summary.json"
    summary = read_json(path) if path.exists() else None
    return isinstance(summary, dict) and "final/val_loss" in summary


def write_config(run_dir: Path, *configs) -> None:
    """The knobs of several dataclasses, as one flat config.json."""
    write_json(run_dir / "config.json", {k: v for config in configs for k, v in asdict(config).items()})


def read_config(run_dir: Path) -> dict:
    """Every knob of a run, not yet checked. Raises UserError if the folder is not a run or its config is damaged."""
    path = run_dir / "config.json"
    if not path.exists():
        fault = "it has no config.json" if run_dir.is_dir() else "no such folder"
        raise UserError(f"{run_dir} is not a run folder: {fault}")
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it is no JSON object")
    return values


class Saver:
    """Writes checkpoints in a thread while training continues. If a save fails, the next call raises its UserError."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        # one torch thread: with more, OpenMP would have more threads than cores, and then all of them would
        # sleep between kernels, so that small models would train at half the speed
        self.thread = ThreadPoolExecutor(1, "checkpoint", torch.set_num_threads, (1,))
        self.pending: Future | None = None

    def save(self, names: Sequence[str], checkpoint: Checkpoint) -> None:
        """Copy the tensors to CPU memory and return. The thread writes them to disk, under each of `names`."""
        self.wait()

        def copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

        copies = Checkpoint(copy(checkpoint.model), copy(checkpoint.optimizer), deepcopy(checkpoint.state))
        self.pending = self.thread.submit(lambda: [save(self.run_dir, name, copies) for name in names])

    def check(self) -> None:
        """Raise the error of a finished save, if it had one. Never waits."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is on disk. Raises the UserError of the save."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()


def save(run_dir: Path, name: str, checkpoint: Checkpoint) -> None:
    """Write `run_dir/name`. Raises UserError, and keeps the one before, if that fails or a weight is not finite."""
    target, new = run_dir / name, run_dir / f"{name}.new"
    for key, tensor in checkpoint.model.items():
        if not torch.isfinite(tensor).all():  # no run could resume from that
            fault = f"step {checkpoint.state['step']} is not saved: {key} holds nan or inf; {target} is kept"
            raise UserError(f"{fault}; go on from it with --init_from=resume and a lower learning rate")
    with writing(target):
        if (new / "manifest.json").exists():
            _swap_in(run_dir, name)  # an earlier process stopped just before this step
        _remove(new)
        new.mkdir()
        for part, tensors in zip(PARTS[:2], (checkpoint.model, checkpoint.optimizer), strict=True):
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            save_file(tensors, new / part)
            _sync(new / part)
            written = load_file(new / part)
            if not all(torch.equal(_bytes(tensor), _bytes(written[key])) for key, tensor in tensors.items()):
                raise OSError(errno.EIO, "the disk does not hold what was written")
        write_json(new / "state.json", checkpoint.state)
        write_json(new / "manifest.json", {part: _fingerprint(new / part) for part in PARTS})
        _swap_in(run_dir, name)


def _swap_in(run_dir: Path, name: str) -> None:
    """Rename `name.new` to `name`. The last/ before is kept as last.old/; the best/ before is deleted."""
    target, new, old = (run_dir / (name + suffix) for suffix in ("", ".new", ".old"))
    _sync(new)
    if target.exists():
        _remove(old)
        target.rename(old)
    new.rename(target)
    _sync(run_dir)
    if name != "last":
        _remove(old)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def load_newest(run_dir: Path) -> Checkpoint:
    """The newest undamaged checkpoint; stderr names damaged newer ones. Raises UserError if all are damaged."""
    steps = {}
    for name in CHECKPOINTS:
        folder = run_dir / name
        if not folder.exists() or name.endswith(".new") and not (folder / "manifest.json").exists():
            continue  # a .new without a manifest is what a killed save leaves
        try:
            steps[name] = float(read_json(folder / "state.json")["step"])
        except (UserError, LookupError, TypeError, ValueError, ArithmeticError):
            steps[name] = math.inf if name == "last" else -1
    faults = []
    for name in sorted(steps, key=steps.__getitem__, reverse=True):  # if steps are equal, last/ comes first
        try:
            checkpoint = load(run_dir, name)
            for fault in faults:
                print(f"going on from {run_dir / name}, step {checkpoint.state['step']}: {fault}", file=sys.stderr)
            return checkpoint
        except UserError as fault:
            faults.append(fault)
    raise UserError(f"{faults[0]}, but no other is whole" if faults else f"{run_dir} has no checkpoint")


def load(run_dir: Path, name: str) -> Checkpoint:
    """Read and verify `run_dir/name`. Raises UserError if it is missing or damaged."""
    folder = _verified(run_dir, name, PARTS)
    weights, optimizer = (_read_tensors(folder / part) for part in PARTS[:2])
    state = read_json(folder / "state.json")
    if state == {}:
        raise UserError(f"{run_dir} holds weights only, from convert.py; start with --init_from={run_dir}")
    if not isinstance(state, dict) or not all(isinstance(state.get(k), kind) for k, kind in STATE.items()):
        raise UserError(f"checkpoint {folder} is damaged: state.json lacks some of {', '.join(STATE)}")
    return Checkpoint(weights, optimizer, state)


def find(path: str | Path, which: str = "best") -> tuple[Path, str]:
    """Run folder and checkpoint of `path`: best/ or last/ itself, else a run: then `which`, or last if no best."""
    path, whole = Path(path), Path(path).absolute()
    if whole.name in ("best", "last") and not (path / "config.json").exists():
        return whole.parent, whole.name
    return path, "last" if which == "best" and not holds_checkpoint(path, of="best") else which


def load_weights(run_dir: Path, name: str) -> dict[str, Tensor]:
    """The weights alone, a third of a checkpoint. Raises UserError if they are missing or damaged."""
    return _read_tensors(_verified(run_dir, name, PARTS[:1]) / PARTS[0])


class NotInitialized(TorchFunctionMode):
    """Skips torch.nn.init: on meta tensors it would import torch's compiler, which takes two seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if getattr(func, "__module__", "") == "torch.nn.init" else func(*args, **(kwargs or {}))


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """The module that `make` makes, with names and shapes only, without memory for weights."""
    with torch.device("meta"), NotInitialized():
        return make()


def build(make: Callable[[], nn.Module], weights: dict[str, Tensor]) -> nn.Module:
    """make() in eval mode, with `weights` themselves as parameters. Raises RuntimeError if names or shapes differ."""
    model = on_meta(make)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _verified(run_dir: Path, name: str, parts: tuple[str, ...]) -> Path:
    """The folder of a checkpoint, after checking `parts` against its manifest."""
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
        with suppress(OSError, KeyError, TypeError):
            if manifest[part] == _fingerprint(folder / part):
                continue
        raise UserError(f"checkpoint {folder} is damaged: {part} does not match its manifest; use another one")
    return folder


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:  # copy: load_file maps the file, and if it were cut short later, the process would be killed
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except SafetensorError as e:
        raise UserError(f"{path} is damaged: not a safetensors file; use another checkpoint") from e


def _fingerprint(path: Path) -> dict:
    with open(path, "rb") as f:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
