"""The private functions of torch that nanokv calls: torch has them, and each stand-in computes the same."""

import pytest
import torch
from equivalence import small_model, tokens

from nanokv.device import pick_dtype
from nanokv.optim import make_optimizers
from nanokv.torch_private import STAND_INS, private


@pytest.fixture
def removed(monkeypatch):
    """removed(names): torch without these functions."""

    def remove(names):
        for name in names:
            monkeypatch.delattr(f"torch.{name}")

    return remove


@pytest.mark.parametrize("name", STAND_INS)
def test_torch_has_it(name):
    fault = f"torch.{name} is gone: let nanokv/torch_private.py call what replaces it, or its stand-in always"
    assert private(name) is not STAND_INS[name], fault


def weights_after_training() -> list[torch.Tensor]:
    model = small_model(attention="gqa", n_kv_head=2).train()
    optimizers = make_optimizers(model, "muon", betas=(0.8, 0.9))
    for step in range(3):
        model(tokens(2, 9, seed=step), tokens(2, 9, seed=step + 1))[1].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return list(model.parameters())


def test_optimizers_compute_the_same_without_it(removed):
    expected = weights_after_training()
    removed(name for name in STAND_INS if not name.startswith("cpu."))
    for ours, theirs in zip(weights_after_training(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_auto_is_float32_without_it(removed):
    removed(name for name in STAND_INS if name.startswith("cpu."))
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32


def test_no_other_function():
    with pytest.raises(KeyError):
        private("_foreach_sub_")
