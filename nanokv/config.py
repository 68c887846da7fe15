"""The loader that all commands share: a command line and a config file as instances of dataclasses.

    python train.py config/mla.py --batch_size=32

The fields of several dataclasses are one flat set of knobs. A config file is data: assignments of constants
and of arithmetic on numbers, parsed and never executed. File and command line pass the same checks, and
whatever is wrong becomes a one-line UserError. The loader knows no dataclass of its own and does not import
torch, so that commands which need neither start at once.
"""

import ast
import difflib
import inspect
import io
import operator
import os
import reprlib
import shutil
import subprocess
import sys
import textwrap
import tokenize
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class UserError(ValueError):
    """The user's fault, not the program's: one line that names the fault and the remedy."""


def load(
    argv: list[str],
    *classes: type,
    usage: str = "",
    fill_in: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> tuple:
    """`[config.py] [--key=value ...]` as an instance of each dataclass, typed by their annotations.

    A bare `--key` sets a bool. The command line overrides the file, and the last of two equal keys counts.
    `fill_in` is told the values that were given and returns those to use, such as with those of the run that
    goes on; defaults are for the rest. `--help` prints `usage` and every field, and exits. Raises UserError.
    """
    if "--help" in argv or "-h" in argv:
        print(describe(classes, usage))
        raise SystemExit(0)
    files = [arg for arg in argv if not arg.startswith("-")]
    if len(files) > 1:
        raise UserError(f"unexpected argument {files[1]!r}; write --key=value, after one config file at most")
    settings, hints = [setting for file in files for setting in read_file(file)], _hints(classes)
    for arg in argv:
        if not arg.startswith("-"):
            continue
        key, equals, text = arg.removeprefix("--").partition("=")
        if not equals and bool not in _members(hints.get(key, bool)):
            raise UserError(f"--{key} needs a value: --{key}=...")
        settings.append((key, _Text(text if equals else "True"), "command line"))
    given = _check(settings, hints)
    return _build(classes, fill_in(given) if fill_in else given)


def parse(cls: type[T], argv: list[str], usage: str = "", bare: int = 0) -> T:
    """`load` for a single dataclass, whose first `bare` fields may be given as words without their names."""
    if bare:
        words = [arg for arg in argv if not arg.startswith("-")]
        if len(words) > bare:
            raise UserError(f"unexpected argument {words[bare]!r}; write --key=value after {bare} of those")
        named = [f"--{field.name}={word}" for field, word in zip(fields(cls), words, strict=False)]
        argv = named + [arg for arg in argv if arg.startswith("-")]
    return load(argv, cls, usage=usage)[0]


def from_dict(values: dict[str, Any], where: str, *classes: type) -> tuple:
    """An instance of each dataclass from one flat dict, with the checks of `load`.

    Raises UserError, which names `where` (a file), also for a key that none of the dataclasses has.
    """
    return _build(classes, _check([(key, value, where) for key, value in values.items()], _hints(classes)))


def only_fields(cls: type[T], values: dict[str, Any], where: str) -> T:
    """`from_dict` for a single dataclass, which ignores the keys that it does not have."""
    return from_dict({key: values[key] for key in _hints([cls]) if key in values}, where, cls)[0]


def check_range(config, names: str, **bounds: float) -> None:
    """Raises ValueError if one of these fields (names with spaces between) is out of its bounds.

    The bounds are some of at_least, at_most, above and below.
    """
    tests = {"at_least": operator.ge, "at_most": operator.le, "above": operator.gt, "below": operator.lt}
    for name in names.split():
        value = getattr(config, name)
        if not all(tests[bound](value, limit) for bound, limit in bounds.items()):
            wanted = " and ".join(f"{bound.replace('_', ' ')} {limit}" for bound, limit in bounds.items())
            raise ValueError(f"{name} must be {wanted}, not {value}")


def cli(main: Callable[[list[str]], Any], ranks: bool = False) -> None:
    """Run a command: main(arguments), with faults of the user's as one line on stderr and exit code 2.

    Only with `ranks` does the command know what to do as one of several that torchrun started.
    """
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not ranks:
            raise UserError(f"{sys.argv[0]} is one process; run it without torchrun")
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as shells report it
    except BrokenPipeError:  # the reader has gone (`| head`); spare Python's flush at exit the same error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE


def run_python(command: list[str], **options) -> str | None:
    """`python COMMAND` in a process of its own, as none of several ranks; options as for subprocess.run.

    Returns what it printed, if `stdout` is a pipe. Raises UserError, with its last line, if it fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    options = {"text": True, "stderr": subprocess.PIPE, "env": environment} | options
    done = subprocess.run([sys.executable, *command], **options)
    if done.returncode:
        lines = (done.stderr or done.stdout or "").strip().splitlines() or [f"exit code {done.returncode}"]
        fault = lines[-1].removeprefix("error: ")
        raise UserError(fault if done.returncode == 2 else f"{' '.join(command[:2])} failed: {fault}")
    return done.stdout


class _Text(str):
    """A value as typed on the command line, whose type is still open."""


def _hints(classes: Iterable[type]) -> dict[str, Any]:
    """The type hint of each field."""
    return {field.name: get_type_hints(cls)[field.name] for cls in classes for field in fields(cls)}


def _check(settings: Iterable[tuple[str, Any, str]], hints: dict[str, Any]) -> dict[str, Any]:
    """The typed values of (key, value, where it was set)."""
    values = {}
    for key, value, where in settings:
        if key not in hints:
            raise UserError(
                f"{where}: unknown key {key!r}{_did_you_mean(key, list(hints)) or '; see --help'}"
            )
        try:
            values[key] = _read(value, hints[key])
        except TypeError:
            choices = [choice for choice in _members(hints[key]) if isinstance(choice, str)]
            raise UserError(
                f"{where}: {key} should be {_type_name(hints[key])}, not {reprlib.repr(value)}"
                + _did_you_mean(value, choices)
            ) from None
    return values


def _build(classes: Iterable[type], values: dict[str, Any]) -> tuple:
    """An instance of each class from the values of all."""
    instances = []
    for cls in classes:
        own = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        for field in fields(cls):
            if field.name not in own and field.default is MISSING:
                raise UserError(f"--{field.name}=... is required")
        try:
            instances.append(cls(**own))
        except ValueError as error:
            raise UserError(str(error)) from error
    return tuple(instances)


def _read(value: Any, hint: Any) -> Any:
    """A value from the command line, a file or JSON as the type hint. Raises TypeError if it does not fit."""
    if get_origin(hint) is tuple:  # tuple[int, ...]: words with commas between, or a list
        words = [_Text(word) for word in value.split(",") if value] if isinstance(value, str) else value
        return tuple(_read(word, get_args(hint)[0]) for word in words)
    if not isinstance(value, _Text):
        return _fit(value, hint)
    with suppress(TypeError):
        return _fit(_literal(value), hint)
    return _fit(str(value), hint)


def _fit(value: Any, hint: Any) -> Any:
    """value as the type hint, never guessing: 1e3 fits int, 1 fits float and bool. Raises TypeError."""
    for member in _members(hint):
        if member is None or isinstance(member, str):
            fits = type(value) is type(member) and value == member
        elif member is bool:
            fits = type(value) is bool or (type(value) is int and value in (0, 1))
        elif member is str:
            fits = type(value) is str
        else:  # int, float; in 64 bits, which also excludes inf and nan
            fits = type(value) in (int, float) and abs(value) < 2**63 and member(value) == value
        if fits:
            return value if member is None or isinstance(member, str) else member(value)
    raise TypeError


def _members(hint: Any) -> list[Any]:
    """What a type hint admits: int, float, bool or str, or as themselves None and a Literal's strings."""
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
    """The constant that a command line's text spells; the text itself if none."""
    names = {"None": None, "True": True, "true": True, "False": False, "false": False}
    if text in names:
        return names[text]
    for number in (int, float):
        with suppress(ValueError):
            return number(text)
    return str(text)


def read_file(path: str) -> Iterator[tuple[str, Any, str]]:
    """(key, value, "file:line") of each assignment in a config file. A name with a leading _ is a helper."""
    try:
        tree = ast.parse(Path(path).read_bytes())
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno or 1}: {error.msg}") from error
    except FileNotFoundError as error:
        raise UserError(f"no config file {path!r}; {_nearby(path)}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read config file {path!r}: {reason}") from error
    except (MemoryError, RecursionError) as error:
        raise UserError(f"{path}:1: nested too deeply") from error
    names: dict[str, Any] = {}
    for node in tree.body:
        where = f"{path}:{node.lineno}"
        match node:
            case ast.Expr(ast.Constant(str())):  # a docstring
                continue
            case ast.Assign(targets, expression) if all(isinstance(target, ast.Name) for target in targets):
                try:
                    value = _evaluate(expression, names)
                except ValueError as error:
                    raise UserError(f"{where}: {error}") from error
                except RecursionError as error:
                    raise UserError(f"{where}: nested too deeply") from error
                for target in targets:
                    names[target.id] = value
                    if not target.id.startswith("_"):
                        yield target.id, value, where
            case _:
                raise UserError(f"{where}: {_not_allowed(node)}")


def _nearby(path: str) -> str:
    """A hint at the config files there are: those of a like name, else all."""
    folder = Path(__file__).parents[1] / "config"
    there = sorted(os.path.relpath(file) for file in folder.rglob("*.py"))
    same_name = [file for file in there if Path(file).stem == Path(path).stem]
    close = same_name or difflib.get_close_matches(path, there)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(there)}"


_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


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


def _not_allowed(node: ast.AST) -> str:
    match node:
        case ast.Expr(node) | ast.Assign([node]):  # a bare expression; a target that is no name
            pass
        case ast.Constant(node) | ast.BinOp(op=node) | ast.UnaryOp(op=node):
            pass
    return (
        f"{type(node).__name__} is not allowed; a config file is data: it assigns constants, names assigned "
        "above and arithmetic (+ - * / // % **) on numbers"
    )


def describe(classes: Iterable[type], usage: str = "") -> str:
    """The manual that --help prints: usage, then every field with its default, comment and type."""
    hints, every = _hints(classes), [field for cls in classes for field in fields(cls)]
    comments = {name: comment for cls in classes for name, comment in _comments(cls).items()}
    knobs = {field.name: f"  --{field.name}" for field in every}
    for field in every:
        default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        knobs[field.name] += "=..." if field.default is MISSING else f"={default}"
    column = max(map(len, knobs.values())) + 2
    width = max(shutil.get_terminal_size((110, 24)).columns, column + 30)
    lines = [usage.strip()] if usage else []
    section = None
    for name, knob in knobs.items():
        if comments[name][0] != section:
            section = comments[name][0]
            lines += ["", section] if section else [""]
        text = f"{comments[name][1]} [{_type_name(hints[name])}]"
        lines += textwrap.wrap(text, width, initial_indent=knob.ljust(column), subsequent_indent=" " * column)
    return "\n".join(lines)


def _comments(cls: type) -> dict[str, tuple[str, str]]:
    """Field -> (section, comment), read from the source of cls and its bases.

    A field's comment is the one beside it, or if there is none the lines right above it. Any other line of
    comment is the title of the section that begins there.
    """
    result = {}
    for base in filter(is_dataclass, reversed(cls.__mro__)):
        source = textwrap.dedent(inspect.getsource(base))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
        section, line = "", 1
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                blocks = [""]  # of comment lines between the last statement and this one
                for number in range(line, node.lineno):
                    blocks.append("") if number not in comments else None
                    blocks[-1] = f"{blocks[-1]} {comments.get(number, '')}".strip()
                beside = comments.get(node.end_lineno, "")
                titles = blocks if beside else blocks[:-1]
                section = next((title for title in reversed(titles) if title), section)
                result[node.target.id] = section, beside or blocks[-1]
            line = node.end_lineno + 1
    return result
