"""native.c against torch's operators, and that decoding goes by it where it can."""

import os
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from equivalence import CASES, assert_close, cached_logits, small_model, tokens
from torch import Tensor

from backends import cpu as native
from model import ATTENTIONS, MLP, GroupedQueryAttention, rope_angles, rotate
from nanokv.loss import NativeCausalAttention, NativeNorm, NativeRotation, NativeSwiGLU, RMSNorm

ROOT = Path(native.__file__).parents[1]
CC = shlex.split(os.environ.get("CC", "cc"))[0]
# where there is a compiler, a native.c that it does not take fails here
compiled = pytest.mark.skipif(shutil.which(CC) is None, reason="no C compiler")
WIDTHS = [1, 7, 8, 31, 32, 33, 64, 100, 387]


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@compiled
@pytest.mark.parametrize("width", WIDTHS)
def test_norm_products_and_mlp(width):
    x, norm, mlp = randn(1, 1, width), RMSNorm(width, 1e-6), SimpleNamespace()
    norm.weight = torch.nn.Parameter(randn(width), requires_grad=False)
    rows = randn(3, 5, width + 2)[..., :width]  # not contiguous
    assert_close(native.norm(rows, norm.weight, 1e-6), F.rms_norm(rows, (width,), norm.weight, 1e-6))
    h = F.rms_norm(x, (width,), norm.weight, 1e-6)
    for n in (1, 5, 64):
        gate, up, down = (w * width**-0.5 for w in (randn(n, width), randn(n, width) + 1, randn(width, n)))
        assert_close(native.linear(x, gate), x @ gate.mT)
        expected = x + (F.silu(h @ gate.mT) * (h @ up.mT)) @ down.mT
        mlp.gate_proj, mlp.up_proj, mlp.down_proj = (SimpleNamespace(weight=w) for w in (gate, up, down))
        assert_close(native.mlp(mlp, x, norm), expected)


@compiled
@pytest.mark.parametrize("keys", [1, 2, 31, 32, 33, 64, 131, 700])
@pytest.mark.parametrize("cores", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 30])  # of the scores: even ones, and ones of which one takes all
def test_attention(keys, cores, size, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    for B, G, n, d in ((1, 1, 6, 40), (2, 1, 3, 33), (1, 4, 1, 64), (2, 3, 2, 7)):
        q = randn(B, G, n, d) * size
        k, v = randn(B, G, keys + 5, d).narrow(2, 0, keys), randn(B, G, keys + 5, d).narrow(2, 2, keys)
        expected = ((0.3 * q.double() @ k.double().mT).softmax(-1) @ v.double()).float()
        tolerance = 1e-5 if size == 1 else 1e-4  # of scores of hundreds, fp32 knows no more
        assert_close(native.attend(q, k, v, 0.3), expected, tolerance)
        assert_close(native.attend(q, k, v.mT.contiguous().mT, 0.3), expected, tolerance)  # of other strides


def assert_same_gradients(ours, theirs, *inputs, tolerance=1e-5):
    """Values and gradients of `ours`, in fp32, and of `theirs`, in fp64."""
    mine, exact = (
        [convert(x.detach()).requires_grad_() for x in inputs] for convert in (torch.clone, Tensor.double)
    )
    a, b = ours(*mine), theirs(*exact)
    grad = randn(*b.shape)
    grads = torch.autograd.grad(a, mine, grad), torch.autograd.grad(b, exact, grad.double())
    for x, y in zip((a, *grads[0]), (b, *grads[1]), strict=True):
        assert_close(x / (1 + y.abs().max()), y / (1 + y.abs().max()), tolerance)


@compiled
@pytest.mark.parametrize("shape", [(2, 5, 12), (2, 3, 4, 7), (200, 64)])
def test_norm_and_swiglu_forward_and_backward(shape):
    x, up, weight = randn(*shape), randn(*shape) + 1, randn(shape[-1]) + 1
    x[0, 0] *= 1e-3  # so small that eps counts
    assert_same_gradients(
        lambda x, w: NativeNorm.apply(x, w, 1e-6), lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), x, weight
    )
    assert_same_gradients(NativeSwiGLU.apply, lambda gate, up: F.silu(gate) * up, 30 * x, up)
    assert_same_gradients(NativeSwiGLU.apply, lambda gate, up: F.silu(gate) * up, x.mT, up.mT)


@compiled
@pytest.mark.parametrize("lead, width, after", [(0, 8, 0), (0, 6, 5), (3, 4, 0), (3, 2, 2)])
@pytest.mark.parametrize("rows", [1, 3])  # of positions
def test_rotation_forward_and_backward(lead, width, after, rows, monkeypatch):
    angles = rope_angles(torch.arange(rows * 9).view(rows, 9), width, 1e4)
    exact = tuple(t.double() for t in angles)  # which native.c does not take
    x = randn(3, 9, 2, lead + width + after).transpose(1, 2)
    ours = partial(rotate, rope=angles, lead=lead)
    assert_same_gradients(ours, lambda x: rotate(x, exact, lead), x)
    monkeypatch.setattr(native, "library", lambda: None)
    assert_same_gradients(ours, lambda x: rotate(x, exact, lead), x)


@compiled
@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("tokens", [1, 7, 48, 49, 100])
@pytest.mark.parametrize("d, dv", [(16, 16), (32, 48), (64, 16)])
def test_causal_attention_forward_and_backward(heads, groups, tokens, d, dv):
    def ours(q, k, v):
        return NativeCausalAttention.apply(q, k, v, 0.2)

    def exact(q, k, v):
        k, v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        return (0.2 * q @ k.mT).masked_fill(future, -torch.inf).softmax(-1) @ v

    q = randn(2, tokens, heads, d).transpose(1, 2)
    v = randn(2, tokens, groups, dv + 3)[..., 3:].transpose(1, 2)  # as a part of wider rows
    for size in (1, 10):  # of the scores: attention to many keys, and to few
        k = size * randn(2, groups, tokens, d)
        assert_same_gradients(ours, exact, q, k, v, tolerance=size * 1e-5)


@compiled
@pytest.mark.parametrize("vocabulary", [1, 7, 8, 65, 2048])
def test_cross_entropy_and_its_gradient(vocabulary):
    logits, targets = 30 * randn(50, vocabulary), torch.arange(-3, 47) % vocabulary
    targets[:3] = -1  # do not count
    gradient = logits.double().softmax(-1) - F.one_hot(targets.clamp(min=0), vocabulary)
    expected = F.cross_entropy(logits.double(), targets, ignore_index=-1, reduction="none")
    assert_close(native.cross_entropy(logits, targets) / 100, expected / 100)  # losses of up to 100
    gradient[:3] = 0
    assert_close(logits, gradient)


@compiled
def test_what_is_not_finite_is_not_hidden():
    """A run has to see that its loss or a gradient is nan."""
    x, weight, (cos, sin) = randn(2, 3, 9, 16), randn(16), rope_angles(torch.arange(9)[None], 16, 1e4)
    cases = [
        (lambda x, w: NativeNorm.apply(x, w, 1e-6), (x, weight)),
        (NativeSwiGLU.apply, (x, x + 1)),
        (lambda x: NativeRotation.apply(x, cos, sin, 0), (x,)),
        (lambda q, k, v: NativeCausalAttention.apply(q, k, v, 0.2), (x, x + 1, x - 1)),
    ]
    for function, inputs in cases:
        for i in range(len(inputs)):
            for bad in (torch.nan, torch.inf):
                broken = [t.clone().requires_grad_() for t in inputs]
                broken[i].data.flatten()[0] = bad
                y = function(*broken)
                y.sum().backward()  # a gradient of strides 0
                assert not all(t.isfinite().all() for t in (y, *(b.grad for b in broken)))
    for bad in (torch.nan, torch.inf, -torch.inf):
        logits = torch.zeros(3, 9)
        logits[0, 8], logits[1] = bad, bad
        losses = native.cross_entropy(logits, torch.tensor([8, 0, 0]))
        assert not losses[:2].isfinite().any() and losses[2].isfinite()
        assert logits[1].isnan().all() and logits[2].isfinite().all()


@compiled
def test_frozen_inputs_and_second_derivatives():
    x, weight = randn(4, 16).requires_grad_(), randn(16)
    NativeNorm.apply(x, weight, 1e-6).sum().backward()
    assert weight.grad is None and x.grad is not None
    y = NativeSwiGLU.apply(x, x + 1).square().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@compiled
@pytest.mark.parametrize("targets", [[0, 8, 1], [0, 1], torch.zeros(3, dtype=torch.int32)], ids=str)
def test_targets_that_are_no_tokens_are_refused(targets):
    with pytest.raises(IndexError, match="3 int64 numbers below 8"):
        native.cross_entropy(randn(3, 8), torch.as_tensor(targets))


ODD = [
    dict(n_embd=33, n_head=3, n_kv_head=1, attention="gqa", head_dim=18, rotary_dim=6),
    dict(n_embd=31, n_head=5, n_kv_head=5, attention="mha", head_dim=7, rotary_dim=0, qk_norm=False),
    dict(attention="mla", n_embd=33, kv_lora_rank=13, qk_rope_head_dim=6, qk_nope_head_dim=5),
    dict(attention="mla", n_embd=28, kv_lora_rank=7, qk_rope_head_dim=0, q_lora_rank=11, v_head_dim=3),
]


@compiled
@pytest.mark.parametrize("knobs", [*CASES.values(), *ODD], ids=[*CASES, *map(str, range(len(ODD)))])
@torch.no_grad()
def test_decoding_with_it_and_without(knobs, monkeypatch):
    calls = []
    real, linear = native.call, native.linear
    monkeypatch.setattr(native, "call", lambda name, *args: calls.append(name) or real(name, *args))
    monkeypatch.setattr(native, "linear", lambda *args: calls.append("linear") or linear(*args))
    monkeypatch.setattr("nanokv.loss.FEW", 32)  # so that the first chunk goes through the BLAS
    model, idx = small_model(**knobs), tokens(1, 70)
    chunks = [36] + [1] * 34
    by_it = cached_logits(model, idx, chunks)
    layers = 34 * len(model.layers)
    assert calls.count("mlp") == calls.count("grouped_query") + calls.count("multi_head_latent") == layers
    assert calls.count("linear") == 34 and "attend" not in calls
    monkeypatch.setattr(native, "library", lambda: None)
    assert_close(cached_logits(model, idx, chunks), by_it)
    assert calls.count("mlp") == layers


@compiled
@pytest.mark.parametrize("knobs", [*CASES.values(), *ODD], ids=[*CASES, *map(str, range(len(ODD)))])
@pytest.mark.parametrize("rows", [2, 5])
@torch.no_grad()
def test_rows_side_by_side_are_as_each_alone(knobs, rows):
    model, idx = small_model(**knobs), tokens(rows, 50)
    chunks = [36] + [1] * 14
    together = cached_logits(model, idx, chunks)
    alone = torch.cat([cached_logits(model, row[None], chunks) for row in idx])
    assert_close(together, alone)
    assert_close(together, model(idx)[0])


@torch.no_grad()
def test_what_a_subclass_changed_is_not_passed_over(monkeypatch):
    class Doubled(GroupedQueryAttention):
        def forward(self, *args):
            return 2 * super().forward(*args)

    class Halved(MLP):
        def forward(self, x):
            return super().forward(x) / 2

    monkeypatch.setitem(ATTENTIONS, "gqa", Doubled)
    monkeypatch.setattr("model.MLP", Halved)
    model, idx = small_model(**CASES["gqa"]), tokens(1, 9)
    assert_close(cached_logits(model, idx, [4, 1, 1, 1, 1, 1]), model(idx)[0])


@compiled
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
@torch.no_grad()
def test_other_formats_are_not_read_as_fp32(attention, dtype, monkeypatch):
    model, idx = small_model(**CASES[attention]), tokens(1, 9)
    chunks = [4, 1, 1, 1, 1, 1]
    by_it = cached_logits(model, idx, chunks, model.new_cache(1, 9, dtype))
    monkeypatch.setattr(native, "library", lambda: None)
    assert_close(cached_logits(model, idx, chunks, model.new_cache(1, 9, dtype)), by_it)


@compiled
@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_a_full_ring_is_read_by_it(attention, monkeypatch):
    """Its slots hold what the next token sees and nothing else, so that no mask is needed."""
    model, idx = small_model(**CASES[attention], window=6, sink_tokens=2), tokens(1, 30)
    cache = model.new_cache(1, 30)
    by_it = cached_logits(model, idx, [3] + [1] * 27, cache)
    assert cache.layers[0].is_plain() and cache.steps[6].end == cache.steps[6].slots == 8
    assert_close(by_it, model(idx)[0])
    with_spare = cached_logits(model, idx, [3] + [1] * 27, model.new_cache(1, 30, spare=3))
    assert_close(with_spare, by_it)


class Subclass(Tensor):
    pass


def test_it_takes_only_what_it_was_made_for():
    x = randn(1, 1, 8)
    assert not native.takes(x)  # gradients are recorded
    with torch.no_grad():
        assert native.takes(x) == (shutil.which(CC) is not None)
        assert not native.takes(x.double()) and not native.takes(x, x.bfloat16())
        assert not native.takes(x.to("meta")) and not native.takes(x.as_subclass(Subclass))
        with torch.autocast("cpu", torch.bfloat16):
            assert not native.takes(x)
        assert_close(RMSNorm(8, 1e-6).double()(x.double()), F.rms_norm(x.double(), (8,), None, 1e-6))


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "cc"])
def test_machines_with_and_without_a_compiler(compiler, tmp_path):
    """Where there is none, or one that fails, nothing is said and nothing is left behind."""
    program = "from backends import cpu; print(cpu.library() is not None)"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CC": compiler}
    for _ in range(2):  # the second time as it was kept
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        works = compiler == "cc" and shutil.which("cc") is not None
        assert (done.stdout.strip(), done.stderr) == (str(works), "")
        assert len(list((tmp_path / "cache/nanokv").iterdir())) == works
    (tmp_path / "file").touch()
    environment["XDG_CACHE_HOME"] = str(tmp_path / "file")  # no place to keep it
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.stderr) == ("False", "")
