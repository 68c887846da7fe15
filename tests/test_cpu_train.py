"""Training pieces in C: values and gradients as torch's in fp64, and only where they apply."""

import pytest
import torch
import torch.nn.functional as F
from conftest import compiled
from equivalence import CASES, VOCAB, assert_close, small_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import backends
from backends import cpu_library, cpu_train
from backends.cpu_train import CausalAttention, CpuAttend, CrossEntropy, Norm, SwiGLU
from model import Attend, Linear
from nanokv.loss import LanguageModelLoss

pytestmark = [pytest.mark.usefixtures("c_backend"), compiled]
WIDE = {"n_embd": 64, "n_head": 4}  # heads as wide as the C attention wants them


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_same_gradients(ours, theirs, *inputs, tolerance=1e-5):
    """Values and gradients of `ours`, in fp32, and of `theirs`, in fp64."""
    mine, exact = ([convert(x.detach()).requires_grad_() for x in inputs] for convert in (torch.clone, Tensor.double))
    a, b = ours(*mine), theirs(*exact)
    grad = randn(*b.shape) if b.ndim else torch.tensor(3.0)
    grads = torch.autograd.grad(a, mine, grad), torch.autograd.grad(b, exact, grad.double())
    for x, y in zip((a, *grads[0]), (b, *grads[1]), strict=True):
        assert_close(x / (1 + y.abs().max()), y / (1 + y.abs().max()), tolerance)


def norm(x, w):
    return F.rms_norm(x, w.shape, w, 1e-6)


def mlp(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def causal(q, k, v, scale=0.2):
    k, v = (t.repeat_interleave(q.size(1) // k.size(1), 1) for t in (k, v))
    future = torch.ones(q.size(2), q.size(2), dtype=torch.bool).triu(1)
    return (scale * q @ k.mT).masked_fill(future, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("shape", [(1, 1), (2, 5, 12), (2, 3, 4, 7), (200, 64)])
def test_norm(shape):
    x, weight = randn(*shape), randn(shape[-1]) + 1
    x.view(-1, shape[-1])[0] *= 1e-3  # so small that eps counts
    assert_same_gradients(lambda x, w: Norm.apply(x, w, 1e-6), norm, x, weight)
    assert_same_gradients(
        lambda x, w: Norm.apply(x[..., 1:], w[1:], 1e-6),
        lambda x, w: norm(x[..., 1:], w[1:]),
        *((x, weight) if shape[-1] > 1 else (randn(3, 2), randn(2))),
    )
    columns = randn(shape[-1], 9)  # rows that are columns in memory
    assert_same_gradients(lambda x, w: Norm.apply(x.mT, w, 1e-6), lambda x, w: norm(x.mT, w), columns, weight)


@pytest.mark.parametrize("width, inner", [(1, 1), (7, 9), (12, 8), (40, 33)])
def test_mlp(width, inner):
    weights = randn(inner, width), randn(inner, width) + 0.1, randn(width, inner)
    assert_same_gradients(SwiGLU.apply, mlp, 3 * randn(2, 5, width), *weights)
    assert_same_gradients(SwiGLU.apply, mlp, 30 * randn(200, width), *weights)
    across = [w.mT.contiguous().mT for w in weights]  # transposed in memory
    assert_same_gradients(SwiGLU.apply, mlp, randn(width, 6).mT, *across)


@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("tokens", [1, 7, 48, 49, 100])
@pytest.mark.parametrize("d, dv", [(16, 16), (32, 48), (64, 16)])
def test_causal_attention(heads, groups, tokens, d, dv):
    q = randn(2, tokens, heads, d).transpose(1, 2)
    v = randn(2, tokens, groups, dv + 3)[..., 3:].transpose(1, 2)  # as a part of wider rows
    for size in (1, 10):  # of the scores: attention to many keys, and to few
        k = size * randn(2, groups, tokens, d)
        ours = lambda q, k, v: CausalAttention.apply(q, k, v, 0.2)  # noqa: E731
        assert_same_gradients(ours, causal, q, k, v, tolerance=size * 1e-5)


@pytest.mark.parametrize("vocabulary", [1, 7, 8, 65, 2048])
@pytest.mark.parametrize("rows", [1, 50, 300])
def test_cross_entropy(vocabulary, rows):
    hidden, weight, targets = randn(rows, 5), 10 * randn(vocabulary, 5), torch.arange(rows) % vocabulary
    targets[rows // 2 :: 7] = -1  # these do not count
    targets[0] = 0
    assert_same_gradients(
        lambda h, w: CrossEntropy.apply(h, w, targets),
        lambda h, w: F.cross_entropy(h @ w.mT, targets, ignore_index=-1),
        hidden,
        weight,
    )


def test_second_derivatives():
    """Gradients of gradients are torch's own."""
    x, w = randn(3, 16).requires_grad_(), randn(16).requires_grad_()
    q = randn(1, 2, 5, 16).requires_grad_()
    targets = torch.tensor([1, 0, -1])
    weights = randn(4, 16), randn(4, 16), randn(16, 4)
    cases = [
        (lambda: Norm.apply(x, w, 1e-6), lambda: norm(x, w), (x, w)),
        (lambda: SwiGLU.apply(x, *weights), lambda: mlp(x, *weights), (x,)),
        (lambda: CausalAttention.apply(q, 2 * q, q - 1, 0.2), lambda: causal(q, 2 * q, q - 1), (q,)),
        (
            lambda: CrossEntropy.apply(x, weights[0], targets),
            lambda: F.cross_entropy(x @ weights[0].mT, targets, ignore_index=-1),
            (x,),
        ),
    ]
    for ours, theirs, inputs in cases:
        results = []
        for function in (ours, theirs):
            grads = torch.autograd.grad(function().square().sum(), inputs, create_graph=True)
            results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), inputs))
        for a, b in zip(*results, strict=True):
            assert_close(a / b.abs().max(), b / b.abs().max(), 1e-4)


def test_what_is_not_finite_is_not_hidden():
    """A run has to see that its loss or a gradient is nan."""
    x, weight = randn(2, 3, 9, 16), randn(16)
    weights = randn(4, 16), randn(4, 16), randn(16, 4)
    cases = [
        (lambda x, w: Norm.apply(x, w, 1e-6), (x, weight)),
        (SwiGLU.apply, (x, *weights)),
        (lambda q, k, v: CausalAttention.apply(q, k, v, 0.2), (x, x + 1, x - 1)),
        (lambda h, w: CrossEntropy.apply(h.flatten(0, 2), w, torch.arange(54) % 4), (x, weights[0])),
    ]
    for function, inputs in cases:
        for i in range(len(inputs)):
            for bad in (torch.nan, torch.inf):
                broken = [t.clone().requires_grad_() for t in inputs]
                broken[i].data.flatten()[0] = bad
                y = function(*broken)
                y.sum().backward()  # a gradient of strides 0
                assert not all(t.isfinite().all() for t in (y, *(b.grad for b in broken)))


@pytest.mark.parametrize("bad", [-torch.inf, torch.inf, torch.nan])
def test_scores_that_are_not_finite_give_what_torch_gives(bad):
    q, k, v = torch.ones(1, 1, 20, 16), randn(1, 1, 20, 16), randn(1, 1, 20, 16)
    k[0, 0, 0] = bad  # the first query sees nothing else
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)
    ours = CausalAttention.apply(q, k, v, 0.2)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert_close(ours.nan_to_num(), expected.nan_to_num())


def loss_and_gradients(loss: nn.Module, idx, targets) -> list[Tensor]:
    loss.zero_grad()
    value = loss(idx, targets)
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in loss.parameters())]


def batch(B: int, T: int) -> tuple[Tensor, Tensor]:
    idx = torch.randint(VOCAB, (B, T + 1), generator=torch.Generator().manual_seed(B * T))
    return idx[:, :-1], idx[:, 1:].contiguous()


@pytest.mark.parametrize("knobs", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("more", [{}, WIDE, {"window": 7, "sink_tokens": 2}, {"tie_embeddings": True}], ids=str)
def test_training_as_the_pure_model(knobs, more):
    loss = LanguageModelLoss(small_model(**more | knobs).train())
    backends.accelerate(loss)
    ours = loss_and_gradients(loss, *batch(3, 40))
    exact = loss_and_gradients(backends.pure(loss).double(), *batch(3, 40))
    for a, b in zip(ours, exact, strict=True):
        assert_close(a / b.abs().max(), (b / b.abs().max()).float(), 2e-5)


def test_frozen_weights_and_no_gradients():
    loss = backends.accelerate(LanguageModelLoss(small_model(**WIDE).train()))
    for name, p in loss.named_parameters():
        p.requires_grad_("up_proj" in name)
    idx, targets = batch(2, 9)
    value = loss(idx, targets)
    value.backward()
    assert all((p.grad is not None) == p.requires_grad for p in loss.parameters())
    with torch.no_grad():
        assert torch.equal(loss(idx, targets), value)


def test_dropout_is_torchs():
    results = []
    for change in (backends.accelerate, backends.pure):
        loss = change(LanguageModelLoss(small_model(**WIDE, dropout=0.5).train()))
        torch.manual_seed(0)
        results.append(loss_and_gradients(loss, *batch(2, 30)))
    for a, b in zip(*results, strict=True):
        assert_close(a / b.abs().max(), b / b.abs().max())


def called(monkeypatch) -> list[str]:
    """Names of the C functions that are called from now on."""
    names, real = [], cpu_library.call
    monkeypatch.setattr(cpu_train, "call", lambda name, *args: names.append(name) or real(name, *args))
    return names


def test_targets_that_are_no_tokens_are_torchs_to_refuse(monkeypatch):
    loss = backends.accelerate(LanguageModelLoss(small_model()))
    names = called(monkeypatch)
    idx, targets = torch.zeros(1, 9, dtype=torch.int64), torch.zeros(1, 9, dtype=torch.int64)
    for bad in (VOCAB, -2):
        targets[0, 3] = bad
        with pytest.raises(IndexError, match=f"{bad} is out of bounds"):
            loss(idx, targets)
    assert "cross_entropy" not in names
    targets[:] = -1
    assert loss(idx, targets).isnan()  # as in torch: the mean of nothing


def test_each_module_takes_only_what_it_was_made_for(monkeypatch):
    names = called(monkeypatch)
    model = backends.accelerate(small_model(**WIDE))
    block, attend = model.layers[0], CpuAttend(0.2)
    x, q = randn(1, 5, 64), randn(1, 2, 5, 16)
    used = lambda f, *args: (names.clear(), f(*args), bool(names))[-1]  # noqa: E731
    assert used(block.input_layernorm, x) and used(block.mlp, x) and used(attend, q, q, q)
    with torch.autocast("cpu", torch.bfloat16):
        assert not used(block.mlp, x)
    assert not used(block.input_layernorm, x.double())
    assert not used(attend, q[..., :8], q[..., :8], q[..., :8])  # heads of 8
    assert not used(attend, q, q, q, torch.ones(1, 1, 5, 5, dtype=torch.bool))
    with FlopCounterMode(display=False) as counter:
        assert not used(block.mlp, x)
    assert counter.get_total_flops() > 0
    monkeypatch.setattr(F, "silu", torch.tanh)
    assert not used(block.mlp, x)
    assert_close(block.mlp(x), backends.pure(model).layers[0].mlp(x), 0)


def test_what_is_done_to_a_linear_of_the_mlp_holds(monkeypatch):
    names = called(monkeypatch)
    x = randn(1, 5, 64)
    changes = {
        "bias": lambda m: setattr(m.up_proj, "bias", nn.Parameter(randn(64 * 8 // 3 // 64 * 64))),
        "hook": lambda m: m.up_proj.register_forward_hook(lambda module, args, y: 2 * y),
        "pre-hook": lambda m: m.gate_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
        "forward": lambda m: setattr(m.down_proj, "forward", lambda x: x @ x.mT),
        "class": lambda m: setattr(m, "gate_proj", nn.Linear(64, 128)),
        "module": lambda m: setattr(m, "down_proj", nn.Identity()),
    }
    for change in changes.values():
        module = backends.accelerate(small_model(**WIDE)).layers[0].mlp
        before = module(x)
        change(module)
        names.clear()
        after = module(x)
        assert not names and (after.shape != before.shape or not torch.allclose(before, after))
    same = backends.accelerate(small_model(**WIDE)).layers[0].mlp
    same.gate_proj, same.up_proj, same.down_proj = Linear(64, 9), Linear(64, 9), Linear(9, 64)
    names.clear()
    same(x)
    assert names
    same.up_proj = Linear(64, 8)
    with pytest.raises(RuntimeError, match="size"):  # torch's to refuse
        same(x)


def test_attention_of_more_tokens_than_it_was_measured_for_is_torchs(monkeypatch):
    names = called(monkeypatch)
    q = randn(1, 1, 1025, 16)
    assert_close(CpuAttend(0.2)(q, q, q), Attend(0.2)(q, q, q), 0)
    assert not names
