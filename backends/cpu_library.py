"""The C files of this folder as one library, compiled at first use and kept in the user's cache.

Where that fails `library()` is None, `why_not()` says why, and torch does the work.
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

from backends.torch_private import plain_operators

SOURCES = sorted(Path(__file__).parent.glob("cpu*.[ch]"))
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"]
FLAGS += ["-shared", "-fPIC"]
FOR_THIS_MACHINE = [["-march=native", "-fopenmp"], ["-march=native"], []]  # the first that the compiler takes
COMPILE_SECONDS = 120  # a compiler that takes longer hangs

P, N, R = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
SIGNATURES = {
    "rms_norm": [P] * 3 + [N] * 3 + [R],
    "rms_norm_backward": [P] * 5 + [N] * 3 + [R],
    "swiglu": [P] * 6 + [N] * 3,
    "cross_entropy": [P] * 3 + [N] * 2,
    "causal": [P] * 5 + [N] * 6 + [R],
    "causal_backward": [P] * 9 + [N] * 6 + [R],
    "decode_scratch": [P],
    "decode_step": [P] * 2 + [N, P],
    "few_rows_linear": [P] * 3 + [N] * 4,
}
WITHOUT_RESULT = ("rms_norm", "swiglu", "cross_entropy")


class Unusable(Exception):
    """Why there is no library, in a few words."""


def library() -> ctypes.CDLL | None:
    """The compiled C files; None where there is no compiler for them, and in a forked child, whose OpenMP has
    lost its threads.
    """
    lib, _, process = load()
    return lib if process == os.getpid() else None


def why_not() -> str:
    """Why `library` is None; empty if it is not."""
    return load()[1]


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str, int]:
    try:
        path = cache_folder() / f"cpu-{key()[:16]}.so"
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            compile_to(path)
        lib = ctypes.CDLL(str(path))
        for name, types in SIGNATURES.items():
            getattr(lib, name).argtypes = types
        for name in WITHOUT_RESULT:
            getattr(lib, name).restype = None
        lib.decode_scratch.restype = N
    except (OSError, Unusable) as error:
        return None, str(error), os.getpid()
    except AttributeError as error:
        return None, f"the compiled library is incomplete: {error}", os.getpid()
    return lib, "", os.getpid()


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/nanokv or ~/.cache/nanokv. Raises Unusable if there is no home."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if folder.is_absolute():  # the standard says to ignore others
        return folder / "nanokv"
    try:
        return Path.home() / ".cache/nanokv"
    except RuntimeError:
        raise Unusable("no home folder to keep the compiled library in") from None


def key() -> str:
    """Of all that the library depends on: a cache folder may be shared by machines that differ."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    text = f"{FLAGS}{FOR_THIS_MACHINE}{os.environ.get('CC', 'cc')}{platform.platform()}{cpu}"
    return hashlib.sha256(b"".join(s.read_bytes() for s in SOURCES) + text.encode()).hexdigest()


def compile_to(path: Path) -> None:
    """Compile into `path`, which other processes may be doing too. Raises OSError or Unusable."""
    try:
        compiler = shlex.split(os.environ.get("CC", "cc")) or ["cc"]
    except ValueError as error:
        raise Unusable(f"CC is not a command: {error}") from None
    sources = [str(source) for source in SOURCES if source.suffix == ".c"]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder, path.name)
        for flags in FOR_THIS_MACHINE:
            command = [*compiler, *FLAGS, *flags, "-o", str(built), *sources, "-lm"]
            try:
                done = subprocess.run(
                    command, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMPILE_SECONDS
                )
            except FileNotFoundError:
                raise Unusable(f"no C compiler: {compiler[0]} is not installed") from None
            except subprocess.TimeoutExpired:
                raise Unusable(f"{compiler[0]} took longer than {COMPILE_SECONDS} s") from None
            if done.returncode == 0 and built.exists():
                return os.replace(built, path)
    raise Unusable(f"{compiler[0]} does not compile {path.name}")


def takes(*tensors: Tensor) -> bool:
    """Whether C functions may compute with these now: numbers in fp32 on the CPU, and nothing compiles,
    traces, transforms or watches the operators of torch, or wants another precision.
    """
    if not plain_operators():
        return False
    for t in tensors:
        plain = type(t) in (Tensor, torch.nn.Parameter)  # a subclass may have no memory of its own
        if not plain or t.dtype != torch.float32 or not t.is_cpu or t.layout != torch.strided:
            return False
        if t.is_neg() or not t.numel():
            return False
    return library() is not None


def call(name: str, tensors: list[Tensor | ctypes.Structure | None], *numbers: float) -> None:
    """Call a function of the library. Raises MemoryError if it runs out of memory."""
    pointers = [t.data_ptr() if isinstance(t, Tensor) else t and ctypes.byref(t) for t in tensors]
    function = getattr(library(), name)
    if function(*pointers, *numbers):
        raise MemoryError(f"no memory for {name}")
