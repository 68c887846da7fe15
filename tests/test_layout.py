"""The plan of the house: which folder may import which, and how large a thing may be.

    nanokv <- model <- backends <- train, sample, compare <- tools        data/*/prepare.py -> nanokv

A file may import anything to its left. train, sample and compare do not import one another.
"""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEFT_OF = {"nanokv": set(), "data": {"nanokv"}, "model": {"nanokv"}, "backends": {"nanokv", "model"}}
LEFT_OF |= dict.fromkeys(("train", "sample", "compare"), {"nanokv", "model", "backends"})
LEFT_OF["tools"] = set(LEFT_OF) - {"data"}
PACKAGES = {"nanokv", "backends", "tools"}  # whose files may import each other
LONGEST = {"model.py": 510, "train.py": 500}


def tracked(*suffixes: str) -> list[Path]:
    """Files of the product, relative to the root: what git tracks, else (an export) what is there."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = done.stdout.splitlines() or [str(p.relative_to(ROOT)) for p in ROOT.rglob("*")]
    files = [Path(name) for name in names if name.endswith(suffixes) and (ROOT / name).exists()]
    return [file for file in files if file.parts[0] not in ("tests", "docs", ".venv")]


def imports(source: str) -> set[str]:
    """First words of the modules that a file imports, by statement or by name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module or "")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant | ast.JoinedStr):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("import_module", "__import__", "find_spec", "run_module"):
                found.add(ast.unparse(node.args[0]).strip("f'\""))
    return {name.partition(".")[0] for name in found}


def wrong_arrows(file: Path, source: str) -> set[str]:
    here = file.parts[0].removesuffix(".py")
    ours = imports(source) & set(LEFT_OF) - LEFT_OF.get(here, set())
    return ours - ({here} if here in PACKAGES else set())


def test_no_arrow_that_the_design_does_not_draw():
    wrong = {str(file): found for file in tracked(".py") if (found := wrong_arrows(file, (ROOT / file).read_text()))}
    assert not wrong


@pytest.mark.parametrize(
    "file, source, found",
    [
        ("nanokv/optim.py", "import model", {"model"}),
        ("nanokv/optim.py", "def f():\n    from backends.cpu import x", {"backends"}),
        ("model.py", "import importlib\nimportlib.import_module('backends.cpu')", {"backends"}),
        ("train.py", "from sample import load_run", {"sample"}),
        ("data/stdlib/prepare.py", "import model", {"model"}),
        ("nanokv/dataset.py", "import_module(f'data.{name}.prepare')", {"data"}),
        ("tools/bench.py", "import train, sample\nfrom nanokv import cache\nfrom tools import sweep", set()),
    ],
)
def test_wrong_arrows_are_found(file, source, found):
    assert wrong_arrows(Path(file), source) == found


def test_the_model_and_the_library_name_no_backend():
    for file in tracked(".py"):
        if file.parts[0] in ("nanokv", "model.py"):
            code = "\n".join(line.split("#")[0] for line in (ROOT / file).read_text().splitlines())
            assert not re.findall(r"\b(backends|accelerate|pure)\(|import backends", code), file
    words = r"is_cuda|is_cpu|device\.type|autograd\.Function|is_compiling|ctypes|native|backend"
    assert not re.findall(words, (ROOT / "model.py").read_text())


# Private attributes that files read of modules of torch, or of the operating system. backends/cpu_checks.py asks for
# torch's hidden states, and nanokv/torch_private.py calls private functions of torch by name, each with a stand-in.
PRIVATE = {"model.py": {"_forward_hooks", "_forward_pre_hooks"}, "nanokv/watchdogs.py": {"_exit"}}
PRIVATE["nanokv/config.py"] = {"_exit"}
PRIVATE |= {"backends/cpu_decode.py": {"_parameters", "_modules"}}
BY_NAME = ("getattr", "hasattr", "setattr", "delattr", "attrgetter", "methodcaller", "import_module")
GUARDED = {"backends/cpu_checks.py", "nanokv/torch_private.py"}  # which hold such names as text


def private_attributes(source: str) -> set[str]:
    """Names with one leading underscore that a file takes from anything but self: x._name, getattr(x, "_name"),
    from x import _name, import x._name.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls", "super()"):
            found.add(node.attr)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            paths = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found |= {part for path in paths for part in path.split(".")}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in BY_NAME:
            words = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            found |= {part for word in words for part in word.split(".")}
    return {name for name in found if re.match("_[^_]", name)}


def test_private_functions_of_torch_are_called_in_one_place():
    for file in set(map(str, tracked(".py"))) - GUARDED:
        found = private_attributes((ROOT / file).read_text()) - PRIVATE.get(file, set())
        assert not found, f"{file}: add to nanokv/torch_private.py, with a stand-in: {found}"


@pytest.mark.parametrize(
    "source, found",
    [
        ("kernels = torch\nkernels._foreach_add_(x, 1)", {"_foreach_add_"}),
        ("torch._C._functorch.f()", {"_C", "_functorch"}),
        ("getattr(model, '_orig_mod', model)", {"_orig_mod"}),
        ("attrgetter('nn.modules._x')(torch)", {"_x"}),
        ("from torch._dynamo import a, _b", {"_dynamo", "_b"}),
        ("import torch._inductor.config", {"_inductor"}),
        ("self._x = x.__class__\n_ = torch.add", set()),
    ],
)
def test_private_attributes_are_found(source, found):
    assert private_attributes(source) == found


def code_lines(source: str) -> int:
    """Lines that are not blank, not a comment and not a docstring."""
    documented = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(line.strip()) and line.strip()[0] != "#" and i not in documented for i, line in lines)


def test_sizes():
    sources = {file: (ROOT / file).read_text() for file in tracked(".py", ".c", ".h")}
    assert sorted(file.name for file in sources if len(file.parts) == 1) == [
        *("compare.py", "model.py", "sample.py", "train.py")
    ]
    model = (ROOT / "model.py").read_text()
    assert code_lines(model) <= 380 and len(model.splitlines()) <= 510
    assert sum(len(source.splitlines()) for file, source in sources.items() if file.suffix != ".h") <= 10000
    for file, source in sources.items():
        limit = LONGEST.get(file.name, 500 if file.suffix in (".c", ".h") else 450)
        assert len(source.splitlines()) <= limit, file
        if file.suffix == ".py":
            long = [
                node.name
                for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 60
            ]
            assert not long, (file, long)
