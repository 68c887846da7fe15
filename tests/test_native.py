"""decode.c against torch's operators, and that decoding goes by it where it can."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from equivalence import CASES, assert_close, cached_logits, small_model, tokens

import native
from kernels import RMSNorm
from model import ATTENTIONS, MLP, GroupedQueryAttention

ROOT = Path(native.__file__).parent
CC = shlex.split(os.environ.get("CC", "cc"))[0]
# where there is a compiler, a decode.c that it does not take fails here
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
    monkeypatch.setattr("kernels.FEW", 32)  # so that the first chunk goes through the BLAS
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


def test_it_takes_only_what_it_was_made_for():
    x = randn(1, 1, 8)
    assert not native.takes(x)  # gradients are recorded
    with torch.no_grad():
        assert native.takes(x) == (shutil.which(CC) is not None)
        assert not native.takes(x.double()) and not native.takes(x, x.bfloat16())
        assert not native.takes(x.to("meta"))
        assert_close(RMSNorm(8, 1e-6).double()(x.double()), F.rms_norm(x.double(), (8,), None, 1e-6))


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "cc"])
def test_machines_with_and_without_a_compiler(compiler, tmp_path):
    """Where there is none, or one that fails, nothing is said and nothing is left behind."""
    program = "import native; print(native.library() is not None)"
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
