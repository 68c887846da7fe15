"""What a run watches while it trains: gradients that are not finite, loss spikes, slow data, signals."""

import math
import os
import signal
import sys
import threading
from collections.abc import Callable

from nanokv import distributed as parallel
from nanokv.config import UserError


class SkippedSteps:
    """Counts the steps whose gradient was not finite and which were therefore not taken."""

    def __init__(self, limit: int, total: int, say: Callable[[str], None]):
        """limit: the number of skipped steps in a row that ends the run; total: steps skipped so far."""
        self.limit, self.total, self.say, self.in_a_row = limit, total, say, 0

    def step(self, number: int, grad_norm: float) -> bool:
        """Whether the optimizers may take step `number`. Raises UserError after `limit` skipped steps in a row."""
        if math.isfinite(grad_norm):
            self.in_a_row = 0
            return True
        self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
        if self.in_a_row >= self.limit:
            fault = f"step {number}: the gradient was not finite for {self.in_a_row} steps in a row, which were skipped"
            raise UserError(f"{fault}; go on from the last checkpoint: --init_from=resume and a lower learning rate")
        self.say(f"step {number} is skipped: its gradient norm is {grad_norm}")
        return False


class LossSpikes:
    """Detects jumps of the loss, by a running mean and standard deviation."""

    DECAY, DEVIATIONS, SHARE, WARM_UP = 0.9, 6, 0.1, 10

    def __init__(self, say: Callable[[str], None]):
        self.say, self.seen, self.mean, self.variance = say, 0, 0.0, 0.0

    def see(self, number: int, loss: float) -> None:
        """Prints a line if the loss at step `number` is 6 deviations and 10 % above the running mean."""
        if not math.isfinite(loss):
            return
        above, far = loss - self.mean, max(self.DEVIATIONS * math.sqrt(self.variance), self.SHARE * self.mean)
        if self.seen >= self.WARM_UP and above > far:
            self.say(f"step {number}: the loss has jumped to {loss:.4f}, from {self.mean:.4f} on the average")
        keep = min(self.DECAY, self.seen / (self.seen + 1))  # the first ones as a plain mean
        self.seen += 1
        self.variance = keep * (self.variance + (1 - keep) * above**2)
        self.mean += (1 - keep) * above


class StallWatchdog:
    """`with watchdog: fetch()` prints a line as soon as `fetch` has taken longer than `seconds`."""

    def __init__(self, seconds: float, say: Callable[[str], None]):
        self.seconds, self.say = seconds, say

    def __enter__(self) -> None:
        line = f"the data source has not given the next batch in {self.seconds:g} s; still waiting"
        self.timer = threading.Timer(self.seconds, self.say, [line])
        self.timer.daemon = True
        self.timer.start()

    def __exit__(self, *fault) -> None:
        self.timer.cancel()


class StopSignal:
    """Remembers the first SIGINT, SIGTERM or SIGUSR1 on any rank, so that all ranks stop after the same whole step.
    Before the first step, which may compile for minutes, a signal ends the run `at_once`. A second signal kills the
    process, but not under torchrun, which sends each rank a signal that it may have received already.
    """

    def __init__(self):
        self.at_once, self.signal = True, None
        caught = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self.before = {number: signal.signal(number, self.catch) for number in caught}

    def catch(self, number, frame) -> None:
        self.signal = self.signal or signal.Signals(number)
        if parallel.launch() is None:
            self.restore()
        if self.at_once:
            print(f"{self.signal.name}: stopped before the first step, nothing to save", flush=True)
            (os._exit if parallel.size() > 1 else sys.exit)(128 + number)  # without telling other ranks, which may wait

    def agreed(self) -> bool:
        """Whether a rank was told to stop. A collective: all must call it."""
        number = parallel.all_reduce_max(self.signal or 0)
        self.signal = signal.Signals(number) if number else None
        return number > 0

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
