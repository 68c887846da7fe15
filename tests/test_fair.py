"""A fair comparison: equal parameters without hand work, and a hash that tells which code made a run."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

import train
from nanokv import metrics
from nanokv.config import UserError
from tools import sweep

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16", "--batch_size=2", "--max_iters=2"]
SMALL += ["--eval_iters=1", "--device=cpu", "--dtype=float32", "--sample_tokens=0", "--warmup_iters=1"]


def parameters(config) -> int:
    with torch.device("meta"):
        return metrics.n_params(train.GPT(config))


@pytest.mark.parametrize("attention", ["mha", "mqa", "gqa", "mla"])
@pytest.mark.parametrize("shape", [[], ["--n_layer=3"], ["--n_embd=96", "--n_head=3", "--n_kv_head=None"]])
def test_every_attention_matches_a_config_file(monkeypatch, capsys, attention, shape):
    monkeypatch.chdir(ROOT)
    if attention == "gqa":
        shape = [knob.replace("None", "1") for knob in shape]
    config, _ = train.configure([f"config/{attention}.py", *shape])
    target, _ = train.configure(["config/mla.py"])
    config.vocab_size = target.vocab_size = 2048
    train.match_parameters(config, "config/mla.py")
    n, wanted = parameters(config), parameters(target)
    assert abs(n - wanted) <= 0.01 * wanted and config.intermediate_size % 8 == 0
    said = f"intermediate_size = {config.intermediate_size}: {n:,} parameters, to match {wanted:,} of config/mla.py\n"
    assert capsys.readouterr().out == said


def test_a_width_between_multiples_of_8_where_those_are_too_far():
    config = train.GPTConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=64, attention="mla")
    like = train.GPTConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=64)
    n, wanted = metrics.match_params(train.GPT, config, like)
    assert (n, wanted) == (parameters(config), parameters(like))
    assert config.intermediate_size % 8 and abs(n - wanted) <= 0.01 * wanted


def test_a_run_matches_a_run_and_keeps_its_width_when_it_is_resumed(corpus, tmp_path, capsys):
    common = [*SMALL, f"--dataset={corpus}"]
    train.train([*common, "--attention=mla", f"--out_dir={tmp_path / 'mla'}"])
    mha = [*common, f"--match_params={tmp_path / 'mla'}", f"--out_dir={tmp_path / 'mha'}"]
    summary = train.train(mha)
    target = json.loads((tmp_path / "mla/summary.json").read_text())["params/total"]
    assert abs(summary["params/total"] - target) <= 0.01 * target
    width = json.loads((tmp_path / "mha/config.json").read_text())["intermediate_size"]
    assert f"intermediate_size = {width}: " in capsys.readouterr().out
    assert sweep.is_done(tmp_path / "mha", mha)
    (tmp_path / "mla/config.json").write_text("no longer there")
    train.train(["--init_from=resume", f"--out_dir={tmp_path / 'mha'}", "--max_iters=3"])
    assert json.loads((tmp_path / "mha/config.json").read_text())["intermediate_size"] == width
    assert "to match" not in capsys.readouterr().out
    with pytest.raises(UserError, match="match_params = config/mla.py does not fit the checkpoint"):
        train.train(["--init_from=resume", f"--out_dir={tmp_path / 'mha'}", "--match_params=config/mla.py"])


COARSE = ["--n_embd=16", "--n_layer=5", "--tie_embeddings", "--qk_norm=False"]
FAULTS = {
    "no file": (["--match_params=config/mlaa.py"], "no config file 'config/mlaa.py'; did you mean config/mla.py"),
    "no run": (["--match_params=out/none"], "out/none is not a run folder: no such folder"),
    "no name": (["--match_params="], "match_params must not be empty"),
    "another vocabulary": (["--match_params=tests/runs/mla", "--vocab_size=300"], "a vocabulary of 257, not 300"),
    "too large already": (["--match_params=tests/runs/mla", "--n_layer=9"], "the nearest, 1, gives .*; change n_embd"),
    "too coarse": (
        ["--match_params=tests/runs/mla", *COARSE],
        "9,780 parameters within 1 %; the nearest, 2, gives 9,888",
    ),
    "a chain": (["--match_params=CHAIN.py"], "match config/mla.py, which it names"),
    "a width too": (
        ["--match_params=config/mla.py", "--intermediate_size=64"],
        "chooses intermediate_size; remove one",
    ),
    "weights": (["--match_params=config/mla.py", "--init_from=tests/runs/mla"], "match_params is for a new model"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_line(corpus, tmp_path, monkeypatch, fault):
    monkeypatch.chdir(ROOT)
    (tmp_path / "chain.py").write_text('match_params = "config/mla.py"\n')
    knobs, words = FAULTS[fault]
    knobs = [knob.replace("CHAIN", str(tmp_path / "chain")) for knob in knobs]
    with pytest.raises(UserError, match=words) as caught:
        train.train([*SMALL, f"--dataset={corpus}", f"--out_dir={tmp_path / 'run'}", *knobs])
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_the_hash_of_code_is_that_of_its_files_alone(tmp_path, monkeypatch):
    """Of a checkout, of an export of it elsewhere, and of that with files changed."""
    ours = metrics.code_sha256()
    assert len(ours) == 64 and ours == metrics.code_sha256()
    listed = metrics.git("ls-files")
    if listed is None:
        pytest.skip("needs a git checkout")
    export = tmp_path / "export"
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (export / name).parent.mkdir(parents=True, exist_ok=True)
            (export / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.setattr(metrics, "ROOT", export)
    assert metrics.git("ls-files") is None and metrics.code_sha256() == ours
    for name in ("tests/test_x.py", "data/text/prepare.py", "config/mla.py", "README.md", ".venv/x.py", "out/x.py"):
        (export / name).parent.mkdir(exist_ok=True)
        (export / name).write_text("other")
    assert metrics.code_sha256() == ours
    hashes = {ours}
    for name in ("model.py", "nanokv/cache.py", "tools/sweep.py", "backends/new.c"):
        with open(export / name, "a") as file:
            file.write("\n")
        hashes.add(metrics.code_sha256())
    (export / "model.py").rename(export / "gpt.py")
    assert len({*hashes, metrics.code_sha256()}) == 6
    (export / "gpt.py").rename(export / "model.py")
    whole = metrics.code_sha256()
    for command in (["init", "-q"], ["add", "-f", "out/x.py", "train.py"]):  # as where a larger repository holds ours
        subprocess.run(["git", *command], cwd=export, check=True)
    assert metrics.code_sha256() == whole
    subprocess.run(["git", "add", "model.py", "nanokv"], cwd=export, check=True)
    tracked = metrics.code_sha256()
    (export / "scratch.py").write_text("not tracked")
    assert metrics.code_sha256() == tracked
    (export / "train.py").unlink()
    assert metrics.code_sha256() != tracked
