"""Settings for all tests: one thread, a fixed seed, and the same hypothesis examples in every run."""

import os
import shlex
import shutil
import subprocess
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest
import torch

from data.text import prepare
from model import GPT, GPTConfig
from nanokv import checkpoint
from train import TrainConfig, configure

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start; two would wait for each other
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")


CC = shlex.split(os.environ.get("CC", "")) or ["cc"]
WORKS = shutil.which(CC[0]) and not subprocess.run([*CC, "-E", "-x", "c", "/dev/null"], capture_output=True).returncode
# where there is a compiler, C that it does not take is a fault, not a reason to skip a test
compiled = pytest.mark.skipif(not WORKS, reason="no C compiler")


@pytest.fixture
def c_backend(monkeypatch):
    """For tests of the C backend itself, whatever NANOKV_BACKEND says of the others."""
    monkeypatch.delenv("NANOKV_BACKEND", raising=False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def knobs(argv: list[str]) -> SimpleNamespace:
    """Every knob of the run that a command line asks for."""
    model_config, config = configure(argv)
    return SimpleNamespace(**asdict(model_config), **asdict(config))


def split_knobs(**values) -> tuple[GPTConfig, TrainConfig]:
    """Knobs as the instances of both dataclasses."""
    model = {name: values.pop(name) for name in list(values) if name in GPTConfig.__dataclass_fields__}
    return GPTConfig(**model), TrainConfig(**values)


def build(config: GPTConfig, weights: dict[str, torch.Tensor]) -> GPT:
    """A model in eval mode with these weights."""
    return checkpoint.build(partial(GPT, config), weights)


def write_corpus(folder: Path, lines: int) -> Path:
    """Prepares a data set of bytes in `folder`, with its text beside it."""
    text = "".join(f"the cat number {i % 37} sat on the mat {i * i % 91}\n" for i in range(lines))
    (folder / "text.txt").write_text(text)
    prepare.main([f"--input={folder / 'text.txt'}", "--tokenizer=byte", f"--out_dir={folder / 'set'}"])
    return folder / "set"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), 900)
