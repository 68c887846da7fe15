"""The training loop, run for real on a small text: what it writes, resume, signals, faults."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import train
from data.mqar import prepare as mqar
from data.text import prepare
from nanokv import checkpoint, metrics
from nanokv.config import UserError
from nanokv.dataset import open_dataset
from nanokv.loss import LanguageModelLoss
from train import GPTConfig, TrainConfig, read_knobs

ROOT = Path(__file__).parent.parent
TINY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=4", "--warmup_iters=2"]
TINY += ["--device=cpu", "--dtype=float32", "--compile=False", "--sample_tokens=8"]
RUN_KEYS = [
    "step",
    "tokens",
    "time",
    "flops",
    "train/loss",
    "train/grad_norm",
    "train/skipped_steps",
    "lr",
    "train/tokens_per_s",
    "train/mfu",
    "memory/peak_bytes",
    "val/loss",
    "val/bpb",
    "val/loss_at/16",
    "val/loss_at/32",
    "best/val_loss",
    "best/val_bpb",
    "final/val_loss",
    "final/val_bpb",
    "params/total",
    "params/non_embedding",
    "kv_cache/elements_per_token_layer",
    "kv_cache/bytes_per_token",
    "kv_cache/ratio_to_mha",
    "kv_cache/allocated_bytes",
    "decode/tokens_per_s",
    "decode/context",
    "attention",
    "dataset",
    "seed",
    "git_sha",
    "corpus_sha256",
    "tokenizer_sha256",
    "code_sha256",
    "resolved/device",
    "resolved/dtype",
    "resolved/backend",
]


@pytest.fixture
def run(corpus, tmp_path, capsys):
    """Trains in this process: run("name", "--knob=value" ...) -> run folder."""

    def run(name: str, *knobs: str) -> Path:
        train.main([*TINY, f"--dataset={corpus}", f"--out_dir={tmp_path / name}", *knobs])
        return tmp_path / name

    return run


def command(corpus: Path, out_dir: Path, *knobs: str) -> list[str]:
    return [sys.executable, "train.py", *TINY, f"--dataset={corpus}", f"--out_dir={out_dir}", *knobs]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(run_dir, "last").model


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def events(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("attention", ["mha", "mqa", "gqa", "mla"])
def test_a_run_learns_and_reports_quality_and_cache(run, attention, capsys):
    heads = ["--n_kv_head=1"] if attention == "gqa" else []
    folder = run("run", f"--attention={attention}", *heads, "--max_iters=40", "--eval_interval=20")
    summary = json.loads((folder / "summary.json").read_text())
    assert not set(RUN_KEYS) - summary.keys()
    logged = {key for event in events(folder) for key in event}
    assert logged <= summary.keys() and {"train/loss", "val/loss", "decode/tokens_per_s"} <= logged
    first = next(event["val/loss"] for event in events(folder) if "val/loss" in event)
    assert first == pytest.approx(math.log(257), abs=0.3)
    assert summary["final/val_loss"] < first - 1
    assert summary["final/val_bpb"] == pytest.approx(summary["final/val_loss"] / math.log(2), rel=0.02)
    config, _ = read_knobs(folder)
    assert summary["kv_cache/bytes_per_token"] == config.kv_bytes_per_token(torch.bfloat16)
    assert summary["tokens"] == 40 * 4 * 32
    out = capsys.readouterr().out
    assert "cache bytes/token" in out and attention in out and "step 40: val loss" in out


def test_data_that_is_no_text_has_no_bits_per_byte(tmp_path, capsys):
    mqar.main([f"--out_dir={tmp_path / 'set'}", "--n_pairs=2", "--seq_len=8", "--n_train=100", "--n_val=10"])
    knobs = ["--block_size=8", "--max_iters=4", f"--dataset={tmp_path / 'set'}"]
    summary = train.train([*TINY, *knobs, f"--out_dir={tmp_path / 'run'}"])
    assert summary["final/val_loss"] > 0 and summary["final/val_bpb"] is None
    out = capsys.readouterr().out
    assert "val loss" in out and "bits" not in out


def test_resume_is_bit_identical(run):
    """Dropout draws from the random state, micro-batches accumulate; the schedule knows where it is."""
    knobs = ["--dropout=0.1", "--gradient_accumulation_steps=2", "--eval_interval=4", "--max_iters=12"]
    whole = run("whole", *knobs)
    half = run("half", *knobs, "--lr_decay_iters=12", "--max_iters=8")
    run("half", "--init_from=resume", "--max_iters=12")
    assert same(weights(whole), weights(half))
    whole_losses, half_losses = (
        [(e["step"], e["val/loss"]) for e in events(folder) if "val/loss" in e] for folder in (whole, half)
    )
    assert half_losses == whole_losses


@pytest.mark.parametrize(
    ("number", "optimizer"), [(signal.SIGINT, "muon"), pytest.param(signal.SIGTERM, "adamw", marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_resume_goes_on_bit_identically(corpus, tmp_path, run, number, optimizer):
    knobs = [f"--optimizer={optimizer}", "--max_iters=60", "--eval_interval=25", "--log_interval=1"]
    whole = run("whole", *knobs)
    process = subprocess.Popen(command(corpus, tmp_path / "cut", *knobs), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(number)
            sent = time.monotonic()
    assert process.wait() == 128 + number
    assert time.monotonic() - sent < 30  # a second or two where nothing else runs
    stopped = checkpoint.load(tmp_path / "cut", "last").state["step"]
    assert 3 <= stopped < 60
    run("cut", "--init_from=resume", *knobs)
    assert same(weights(whole), weights(tmp_path / "cut"))


def test_resume_of_a_finished_run_changes_nothing(run):
    folder = run("run", "--max_iters=6", "--eval_interval=3")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="complete at step 6; raise --max_iters"):
        run("run", "--init_from=resume")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    run("run", "--init_from=resume", "--max_iters=9")
    _, config = read_knobs(folder)
    assert (config.max_iters, config.lr_decay_iters) == (9, 9)
    assert checkpoint.load(folder, "last").state["step"] == 9


def test_resume_drops_lines_past_the_checkpoint(run):
    folder = run("run", "--max_iters=6", "--eval_interval=3", "--log_interval=1")
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"step": 7, "train/loss": 1.0}\n{"step": 8, "trai')
    run("run", "--init_from=resume", "--max_iters=8")
    steps = [event["step"] for event in events(folder) if "train/loss" in event]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]


def changes(out: str) -> list[str]:
    return [line for line in out.splitlines() if " -> " in line]


def test_resume_keeps_what_the_run_was_started_with(corpus, tmp_path, capsys):
    """Whether or not its config file is named again; only the command line changes a value, and each change is said."""
    file, where = tmp_path / "small.py", [f"--out_dir={tmp_path / 'run'}"]
    knobs = ["n_layer=1", "n_head=2", "n_embd=32", "block_size=32", "batch_size=4", "warmup_iters=2", "sample_tokens=0"]
    file.write_text(
        "\n".join([*knobs, f"dataset={str(corpus)!r}", "learning_rate=0.1", "max_iters=99", "grad_clip=2.0"])
    )
    train.main([str(file), *where, "--learning_rate=0.003", "--max_iters=4", "--dtype=float32"])
    assert not changes(capsys.readouterr().out)
    started = train.all_knobs(*read_knobs(tmp_path / "run"))
    file.write_text(file.read_text().replace("n_layer=1", "n_layer=3").replace("99", "999"))  # edited since
    steps = {"max_iters": 4, "lr_decay_iters": 4}  # of which the latter follows the former
    for named, new in (([str(file)], {"max_iters": 6}), ([], {"max_iters": 8, "grad_clip": 0.5})):
        train.main([*named, "--init_from=resume", *where, *(f"--{k}={v}" for k, v in new.items())])
        held = train.all_knobs(*read_knobs(tmp_path / "run"))
        followed = new | {"lr_decay_iters": new["max_iters"]}
        assert held == started | followed  # init_from too: where its weights come from
        expected = [f"{knob}: {(started | steps)[knob]} -> {value}" for knob, value in followed.items()]
        assert sorted(changes(capsys.readouterr().out)) == sorted(expected)
        steps = followed
    train.main([str(file), "--init_from=resume", *where, "--learning_rate=0.003", "--max_iters=9", "--eval_only"])
    lines = ["eval_only: False -> True", "max_iters: 8 -> 9", "lr_decay_iters: 8 -> 9"]
    assert changes(capsys.readouterr().out) == lines
    with pytest.raises(UserError, match="n_layer = 2 does not fit the checkpoint"):
        train.main([str(file), "--init_from=resume", *where, "--n_layer=2"])
    assert not changes(capsys.readouterr().out)


@pytest.mark.parametrize("named", [True, False], ids=["its config file named", "not named"])
def test_a_copied_or_moved_run_resumes_into_itself(run, corpus, tmp_path, named, capsys):
    file, old = tmp_path / "old.py", run("old", "--max_iters=4", "--eval_interval=2")
    file.write_text(f"out_dir = {str(old)!r}\nmax_iters = 4\n")
    again = [str(file)] if named else []
    shutil.copytree(old, tmp_path / "copy")
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    capsys.readouterr()
    train.main([*again, "--init_from=resume", f"--out_dir={tmp_path / 'copy'}", "--max_iters=6"])
    assert f"out_dir: {old} -> {tmp_path / 'copy'}" in changes(capsys.readouterr().out)
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before
    assert checkpoint.load(tmp_path / "copy", "last").state["step"] == 6
    old.rename(tmp_path / "moved")
    train.main([*again, "--init_from=resume", f"--out_dir={tmp_path / 'moved'}", "--max_iters=6"])
    assert not old.exists() and same(weights(tmp_path / "copy"), weights(tmp_path / "moved"))
    assert read_knobs(tmp_path / "moved")[1].out_dir == str(tmp_path / "moved")


def test_best_is_kept_where_last_is_worse(run):
    """A learning rate that explodes after the first evaluation."""
    knobs = ["--max_iters=20", "--eval_interval=10", "--optimizer=adamw", "--grad_clip=0"]
    folder = run("run", *knobs, "--warmup_iters=0", "--learning_rate=0.01", "--decay_lr=False")
    good = json.loads((folder / "summary.json").read_text())["best/val_loss"]
    run("run", "--init_from=resume", "--learning_rate=100", "--max_iters=30")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["final/val_loss"] > summary["best/val_loss"] == good
    assert checkpoint.load(folder, "best").state["step"] == 20


def test_evaluation_draws_nothing_and_repeats(corpus, run):
    folder = run("run", "--max_iters=4", "--eval_interval=2", "--dropout=0.2")
    again = run("again", "--max_iters=4", "--eval_interval=4", "--dropout=0.2")
    assert same(weights(folder), weights(again))
    config, knobs = read_knobs(folder)
    model = train.GPT(config)
    model.load_state_dict(weights(folder))
    state = torch.get_rng_state()
    dataset = open_dataset(str(corpus))
    windows = config.block_size, knobs.batch_size, knobs.eval_iters
    loss_model = LanguageModelLoss(model)
    first, second = (metrics.evaluate(loss_model, dataset, windows, nullcontext()) for _ in range(2))
    assert first == second == {key: events(folder)[-1 - 1][key] for key in first}
    assert torch.equal(torch.get_rng_state(), state)


def test_accumulation_equals_one_large_batch(run):
    a = run("a", "--max_iters=3", "--batch_size=8")
    b = run("b", "--max_iters=3", "--batch_size=2", "--gradient_accumulation_steps=4")
    for name, weight in weights(a).items():
        torch.testing.assert_close(weights(b)[name], weight, rtol=0, atol=2e-5)


def test_init_from_a_run_takes_its_weights(run, tmp_path, capsys):
    folder = run("first", "--max_iters=20", "--eval_interval=10")
    loss = json.loads((folder / "summary.json").read_text())["best/val_loss"]
    second = run("second", f"--init_from={folder}", "--max_iters=2", "--eval_interval=1")
    assert events(second)[0]["val/loss"] == pytest.approx(loss, abs=1e-6)
    capsys.readouterr()
    dataset = read_knobs(folder)[1].dataset
    knobs = [f"--dataset={dataset}", "--eval_only=True", f"--init_from={folder}", f"--out_dir={tmp_path / 'none'}"]
    metrics = train.train([*TINY, *knobs])
    assert metrics["val/loss"] == pytest.approx(loss, abs=1e-6)
    assert not (tmp_path / "none").exists()


def test_learning_rate_schedules():
    cosine = TrainConfig(schedule="cosine", learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110)
    rates = [train.learning_rate(step, cosine) for step in range(120)]
    assert rates[0] == pytest.approx(1 / 11) and rates[10] == 1 and rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1) == rates[119]
    wsd = TrainConfig(schedule="wsd", learning_rate=1.0, min_lr=0.0, warmup_iters=10, max_iters=100, cooldown=0.2)
    rates = [train.learning_rate(step, wsd) for step in range(101)]
    assert rates[10:81] == [1] * 71 and rates[90] == pytest.approx(0.5) and rates[100] == 0
    short = TrainConfig(learning_rate=1.0, warmup_iters=100, max_iters=5)
    assert all(0 < train.learning_rate(step, short) <= 1 for step in range(6))
    assert train.learning_rate(3, TrainConfig(decay_lr=False, warmup_iters=2)) == 1


@pytest.mark.slow
def test_wandb_offline_has_every_key_and_resumes_the_same_run(corpus, tmp_path):
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    knobs = ["--wandb_log=True", "--max_iters=4", "--eval_interval=2", "--log_interval=1", "--attention=mla"]
    knobs += ["--wandb_entity=team", "--wandb_group=group", "--wandb_tags=a,b"]
    subprocess.run(command(corpus, tmp_path / "run", *knobs), cwd=ROOT, env=environment, check=True)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    shown = subprocess.run(inspect, capture_output=True, text=True, check=True, env=environment).stdout
    for key in RUN_KEYS:
        assert key in shown, key
    knobs = ["--wandb_log=True", "--init_from=resume", "--max_iters=6"]
    subprocess.run(command(corpus, tmp_path / "run", *knobs), cwd=ROOT, env=environment, check=True)
    ids = {path.name.rsplit("-", 1)[1] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert ids == {(tmp_path / "run/wandb_id").read_text()}


FAULTS = {
    "unknown key": (["--n_heads=4"], "n_head"),
    "wrong type": (["--n_layer=two"], "int"),
    "unknown attention": (["--attention=mhla"], "attention"),
    "unknown dataset": (["--dataset=stdlibb"], "stdlib"),
    "unknown tokenizer": (["--tokenizer=bpee"], "tokenizer"),
    "unknown optimizer": (["--optimizer=adam"], "adamw"),
    "unknown dtype": (["--dtype=float8"], "float"),
    "unknown device": (["--device=gpu"], "device"),
    "heads not divisible": (["--attention=gqa", "--n_kv_head=3", "--n_head=4"], "divisible"),
    "width not divisible": (["--n_embd=33"], "divisible"),
    "odd rope width": (["--rotary_dim=3"], "even"),
    "mla knob on mha": (["--kv_lora_rank=8"], "mla"),
    "missing config file": (["config/mlaa.py"], "config/mla.py"),
    "vocabulary too small": (["--vocab_size=100"], "257"),
    "block longer than val": (["--block_size=5000"], "block_size"),
    "nothing to resume": (["--init_from=resume"], "run"),
    "no run to start from": (["--init_from=out/none"], "run folder"),
    "out_dir not writable": (["--out_dir=/proc/nanokv"], "out_dir"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_line(run, corpus, tmp_path, fault):
    knobs, word = FAULTS[fault]
    with pytest.raises(UserError) as caught:
        train.main([*TINY, f"--dataset={corpus}", f"--out_dir={tmp_path / 'run'}", "--max_iters=2", *knobs])
    assert word in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_faults_leave_an_existing_run_untouched(run, corpus, tmp_path):
    text = corpus.parent / "text.txt"
    (tmp_path / "text.txt").write_text(text.read_text().replace("cat", "dog"))
    other_tokenizer, other_text, no_tokenizer = (tmp_path / name for name in ("char", "dogs", "lost"))
    prepare.main([f"--input={text}", "--tokenizer=char", f"--out_dir={other_tokenizer}"])
    prepare.main([f"--input={tmp_path / 'text.txt'}", "--tokenizer=byte", f"--out_dir={other_text}"])
    shutil.copytree(corpus, no_tokenizer)
    (no_tokenizer / "tokenizer_spec.json").unlink()
    folder = run("run", "--max_iters=4", "--eval_interval=2", "--attention=mla")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for knobs, word in (
        (["--max_iters=4"], "already holds a run"),
        (["--init_from=resume", "--n_layer=3"], "n_layer"),
        (["--init_from=resume", "--kv_lora_rank=4"], "kv_lora_rank"),
        (["--init_from=resume", "--attention=mqa"], "mla"),
        (["--init_from=resume", "--optimizer=adamw", "--max_iters=8"], "optimizer"),
        (["--init_from=resume", f"--dataset={other_tokenizer}", "--max_iters=8"], "add --tokenizer="),
        (["--init_from=resume", f"--dataset={other_text}", "--max_iters=8"], "other data"),
        (["--overwrite=True", f"--dataset={no_tokenizer}"], "tokenizer_spec.json"),
        (["--overwrite=True", "--n_embd=33"], "divisible"),
        (["--overwrite=True", "--dataset=nowhere"], "nowhere"),
    ):
        with pytest.raises(UserError, match=word):
            run("run", *knobs)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    for name in ("last", "last.old", "best"):
        (folder / name / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="last is damaged.*no other is whole"):
        run("run", "--init_from=resume")


def test_exit_code_2_and_no_traceback(corpus, tmp_path):
    done = subprocess.run(command(corpus, tmp_path / "run", "--n_embed=12"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "n_embd" in done.stderr


def test_help_is_the_manual():
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for knob in (*GPTConfig.__dataclass_fields__, *TrainConfig.__dataclass_fields__):
        assert f"--{knob}=" in done.stdout
