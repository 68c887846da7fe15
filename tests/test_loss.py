"""nanokv/loss.py: the loss that training takes is the model's own, whole or some rows at a time."""

import pytest
import torch
from equivalence import CASES, VOCAB, assert_close, small_model, tokens

from nanokv import loss as losses
from nanokv.loss import LanguageModelLoss


@pytest.mark.parametrize("rows", [7, 60, 1000])
@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_in_slices_is_the_loss(tied, rows, monkeypatch):
    model = small_model(**CASES["mha"], tie_embeddings=tied).train()
    x, y = tokens(3, 20), tokens(3, 20, seed=1)
    y[0, :7] = y[2, 19] = -1
    loss = model(x, y)[1]
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr(losses, "MAX_LOGITS", rows * VOCAB)  # of 60 rows
    sliced = LanguageModelLoss(model)(x, y)
    (3 * sliced).backward()
    assert_close(sliced, loss, 1e-6)
    for name, p in model.named_parameters():
        assert_close(p.grad / 3, expected[name], 1e-6)
    with torch.no_grad():
        assert_close(LanguageModelLoss(model)(x, y), loss, 1e-6)


def test_hooks_on_the_head_are_in_the_loss(monkeypatch):
    model, x, y = small_model(), tokens(2, 10), tokens(2, 10, seed=1)
    model.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
    for rows in (3, 1000):
        monkeypatch.setattr(losses, "MAX_LOGITS", rows * VOCAB)
        assert_close(LanguageModelLoss(model)(x, y), model(x, y)[1], 1e-6)
