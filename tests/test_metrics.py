"""nanokv/metrics.py: the loss by position in the context, and when a run has a model FLOPs utilization."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from equivalence import CASES, VOCAB, small_model, tokens

from backends import accelerate
from nanokv import distributed as parallel
from nanokv import loss as losses
from nanokv import metrics
from nanokv.loss import LanguageModelLoss

WINDOWS = 40, 4, 0
WRAPS = {"torch": lambda loss: loss, "c": accelerate, "compiled": lambda loss: torch.compile(loss, backend="eager")}


class Batches:
    """Stands for a data set with three batches a rank, whose last window ends at position 20."""

    val_bytes_per_token = 2.0

    def __init__(self, ranks=1):
        x, y = tokens(6, 40), tokens(6, 40, seed=1)
        y[5, 20:] = y[1, 3] = -1
        self.all = list(zip(x.split(2 // ranks), y.split(2 // ranks), strict=True))

    def val_batches(self, block_size, batch_size, n, rank=0, ranks=1):
        return iter(self.all[rank::ranks])


def by_position(model) -> tuple[list[float], list[int]]:
    """The sum of losses and the number of targets of each of 40 positions."""
    x, y = (torch.cat(parts) for parts in zip(*Batches().all, strict=True))
    loss = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten(), ignore_index=-1, reduction="none")
    return loss.view(y.shape).double().sum(0).tolist(), (y >= 0).sum(0).tolist()


@pytest.mark.parametrize("rows", [7, 1000])
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_losses_at_positions_are_the_direct_ones_and_their_mean_is_the_loss(c_backend, monkeypatch, wrap, rows):
    monkeypatch.setattr(losses, "MAX_LOGITS", rows * VOCAB)
    model = small_model(**CASES["mla"], block_size=40)
    total, n = by_position(model)
    found = metrics.evaluate(wrap(LanguageModelLoss(model)), Batches(), WINDOWS, nullcontext())
    ends = {16: slice(0, 16), 32: slice(16, 32), 40: slice(32, 40)}
    assert found.keys() == {"val/loss", "val/bpb", *(f"val/loss_at/{end}" for end in ends)}
    for end, span in ends.items():
        assert found[f"val/loss_at/{end}"] == pytest.approx(sum(total[span]) / sum(n[span]), rel=1e-6)
    mean = sum(found[f"val/loss_at/{end}"] * sum(n[span]) for end, span in ends.items()) / sum(n)
    assert found["val/loss"] == pytest.approx(sum(total) / sum(n), rel=1e-6)
    assert found["val/loss"] == pytest.approx(mean, rel=1e-12)
    assert found["val/bpb"] == found["val/loss"] / math.log(2) / 2


def test_ranks_add_up_what_they_have(monkeypatch):
    loss, summed = LanguageModelLoss(small_model(block_size=40)), []
    alone = metrics.evaluate(loss, Batches(), WINDOWS, nullcontext())
    monkeypatch.setattr(parallel, "size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(parallel, "all_reduce_sum", lambda *values: summed.append(values) or list(values))
        metrics.evaluate(loss, Batches(2), WINDOWS, nullcontext())
    monkeypatch.setattr(parallel, "all_reduce_sum", lambda *values: [a + b for a, b in zip(*summed, strict=True)])
    assert metrics.evaluate(loss, Batches(2), WINDOWS, nullcontext()) == pytest.approx(alone, rel=1e-6)


def test_positions_without_targets_are_left_out_and_what_is_not_finite_shows(monkeypatch):
    x, y = tokens(2, 40), tokens(2, 40, seed=1)
    y[:, 16:32] = -1
    nothing = torch.full((1, 40), -1)
    batches = iter([(x, y), (x[:1], nothing)])
    dataset = SimpleNamespace(val_bytes_per_token=None, val_batches=lambda *args: batches)
    model = small_model(block_size=40)
    found = metrics.evaluate(LanguageModelLoss(model), dataset, WINDOWS, nullcontext())
    assert found.keys() == {"val/loss", "val/bpb", "val/loss_at/16", "val/loss_at/40"}
    assert found["val/loss"] == pytest.approx(model(x, y)[1].item(), rel=1e-6)
    model.norm.weight.data.fill_(torch.nan)
    assert math.isnan(metrics.evaluate(LanguageModelLoss(model), Batches(), WINDOWS, nullcontext())["val/loss"])


def test_spans_double_up_to_the_context():
    assert metrics.position_spans(8) == [8] and metrics.position_spans(16) == [16]
    assert metrics.position_spans(100) == [16, 16, 32, 36]
    assert metrics.position_spans(256) == [16, 16, 32, 64, 128]


def test_mfu_is_left_out_where_the_peak_is_not_one():
    assert metrics.mfu(5e9, 1e10) == 0.5 and metrics.mfu(1e10, 1e10) == 1
    assert metrics.mfu(1.25e10, 1e10) is None and metrics.mfu(1e10, None) is None
