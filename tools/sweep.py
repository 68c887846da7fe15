"""Train a list of runs, side by side: `python -m tools.sweep config/compare.txt out/compare --max_iters=500`.

The list is a text file, a run a line: its name, then the arguments of train.py. Further knobs of train.py on the
command line are for all runs, and override those of a line. A finished run is left alone and a stopped one goes on,
so the same command again does what is left. Ctrl-C or SIGTERM stops the runs; they save. Small models make the most
of the cores with one thread a run.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

from compare import NOT_THE_EXPERIMENT
from nanokv import checkpoint
from nanokv.config import UserError, check_range, cli, parse
from nanokv.dataset import open_dataset
from train import configure, read_knobs

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "train.py"
USAGE = """python -m tools.sweep LIST OUT_DIR [--key=value ...]

Keys of train.py (python train.py --help) may be given too: they override the arguments of all runs of the list."""
ANY_VALUE = NOT_THE_EXPERIMENT - {"seed"} | {"vocab_size", "init_from"}  # knobs that a run may hold otherwise


@dataclass
class Options:
    list: str  # the text file
    out_dir: str  # where the run folders go, with what each run prints in its log.txt
    threads: int = 1  # of each run
    jobs: int = 0  # runs side by side; 0: as many as the cores give threads for

    def __post_init__(self):
        check_range(self, "threads", at_least=1)
        check_range(self, "jobs", at_least=0)


def read_list(path: Path) -> dict[str, list[str]]:
    """Arguments of train.py by the name of the run. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise UserError(f"cannot read the list of runs {path}: {e.strerror}") from e
    runs = {}
    for line in lines:
        if words := shlex.split(line, comments=True):
            if words[0] in runs:
                raise UserError(f"{path} has two runs named {words[0]}")
            runs[words[0]] = words[1:]
    return runs


def run_all(runs: dict[str, list[str]], out_dir: Path, jobs: int = 0, threads: int = 1) -> None:
    """Train each of `runs` (arguments of train.py by name) to its end, in out_dir/NAME.

    Raises UserError if some of them failed, or if a folder holds a run that was trained with other values.
    """
    waiting = [name for name in runs if not is_done(out_dir / name, runs[name])]
    if len(waiting) < len(runs):
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done already", flush=True)
    for data in {(c.dataset, c.tokenizer) for _, c in (configure(runs[name]) for name in waiting)}:
        open_dataset(*data)  # prepared once, rather than by several runs at a time
    jobs = jobs or max((os.cpu_count() or 1) // threads, 1)
    running: dict[str, subprocess.Popen] = {}
    failed, done, began, total = [], 0, time.monotonic(), len(waiting)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                running[name] = start(runs[name], out_dir / name, threads)
            time.sleep(0.1)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                code = running.pop(name).returncode
                done += 1
                left = timedelta(minutes=round((time.monotonic() - began) / 60 / done * (total - done)))
                print(f"[{done}/{total}] {name} {outcome(out_dir / name, code)}; about {left} left", flush=True)
                failed += [name] if code else []
    except KeyboardInterrupt:
        for process in running.values():  # each in a session of its own, so that it hears of this once
            process.terminate()
        for process in running.values():
            process.wait()
        print(f"stopped; {len(waiting) + len(running)} runs are left, the same command goes on", flush=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if failed:
        raise UserError(f"{len(failed)} of {total} runs failed: {', '.join(failed)}; see log.txt in each folder")


def is_done(folder: Path, argv: list[str]) -> bool:
    """Whether the folder holds this run, finished. Raises UserError if it holds one with other values."""
    if not any((folder / name).exists() for name in checkpoint.CHECKPOINTS):
        return False
    wanted, held = (asdict(a) | asdict(b) for a, b in (configure(argv), read_knobs(folder)))
    any_value = ANY_VALUE | ({"intermediate_size"} if wanted["match_params"] else set())
    for knob in wanted:
        if knob not in any_value and wanted[knob] != held[knob]:
            fault = f"was trained with {knob} = {held[knob]}, now {wanted[knob]} is asked for; remove it"
            raise UserError(f"{folder} {fault}")
    return checkpoint.is_finished(folder)


def start(argv: list[str], folder: Path, threads: int) -> subprocess.Popen:
    """train.py in a process of its own: from scratch, or from where it stopped."""
    resume = any((folder / name).exists() for name in checkpoint.CHECKPOINTS if name.startswith("last"))
    mode = "--init_from=resume" if resume else "--overwrite=True"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(TRAIN), *argv, f"--out_dir={folder}", mode]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)


def outcome(folder: Path, code: int) -> str:
    if code:
        lines = (folder / "log.txt").read_text(errors="replace").splitlines()
        return f"failed ({code}): {lines[-1] if lines else 'no output'}"
    summary = checkpoint.read_json(folder / "summary.json")
    return f"has val loss {summary['final/val_loss']:.4f}, trained in {summary['time']:.0f} s"


def main(argv: list[str]) -> None:
    own = {"-h", "--help", *(f"--{field.name}" for field in fields(Options))}
    for_all = [arg for arg in argv if arg.startswith("-") and arg.partition("=")[0] not in own]
    options = parse(Options, [arg for arg in argv if arg not in for_all], USAGE, bare=2)
    runs = {name: [*line, *for_all] for name, line in read_list(Path(options.list)).items()}
    run_all(runs, Path(options.out_dir), options.jobs, options.threads)


if __name__ == "__main__":
    cli(main)
