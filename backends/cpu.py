"""native.c, compiled by the machine's C compiler when a model first computes, and kept in the user's cache.

Where it cannot be compiled `handles` is false, and torch's operators do the work, more slowly.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("cpu.c")
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"]
FLAGS += ["-shared", "-fPIC"]
COLUMNS, LONGEST = 16, 1024  # `causal`: widths are multiples of it; tokens whose scores stay in the cache
FOR_THIS_MACHINE = [["-march=native", "-fopenmp"], ["-march=native"], []]  # the first that the compiler takes

P, N, R = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
SIGNATURES = {
    "norm": [P] * 3 + [N] * 2 + [R],
    "packed": [N] * 2,
    "linear": [P] * 5 + [N] * 3,
    "attend": [P] * 4 + [N] * 7 + [R, N],
    "mlp": [P] * 6 + [N] * 3 + [R],
    "grouped_query": [P] * 13 + [N] * 9 + [R] * 2 + [N],
    "multi_head_latent": [P] * 13 + [N] * 11 + [R] * 2 + [N],
    "norm_backward": [P] * 5 + [N] * 2 + [R],
    "swiglu": [P] * 5 + [N],
    "cross_entropy": [P] * 3 + [N] * 2,
    "rope": [P] * 5 + [N] * 7 + [R],
    "causal": [P] * 5 + [N] * 6 + [R],
    "causal_backward": [P] * 9 + [N] * 6 + [R],
    "tape_forward": [P] * 4 + [N],
    "tape_backward": [P] * 8,
}


def takes(*tensors: Tensor) -> bool:
    """Whether it can compute with these where nothing records gradients or wants another precision."""
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu") and handles(*tensors)


def handles(*tensors: Tensor) -> bool:
    """Whether it has functions for these: fp32 on the CPU, where nothing compiles."""
    if torch.compiler.is_compiling():
        return False
    for t in tensors:
        if t.dtype != torch.float32 or not t.is_cpu or type(t) not in (Tensor, torch.nn.Parameter):
            return False  # a subclass may have no memory of its own
    return library() is not None


@functools.cache
def library() -> ctypes.CDLL | None:
    """native.c as a library; None where there is no compiler for it."""
    info = Path("/proc/cpuinfo")  # a cache folder may be shared by machines that differ
    cpu = next((line for line in info.open() if line.startswith("flags")), "") if info.exists() else ""
    key = hashlib.sha256(SOURCE.read_bytes() + f"{FLAGS}{platform.platform()}{cpu}".encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "nanokv"
    path = folder / f"native-{key[:16]}.so"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            compile_to(path)
        lib = ctypes.CDLL(str(path))
    except OSError:
        return None
    for name, types in SIGNATURES.items():
        getattr(lib, name).argtypes = types
    lib.packed.restype = N
    return lib


def compile_to(path: Path) -> None:
    """Compile into `path`, which other processes may be doing too. Raises OSError if that fails."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder, path.name)
        for flags in FOR_THIS_MACHINE:
            command = [*compiler, *FLAGS, *flags, "-o", str(built), str(SOURCE), "-lm"]
            if subprocess.run(command, capture_output=True).returncode == 0:
                return os.replace(built, path)
    raise OSError(f"{compiler[0]} cannot compile {SOURCE.name}")


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x (..., C)."""
    x = x.contiguous()
    y, width = torch.empty_like(x), x.size(-1)
    library().norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // width, width, eps)
    return y


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., C) weight^T (C, N) -> (..., N), for few rows."""
    (rows, width), x = weight.shape, x.contiguous()
    batch, y = x.numel() // width, x.new_empty(*x.shape[:-1], rows)
    room = x.new_empty(library().packed(batch, width))
    pointers = [t.data_ptr() for t in (weight, x, y, room)]
    library().linear(*pointers[:2], None, *pointers[2:], batch, rows, width)
    return y


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v: q (B, G, N, D), k and v (B, G, S, D) -> (B, G, N, D). Raises MemoryError."""
    (B, G, n, d), keys = q.shape, k.size(2)
    if not (k.stride() == v.stride() and k.stride(3) == 1 and (G == 1 or k.stride(0) == G * k.stride(1))):
        k, v = k.contiguous(), v.contiguous()
    q, group = q.contiguous(), k.stride(0 if G == 1 else 1)
    y = torch.empty_like(q)
    shape = (B * G, n, keys, d, d, group, k.stride(2))
    call("attend", (q, k, v, y), *shape, scale, shares(B * G, keys))
    return y


def mlp(self, x: Tensor, norm) -> Tensor:
    """`decode` of model.MLP: x + forward(norm(x)) of the next token of each row, x (B, 1, C).

    Raises MemoryError, as those of the attentions do.
    """
    gate, x = self.gate_proj.weight, x.contiguous()
    (inner, width), y = gate.shape, torch.empty_like(x)
    weights = (norm.weight, gate, self.up_proj.weight, self.down_proj.weight)
    call("mlp", (x, *weights, y), len(x), width, inner, norm.eps)
    return y


def grouped_query(self, x: Tensor, norm, rope: tuple[Tensor, Tensor], cache) -> Tensor:
    """`decode` of model.GroupedQueryAttention: x + forward(norm(x), rope, cache) as above.

    The keys and values go in a slot of the cache, a LayerCache that is_plain.
    """
    norms = (self.q_norm.weight, self.k_norm.weight) if self.qk_norm else (None, None)
    projections = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
    weights = (norm.weight, *projections, *norms, self.o_proj.weight)
    buffers, slot, keys = (cache.buffers["k"], cache.buffers["v"]), cache.step.start, cache.step.end
    (B, G, slots, d), x = buffers[0].shape, x.contiguous()
    y = torch.empty_like(x)
    shape = (B, x.size(2), self.n_head, G, d, rope[0].size(-1), slots, slot, keys)
    call("grouped_query", (x, *weights, *rope, *buffers, y), *shape, norm.eps, d**-0.5, shares(B * G, keys))
    return y


def multi_head_latent(self, x: Tensor, norm, rope: tuple[Tensor, Tensor], cache) -> Tensor:
    """`decode` of model.MultiHeadLatentAttention, in its absorbed form."""
    if self.q_rank is None:
        query = (None, None, self.q_proj.weight)
    else:
        query = (self.q_a_proj.weight, self.q_a_layernorm.weight, self.q_b_proj.weight)
    latent = (self.kv_a_proj_with_mqa.weight, self.kv_a_layernorm.weight, self.kv_b_proj.weight)
    weights = (norm.weight, *query, *latent, self.o_proj.weight)
    buffer, slot, keys = cache.buffers["latent"], cache.step.start, cache.step.end
    (B, slots, _), x = buffer.shape, x.contiguous()
    y = torch.empty_like(x)
    shape = (B, x.size(2), self.n_head, self.q_rank or 0, self.dn, self.dr, self.dv, self.rank)
    numbers = (*shape, slots, slot, keys, norm.eps, self.scale, shares(B, keys))
    call("multi_head_latent", (x, *weights, *rope, buffer, y), *numbers)
    return y


def norm_backward(x: Tensor, weight: Tensor, eps: float, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of norm's x and weight. Raises MemoryError."""
    x, grad, width = x.contiguous(), grad.contiguous(), x.size(-1)
    grads = torch.empty_like(x), torch.empty_like(weight)
    call("norm_backward", (x, weight, grad, *grads), x.numel() // width, width, eps)
    return grads


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    library().swiglu(gate.data_ptr(), up.data_ptr(), None, y.data_ptr(), None, y.numel())
    return y


def swiglu_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of swiglu's gate and up."""
    tensors = gate.contiguous(), up.contiguous(), grad.contiguous()
    grads = torch.empty_like(tensors[0]), torch.empty_like(tensors[0])
    library().swiglu(*[t.data_ptr() for t in (*tensors, *grads)], gate.numel())
    return grads


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropies (N,) of logits (N, V) to targets (N,) and, in place of the logits, their gradients.

    Both are 0 where a target is negative. Raises IndexError if one is no token id.
    """
    if targets.dtype != torch.int64 or len(targets) != len(logits) or targets.max() >= logits.size(1):
        raise IndexError(f"targets must be {len(logits)} int64 numbers below {logits.size(1)}")
    losses, targets = logits.new_empty(len(logits)), targets.contiguous()
    library().cross_entropy(logits.data_ptr(), targets.data_ptr(), losses.data_ptr(), *logits.shape)
    return losses


def rotate(x: Tensor, cos: Tensor, sin: Tensor, lead: int, sign: float = 1.0) -> Tensor:
    """model.rotate of x (B, H, T, D), or with a sign of -1 the way back."""
    (B, H, T, D), x = x.shape, with_whole_rows(x)
    y, width = x.new_empty(B, T, H, D), cos.size(-1)
    pointers = [t.data_ptr() for t in (x, cos, sin, y)]
    angles = T * width if len(cos) > 1 else 0
    library().rope(*pointers, (N * 3)(*x.stride()[:3]), B, H, T, D, lead, width, angles, sign)
    return y.transpose(1, 2)


class Strided(ctypes.Structure):
    """`tensor` of native.c: a tensor (B, H, T, D) with whole rows."""

    _fields_ = [("x", P), ("batch", N), ("head", N), ("token", N)]


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over keys up to a query's own, and what `causal_backward` wants of it.

    q (B, H, T, D), k (B, G, T, D), v (B, G, T, Dv) -> (B, H, T, Dv); widths are multiples of COLUMNS.
    """
    (B, H, T, D), G, Dv = q.shape, k.size(1), v.size(-1)
    y, logs = q.new_empty(B, T, H, Dv).transpose(1, 2), q.new_empty(B, H, T)
    call_strided("causal", (q, k, v, y), logs, B, H, G, T, D, Dv, scale)
    return y, logs


def causal_backward(q, k, v, y, logs, scale: float, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of causal's q, k and v."""
    (B, H, T, D), G, Dv = q.shape, k.size(1), v.size(-1)
    grads = q.new_empty(B, T, H, D), q.new_empty(B, T, G, D), q.new_empty(B, T, G, Dv)
    grads = tuple(t.transpose(1, 2) for t in grads)
    call_strided("causal_backward", (q, k, v, y, grad, *grads), logs, B, H, G, T, D, Dv, scale)
    return grads


def with_whole_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def call_strided(name: str, tensors: Sequence[Tensor], logs: Tensor, *numbers: float) -> None:
    tensors = [with_whole_rows(t) for t in tensors]  # kept until the call is over
    call(name, (*(Strided(t.data_ptr(), *t.stride()[:3]) for t in tensors), logs), *numbers)


def call(name: str, tensors: Sequence[Tensor | ctypes.Structure | None], *numbers: float) -> None:
    """Call a function that may run out of memory, and then raises MemoryError."""
    pointers = [t.data_ptr() if isinstance(t, Tensor) else t and ctypes.byref(t) for t in tensors]
    if getattr(library(), name)(*pointers, *numbers):
        raise MemoryError(f"no memory for {name}")


def shares(groups: int, keys: int) -> int:
    """In how many parts to cut the keys, so that every core has some."""
    return max(1, min(torch.get_num_threads() // groups, keys // 64))
