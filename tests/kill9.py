"""Kill a run again and again, at random moments, and compare what comes of it with a run left alone.

    python tests/kill9.py --kills=50

Trains a small model, saving every few steps, in a process that gets SIGKILL at a random moment; resumes it;
and so on until it has been killed `kills` times and may end. Fails (exit 1) unless every resume succeeds from
the last completed save or a later one, and weights, optimizer and random state end bit for bit like those of
a run that nobody killed. (A loss of power, after which only what was synced is there, is more than a kill.)
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train
from data.text import prepare
from nanokv import checkpoint
from nanokv.config import cli, parse


@dataclass
class Options:
    kills: int = 50  # how often to kill the run
    steps_a_life: int = 12  # steps between two kills, on the average
    save_interval: int = 3  # steps between saves
    seed: int = 0  # of the moments


KNOBS = "--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4 --warmup_iters=2 --sample_tokens=0"
KNOBS += " --attention=mla --dropout=0.1 --log_interval=1 --device=cpu --dtype=float32 --compile=False"


class Life:
    """A process that trains; forked, so that it need not import torch again."""

    def __init__(self, *knobs: str):
        self.started = time.monotonic()
        reader, writer = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.dup2(writer, 1)
            sys.argv = ["train.py", *KNOBS.split(), *knobs]
            try:
                cli(train.main)
            except SystemExit as end:
                os._exit(end.code)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        os.close(writer)
        self.lines = open(reader, errors="replace")  # noqa: SIM115 (closed by wait)

    def wait(self) -> int:
        """Its exit code, negative if a signal ended it."""
        for _ in self.lines:
            pass
        self.lines.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def completed(run_dir: Path) -> int:
    """The step of the last save that was swapped in, -1 if there is none."""
    states = [run_dir / name / "state.json" for name in ("last", "best")]
    return max((json.loads(path.read_text())["step"] for path in states if path.exists()), default=-1)


def main(argv: list[str]) -> None:
    options = parse(Options, argv, "python tests/kill9.py [--key=value ...]")
    torch.set_num_threads(1)
    draw = random.Random(options.seed)
    steps = 2 * options.kills * options.steps_a_life  # so that the run does not end before the last kill
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text("".join(f"the cat number {i % 37} sat on the mat {i * i % 91}\n" for i in range(900)))
        prepare.main([f"--input={text}", "--tokenizer=byte", f"--out_dir={folder}/set"])
        knobs = [f"--dataset={folder}/set", f"--max_iters={steps}", f"--eval_interval={max(steps // 4, 1)}"]
        knobs += [f"--save_interval={options.save_interval}", "--eval_iters=4"]

        alone = Life(*knobs, f"--out_dir={folder}/alone")
        next(line for line in alone.lines if line.startswith("step 1/"))
        start_up, begin = time.monotonic() - alone.started, time.monotonic()
        assert alone.wait() == 0, "the run that nobody kills failed"
        step_seconds = (time.monotonic() - begin) / steps

        run_dir, safe, lost, saving, starting = Path(folder, "run"), -1, [], 0, 0
        for kill in range(1, options.kills + 1):
            life = Life(*knobs, f"--out_dir={run_dir}", *["--init_from=resume"] * (safe >= 0))
            if draw.random() < 0.2:  # while it starts and reads
                starting += 1
                time.sleep(draw.uniform(0, start_up))
            else:
                taken = (line for line in life.lines if "/" in line and line.startswith("step "))
                for _ in range(draw.randrange(1, 2 * options.steps_a_life)):
                    next(taken, None)
                time.sleep(draw.uniform(0, step_seconds))
            os.kill(life.pid, signal.SIGKILL)
            code = life.wait()
            assert code == -signal.SIGKILL, f"before kill {kill} the run ended by itself with {code}"
            saving += any(path.name.endswith(".new") for path in run_dir.glob("*/"))
            assert completed(run_dir) >= safe, f"kill {kill} lost a save: {safe} -> {completed(run_dir)}"
            safe = completed(run_dir)
            if safe >= 0:
                newest = checkpoint.load_newest(run_dir).state["step"]
                assert newest >= safe, f"after kill {kill} the newest is of step {newest}, saved was {safe}"
                logged = (run_dir / "metrics.jsonl").read_text().splitlines()
                lost.append(max([newest, *(json.loads(line)["step"] for line in logged[-2:-1])]) - newest)
        assert Life(*knobs, f"--out_dir={run_dir}", "--init_from=resume").wait() == 0, "the last resume failed"
        one, other = (checkpoint.load(path, "last") for path in (Path(folder, "alone"), run_dir))
        for a, b in ((one.model, other.model), (one.optimizer, other.optimizer)):
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), "the weights differ"
        assert one.state["best"] == other.state["best"] and other.state["step"] == steps
        print(
            f"{options.kills} kills in {steps} steps, {saving} during a save, {starting} at the start; every "
            f"resume succeeded; {sum(lost)} steps done again, at most {max(lost, default=0)} for one kill; "
            "weights, optimizer and random state bit-identical"
        )


if __name__ == "__main__":
    cli(main)
