"""The compiled library: loaded only if it is ours and whole, built again if not, and a line where it cannot be.

A small C file stands for the real ones. `start` is a run of its own: a forked child, maybe of another user.
"""

import os
import pwd
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from backends import cpu_library

COMPILER = shutil.which("gcc") or shutil.which("clang") or ""
STRANGER = 54321  # a uid without a name and a home
EVIL = """#include <stdio.h>
int answer(void) { return 666; }
__attribute__((constructor)) static void at_load(void) { fclose(fopen("%s", "w")); }
"""
pytestmark = pytest.mark.skipif(not COMPILER, reason="no C compiler")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Where the library of `tmp_path/cpu.c` will be."""
    (tmp_path / "cpu.c").write_text("int answer(void) { return 42; }\n")
    monkeypatch.setattr(cpu_library, "SOURCES", [tmp_path / "cpu.c"])
    monkeypatch.setattr(cpu_library, "FUNCTIONS", {"answer": (cpu_library.STATUS,)})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", COMPILER)
    for part in (tmp_path, *tmp_path.parents):  # so that other users reach it
        if "pytest-of-" in str(part):
            part.chmod(0o755)
    return tmp_path / "cache/nanokv"


def begin(uid: int | None = None, before: Callable[[], object] = lambda: None) -> tuple[int, int]:
    """A forked child that loads the library, and where it writes what came of it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        result = "a traceback"
        try:
            if uid is not None:
                os.setgroups([])
                os.setuid(uid)
            before()
            lib, reason, _ = cpu_library.load.__wrapped__()
            result = f"answer {lib.answer()}" if lib else reason
        finally:
            os.write(writer, result.encode())
            os._exit(0)
    os.close(writer)
    return child, reader


def end(child: int, reader: int) -> str:
    with os.fdopen(reader) as file:
        result = file.read()
    assert os.waitpid(child, 0)[1] == 0 and "\n" not in result
    return result


def start(*args, **kwargs) -> str:
    return end(*begin(*args, **kwargs))


def proper_name(library: Path) -> Path:
    return library.with_name(cpu_library.with_hash(library.name.rpartition("-")[0], library.read_bytes()))


def compiled(source: str, folder: Path) -> Path:
    """The kept library, and in its place another one, under the name that such a content has."""
    assert start() == "answer 42"
    (kept,) = folder.iterdir()
    (folder / "evil.c").write_text(source)
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", kept, folder / "evil.c"], check=True)
    (folder / "evil.c").unlink()
    kept.chmod(0o700)
    return kept.rename(proper_name(kept))


def test_it_is_built_once(folder):
    assert start() == "answer 42"
    (kept,) = folder.iterdir()
    built = kept.stat().st_mtime_ns
    assert start() == "answer 42" and [path.stat().st_mtime_ns for path in folder.iterdir()] == [built]
    assert kept.stat().st_mode & 0o777 == folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("change", ["SOURCES", "FLAGS", "version", "features"])
def test_it_is_built_anew_for_another(change, folder, tmp_path, monkeypatch):
    assert start() == "answer 42"
    if change == "SOURCES":
        (tmp_path / "cpu.c").write_text("int answer(void) { return 43; }\n")
    elif change == "FLAGS":
        monkeypatch.setattr(cpu_library, "FLAGS", [*cpu_library.FLAGS, "-DOTHER"])
    else:  # which the compiler tells by its macros
        macro = {"version": "__VERSION__", "features": "__AVX512F__"}[change]
        monkeypatch.setattr(
            cpu_library, "MACROS", [*cpu_library.MACROS, f"-D{macro}=9", "-Wno-builtin-macro-redefined"]
        )
    assert start() == f"answer {43 if change == 'SOURCES' else 42}" and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "no library"])
def test_a_damaged_library_is_built_again(damage, folder):
    assert start() == "answer 42"
    (kept,) = folder.iterdir()
    whole = kept.read_bytes()
    half = len(whole) // 2
    changed = {"truncated": whole[:half], "empty": b"", "no library": b"text"}
    changed["flipped"] = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]
    kept.unlink()
    kept.write_bytes(changed[damage])
    kept.chmod(0o700)
    if damage == "no library":  # though its hash is right
        kept.rename(proper_name(kept))
    assert start() == start() == "answer 42" and kept.read_bytes() == whole


def test_a_library_that_lacks_a_function_is_built_again(folder):
    compiled("int other;", folder)
    assert start() == start() == "answer 42"


@as_root
@pytest.mark.parametrize("owner, mode", [(STRANGER, 0o755), (0, 0o775), (0, 0o757)])
def test_a_library_that_others_planted_is_not_loaded(owner, mode, folder, tmp_path):
    mark = tmp_path / "loaded"
    planted = compiled(EVIL % mark, folder)
    assert start() == "answer 666" and mark.exists()  # so the test is able to fail
    mark.unlink()
    os.chown(planted, owner, owner)
    planted.chmod(mode)
    assert start() == "answer 42" and not mark.exists()


@as_root
@pytest.mark.parametrize(
    "owner, mode, reason",
    [(STRANGER, 0o755, "belongs to another user"), (0, 0o775, "can be written by others"), (0, 0o777, "can be")],
)
def test_a_folder_that_others_can_write_is_not_used(owner, mode, reason, folder, tmp_path):
    compiled(EVIL % (tmp_path / "loaded"), folder)
    os.chown(folder, owner, owner)
    folder.chmod(mode)
    before = list(folder.iterdir())
    reason = f"{folder} {reason}"
    assert start().startswith(reason) and not (tmp_path / "loaded").exists() and list(folder.iterdir()) == before


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="paths by descriptor need /proc")
def test_a_folder_that_takes_the_place_of_the_checked_one_is_not_used(folder, tmp_path, monkeypatch):
    evil, mark, real = tmp_path / "evil", tmp_path / "loaded", cpu_library.not_ours
    compiled(EVIL % mark, folder)
    folder.rename(evil)
    assert start() == "answer 42"

    def swap_after(opened):
        fault = real(opened)
        if not (tmp_path / "aside").exists():
            folder.rename(tmp_path / "aside")
            evil.rename(folder)
        return fault

    monkeypatch.setattr(cpu_library, "not_ours", swap_after)
    assert start() == "answer 42" and not mark.exists()


@pytest.mark.parametrize("variable, value", [("XDG_CACHE_HOME", ""), ("XDG_CACHE_HOME", "cache"), ("HOME", ".")])
def test_nothing_is_kept_in_the_working_folder(variable, value, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if variable == "HOME":
        monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv(variable, value)
    if variable == "HOME":
        assert start().startswith("HOME is no absolute path")
    else:
        assert start() == "answer 42" and list((tmp_path / "home/.cache/nanokv").iterdir())
    assert not list((tmp_path / "here").iterdir())


def test_no_home(monkeypatch):
    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert start() == "Could not determine home directory."


@as_root
def test_another_user_without_a_home(folder, tmp_path, monkeypatch):
    assert start(STRANGER).startswith("[Errno 13] Permission denied")
    (tmp_path / "cache").mkdir()
    os.chown(tmp_path / "cache", STRANGER, STRANGER)
    assert start(STRANGER) == "answer 42" and folder.stat().st_uid == STRANGER
    folder.chmod(0o500)  # what is kept can still be read
    assert start(STRANGER) == "answer 42"
    (kept,) = folder.iterdir()
    kept.unlink()
    assert start(STRANGER).startswith(f"[Errno 13] Permission denied: '{folder}/")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert start(STRANGER) == "Could not determine home directory."


def test_a_full_disk(folder):
    reason = start(before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))
    assert "does not compile" in reason or "File too large" in reason
    assert not list(folder.iterdir()) and start() == "answer 42"


@pytest.mark.parametrize(
    "compiler, reason",
    [
        ("no-such-compiler", "no C compiler: no-such-compiler is not installed"),
        ("/", "no C compiler: /: Permission denied"),
        ("false", "false does not compile"),
        ("true", "[Errno 2] No such file or directory: '/"),
        ('gcc "', "CC is not a command: No closing quotation"),
        (os.fsdecode(b"g\xffcc"), r"no C compiler: g\udcffcc is not installed"),
        (f"{COMPILER} -Dint=error", f"{COMPILER} does not compile"),
    ],
)
def test_compilers_that_fail(compiler, reason, folder, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    assert start().startswith(reason) and not list(folder.iterdir())


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_compiler_that_hangs(folder, tmp_path, monkeypatch):
    """It is ended with what it has started."""
    monkeypatch.setenv("CC", script(tmp_path / "hangs", f"sleep 60 & echo $! > {tmp_path}/child; wait"))
    monkeypatch.setattr(cpu_library, "COMPILE_SECONDS", 0.5)
    began = time.monotonic()
    assert start() == f"{tmp_path}/hangs took longer than 0.5 s"
    assert time.monotonic() - began < 20 and not list(folder.iterdir())
    child = Path("/proc", (tmp_path / "child").read_text().strip())
    for _ in range(100):
        if not child.exists() or ") Z" in (child / "stat").read_text():
            return
        time.sleep(0.05)
    pytest.fail("the compiler's child lives on")


@pytest.mark.parametrize("refused", ["-march=native", "-fopenmp", "-fopenmp|-march=native"])
def test_compilers_that_do_not_know_a_flag(refused, tmp_path, monkeypatch):
    loop = f'for a; do case "$a" in {refused}) echo "error: $a" >&2; exit 1;; esac; done; exec {COMPILER} "$@"'
    monkeypatch.setenv("CC", script(tmp_path / "cc", loop))
    assert start() == "answer 42"


@pytest.mark.parametrize("openmp", [True, False])
def test_it_knows_whether_it_has_openmp(openmp, tmp_path, monkeypatch):
    (tmp_path / "cpu.c").write_text(
        "int answer(void) {\n int n = 0;\n#pragma omp parallel reduction(+ : n)\n n++;\n return n > 0; }\n"
    )
    monkeypatch.setattr(cpu_library, "FOR_THIS_MACHINE", [["-fopenmp"] if openmp else []])
    lib = cpu_library.load.__wrapped__()[0]
    if lib is None:
        pytest.skip("no OpenMP for this compiler")
    monkeypatch.setattr(cpu_library, "library", lambda: lib)
    assert cpu_library.has_openmp() == openmp


def test_processes_that_build_at_once(folder):
    assert [end(*child) for child in [begin() for _ in range(4)]] == ["answer 42"] * 4
    assert len(list(folder.iterdir())) == 1
