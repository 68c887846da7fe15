"""How a backend detects edits of the functions that it replaces: by fingerprints of their syntax trees.

So comments, docstrings and formatting do not count, and a fingerprint is the same in every Python version.
`python -m backends.fingerprints` writes the table anew, after the backends follow a change of model.py.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import pkgutil
import textwrap
from collections.abc import Iterable
from pathlib import Path
from types import CodeType
from typing import Any

TABLE = Path(__file__).with_name("fingerprints.json")


def edited(names: Iterable[str]) -> list[str]:
    """Those of the functions, such as "model.RMSNorm.forward", that are no longer what the table says."""
    return [name for name in names if not is_known(name, resolve(name))]


def is_known(name: str, function: Any) -> bool:
    """Whether the function has the source that the table knows by this name. Its code, not the function, is
    looked at, since a reload may replace the one in the other.
    """
    return has_known_source(name, getattr(function, "__code__", None))


@functools.cache
def has_known_source(name: str, code: CodeType | None) -> bool:
    return fingerprint(code) == table().get(name, "unknown")


@functools.cache
def table() -> dict[str, str]:
    return json.loads(TABLE.read_text())


def resolve(name: str) -> Any:
    """The object of this dotted name; None if there is nothing."""
    try:
        return pkgutil.resolve_name(name)
    except (AttributeError, ImportError):
        return None


def fingerprint(code: Any) -> str:
    """Of a function's source; empty if it has none, or if the file has changed since it was imported."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
        compiled = compile(tree, "", "exec", dont_inherit=True).co_consts
    except (AttributeError, OSError, TypeError, SyntaxError):
        return ""
    if not any(isinstance(const, CodeType) and words(const) == words(code) for const in compiled):
        return ""
    return hashlib.sha256(repr(outline(tree)).encode()).hexdigest()[:16]


def words(code: CodeType) -> tuple:
    """The names that a function's code uses, those of the functions in it too."""
    inner = [words(const) for const in code.co_consts if isinstance(const, CodeType)]
    return code.co_name, code.co_names, code.co_varnames, inner


def outline(node: object) -> object:
    """A syntax tree as nested lists, without docstrings, and without the empty fields that only some Python
    versions have.
    """
    if isinstance(node, ast.AST):
        fields = {name: outline(value) for name, value in ast.iter_fields(node) if value not in (None, [])}
        return [type(node).__name__, fields]
    if isinstance(node, list):
        docstrings = [n for n in node if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
        return [outline(part) for part in node if part not in docstrings]
    return repr(node)


if __name__ == "__main__":
    from backends import pieces

    names = sorted({name for piece in pieces() for name in piece.stands_for})
    TABLE.write_text(json.dumps({name: fingerprint(resolve(name).__code__) for name in names}, indent=1) + "\n")
