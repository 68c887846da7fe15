"""The loader that all commands share: a command line and a config file as instances of dataclasses.

    python train.py config/mla.py --batch_size=32

The fields of several dataclasses are one flat set of knobs. A config file is data: assignments of constants
and of arithmetic on numbers, parsed and never executed. Every fault becomes a one-line UserError. This file
does not import torch, so that commands without torch start at once.
"""

import ast
import difflib
import inspect
import itertools
import json
import operator
import os
import re
import reprlib
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T", bound=Any)


class UserError(ValueError):
    """The user's fault, not the program's: one line that names the fault and the remedy."""


def at_least(config: Any, low: int, *names: str) -> None:
    """Raises ValueError if one of these fields is a number below `low`."""
    for name in names:
        if getattr(config, name) is not None and getattr(config, name) < low:
            raise ValueError(f"{name} must be at least {low}, not {getattr(config, name)}")


def load(
    argv: list[str], *classes: type, usage: str = "", fill_in: Callable[[dict, dict], dict] = operator.or_
) -> tuple:
    """Turn `[config.py] [--key=value ...]` into an instance of each dataclass, typed by their annotations. A bare
    `--key` sets a bool. The command line overrides the file; if a key is given twice, the last one counts. `fill_in`
    gets the values of the file and those of the command line, and returns the values to use. `--help` prints `usage`
    and every field, and exits. Raises UserError.
    """
    if "--help" in argv or "-h" in argv:
        print(describe(classes, usage))
        raise SystemExit(0)
    files = [arg for arg in argv if not arg.startswith("-")]
    if len(files) > 1:
        raise UserError(f"unexpected argument {files[1]!r}; write --key=value, after one config file at most")
    hints, settings = _hints(classes), []
    in_file = _check((setting for file in files for setting in read_file(file)), hints)
    for arg in (arg for arg in argv if arg.startswith("-")):
        key, equals, text = arg.removeprefix("--").partition("=")
        if not equals and bool not in _members(hints.get(key, bool)):
            raise UserError(f"--{key} needs a value: --{key}=...")
        settings.append((key, (_literal(text), text) if equals else (True,), "command line"))
    return _build(classes, fill_in(in_file, _check(settings, hints)))


def parse(cls: type[T], argv: list[str], usage: str = "", bare: int = 0) -> T:
    """`load` for a single dataclass. Its first `bare` fields may be given as words without their names."""
    if bare:
        words = [arg for arg in argv if not arg.startswith("-")]
        if len(words) > bare:
            raise UserError(f"unexpected argument {words[bare]!r}; write --key=value after {bare} of those")
        named = [f"--{field.name}={word}" for field, word in zip(fields(cls), words, strict=False)]
        argv = named + [arg for arg in argv if arg.startswith("-")]
    return load(argv, cls, usage=usage)[0]


def from_dict(values: dict[str, Any], where: str, *classes: type) -> tuple:
    """An instance of each dataclass from one flat dict, checked as in `load`. Raises UserError that names `where`."""
    return _build(classes, _check([(key, (value,), where) for key, value in values.items()], _hints(classes)))


def only_fields(cls: type[T], values: dict[str, Any], where: str) -> T:
    """`from_dict` for a single dataclass, which ignores the keys that it does not have."""
    return from_dict({key: values[key] for key in _hints([cls]) if key in values}, where, cls)[0]


def check_range(config, names: str, **bounds: float) -> None:
    """Raises ValueError unless these fields (names in a string) meet the bounds: at_least, at_most, above, below."""
    tests = {"at_least": operator.ge, "at_most": operator.le, "above": operator.gt, "below": operator.lt}
    for name in names.split():
        value = getattr(config, name)
        if not all(tests[bound](value, limit) for bound, limit in bounds.items()):
            wanted = " and ".join(f"{bound.replace('_', ' ')} {limit}" for bound, limit in bounds.items())
            raise ValueError(f"{name} must be {wanted}, not {value}")


def as_text(value: Any) -> str:
    """A knob's value as a command line spells it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def cli(main: Callable[[list[str]], Any], ranks: bool = False) -> None:
    """Run main(arguments); a UserError is one line on stderr and exit code 2. ranks: whether torchrun may start it."""
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not ranks:
            raise UserError(f"{sys.argv[0]} is one process; run it without torchrun")
        main(sys.argv[1:])
        sys.stdout.flush()
        if ranks and "TORCHELASTIC_RUN_ID" in os.environ:
            sys.stderr.flush()
            os._exit(0)  # all is written; a thread of torch may abort a rank while Python takes itself down
    except UserError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as shells report it
    except BrokenPipeError:  # the reader is gone (`| head`); avoid the same error when Python flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE


def run_python(command: list[str], **options) -> str | None:
    """Run `python COMMAND` in its own process, not as a rank. Returns its stdout if piped. UserError: its last line."""
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    options = {"text": True, "stderr": subprocess.PIPE, "env": environment} | options  # of subprocess.run
    done = subprocess.run([sys.executable, *command], **options)
    if done.returncode:
        lines = (done.stderr or done.stdout or "").strip().splitlines() or [f"exit code {done.returncode}"]
        fault = lines[-1].removeprefix("error: ")
        raise UserError(fault if done.returncode == 2 else f"{' '.join(command[:2])} failed: {fault}")
    return done.stdout


def replace_json(path: Path, content: Any) -> None:
    """Writes another file and renames it, so that a reader finds the old file or the new one, never a part."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w", encoding="utf-8") as f:
        f.write(json.dumps(content, indent=2) + "\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)


def _hints(classes: Iterable[type]) -> dict[str, Any]:
    types = {cls: get_type_hints(cls) for cls in classes}  # a millisecond per class
    return {field.name: types[cls][field.name] for cls in types for field in fields(cls)}


def _check(settings: Iterable[tuple[str, tuple, str]], hints: dict[str, Any]) -> dict[str, Any]:
    """The typed values of (key, possible readings of its value, where it was set)."""
    values = {}
    for key, readings, where in settings:
        if key not in hints:
            raise UserError(f"{where}: unknown key {key!r}{_did_you_mean(key, list(hints)) or '; see --help'}")
        fitting = [value for reading in readings for value in _fit(reading, hints[key])]
        if not fitting:
            choices = [choice for choice in _members(hints[key]) if isinstance(choice, str)]
            fault = f"should be {_type_name(hints[key])}, not {reprlib.repr(readings[-1])}"
            raise UserError(f"{where}: {key} {fault}{_did_you_mean(readings[-1], choices)}")
        values[key] = fitting[0]
    return values


def _build(classes: Iterable[type], values: dict[str, Any]) -> tuple:
    """An instance of each class from the values of all."""
    for field in (field for cls in classes for field in fields(cls)):
        if field.name not in values and field.default is MISSING:
            raise UserError(f"--{field.name}=... is required")
    own = [{field.name: values[field.name] for field in fields(cls) if field.name in values} for cls in classes]
    try:
        return tuple(cls(**knobs) for cls, knobs in zip(classes, own, strict=True))
    except ValueError as error:
        raise UserError(str(error)) from error


def _fit(value: Any, hint: Any) -> Iterator[Any]:
    """Yields `value` in each type of the hint that it fits exactly: 1e3 fits int, 1 fits float and bool."""
    if get_origin(hint) is tuple:  # tuple[int, ...]: words with commas between, or a list
        words, kind = value.split(",") if value and isinstance(value, str) else value or (), get_args(hint)[0]
        if isinstance(words, list | tuple):
            fitting = [[fit for read in (_literal(str(word)), word) for fit in _fit(read, kind)] for word in words]
            if all(fitting):
                yield tuple(fits[0] for fits in fitting)
        return
    for member in _members(hint):
        if member in (int, float):  # in 64 bits, which also excludes inf and nan
            if type(value) in (int, float) and abs(value) < 2**63 and member(value) == value:
                yield member(value)
        elif member is bool and type(value) is int and value in (0, 1):
            yield bool(value)
        elif type(value) is member or type(value) is type(member) and value == member:
            yield value


def _members(hint: Any) -> list[Any]:
    """What a type hint allows: the types int, float, bool and str, and the values None and a Literal's strings."""
    if get_origin(hint) in (Union, UnionType, Literal):
        return [member for arg in get_args(hint) for member in _members(arg)]
    return [None if hint is NoneType else hint]


def _type_name(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return f"a list of {_type_name(get_args(hint)[0])} with commas between"
    return "|".join(getattr(member, "__name__", str(member)) for member in _members(hint))


def _did_you_mean(word: Any, choices: list[str]) -> str:
    close = difflib.get_close_matches(word, choices, 1) if isinstance(word, str) else []
    return f"; did you mean {close[0]!r}?" if close else ""


def _literal(text: str) -> Any:
    """The constant that a text on the command line stands for; else the text itself."""
    for read in ({"None": None, "True": True, "true": True, "False": False, "false": False}.__getitem__, int, float):
        with suppress(ValueError, LookupError):
            return read(text)
    return text


def read_file(path: str) -> Iterator[tuple[str, tuple, str]]:
    """(key, (value,), "file:line") of each assignment in a config file. A name with a leading _ is not a key."""
    try:
        tree = ast.parse(Path(path).read_bytes())
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno or 1}: {error.msg}") from error
    except FileNotFoundError as error:
        raise UserError(f"no config file {path!r}; {_nearby(path)}") from error
    except (OSError, ValueError, MemoryError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "nested too deeply"
        raise UserError(f"cannot read config file {path!r}: {reason}") from error
    names: dict[str, Any] = {}
    for node in tree.body:
        where = f"{path}:{node.lineno}"
        match node:
            case ast.Expr(ast.Constant(str())):  # a docstring
                continue
            case ast.Assign(targets, expression) if all(isinstance(target, ast.Name) for target in targets):
                try:
                    value = _evaluate(expression, names)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where}: {error}") from error
                names |= dict.fromkeys(map(ast.unparse, targets), value)
                yield from ((key, (value,), where) for key in map(ast.unparse, targets) if key[0] != "_")
            case _:
                raise UserError(f"{where}: {_not_allowed(node)}")


def _nearby(path: str) -> str:
    """A hint at existing config files: those with a similar name, else all."""
    there = sorted(os.path.relpath(file) for file in Path(__file__).parents[1].glob("config/**/*.py"))
    same_name = [file for file in there if Path(file).stem == Path(path).stem]
    close = same_name or difflib.get_close_matches(path, there)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(there)}"


_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_OPERATORS |= {ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow}


def _evaluate(node: ast.expr, names: dict[str, Any]) -> Any:
    """The value of a constant expression. Raises ValueError for anything else."""
    match node:
        case ast.Constant(bool() | int() | float() | str() | None as value):
            return value
        case ast.Name(name):
            if name not in names:
                raise ValueError(f"{name!r} is not assigned above")
            return names[name]
        case ast.UnaryOp(ast.USub(), operand):
            return -_number(_evaluate(operand, names))
        case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
            a, b = _number(_evaluate(left, names)), _number(_evaluate(right, names))
            if isinstance(op, ast.Pow) and abs(b) > 64:  # 9**9**9 would take for ever
                raise ValueError(f"the exponent {b} is too large")
            try:
                return _number(_OPERATORS[type(op)](a, b))
            except ArithmeticError as error:
                raise ValueError(str(error)) from error
    raise ValueError(_not_allowed(node))


def _number(value: Any) -> int | float:
    if type(value) not in (int, float):
        raise ValueError(f"arithmetic is for numbers, not {reprlib.repr(value)}")
    if not abs(value) < 2**63:
        raise ValueError("a number is too large")
    return value


def _not_allowed(node: Any) -> str:
    match node:  # name the inner part of a bare expression, a target that is not a name, a constant, an operation
        case ast.Expr(node) | ast.Assign([node]) | ast.Constant(node) | ast.BinOp(_, node) | ast.UnaryOp(node):
            pass
    allowed = "constants, names assigned above and arithmetic (+ - * / // % **) on numbers"
    return f"{type(node).__name__} is not allowed; a config file is data: it assigns {allowed}"


def describe(classes: Iterable[type], usage: str = "") -> str:
    """The manual that --help prints: usage, then every field with its default, comment and type."""
    hints, knobs, comments = _hints(classes), {}, {}
    for cls in classes:
        comments |= _comments(cls)
        for field in fields(cls):
            default = "..." if field.default is MISSING else field.default
            knobs[field.name] = f"  --{field.name}={as_text(default)}"
    column = max(map(len, knobs.values())) + 2
    width = max(shutil.get_terminal_size((110, 24)).columns, column + 30)
    lines = [usage.strip()] if usage else []
    for section, names in itertools.groupby(knobs, lambda name: comments[name][0]):
        lines += ["", section] if section else [""]
        for name in names:
            text, first = f"{comments[name][1]} [{_type_name(hints[name])}]", knobs[name].ljust(column)
            lines += textwrap.wrap(text, width, initial_indent=first, subsequent_indent=" " * column)
    return "\n".join(lines)


def _comments(cls: type) -> dict[str, tuple[str, str]]:
    """Field -> (section, comment), read from the source of cls and its bases. A field's comment is the one
    beside it, or else the lines right above it. Any other comment is the title of a section.
    """
    result = {}
    for base in (base for base in reversed(cls.__mro__) if hasattr(base, "__dataclass_fields__")):
        section, blocks = "", [""]  # blocks of comment lines since the last line of code
        for line in textwrap.dedent(inspect.getsource(base)).splitlines():
            code, _, comment = line.partition("# ")
            if field := re.match(r"    (\w+):", code):
                titles = blocks if comment else blocks[:-1]
                section = next((title for title in reversed(titles) if title), section)
                result[field[1]] = section, comment or blocks[-1]
            if code.strip():
                blocks = [""]
            elif comment:
                blocks[-1] = f"{blocks[-1]} {comment}".strip()
            else:
                blocks.append("")
    return result
