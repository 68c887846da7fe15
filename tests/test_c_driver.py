"""The C of backends/ against double precision on other machines: other compilers, sanitizers, an emulated ARM."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from backends import cpu_library

SOURCES = [Path(__file__).with_name("c_driver.c"), Path(cpu_library.__file__).with_name("cpu_decode.c")]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"]
SANITIZE = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
RUNTIME = {"OMP_NUM_THREADS": "2", "TSAN_OPTIONS": "ignore_noninstrumented_modules=1"}
RUNTIME["OMP_TOOL_LIBRARIES"] = "libarcher.so"  # tells ThreadSanitizer where OpenMP's threads wait for each other
MACHINES = {  # name: compiler, flags, how to run the program
    "gcc": (["gcc", "-march=native", "-fopenmp"], []),
    "gcc, no OpenMP": (["gcc", "-march=native"], []),
    "gcc, any x86-64 or ARM": (["gcc", "-fopenmp"], []),
    "clang": (["clang", "-march=native", "-fopenmp"], []),
    "clang, no OpenMP": (["clang", "-march=native"], []),
    "gcc, sanitizers": (["gcc", "-march=native", "-fopenmp", *SANITIZE], []),
    "clang, sanitizers": (["clang", "-march=native", *SANITIZE], []),
    "clang, threads": (["clang", "-march=native", "-fopenmp", "-g", "-fsanitize=thread"], []),
    "aarch64": (["aarch64-linux-gnu-gcc", "-fopenmp", "-static"], ["qemu-aarch64"]),
    "aarch64, SVE": (["aarch64-linux-gnu-gcc", "-march=armv8.2-a+sve", "-fopenmp", "-static"], ["qemu-aarch64"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_functions_equal_double_precision(machine, tmp_path):
    compiler, emulator = MACHINES[machine]
    empty = tmp_path / "empty.c"
    empty.write_text("int main(void) { return 0; }")
    if not all(shutil.which(tool) for tool in (compiler[0], *emulator)):
        pytest.skip(f"{' or '.join([compiler[0], *emulator])} is not installed")
    if subprocess.run([*compiler, "-o", tmp_path / "empty", empty], capture_output=True).returncode:
        pytest.skip(f"{' '.join(compiler)} does not work here")
    flags = [*(flag for flag in cpu_library.FLAGS if flag not in ("-shared", "-fPIC")), *WARNINGS]
    flags += ["-O1"] if "-g" in compiler else []  # sanitizers at -O3 take minutes to compile
    subprocess.run([*compiler, *flags, "-o", tmp_path / "driver", *SOURCES, "-lm"], check=True)
    done = subprocess.run([*emulator, tmp_path / "driver"], capture_output=True, text=True, env=os.environ | RUNTIME)
    assert done.returncode == 0 and "WRONG" not in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("few_rows_linear") == 4  # all of it ran
