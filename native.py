"""decode.c, compiled by the machine's C compiler when a model first decodes, and kept in the user's cache.

Where it cannot be compiled `takes` is false, and torch's operators do the work, in about twice the time.
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
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("decode.c")
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"]
FLAGS += ["-shared", "-fPIC"]
FOR_THIS_MACHINE = [["-march=native", "-fopenmp"], ["-march=native"], []]  # the first that the compiler takes

P, N, R = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
SIGNATURES = {
    "norm": [P] * 3 + [N] * 2 + [R],
    "rotate": [P] * 4 + [N] * 4,
    "linear": [P] * 3 + [N] * 2,
    "swiglu": [P] * 6 + [N] * 2,
    "attend": [P] * 4 + [N] * 7 + [R, N],
    "attend_latent": [P] * 5 + [N] * 7 + [R, N],
}


def takes(*tensors: Tensor) -> bool:
    """Whether there are functions for these: fp32 on the CPU, where nothing records gradients or compiles."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    for t in tensors:
        if t.dtype != torch.float32 or not t.is_cpu:
            return False
    return library() is not None


@functools.cache
def library() -> ctypes.CDLL | None:
    """decode.c as a library; None where there is no compiler for it."""
    info = Path("/proc/cpuinfo")  # a cache folder may be shared by machines that differ
    cpu = next((line for line in info.open() if line.startswith("flags")), "") if info.exists() else ""
    key = hashlib.sha256(SOURCE.read_bytes() + f"{FLAGS}{platform.platform()}{cpu}".encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "nanokv"
    path = folder / f"decode-{key[:16]}.so"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            compile_to(path)
        lib = ctypes.CDLL(str(path))
    except OSError:
        return None
    for name, types in SIGNATURES.items():
        getattr(lib, name).argtypes = types
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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of one token: x (1, H, 1, D), cos and sin (1, 1, 1, width) -> (1, H, 1, D)."""
    y = x.new_empty(x.shape)
    shape = (x.size(1), x.size(3), x.stride(1), cos.size(3))
    library().rotate(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), *shape)
    return y


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """weight (N, C) times one vector x (..., C) -> (..., N)."""
    (rows, width), x = weight.shape, x.contiguous()
    y = x.new_empty(*x.shape[:-1], rows)
    library().linear(weight.data_ptr(), x.data_ptr(), y.data_ptr(), rows, width)
    return y


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down (silu(gate x) * up x) of one vector x."""
    (inner, width), x = gate.shape, x.contiguous()
    hidden, y = x.new_empty(inner), torch.empty_like(x)
    pointers = (
        gate.data_ptr(),
        up.data_ptr(),
        down.data_ptr(),
        x.data_ptr(),
        hidden.data_ptr(),
        y.data_ptr(),
    )
    library().swiglu(*pointers, width, inner)
    return y


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v: q (B, G, N, D), k and v (B, G, S, D) -> (B, G, N, D). Raises MemoryError."""
    (B, G, n, d), keys = q.shape, k.size(2)
    if not (k.stride() == v.stride() and k.stride(3) == 1 and (G == 1 or k.stride(0) == G * k.stride(1))):
        k, v = k.contiguous(), v.contiguous()
    q, group = q.contiguous(), k.stride(0 if G == 1 else 1)
    y = torch.empty_like(q)
    pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr())
    if library().attend(*pointers, B * G, n, keys, d, d, group, k.stride(2), scale, shares(B * G, keys)):
        raise MemoryError("no memory to decode")
    return y


def attend_latent(q_nope: Tensor, q_rope: Tensor, latent: Tensor, weight: Tensor, scale: float) -> Tensor:
    """MLA's absorbed attention of one token: q_nope (1, H, 1, dn), q_rope (1, H, 1, dr), latent
    (1, S, r + dr) and kv_b_proj's weight (H (dn + dv), r) -> (1, H, 1, dv). Raises MemoryError.
    """
    (_, heads, _, dn), dr, keys, r = q_nope.shape, q_rope.size(-1), latent.size(1), weight.size(1)
    dv, q_rope = len(weight) // heads - dn, q_rope.contiguous()
    y = q_nope.new_empty(1, heads, 1, dv)
    pointers = (q_nope.data_ptr(), q_rope.data_ptr(), latent.data_ptr(), weight.data_ptr(), y.data_ptr())
    shape = (heads, keys, dn, dr, dv, r, q_nope.stride(1))
    if library().attend_latent(*pointers, *shape, scale, shares(1, keys)):
        raise MemoryError("no memory to decode")
    return y


def shares(groups: int, keys: int) -> int:
    """In how many parts to cut the keys, so that every core has some."""
    return max(1, min(torch.get_num_threads() // groups, keys // 64))
