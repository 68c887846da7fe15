"""Every knob of a run, typed, in one flat dataclass; and the loader that all commands share.

    python train.py config/mla.py --batch_size=32

A config file is data: assignments of constants and of arithmetic on numbers, parsed and never executed.
File and command line pass the same checks, and whatever is wrong becomes a one-line UserError.
"""

import ast
import difflib
import inspect
import io
import operator
import os
import re
import reprlib
import shutil
import sys
import textwrap
import tokenize
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from model import GPTConfig

T = TypeVar("T")
DEVICES = r"auto|cpu|mps|cuda(:[0-9]{1,2})?"


class UserError(ValueError):
    """The user's fault, not the program's: one line that names the fault and the remedy."""


@dataclass
class Config(GPTConfig):
    """A training run."""

    # The comment beside a field is what --help prints; a comment above one that has its own is a section.

    # the run
    out_dir: str | None = None  # run folder; None: out/<config file's name>, or out/<attention>
    overwrite: bool = False  # start afresh in a folder that holds a run, which is then lost
    init_from: str = "scratch"  # 'scratch', 'resume' (go on from out_dir), or a run folder to start from
    eval_interval: int = 250  # steps between evaluations
    eval_iters: int = 0  # val batches an evaluation, evenly spaced; 0: the whole val split
    eval_only: bool = False  # evaluate once and exit
    log_interval: int = 10  # steps between log lines
    always_save_checkpoint: bool = True  # write last/ at every evaluation, not only when the run ends
    save_interval: int = 0  # write last/ every so many steps too; 0: only at evaluations
    seed: int = 1337  # of the initial weights, dropout and the order of the data
    # Weights & Biases
    wandb_log: bool = False  # also log to W&B; falls back to offline without a key or a network
    wandb_project: str = "nanokv"  # the W&B project
    wandb_run_name: str | None = None  # name of the run in W&B; None: the name of out_dir
    # data
    dataset: str = "stdlib"  # a folder in data/, or the path of a prepared folder
    tokenizer: str | None = None  # byte, char, bpe, gpt2, or a run folder; None: the data set's own
    gradient_accumulation_steps: int = 1  # micro-batches a step, on all ranks together
    batch_size: int = 16  # sequences of block_size tokens in a micro-batch; ranks share them if it must be
    data_timeout: float = 30.0  # seconds that a micro-batch may take to read before a line says so
    # optimizer
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: for the hidden matrices, with AdamW for the rest
    learning_rate: float = 1e-3  # AdamW's peak learning rate; an untied embedding has ten times that
    muon_lr: float = 0.02  # Muon's peak learning rate; it follows the same schedule
    muon_momentum: float = 0.95  # Muon's momentum; 0.9 suits runs of a few hundred steps
    max_iters: int = 2000  # steps to train
    weight_decay: float = 0.1  # decoupled weight decay, on matrices only
    beta1: float = 0.9  # AdamW's decay of the mean of gradients
    beta2: float = 0.95  # AdamW's decay of the mean of squared gradients
    grad_clip: float = 1.0  # largest global gradient norm; 0: no clipping
    max_skipped_steps: int = 20  # end the run when so many steps in a row have a gradient that is not finite
    # learning rate schedule
    decay_lr: bool = True  # False: constant after the warm-up
    schedule: Literal["cosine", "wsd"] = "wsd"  # wsd: warm up, stay, then decay in a straight line
    warmup_iters: int = 100  # steps of linear warm-up
    lr_decay_iters: int | None = None  # the step at which min_lr is reached; None: max_iters
    min_lr: float | None = None  # AdamW's last learning rate, Muon's in proportion; None: a tenth
    cooldown: float = 0.4  # wsd: the share of lr_decay_iters that decays
    # machine
    device: str = "auto"  # cpu, cuda, cuda:N, mps; auto: the best there is
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of activations; weights stay float32
    compile: bool | Literal["auto"] = "auto"  # torch.compile the model; auto: where it saves time
    parallel: Literal["ddp", "fsdp"] = "ddp"  # what each rank holds: ddp: the model, fsdp: its share of it
    activation_checkpointing: bool = False  # compute blocks again in the backward pass, to save memory
    # after the last step
    sample_tokens: int = 200  # tokens of the sample to print; 0: no sample

    def __post_init__(self):
        super().__post_init__()
        if self.lr_decay_iters is None:
            self.lr_decay_iters = self.max_iters
        if self.min_lr is None:
            self.min_lr = self.learning_rate / 10
        at_least = {
            0: "vocab_size eval_iters seed learning_rate muon_lr min_lr weight_decay grad_clip warmup_iters "
            "sample_tokens save_interval",
            1: "eval_interval log_interval gradient_accumulation_steps batch_size max_iters lr_decay_iters "
            "max_skipped_steps",
        }
        for low, names in at_least.items():
            for name in names.split():
                if getattr(self, name) < low:
                    raise ValueError(f"{name} must be at least {low}, not {getattr(self, name)}")
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        if not 0 <= self.cooldown <= 1:
            raise ValueError(f"cooldown is a share, from 0 to 1, not {self.cooldown}")
        if self.data_timeout <= 0:
            raise ValueError(f"data_timeout must be above 0, not {self.data_timeout}")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}; lower it")
        if not re.fullmatch(DEVICES, self.device):
            raise ValueError(f"unknown device {self.device!r}; it is auto, cpu, cuda, cuda:N or mps")
        for name in ("out_dir", "wandb_run_name", "wandb_project", "dataset", "tokenizer", "init_from"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} must not be empty")


def load(argv: list[str], base: dict[str, Any] | None = None) -> Config:
    """`[config.py] [--key=value ...]` as a Config with its names resolved: out_dir and wandb_run_name.

    `base` holds values to start from instead of the defaults, such as those of a run that goes on.
    """
    config = parse(Config, argv, "python train.py [config.py] [--key=value ...]", base)
    files = [Path(arg).stem for arg in argv if not arg.startswith("-")]
    out_dir = config.out_dir or f"out/{(files or [config.attention])[0]}"
    return replace(config, out_dir=out_dir, wandb_run_name=config.wandb_run_name or Path(out_dir).name)


def pick_device(name: str) -> torch.device:
    """The device that a `device` knob names. Raises UserError if this machine has no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(DEVICES, name):
        raise UserError(f"unknown device {name!r}; it is auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("this machine or this build of PyTorch has no device mps; use --device=auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"this machine or this build of PyTorch has no device {name}; use --device=auto")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that a `dtype` knob names; auto: bfloat16 where the hardware computes in it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # AVX512-BF16 or AMX; without them bfloat16 is emulated, slower than float32
        fast = device.type == "cpu" and (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
    return torch.bfloat16 if fast else torch.float32


def parse(cls: type[T], argv: list[str], usage: str = "", base: dict[str, Any] | None = None) -> T:
    """`[config.py] [--key=value ...]` as an instance of the dataclass cls, typed by its annotations.

    A bare `--key` sets a bool. The command line overrides the file, the file overrides `base`, and the last
    of two equal keys counts. `--help` prints `usage` and every field of cls, and exits. Raises UserError.
    """
    if "--help" in argv or "-h" in argv:
        print(describe(cls, usage))
        raise SystemExit(0)
    files = [arg for arg in argv if not arg.startswith("-")]
    if len(files) > 1:
        raise UserError(f"unexpected argument {files[1]!r}; write --key=value, after one config file at most")
    settings = [(key, value, "base") for key, value in (base or {}).items()]
    settings += [setting for file in files for setting in read_file(file)]
    for arg in argv:
        if not arg.startswith("-"):
            continue
        key, equals, text = arg.removeprefix("--").partition("=")
        if not equals and bool not in _members(get_type_hints(cls).get(key, bool)):
            raise UserError(f"--{key} needs a value: --{key}=...")
        settings.append((key, _Text(text if equals else "True"), "command line"))
    return _build(cls, settings)


def from_dict(cls: type[T], values: dict[str, Any], where: str) -> T:
    """The inverse of dataclasses.asdict, with the checks of `parse`; `where` (a file) is named in faults."""
    return _build(cls, [(key, value, where) for key, value in values.items()])


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


class _Text(str):
    """A value as typed on the command line, whose type is still open."""


def _build(cls: type[T], settings: Iterable[tuple[str, Any, str]]) -> T:
    """cls from (key, value, where it was set), each one checked."""
    hints = get_type_hints(cls)
    names = [field.name for field in fields(cls)]
    values = {}
    for key, value, where in settings:
        if key not in names:
            raise UserError(f"{where}: unknown key {key!r}{_did_you_mean(key, names) or '; see --help'}")
        for reading in (_literal(value), str(value)) if isinstance(value, _Text) else (value,):
            try:
                values[key] = _fit(reading, hints[key])
                break
            except TypeError:
                continue
        else:
            choices = [choice for choice in _members(hints[key]) if isinstance(choice, str)]
            raise UserError(
                f"{where}: {key} should be {_type_name(hints[key])}, not {reprlib.repr(value)}"
                + _did_you_mean(value, choices)
            )
    for field in fields(cls):
        if field.name not in values and field.default is MISSING:
            raise UserError(f"--{field.name}=... is required")
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(str(error)) from error


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


def describe(cls: type, usage: str = "") -> str:
    """The manual that --help prints: usage, then every field with its default, comment and type."""
    hints, comments = get_type_hints(cls), _comments(cls)
    knobs = {field.name: f"  --{field.name}" for field in fields(cls)}
    for field in fields(cls):
        knobs[field.name] += "=..." if field.default is MISSING else f"={field.default}"
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
