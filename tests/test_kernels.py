"""What the model computes with, against its definition."""

import pytest
import torch
import torch.nn.functional as F
from equivalence import (
    CASES,
    VOCAB,
    assert_close,
    small_model,
    tokens,
)

from kernels import LinearCrossEntropy, UnfusedRMSNorm


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_in_slices_is_the_loss(tied, monkeypatch):
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


@pytest.mark.parametrize("shape", [(2, 5, 12), (2, 3, 4, 6)])
def test_the_norm_is_torchs_forward_and_backward(shape):
    x, weight, grad = torch.randn(shape), torch.rand(shape[-1]) + 0.5, torch.randn(shape)
    x[0, 0] *= 1e-3  # so small that eps counts
    x, weight = x.requires_grad_(), weight.requires_grad_()
    ours, theirs = UnfusedRMSNorm.apply(x, weight, 1e-6), F.rms_norm(x, weight.shape, weight, 1e-6)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    mine, reference = (torch.autograd.grad(y, (x, weight), grad) for y in (ours, theirs))
    for a, b in zip(mine, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
