"""Settings for all tests: one thread, a fixed seed, and the same hypothesis examples in every run."""

from pathlib import Path

import hypothesis
import pytest
import torch

from data.text import prepare

torch.set_num_threads(1)
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def write_corpus(folder: Path, lines: int) -> Path:
    """Prepares a data set of bytes in `folder`, with its text beside it."""
    text = "".join(f"the cat number {i % 37} sat on the mat {i * i % 91}\n" for i in range(lines))
    (folder / "text.txt").write_text(text)
    prepare.main([f"--input={folder / 'text.txt'}", "--tokenizer=byte", f"--out_dir={folder / 'set'}"])
    return folder / "set"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), 900)
