"""The C files of this folder as one library, compiled at first use and kept in the user's cache.

Where that fails `library()` is None, `why_not()` says why, and torch does the work. A kept library is loaded only if
nobody else could have changed it, and if its name has the hash of its content: see docs/faults.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

from torch import Tensor

SOURCES = sorted(Path(__file__).parent.glob("cpu*.[ch]"))
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"]
FLAGS += ["-shared", "-fPIC"]
FOR_THIS_MACHINE = [["-march=native", "-fopenmp"], ["-march=native"], ["-fopenmp"], []]  # the first that works
MACROS = ["-dM", "-E", "-x", "c", "/dev/null"]  # what the compiler defines: its version, and the CPU's features
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
    """Why `library` is None, in a line; empty if it is not."""
    return load()[1]


def has_openmp() -> bool:
    """Whether the library divides its work among threads."""
    return hasattr(library(), "omp_get_thread_num")


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str, int]:
    """The library or None, why it is None, and the process that asked."""
    try:
        with cache_folder() as folder:
            compiler = compiler_command()
            name = f"cpu-{key(compiler, folder)}"
            lib = kept(name, folder) or bind(build(name, compiler, folder))
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()).encode(errors="backslashreplace").decode()
        return None, reason, os.getpid()
    return lib, "", os.getpid()


@contextlib.contextmanager
def cache_folder() -> Iterator[Path]:
    """$XDG_CACHE_HOME/nanokv or ~/.cache/nanokv. On Linux the path stays that of the folder that was checked, even if
    someone puts another in its place. Raises RuntimeError if there is no home, or if others can write the folder.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = base if base.is_absolute() else Path.home() / ".cache"  # the standard ignores others
    if not base.is_absolute():
        raise RuntimeError(f"HOME is no absolute path: {os.environ.get('HOME')}")
    folder = base / "nanokv"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if fault := not_ours(opened):
            raise RuntimeError(f"{folder} {fault}: set XDG_CACHE_HOME to a folder of your own")
        same = Path(f"/proc/self/fd/{opened}")
        yield same if same.exists() else folder
    except (OSError, AttributeError) as error:  # a full disk, no rights, a library that does not load
        raise RuntimeError(str(error).replace(f"/proc/self/fd/{opened}", str(folder))) from None
    finally:
        os.close(opened)


def not_ours(opened: int) -> str:
    """Why somebody else may have changed this open file or folder; empty if nobody can."""
    found = os.fstat(opened)
    if found.st_uid != os.geteuid():
        return "belongs to another user"
    return "can be written by others" if found.st_mode & 0o022 else ""


def key(compiler: list[str], folder: Path) -> str:
    """Of all that the library depends on: a cache folder may be shared by machines that differ."""
    settings = FLAGS, FOR_THIS_MACHINE, compiler, platform.platform()
    macros = compile_for_this_machine(compiler, MACROS, folder)
    sources = b"".join(source.read_bytes() for source in SOURCES)
    return hashlib.sha256(sources + f"{settings}{macros}".encode()).hexdigest()[:16]


def with_hash(name: str, content: bytes) -> str:
    return f"{name}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def kept(name: str, folder: Path) -> ctypes.CDLL | None:
    """The library of an earlier run; None if there is none that is ours, whole, and loads."""
    for path in folder.glob(f"{name}-*.so"):
        with contextlib.suppress(OSError, AttributeError), path.open("rb") as file:
            if not not_ours(file.fileno()) and path.name == with_hash(name, file.read()):
                return bind(path)
    return None


def bind(path: Path) -> ctypes.CDLL:
    """Load a library. Raises OSError, or AttributeError if it lacks a function."""
    lib = ctypes.CDLL(str(path))
    for name, (result, *arguments) in FUNCTIONS.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def build(name: str, compiler: list[str], folder: Path) -> Path:
    """Compile the library into the folder, which other processes may be doing too. Raises OSError or RuntimeError."""
    sources = [str(source) for source in SOURCES if source.suffix == ".c"]
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        compile_for_this_machine(compiler, [*FLAGS, "-o", "cpu.so", *sources, "-lm"], Path(aside))
        built = Path(aside, "cpu.so")
        built.chmod(0o700)  # whatever the umask
        with built.open("rb") as file:
            path = folder / with_hash(name, file.read())
            os.fsync(file)
        return built.replace(path)


def compiler_command() -> list[str]:
    """$CC or cc. Raises RuntimeError if that is not a command."""
    try:
        return shlex.split(os.environ.get("CC", "")) or ["cc"]
    except ValueError as error:
        raise RuntimeError(f"CC is not a command: {error}") from None


def compile_for_this_machine(compiler: list[str], arguments: list[str], folder: Path) -> str:
    """Run the compiler in the folder with the first flags that work; what it writes. Raises RuntimeError."""
    error = ""
    for flags in FOR_THIS_MACHINE:
        status, output, error = run([*compiler, *flags, *arguments], folder)
        if status == 0:
            return output
    lines = error.splitlines() or [""]
    line = next((line for line in lines if "error" in line), lines[-1])
    raise RuntimeError(f"{compiler[0]} does not compile: {line[:200]}".removesuffix(": "))


def run(command: list[str], folder: Path) -> tuple[int, str, str]:
    """Status, output and errors of a command. Raises RuntimeError if it cannot be run or takes too long."""
    try:
        process = subprocess.Popen(
            command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, errors="replace", cwd=folder, start_new_session=True
        )
    except FileNotFoundError:
        raise RuntimeError(f"no C compiler: {command[0]} is not installed") from None
    except OSError as error:
        raise RuntimeError(f"no C compiler: {command[0]}: {error.strerror}") from None
    try:
        output, error = process.communicate(timeout=COMPILE_SECONDS)
        return process.returncode, output, error
    except BaseException as stopped:  # too late, or Ctrl-C: end all that it started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(stopped, subprocess.TimeoutExpired):
            raise
        raise RuntimeError(f"{command[0]} took longer than {COMPILE_SECONDS} s") from None


def call(name: str, tensors: list[Tensor | ctypes.Structure | None], *numbers: float) -> None:
    """Call a function of the library. Raises MemoryError if it runs out of memory."""
    pointers = [t.data_ptr() if isinstance(t, Tensor) else t and ctypes.byref(t) for t in tensors]
    if getattr(library(), name)(*pointers, *numbers):
        raise MemoryError(f"no memory for {name}")
