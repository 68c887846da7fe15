"""Several ranks, over gloo on one machine: the same run at any number of them, and what if one dies.

As a script it runs trainings in groups of forked ranks, so that torch is imported once for all of them.
"""

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

import train
from nanokv import checkpoint, metrics
from nanokv import distributed as parallel

ROOT = Path(__file__).parent.parent
# widths that 4 ranks cannot cut evenly, and fewer matrices of a shape than ranks
TINY = ["--n_layer=2", "--n_head=2", "--n_embd=24", "--intermediate_size=22", "--block_size=24"]
TINY += ["--batch_size=2", "--gradient_accumulation_steps=4", "--dropout=0.1", "--warmup_iters=2"]
TINY += ["--device=cpu", "--dtype=float32", "--compile=False", "--sample_tokens=0", "--eval_iters=9"]
TINY += ["--eval_interval=15", "--log_interval=1", "--max_iters=30", "--lr_decay_iters=30"]
ATTENTIONS = {"mla": ["--attention=mla"], "gqa": ["--attention=gqa", "--n_kv_head=1"]}
CASES = [
    (attention, optimizer, engine)
    for attention in ATTENTIONS
    for optimizer in ("adamw", "muon")
    for engine in ("ddp", "fsdp")
]
# half of the cases for 2 ranks and half for 4, each pair of choices in both; EVERY_CASE=1 for all of them
HALVES = [[case for i, case in enumerate(CASES) if i.bit_count() % 2 == half] for half in (0, 1)]
BY_TWO, BY_FOUR = (CASES, CASES) if "EVERY_CASE" in os.environ else HALVES


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def fork_ranks(size: int, runs: list[list[str]]) -> list[int]:
    """Process ids of `size` ranks that do the trainings with the arguments `runs`, one after another."""
    port, pids = free_port(), []
    for rank in range(size):
        pids.append(os.fork())
        if pids[-1] == 0:
            torch.set_num_threads(1)
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
            values = (rank, rank, size, size, port, "127.0.0.1")
            os.environ |= {name: str(value) for name, value in zip(names, values, strict=True)}
            os.environ["TORCHELASTIC_RUN_ID"] = "test"
            code = 1
            try:
                with parallel.process_group():
                    for argv in runs:
                        train.train(argv)
                code = 0
            except SystemExit as e:
                code = e.code
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(code)
    return pids


def script(groups: list[tuple[int, list[list[str]]]]) -> None:
    """Groups of ranks, in turn: (number of ranks, trainings)."""
    metrics.decode_probe = lambda *args, **kwargs: {"decode/tokens_per_s": 0.0}  # slow; tested elsewhere
    metrics.peak_flops = lambda *args: None
    for name in ("_dynamo", "distributed.fsdp", "distributed.tensor"):  # once, not in each rank
        importlib.import_module(f"torch.{name}")
    for size, runs in groups:
        statuses = [os.waitpid(pid, 0)[1] for pid in fork_ranks(size, runs)]
        codes = {os.waitstatus_to_exitcode(status) for status in statuses}
        if codes != {0}:
            sys.exit(max(codes) if len(codes) == 1 else 1)  # that of all ranks


def start(*groups: tuple[int, list[list[str]]]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, __file__, json.dumps(groups)], cwd=ROOT, env=environment())


def in_groups(*groups: tuple[int, list[list[str]]]) -> None:
    assert start(*groups).wait() == 0


def workers(of: subprocess.Popen) -> list[int]:
    """The processes that a process has started."""
    return [int(pid) for pid in subprocess.check_output(["pgrep", "-P", str(of.pid)], text=True).split()]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def curve(run_dir: Path) -> list[float]:
    """Losses of a run, of each step and of each evaluation, whole and by position."""
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    keys = ("train/loss", "val/loss", "val/loss_at/16", "val/loss_at/24")
    return [event[key] for key in keys for event in events if key in event]


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> Path:
    """Folder of runs: 1-, 2- and 4-*: of that many ranks; 2-to-N-*: begun by 2 ranks, ended by N."""
    out = tmp_path_factory.mktemp("runs")

    def argv(name: str, attention: str, optimizer: str, engine: str = "ddp") -> list[str]:
        return [
            *(*TINY, *ATTENTIONS[attention], f"--optimizer={optimizer}", f"--parallel={engine}"),
            *(f"--dataset={corpus}", f"--out_dir={out}/{name}-{attention}-{optimizer}-{engine}"),
        ]

    half, rest = ["--max_iters=15"], ["--init_from=resume"]
    moved = BY_TWO[:2]  # one by DDP, one by FSDP
    in_groups(
        (2, [[*argv("2", *case), *(half if case in moved else [])] for case in BY_TWO]),
        (1, [argv("1", a, o) for a in ATTENTIONS for o in ("adamw", "muon")]),
    )
    for case in moved:
        for ranks in "14":
            shutil.copytree(out / "-".join(("2", *case)), out / "-".join((f"2-to-{ranks}", *case)))
    in_groups(
        (2, [[*argv("2", *case), *rest] for case in moved]),
        (4, [argv("4", *case) for case in BY_FOUR] + [[*argv("2-to-4", *case), *rest] for case in moved]),
        (1, [[*argv("2-to-1", *case), *rest] for case in moved]),
    )
    return out


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_losses_are_the_same_at_any_number_of_ranks(runs, case):
    """One rank accumulates 4 micro-batches, each of four ranks has one; dropout drops the same."""
    alone = curve(runs / f"1-{case[0]}-{case[1]}-ddp")
    assert len(alone) == 30 + 3 * 3
    others = [path for path in runs.glob(f"*-{'-'.join(case)}") if not path.name.startswith("1")]
    assert others
    for path in others:
        assert curve(path) == pytest.approx(alone, rel=1e-5), path.name


@pytest.mark.slow
def test_a_run_moves_from_two_ranks_to_one_and_four(runs):
    moved = {path.name for path in runs.glob("2-to-*")}
    assert len(moved) == 4
    for name in moved:
        state = checkpoint.load(runs / name, "last").state
        assert (state["step"], state["samples"]) == (30, 240)


def test_a_signal_to_one_rank_stops_all_after_one_save(corpus, tmp_path):
    argv = [*TINY, *ATTENTIONS["mla"], f"--dataset={corpus}", f"--out_dir={tmp_path}/run"]
    argv += ["--max_iters=100000", "--eval_interval=100000", "--parallel=fsdp"]
    group = start((2, [argv]))
    wait_for_step(tmp_path / "run", 2)
    os.kill(workers(group)[1], signal.SIGUSR1)
    sent = time.monotonic()
    assert group.wait() == 128 + signal.SIGUSR1
    assert time.monotonic() - sent < 30
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert checkpoint.load(tmp_path / "run", "last").state["step"] == last


def wait_for_step(run_dir: Path, step: int) -> None:
    for _ in range(12000):
        path = run_dir / "metrics.jsonl"
        if path.exists() and f'{{"step": {step},' in path.read_text():
            return
        time.sleep(0.01)
    raise TimeoutError(f"{run_dir} has not come to step {step}")


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_killed_rank_brings_the_group_back(runs, corpus, tmp_path, nodes):
    """Two workers of one torchrun, or of two that meet on loopback as two nodes would: one is killed -9,
    and the weights end as undisturbed.
    """
    argv = [*TINY, *ATTENTIONS["gqa"], f"--dataset={corpus}", "--save_interval=5"]
    agent = [sys.executable, "-m", "torch.distributed.run", "--max-restarts=3"]
    if nodes == 1:
        agent += ["--standalone", "--nproc_per_node=2"]
    else:
        agent += ["--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d"]
        agent += [f"--rdzv-endpoint=localhost:{free_port()}"]
    command = [*agent, "train.py", *argv, f"--out_dir={tmp_path}/cut"]
    agents = [subprocess.Popen(command, cwd=ROOT, env=environment()) for _ in range(nodes)]
    wait_for_step(tmp_path / "cut", 6)
    os.kill(workers(agents[-1])[-1], signal.SIGKILL)
    assert [agent.wait(timeout=300) for agent in agents] == [0] * nodes
    whole = runs / "2-gqa-muon-ddp"
    assert curve(tmp_path / "cut") == curve(whole)
    ends = [checkpoint.load(path, "last").model for path in (whole, tmp_path / "cut")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0] | ends[1])


if __name__ == "__main__":
    script(json.loads(sys.argv[1]))
