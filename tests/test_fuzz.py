"""Damaged and hostile files: every reader gives its result or a UserError, and runs nothing.

The files of a run, of a data set and of a configuration, and command lines, each changed at random: bits
flipped, cut short, pieces lost or doubled, a JSON value exchanged, a pickle put in place; half of the changed
parts of a checkpoint are vouched for by a new manifest. The cases are the same in every run; FUZZ=20 tries
twenty times as many.
"""

import json
import os
import pickle
import random
import shutil
import signal
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import write_corpus

import train
from model import GPTConfig
from nanokv import checkpoint
from nanokv.config import UserError, load
from nanokv.dataset import open_dataset
from nanokv.run_logger import RunLogger
from sample import load_run

ROOT = Path(__file__).parent.parent
TIMES = float(os.environ.get("FUZZ", 1))
SECONDS = 10  # of processor time that any one case may take
KNOBS = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=2", "--max_iters=2"]
KNOBS += ["--device=cpu", "--dtype=float32", "--sample_tokens=0", "--eval_iters=1", "--eval_interval=1"]
WORDS = [b"null", b"-1", b"0", b"1e999", b"NaN", b"[]", b"{}", b'""', b"\0", b"true", b"1" * 30, b"\xff", b"[" * 5000]
VALUES = [None, True, -1, 0, 3, 2**31, 2**63, 10**30, 1e-300, 0.5, float("nan"), float("inf"), "", "mla", "../x"]
VALUES += [[], {}, [1], {"step": 1}, "x" * 10_000]


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def mutate(content: bytes, draw: random.Random, bang: Path) -> bytes:
    """The content changed once, or seldom more often, in a way that suits it."""
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        at = draw.randrange(len(content) + 1)
        to = min(len(content), at + draw.choice([1, 2, 8, 64, 1000]))
        way = draw.randrange(8)
        if way == 0 and content:  # a bit flipped
            at = min(at, len(content) - 1)
            content = content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
        elif way == 1:  # cut short
            content = content[:at]
        elif way == 2:  # a piece lost
            content = content[:at] + content[to:]
        elif way == 3:  # a piece doubled
            content = content[:to] + content[at:]
        elif way == 4:  # a word put in or over
            content = content[:at] + draw.choice(WORDS) + content[draw.choice([at, to]) :]
        elif way == 5 and draw.random() < 0.2:
            content = pickle.dumps(Bomb(bang))
        else:
            content = exchange(content, draw)
    return content


def exchange(content: bytes, draw: random.Random) -> bytes:
    """JSON, on its own or as the header of a safetensors file, with one of its values or keys exchanged."""
    start = 8 if content[8:9] == b"{" and content[:1] not in b"{[" else 0
    end = start + int.from_bytes(content[:8], "little") if start else len(content)
    try:
        value = json.loads(content[start:end])
    except (ValueError, RecursionError):
        return content
    holder = value
    while isinstance(holder, dict | list) and holder:
        key = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
        if isinstance(holder[key], dict | list) and holder[key] and draw.random() < 0.8:
            holder = holder[key]
            continue
        if isinstance(holder, dict) and draw.random() < 0.2:
            holder[draw.choice(["step", "x", ""])] = holder.pop(key)
        else:
            holder[key] = draw.choice(VALUES)
        break
    text = json.dumps(value).encode()
    return (len(text).to_bytes(8, "little") if start else b"") + text + content[end:]


@contextmanager
def assert_fair(case: str, bang: Path):
    """Fails if the body raises anything but UserError, takes long, or has run the bomb."""

    def late(number, frame):
        raise AssertionError(f"{case} takes more than {SECONDS} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with suppress(UserError):
            yield
    except Exception as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert not bang.exists(), f"{case} ran code"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    knobs = [f"--dataset={write_corpus(folder, 100)}", f"--out_dir={folder / 'run'}", "--attention=mla"]
    train.main([*KNOBS, *knobs])
    return folder / "run"


def cases(n: int):
    return range(int(n * TIMES))


def changed(original: Path, copy: Path, draw: random.Random, bang: Path) -> str:
    """Lays a copy of a folder with one of its files changed; says which, and how it was vouched for."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(original, copy)
    path = draw.choice(sorted(path for path in copy.rglob("*") if path.is_file()))
    path.write_bytes(mutate(path.read_bytes(), draw, bang))
    if path.name in checkpoint.PARTS and draw.random() < 0.5:
        manifest = json.loads((path.parent / "manifest.json").read_text())
        manifest[path.name] = checkpoint._fingerprint(path)
        (path.parent / "manifest.json").write_text(json.dumps(manifest))
        return f"{path.relative_to(copy)}, vouched for"
    return str(path.relative_to(copy))


@pytest.mark.slow
def test_a_run(run_dir, tmp_path):
    """Read as a checkpoint, by the sampler, by the log and, some, by a trainer that resumes."""
    draw, bang, copy = random.Random(1), tmp_path / "bang", tmp_path / "run"
    for case in cases(400):
        name = f"case {case}: {changed(run_dir, copy, draw, bang)}"
        with assert_fair(name, bang):
            checkpoint.load_newest(copy)
        with assert_fair(name, bang):
            load_run(copy)
        with assert_fair(name, bang):
            checkpoint.is_finished(copy)
            RunLogger(copy, {}, 1).close()
        if case % 4 == 0:
            with assert_fair(name, bang):
                train.main(["--init_from=resume", f"--out_dir={copy}", "--max_iters=3", "--eval_only"])


def test_a_data_set(run_dir, tmp_path):
    draw, bang, copy = random.Random(2), tmp_path / "bang", tmp_path / "set"
    for case in cases(300):
        with assert_fair(f"case {case}: {changed(run_dir.parent / 'set', copy, draw, bang)}", bang):
            dataset = open_dataset(str(copy))
            dataset.train_batch(0, 2, 16, 0)
            next(dataset.val_batches(16, 2))


def test_a_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    draw, bang, path = random.Random(3), tmp_path / "bang", tmp_path / "run.py"
    files = [file.read_bytes() for file in sorted(ROOT.glob("config/**/*.py"))]
    files.append(f"import pathlib\npathlib.Path({str(bang)!r}).touch()\n".encode())
    knobs = [*GPTConfig.__dataclass_fields__, *train.TrainConfig.__dataclass_fields__]
    for case in cases(1500):
        content = mutate(draw.choice(files), draw, bang)
        path.write_bytes(content)
        with assert_fair(f"case {case}: {content[:500]!r}", bang):
            load([str(path)], GPTConfig, train.TrainConfig)
        argv = [f"--{draw.choice(knobs)}={draw.choice(VALUES)}" for _ in range(draw.randrange(1, 4))]
        argv = [mutate(arg.encode(), draw, bang).decode(errors="surrogateescape") for arg in argv]
        with assert_fair(f"case {case}: {argv}"[:500], bang):
            load([arg for arg in argv if arg not in ("-h", "--help")], GPTConfig, train.TrainConfig)
