"""What the model computes with, against its definition."""

import pytest
import torch
from equivalence import CASES, VOCAB, assert_close, small_model, tokens

from backends import cpu as native
from nanokv.loss import LinearCrossEntropy


@pytest.mark.parametrize("in_c", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_in_slices_is_the_loss(tied, in_c, monkeypatch):
    if not in_c:
        monkeypatch.setattr(native, "library", lambda: None)
    model = small_model(**CASES["mha"], tie_embeddings=tied).train()
    x, y = tokens(3, 20), tokens(3, 20, seed=1)
    y[0, :7] = y[2, 19] = -1
    logits, loss = model(x, y)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr(LinearCrossEntropy, "LOGITS", 7 * VOCAB)  # 60 rows, 7 at a time
    nothing, sliced = model(x, y, want_logits=False)
    (3 * sliced).backward()
    assert nothing is None
    assert_close(sliced, loss, 1e-6)
    for name, p in model.named_parameters():
        assert_close(p.grad / 3, expected[name], 1e-6)
    with torch.no_grad():
        assert_close(model(x, y, want_logits=False)[1], loss, 1e-6)
