"""What the model computes with, against its definition."""

import pytest
import torch
import torch.nn.functional as F
from equivalence import (
    CASES,
    VOCAB,
    assert_close,
    cached_logits,
    every_case,
    small_model,
    tokens,
)

from kernels import LinearCrossEntropy, UnfusedRMSNorm, attend_in_shares
from model import ATTENTIONS


@pytest.mark.parametrize("keys", [1, 2, 7, 64, 131])
@pytest.mark.parametrize("shares", [1, 2, 5])
def test_attention_in_shares_of_the_keys_is_attention(keys, shares):
    random = torch.Generator().manual_seed(keys)
    q, k, v = (torch.randn(2, 3, n, 16, generator=random).double() * 3 for n in (4, keys + 5, keys + 5))
    k, v = k.narrow(2, 0, keys), v.narrow(2, 0, keys)  # as of a cache with room for more
    expected = (0.3 * q @ k.mT).softmax(-1) @ v
    assert_close(attend_in_shares(q, k, v, 0.3, min(shares, keys)), expected, 1e-12)


@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_long_caches_are_read_by_several_cores(attention, monkeypatch):
    model, idx = small_model(**CASES[attention]), tokens(1, 2060)
    calls, real = [], attend_in_shares
    monkeypatch.setattr("model.attend_in_shares", lambda *args: calls.append(args[-1]) or real(*args))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    chunks = [2044] + [1] * 16
    assert_close(cached_logits(model, idx, chunks), model(idx)[0])
    share = 9 // {"mha": 4, "gqa": 2}.get(attention, 1)
    assert calls == [share] * 2 * sum(n >= 2048 for n in range(2045, 2061))


@every_case
@pytest.mark.parametrize("cores", [1, 2])
def test_weights_joined_for_decoding_are_the_same_weights(knobs, cores, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    model, idx = small_model(**knobs), tokens(1, 9)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with torch.no_grad():
        full = model(idx)[0]
        assert_close(cached_logits(model, idx, [4, 1, 1, 1, 1, 1]), full)
    gate, up = model.layers[0].mlp.gate_proj.weight, model.layers[0].mlp.up_proj.weight
    assert gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    model.load_state_dict({name: p * 1.01 for name, p in before.items()})
    with torch.no_grad():
        assert_close(cached_logits(model, idx, [4, 1, 1, 1, 1, 1]), model(idx)[0])
    model.train()(idx, idx)[1].backward()  # the weights can still learn
    assert gate.grad.isfinite().all()


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
