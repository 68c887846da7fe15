"""Faults of disk, data and numbers, brought about under a run: one clear line each, and nothing is lost."""

import contextlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from test_train import ROOT, TINY, command, events, run, same, weights  # noqa: F401 (run is a fixture)

import train
from nanokv import checkpoint
from nanokv import dataset as data
from nanokv.config import UserError
from nanokv.watchdogs import LossSpikes, StallWatchdog

KNOBS = ["--max_iters=12", "--eval_interval=6", "--save_interval=2", "--log_interval=1", "--eval_iters=2"]


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    """A run to which nothing happens."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train.main([*TINY, *KNOBS, f"--dataset={corpus}", f"--out_dir={folder}"])
    return folder


@pytest.fixture
def at_step(monkeypatch):
    """at_step(7, f): f() is called before the step that leads from 7 to 8, with all saves before it done."""
    savers = []
    init = checkpoint.Saver.__init__
    monkeypatch.setattr(checkpoint.Saver, "__init__", lambda self, *args: (savers.append(self), init(self, *args))[1])

    def at_step(step: int, action) -> None:
        original = train.learning_rate

        def learning_rate(now, config):
            if now == step:
                savers[-1].wait()
                action()
            return original(now, config)

        monkeypatch.setattr(train, "learning_rate", learning_rate)

    return at_step


def resumes(run, folder: Path, whole: Path, monkeypatch) -> None:  # noqa: F811
    """Goes on, with the fault mended, to the weights of the run to which nothing happened."""
    monkeypatch.undo()
    run(folder.name, "--init_from=resume")
    assert same(weights(folder), weights(whole))


@contextlib.contextmanager
def full_disk(folder: Path):
    """Yields a function that fills the disk on which `folder` is, and one that frees it."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    filler = folder / "filler"

    def fill():
        if not mounted:  # the next best: no file may grow beyond 64 KiB
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limit[1]))
            return
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as f:
            while True:
                f.write(bytes(1 << 12))

    def free():
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        filler.unlink(missing_ok=True)

    try:
        yield fill, free
    finally:
        free()
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_disk_full_during_a_save(run, whole, at_step, tmp_path, monkeypatch):  # noqa: F811
    with full_disk(tmp_path / "disk") as (fill, free):
        at_step(7, fill)
        with pytest.raises(UserError, match="No space left on device|File too large") as fault:
            run("disk/run", *KNOBS)
        assert str(fault.value).startswith("cannot write ") and "\n" not in str(fault.value)
        assert checkpoint.load(tmp_path / "disk/run", "last").state["step"] == 6
        free()
        monkeypatch.undo()
        run("disk/run", "--init_from=resume")
        assert same(weights(tmp_path / "disk/run"), weights(whole))


def test_disk_full_between_saves(run, at_step, tmp_path):  # noqa: F811
    def fill():
        full = os.open("/dev/full", os.O_WRONLY)
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{fd}") == str(tmp_path / "run/metrics.jsonl"):
                    os.dup2(full, int(fd))
        os.close(full)

    at_step(2, fill)
    with pytest.raises(UserError, match="cannot write .*metrics.jsonl: No space left on device"):
        run("run", "--max_iters=40", "--log_interval=1", "--eval_interval=40", "--eval_iters=1")
    assert checkpoint.load_newest(tmp_path / "run").state["step"] == 0


def test_disk_full_from_the_start_is_one_line_and_exit_code_2(corpus, tmp_path):
    limit = ["bash", "-c", 'ulimit -f 64; exec "$@"', "bash"]  # KiB
    done = subprocess.run(limit + command(corpus, tmp_path / "run", *KNOBS), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: cannot write ") and done.stderr.count("\n") == 1


@contextlib.contextmanager
def read_only(folder: Path):
    """Yields a function after which this process may not write to `folder`, not even as root."""
    user = os.geteuid()

    def forbid():
        folder.chmod(0o555)
        if user == 0:
            os.seteuid(65534)

    try:
        yield forbid
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


def test_out_dir_that_becomes_read_only(run, whole, at_step, tmp_path, monkeypatch):  # noqa: F811
    folder = tmp_path / "run"
    folder.mkdir()
    with read_only(folder) as forbid:
        at_step(7, forbid)
        with pytest.raises(UserError, match="cannot write .*last: Permission denied"):
            run("run", *KNOBS)
        with pytest.raises(UserError, match="out_dir.*ermission denied"):
            checkpoint.claim(folder, resume=True, overwrite=False)
    resumes(run, folder, whole, monkeypatch)


def test_out_dir_that_vanishes(run, whole, at_step, tmp_path, monkeypatch):  # noqa: F811
    at_step(7, lambda: (tmp_path / "run").rename(tmp_path / "moved"))
    with pytest.raises(UserError, match="cannot write .*last: No such file or directory"):
        run("run", *KNOBS)
    resumes(run, tmp_path / "moved", whole, monkeypatch)


def test_a_damaged_last_is_passed_over(run, whole, tmp_path, capsys, monkeypatch):  # noqa: F811
    folder = run("run", *KNOBS, "--lr_decay_iters=12", "--max_iters=10")
    for name in ("last", "best"):  # both of step 10
        path = folder / name / "optimizer.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    capsys.readouterr()
    run("run", "--init_from=resume", "--max_iters=12")
    assert "last.old, step 8: checkpoint" in capsys.readouterr().err
    assert same(weights(folder), weights(whole))


@pytest.mark.parametrize("moment", ["evaluation", "save"])
def test_sigterm(run, whole, tmp_path, monkeypatch, moment):  # noqa: F811
    """It comes from a thread, as the trainer evaluates or saves at step 6."""
    if moment == "evaluation":
        batches, calls = data.Dataset.val_batches, []

        def interrupted(*args):
            calls.append(1)
            for i, batch in enumerate(batches(*args)):
                if len(calls) == 2 and i == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        monkeypatch.setattr(data.Dataset, "val_batches", interrupted)
    else:
        save_file, calls = checkpoint.save_file, []

        def interrupted(tensors, path):
            calls.append(threading.current_thread())
            if len(calls) == 10:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)  # in which the loop goes on
            save_file(tensors, path)

        monkeypatch.setattr(checkpoint, "save_file", interrupted)
    with pytest.raises(SystemExit) as end:
        run("run", *KNOBS)
    assert end.value.code == 128 + signal.SIGTERM
    stopped = checkpoint.load(tmp_path / "run", "last").state["step"]
    assert stopped == 6 if moment == "evaluation" else 0 < stopped < 12
    if moment == "save":
        assert threading.main_thread() not in calls
    resumes(run, tmp_path / "run", whole, monkeypatch)


@pytest.mark.slow
def test_sigterm_while_it_compiles(corpus, tmp_path):
    """A minute or more, with nothing to save yet: it ends at once."""
    line = command(corpus, tmp_path / "run", *KNOBS, "--compile=True")
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    next(line for line in process.stdout if line.startswith("compiling"))
    time.sleep(2)
    process.terminate()
    sent = time.monotonic()
    out, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "SIGTERM: stopped before the first step" in out and err == ""
    assert time.monotonic() - sent < 30


@pytest.mark.slow
def test_kill_9_at_random_moments():
    """The script, which anyone can run with --kills=50, in short."""
    script = [sys.executable, "tests/kill9.py", "--kills=3", "--steps_a_life=8"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 kills in 48 steps" in done.stdout and "bit-identical" in done.stdout


@pytest.fixture
def poison(monkeypatch):
    """poison(f): the loss of training call number n is f(n, loss)."""

    def poison(change) -> None:
        forward, calls = train.LanguageModelLoss.forward, [0]

        def poisoned(loss_model, *batch):
            loss = forward(loss_model, *batch)
            if not loss_model.training:
                return loss
            calls[0] += 1
            return change(calls[0], loss)

        monkeypatch.setattr(train.LanguageModelLoss, "forward", poisoned)

    return poison


@pytest.mark.parametrize(
    ("optimizer", "change"),
    [("muon", lambda loss: loss * math.nan), ("adamw", lambda loss: loss + math.inf)],
    ids=["muon-nan", "adamw-inf"],
)
def test_a_step_that_is_not_finite_is_skipped(run, poison, capsys, change, optimizer):  # noqa: F811
    """Of its two micro-batches one is poisoned."""
    poison(lambda n, loss: change(loss) if n == 10 else loss)
    knobs = ["--gradient_accumulation_steps=2", f"--optimizer={optimizer}", "--save_interval=1"]
    folder = run("run", *KNOBS, *knobs)
    assert "step 5 is skipped: its gradient norm is nan" in capsys.readouterr().out
    lines = [event for event in events(folder) if "train/loss" in event]
    assert [line["train/skipped_steps"] for line in lines] == [0] * 4 + [1] * 8
    assert [line["step"] for line in lines if line["train/loss"] is None] == [5]
    last = checkpoint.load(folder, "last")
    assert last.state["skipped_steps"] == json.loads((folder / "summary.json").read_text())["train/skipped_steps"]
    assert all(tensor.isfinite().all() for tensor in (*last.model.values(), *last.optimizer.values()))


def test_a_skipped_step_changes_nothing(run, poison, tmp_path):  # noqa: F811
    four = run("four", *KNOBS, "--lr_decay_iters=12", "--max_iters=4", "--save_interval=1")
    poison(lambda n, loss: loss * math.nan if n == 5 else loss)
    five = run("five", *KNOBS, "--lr_decay_iters=12", "--max_iters=5", "--save_interval=1")
    a, b = checkpoint.load(four, "last"), checkpoint.load(five, "last")
    assert same(a.model, b.model) and same(a.optimizer, b.optimizer) and b.state["step"] == 5


def test_too_many_skipped_steps_end_the_run(run, poison, tmp_path, whole, monkeypatch):  # noqa: F811
    poison(lambda n, loss: loss * math.nan if n > 7 else loss)
    with pytest.raises(UserError, match="step 10: the gradient was not finite for 3 steps in a row"):
        run("run", *KNOBS, "--max_skipped_steps=3", "--always_save_checkpoint=False", "--save_interval=6")
    resumes(run, tmp_path / "run", whole, monkeypatch)


def test_weights_that_are_not_finite_are_not_saved(run, at_step, tmp_path, whole, monkeypatch):  # noqa: F811
    def spoil():
        model = next(m for m in models if m.training)
        with torch.no_grad():
            model.lm_head.weight[3, 3] = math.inf

    models = []
    init = train.GPT.__init__
    monkeypatch.setattr(train.GPT, "__init__", lambda self, c: (models.append(self), init(self, c))[1])
    at_step(7, spoil)
    with pytest.raises(UserError, match="step 8 is not saved: lm_head.weight holds nan or inf"):
        run("run", *KNOBS)
    assert checkpoint.load(tmp_path / "run", "last").state["step"] == 6
    resumes(run, tmp_path / "run", whole, monkeypatch)


def test_train_bin_shortened_under_the_run(run, corpus, whole, at_step, tmp_path, monkeypatch):  # noqa: F811
    shutil.copytree(corpus, tmp_path / "set")
    (path,) = (tmp_path / "set").glob("train*.bin")
    content = path.read_bytes()
    at_step(7, lambda: os.truncate(path, 100))
    with pytest.raises(UserError, match="has become shorter while in use: restore it and resume"):
        run("run", *KNOBS, f"--dataset={tmp_path / 'set'}")
    path.write_bytes(content)
    resumes(run, tmp_path / "run", whole, monkeypatch)


def test_a_stalled_data_source_reports_itself(run, monkeypatch, capsys):  # noqa: F811
    train_batch = data.Dataset.train_batch

    def slow(self, first, *rest):
        time.sleep(0.6 if first == 8 else 0)
        return train_batch(self, first, *rest)

    monkeypatch.setattr(data.Dataset, "train_batch", slow)
    run("run", "--max_iters=4", "--data_timeout=0.4", "--eval_iters=1")
    assert capsys.readouterr().out.count("the data source has not given the next batch in 0.4 s") == 1


def test_stalls_says_it_while_it_waits():
    said = threading.Event()
    stalls = StallWatchdog(0.05, lambda line: said.set())
    with stalls:
        assert said.wait(10)


def test_a_loss_spike_is_told_from_noise():
    torch.manual_seed(1)
    noise = (torch.randn(500) * 0.05).tolist()
    losses = [2 + 6 * math.exp(-i / 40) + noise[i] for i in range(500)]
    lines = []
    spikes = LossSpikes(lines.append)
    for i, loss in enumerate(losses):
        spikes.see(i, loss)
    assert lines == []
    for i, loss in enumerate((5.0, math.nan, 5.1, 4.9)):
        spikes.see(500 + i, loss)
    (line,) = lines
    assert line.startswith("step 500: the loss has jumped to 5.0000, from ")
