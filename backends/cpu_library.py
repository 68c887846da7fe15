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
from typing import Any

from torch import Tensor

SOURCES = sorted(Path(__file__).parent.glob("cpu*.[ch]"))
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"]
FLAGS += ["-shared", "-fPIC"]
FOR_THIS_MACHINE = [["-march=native", "-fopenmp"], ["-march=native"], []]  # the first that the compiler takes
COMPILE_SECONDS = 120  # a compiler that takes longer hangs

P, N, R, STATUS = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
FUNCTIONS = {  # name: result, arguments
    "rms_norm": (None, *[P] * 3, *[N] * 2, R),
    "rms_norm_backward": (STATUS, *[P] * 5, *[N] * 2, R),
    "swiglu": (None, *[P] * 6, *[N] * 3),
    "cross_entropy": (None, *[P] * 3, *[N] * 2),
    "causal": (STATUS, *[P] * 5, *[N] * 6, R),
    "causal_backward": (STATUS, *[P] * 9, *[N] * 6, R),
    "decode_scratch": (N, P),
    "decode_step": (STATUS, P, P, N, P),
    "few_rows_linear": (None, *[P] * 4, *[N] * 5),
}


def library() -> Any:
    """The compiled C files, a ctypes.CDLL; None where there is no compiler for them, and in a forked child, whose
    OpenMP has lost its threads.
    """
    lib, _, process = load()
    return lib if process == os.getpid() else None


def why_not() -> str:
    """Why `library` is None; empty if it is not."""
    return load()[1]


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str, int]:
    """The library or None, why it is None, and the process that asked."""
    try:
        path = cache_folder() / f"cpu-{key()[:16]}.so"
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            compile_to(path)
        lib = ctypes.CDLL(str(path))
        for name, (result, *arguments) in FUNCTIONS.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, RuntimeError, AttributeError) as error:  # no compiler, no home, a function missing
        return None, str(error), os.getpid()
    return lib, "", os.getpid()


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/nanokv or ~/.cache/nanokv. Raises RuntimeError if there is no home."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (folder if folder.is_absolute() else Path.home() / ".cache") / "nanokv"  # the standard ignores others


def key() -> str:
    """Of all that the library depends on: a cache folder may be shared by machines that differ."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    text = f"{FLAGS}{FOR_THIS_MACHINE}{os.environ.get('CC', 'cc')}{platform.platform()}{cpu}"
    return hashlib.sha256(b"".join(s.read_bytes() for s in SOURCES) + text.encode()).hexdigest()


def compile_to(path: Path) -> None:
    """Compile into `path`, which other processes may be doing too. Raises OSError, or RuntimeError with the
    reason in a few words.
    """
    try:
        compiler = shlex.split(os.environ.get("CC", "cc")) or ["cc"]
    except ValueError as error:
        raise RuntimeError(f"CC is not a command: {error}") from None
    sources = [str(source) for source in SOURCES if source.suffix == ".c"]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder, path.name)
        for flags in FOR_THIS_MACHINE:
            command = [*compiler, *FLAGS, *flags, "-o", str(built), *sources, "-lm"]
            try:
                done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMPILE_SECONDS)
            except FileNotFoundError:
                raise RuntimeError(f"no C compiler: {compiler[0]} is not installed") from None
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"{compiler[0]} took longer than {COMPILE_SECONDS} s") from None
            if done.returncode == 0 and built.exists():
                return os.replace(built, path)
    raise RuntimeError(f"{compiler[0]} does not compile {path.name}")


def call(name: str, tensors: list[Tensor | ctypes.Structure | None], *numbers: float) -> None:
    """Call a function of the library. Raises MemoryError if it runs out of memory."""
    pointers = [t.data_ptr() if isinstance(t, Tensor) else t and ctypes.byref(t) for t in tensors]
    if getattr(library(), name)(*pointers, *numbers):
        raise MemoryError(f"no memory for {name}")
