"""How a backend knows the functions that it stands for: by fingerprints of their source.

A fingerprint leaves out comments, docstrings and formatting, and is the same in every Python version.
`python -m backends.fingerprints` writes the table anew, after the backends follow a change of model.py.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import io
import json
import textwrap
import tokenize
from collections.abc import Callable, Iterable
from pathlib import Path

TABLE = Path(__file__).with_name("fingerprints.json")
LAYOUT = {tokenize.NEWLINE: "\n", tokenize.INDENT: "\n{", tokenize.DEDENT: "\n}"}
IGNORED = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER)


def edited(names: Iterable[str]) -> list[str]:
    """Those of the functions, such as "model.RMSNorm.forward", that are no longer what the table says."""
    return [name for name in names if not is_known(name, resolve(name))]


@functools.cache
def is_known(name: str, function: Callable) -> bool:
    """Whether the function has the source that the table knows by this name."""
    return fingerprint(function) == table().get(name)


@functools.cache
def table() -> dict[str, str]:
    return json.loads(TABLE.read_text())


def resolve(name: str) -> object:
    """What "module.Class.function" or "module.function" names now; None if there is nothing."""
    head, _, rest = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ImportError:
        return getattr(resolve(head), rest, None) if head else None


def fingerprint(function: Callable) -> str:
    """Of a function's source; empty if it has none, as where a patch is no Python function."""
    code = getattr(function, "__code__", None)  # not what functools.wraps makes of it
    try:
        source = inspect.getsource(code)
        words = tokens(textwrap.dedent(source))
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):
        return ""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]


def tokens(source: str) -> list[str]:
    """Its tokens without comments, docstrings and commas before a closing bracket."""
    words: list[str] = []
    for kind, text in joined_strings(source):
        if kind in IGNORED:
            continue
        word = LAYOUT.get(kind, text)
        starts_line = not words or words[-1][0] == "\n"
        if word in (")", "]", "}") and words[-1] == "," and commas(words) > 1:
            words.pop()
        words.append(word)
        if kind == tokenize.STRING and starts_line:
            words[-1] = "\n" + text  # perhaps a docstring
        elif kind == tokenize.NEWLINE and len(words) > 1 and words[-2][0] == "\n" and len(words[-2]) > 2:
            del words[-2:]
    return words


def commas(words: list[str]) -> int:
    """Commas in the bracket that is open, which make `(a, b,)` a list, while those of `(a,)` make a tuple."""
    depth, found = 0, 0
    for word in reversed(words):
        depth += (word in (")", "]", "}")) - (word in ("(", "[", "{"))
        if depth < 0:
            break
        found += word == "," and depth == 0
    return found


def joined_strings(source: str) -> Iterable[tuple[int, str]]:
    """Kinds and texts of the tokens; an f-string is one token, as before Python 3.12."""
    lines, depth, start = source.splitlines(keepends=True), 0, (0, 0)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = tokenize.tok_name[token.type]
        if name in ("FSTRING_START", "TSTRING_START"):
            start = start if depth else token.start
            depth += 1
        elif name in ("FSTRING_END", "TSTRING_END"):
            depth -= 1
            if not depth:
                yield tokenize.STRING, between(lines, start, token.end)
        elif not depth:
            yield token.type, token.string


def between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    """The source from (line, column) to (line, column), lines counted from 1."""
    part = lines[start[0] - 1 : end[0]]
    part[-1] = part[-1][: end[1]]
    part[0] = part[0][start[1] :]
    return "".join(part)


def renew() -> None:
    """Write the table for model.py and nanokv as they are."""
    from backends import pieces

    names = sorted({name for piece in pieces() for name in piece.stands_for})
    found = {name: fingerprint(resolve(name)) for name in names}
    TABLE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    renew()
