"""decode.c against torch's operators, and that decoding goes by it where it can."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from equivalence import CASES, assert_close, cached_logits, every_case, small_model, tokens

import native
from kernels import RMSNorm
from model import ATTENTIONS, rope_angles
from model import rotate as rotate_by_torch

ROOT = Path(native.__file__).parent
compiled = pytest.mark.skipif(native.library() is None, reason="no C compiler")
WIDTHS = [1, 7, 8, 31, 32, 33, 64, 100, 387]


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@compiled
@pytest.mark.parametrize("width", WIDTHS)
def test_norm_products_and_mlp(width):
    x, weight = randn(1, 1, width), randn(width)
    rows = randn(3, 5, width + 2)[..., :width]  # not contiguous
    assert_close(native.norm(rows, weight, 1e-6), F.rms_norm(rows, (width,), weight, 1e-6))
    for n in (1, 5, 64):
        gate, up, down = (w * width**-0.5 for w in (randn(n, width), randn(n, width) + 1, randn(width, n)))
        assert_close(native.linear(x, gate), x @ gate.mT)
        assert_close(native.swiglu(x, gate, up, down), (F.silu(x @ gate.mT) * (x @ up.mT)) @ down.mT)


@compiled
@pytest.mark.parametrize("rotated", [2, 6, 16])
def test_rope(rotated):
    x, rope = randn(1, 1, 3, 20)[..., 2:18].transpose(1, 2), rope_angles(torch.tensor([[7]]), rotated, 100.0)
    with torch.enable_grad():  # by torch's operators
        expected = rotate_by_torch(x, rope)
    assert_close(native.rotate(x, *rope), expected)


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


@compiled
@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_decoding_goes_by_it(attention, monkeypatch):
    calls = []
    for name in native.SIGNATURES:
        real = getattr(native, name)
        monkeypatch.setattr(
            native, name, lambda *args, real=real, name=name: calls.append(name) or real(*args)
        )
    model, idx = small_model(**CASES[attention]), tokens(1, 6)
    cached_logits(model, idx, [6])
    assert set(calls) <= {"norm"}  # a prompt's many tokens are for the BLAS
    calls.clear()
    assert_close(cached_logits(model, idx, [5, 1]), model(idx)[0])
    layers = len(model.layers)
    assert calls.count("swiglu") == layers
    assert calls.count("attend") + calls.count("attend_latent") == layers
    assert calls.count("linear") >= 3 * layers


@every_case
@torch.no_grad()
def test_decoding_without_it_gives_the_same(knobs, monkeypatch):
    model, idx = small_model(**knobs), tokens(1, 9)
    by_it = cached_logits(model, idx, [4, 1, 1, 1, 1, 1])
    monkeypatch.setattr(native, "library", lambda: None)
    assert_close(cached_logits(model, idx, [4, 1, 1, 1, 1, 1]), by_it)


def test_it_takes_only_what_it_was_made_for():
    x = randn(1, 1, 8)
    assert not native.takes(x)  # gradients are recorded
    with torch.no_grad():
        assert native.takes(x) == (native.library() is not None)
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
        works = compiler == "cc" and native.library() is not None
        assert (done.stdout.strip(), done.stderr) == (str(works), "")
        assert len(list((tmp_path / "cache/nanokv").iterdir())) == works
    (tmp_path / "cache/nanokv").touch()
    (tmp_path / "file").touch()
    environment["XDG_CACHE_HOME"] = str(tmp_path / "file")  # no place to keep it
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.stderr) == ("False", "")
