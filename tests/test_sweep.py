"""sweep.py: which runs it starts, how, and what it makes of their ends; and the lists that come with it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import knobs

from data.text import prepare
from model import GPT
from nanokv.config import UserError
from nanokv.metrics import n_params
from tools import sweep, uptrain
from train import configure, train

ROOT = Path(__file__).parent.parent
STAND_IN = """
# in the place of train.py: leaves what a run leaves, and a diary of when it ran and how
import json, os, sys, time
from pathlib import Path
options = dict(arg.removeprefix("--").partition("=")[::2] for arg in sys.argv[1:])
folder = Path(options["out_dir"])
print(*sys.argv[1:])
with open(folder.parent / "diary", "a") as diary:
    diary.write(f"begin {folder.name} {options.get('init_from')} {os.environ['OMP_NUM_THREADS']}\\n")
(folder / "last").mkdir(exist_ok=True)
(folder / "config.json").write_text((folder.parent / f"{folder.name}.json").read_text())
if options["seed"] == "13":
    sys.exit("error: unlucky")
time.sleep(0.3)
(folder / "summary.json").write_text(json.dumps({"final/val_loss": 1.5, "time": 60.0}))
with open(folder.parent / "diary", "a") as diary:
    diary.write(f"end {folder.name}\\n")
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """stand_in(runs): the runs, with their configs where the stand-in for train.py finds them."""
    (tmp_path / "train.py").write_text(STAND_IN)
    monkeypatch.setattr(sweep, "TRAIN", tmp_path / "train.py")
    monkeypatch.setattr(sweep, "open_dataset", lambda *names: None)

    def write(runs):
        for name, argv in runs.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(knobs(argv).__dict__))
        return runs

    return write


def diary(folder):
    return (folder / "diary").read_text().splitlines()


def test_runs_go_side_by_side_and_only_once(tmp_path, stand_in, capsys):
    runs = stand_in({f"run{i}": [f"--seed={i}"] for i in range(4)})
    sweep.run_all(runs, tmp_path, jobs=2, threads=3)
    lines = diary(tmp_path)
    assert sorted(lines) == sorted(f"{what}" for i in range(4) for what in (f"begin run{i} None 3", f"end run{i}"))
    running = [sum(1 if line.startswith("begin") else -1 for line in lines[: n + 1]) for n in range(8)]
    assert max(running) == 2
    assert capsys.readouterr().out.count("val loss 1.5000, trained in 60 s") == 4
    sweep.run_all(runs, tmp_path, jobs=2)
    assert diary(tmp_path) == lines
    assert capsys.readouterr().out == "4 of 4 runs are done already\n"


def test_a_failure_is_named_and_does_not_stop_the_others(tmp_path, stand_in, capsys):
    runs = stand_in({"good": ["--seed=1"], "bad": ["--seed=13"], "well": ["--seed=2"]})
    with pytest.raises(UserError, match="1 of 3 runs failed: bad"):
        sweep.run_all(runs, tmp_path, jobs=1)
    assert "bad failed (1): error: unlucky" in capsys.readouterr().out
    assert "end well" in diary(tmp_path)
    with pytest.raises(UserError, match="1 of 1 runs failed: bad"):  # which has a checkpoint to go on from
        sweep.run_all(runs, tmp_path, jobs=1)
    assert diary(tmp_path)[-1] == "begin bad resume 1"


def test_further_knobs_are_for_all_runs(tmp_path, stand_in):
    lines = {"a": ["--seed=1", "--max_iters=9"], "b": ["--seed=2"]}
    (tmp_path / "list").write_text("".join(f"{name} {' '.join(argv)}\n" for name, argv in lines.items()))
    command = [str(tmp_path / "list"), str(tmp_path), "--max_iters=7", "--threads=2", "--jobs=1"]
    for wrong, fault in {
        "--n_haed=2": "unknown key 'n_haed'; did you mean 'n_head'?",
        "--n_layer=two": "n_layer should be int, not 'two'",
        "--n_embd=33": "divisible",
        "-x": "unknown key",
    }.items():
        with pytest.raises(UserError, match=fault):
            sweep.main([*command, wrong])
    assert not any(path.is_dir() for path in tmp_path.iterdir())
    stand_in({name: [*argv, "--max_iters=7"] for name, argv in lines.items()})
    sweep.main(command)
    assert diary(tmp_path) == ["begin a None 2", "end a", "begin b None 2", "end b"]
    for name, argv in lines.items():
        assert (tmp_path / name / "log.txt").read_text().startswith(f"{' '.join(argv)} --max_iters=7 --out_dir=")
    sweep.main(command)
    with pytest.raises(UserError, match="a was trained with max_iters = 7, now 9 is asked for"):
        sweep.main(command[:2])
    sweep.main([*command, "--wandb_tags=c"])  # where a run is logged is no other value
    assert len(diary(tmp_path)) == 4


def test_a_run_with_other_values_is_refused(tmp_path, stand_in):
    runs = stand_in({"run": ["--seed=1", "--learning_rate=0.5"]})
    sweep.run_all(runs, tmp_path)
    before = diary(tmp_path)
    with pytest.raises(UserError, match=r"run was trained with learning_rate = 0.5, now 0.25 is asked for"):
        sweep.run_all({"run": ["--seed=1", "--learning_rate=0.25"], "new": ["--seed=2"]}, tmp_path)
    assert diary(tmp_path) == before


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {i} of {i * i % 91}\n" for i in range(900)))
    prepare.main([f"--input={tmp_path / 'text.txt'}", "--tokenizer=byte", f"--out_dir={tmp_path / 'set'}"])
    knobs = "--n_layer=1 --n_head=1 --n_embd=16 --block_size=32 --batch_size=2 --eval_iters=2 --sample_tokens=0"
    (tmp_path / "list").write_text(f"run --dataset={tmp_path / 'set'} {knobs} --max_iters=100000\n")
    command = [sys.executable, "-m", "tools.sweep", str(tmp_path / "list"), str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "out/run/log.txt"
    while process.poll() is None and not (log.exists() and "step 10/" in log.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0].endswith("1 runs are left, the same command goes on\n")
    assert process.returncode == 130
    assert "SIGTERM: stopped at step" in log.read_text()
    step = json.loads((tmp_path / "out/run/last/state.json").read_text())["step"]
    config = json.loads((tmp_path / "out/run/config.json").read_text())
    config |= {"max_iters": step + 3, "lr_decay_iters": step + 3}
    (tmp_path / "out/run/config.json").write_text(json.dumps(config))
    sweep.run_all(
        {"run": [f"--dataset={tmp_path / 'set'}", *knobs.split(), f"--max_iters={step + 3}"]}, tmp_path / "out"
    )
    summary = json.loads((tmp_path / "out/run/summary.json").read_text())
    assert summary["step"] == step + 3 and summary["final/val_loss"] > 0


def parameters(argv):
    config, _ = configure(argv)
    config.vocab_size = 2048  # of the stdlib set
    with torch.device("meta"):
        return n_params(GPT(config))


def test_the_list_of_make_compare(monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = sweep.read_list(Path("config/compare.txt"))
    usual = parameters(["config/mha.py"])
    for name, argv in runs.items():
        assert abs(parameters(argv) / usual - 1) < 0.01, name
    for attention in ("mha", "gqa", "mqa", "mla"):
        assert [argv for name, argv in runs.items() if name.startswith(f"{attention}-s")] == [
            [f"config/{attention}.py", f"--seed={seed}"] for seed in (1, 2, 3)
        ]
    shapes = {(c.attention, c.kv_bytes_per_token()) for c, _ in map(configure, runs.values())}
    assert len([shape for shape in shapes if shape[0] == "mla"]) >= 4
    assert len([shape for shape in shapes if shape[0] == "gqa"]) >= 3


def test_faults_of_a_list(tmp_path):
    (tmp_path / "list").write_text("# comment\n\na --seed=1  # the first\na --seed=2\n")
    with pytest.raises(UserError, match="two runs named a"):
        sweep.read_list(tmp_path / "list")
    with pytest.raises(UserError, match="cannot read the list"):
        sweep.main([str(tmp_path / "none"), str(tmp_path)])
    with pytest.raises(UserError, match="out_dir"):
        sweep.main([str(tmp_path / "list")])
    with pytest.raises(UserError, match="threads"):
        sweep.main([str(tmp_path / "list"), str(tmp_path), "--threads=0"])
    assert os.listdir(tmp_path) == ["list"]


@pytest.mark.slow
def test_uptraining_is_a_sweep(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("".join(f"line {i} of {i * i % 91}\n" for i in range(900)))
    prepare.main([f"--input={tmp_path / 'text.txt'}", "--tokenizer=byte", f"--out_dir={tmp_path / 'set'}"])
    shape = ["--attention=mha", "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=32", "--qk_norm=False"]
    recipe = [f"--dataset={tmp_path / 'set'}", "--batch_size=2", "--max_iters=4", "--eval_iters=2", "--device=cpu"]
    train([*shape, *recipe, "--sample_tokens=0", f"--out_dir={tmp_path / 'run'}"])
    options = ["--n_kv_heads=1", "--kv_lora_ranks=4", "--shares=25,50", "--eval_iters=2"]
    argv = [str(tmp_path / "run"), *options, f"--out_dir={tmp_path / 'out'}"]
    uptrain.main(argv)
    table = capsys.readouterr().out.splitlines()[-4:]
    assert table[0] == "| target | cached | before | converted | 25 % | 50 % | scratch |"
    assert [row.split(" | ")[:2] for row in table[2:]] == [["| n_kv_head=1", "16"], ["| kv_lora_rank=4", "12"]]
    assert json.loads((tmp_path / "out/n_kv_head=1/50/config.json").read_text())["max_iters"] == 2
    uptrain.main(argv)
    again = capsys.readouterr().out.splitlines()
    assert again[0] == "6 of 6 runs are done already" and again[1:] == table
