"""README.md holds what it says: its example of a new attention works, its links point at what they name.

`python tests/test_readme.py` renews the line numbers in the links.
"""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

import compare  # noqa: E402
import model  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from nanokv import checkpoint  # noqa: E402
from nanokv.generate import generate_lists  # noqa: E402

README = ROOT / "README.md"
LINK = re.compile(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)-L(\d+)\)")


def example() -> str:
    """The new attention that README shows."""
    (block,) = re.findall(r"```python\n(class .*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return block


def place_of(name: str) -> tuple[str, int, int]:
    """File, first and last line of a class of the model."""
    cls = getattr(model, name)
    lines, first = inspect.getsourcelines(cls)
    return Path(inspect.getsourcefile(cls)).name, first, first + len(lines) - 1


def test_the_example_is_short():
    assert len(example().strip().splitlines()) < 40


def test_the_new_attention_passes_the_tests_of_the_others(tmp_path):
    """test_model.py and test_cache.py as they stand, with the class added to what it finds in ATTENTIONS."""
    (tmp_path / "new_attention.py").write_text(f"from model import *\n\n{example()}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "new_attention", "-p", "no:cacheprovider"]
    command += ["tests/test_model.py", "tests/test_cache.py", "-k", "gta"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 20


@pytest.fixture
def gta(monkeypatch):
    monkeypatch.setitem(model.ATTENTIONS, "gta", None)  # taken out again in the end
    exec(example(), vars(model).copy())


def test_the_new_attention_trains_samples_and_compares(corpus, tmp_path, gta, capsys):
    knobs = [
        "--n_layer=2",
        "--n_head=2",
        "--n_embd=32",
        "--block_size=32",
        "--batch_size=4",
        "--sample_tokens=8",
    ]
    knobs += [f"--dataset={corpus}", f"--out_dir={tmp_path / 'run'}", "--device=cpu"]
    train.main(
        ["config/gqa.py", "--attention=gta", "--qk_norm=None", *knobs, "--max_iters=40", "--eval_interval=20"]
    )
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["kv_cache/elements_per_token_layer"] == 2 * 16 + 8  # G D + D / 2
    first, *_, last = [
        event["val/loss"]
        for event in map(json.loads, (tmp_path / "run/metrics.jsonl").open())
        if "val/loss" in event
    ]
    assert last < first - 1
    assert checkpoint.read_config(tmp_path / "run").attention == "gta"
    gpt, _ = sample.load_run(tmp_path / "run", device="cpu", dtype="float32")
    prompt = torch.tensor([[1, 2, 3]])
    for _ in range(12):
        prompt = torch.cat((prompt, gpt(prompt)[0][:, -1:].argmax(-1)), 1)
    assert generate_lists(gpt, [[1, 2, 3]], 12, temperature=0.0) == [prompt[0, 3:].tolist()]
    capsys.readouterr()
    compare.main([str(tmp_path / "run"), "--picture="])
    assert "gta" in capsys.readouterr().out


def test_links_into_the_model_point_at_the_classes_they_name():
    links = LINK.findall(README.read_text(encoding="utf-8"))
    assert {name for name, *_ in links} == {"GroupedQueryAttention", "MultiHeadLatentAttention", "KVCache"}
    wrong = [name for name, file, *lines in links if (file, *map(int, lines)) != place_of(name)]
    assert not wrong, "python tests/test_readme.py renews the line numbers"


def test_links_and_pictures_exist():
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


if __name__ == "__main__":
    page = README.read_text(encoding="utf-8")
    page = LINK.sub(lambda m: "[`{}`]({}#L{}-L{})".format(m[1], *place_of(m[1])), page)
    README.write_text(page, encoding="utf-8")
