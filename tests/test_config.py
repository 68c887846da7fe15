"""The loader: typed, strict, one line a fault; config files are data; the files shipped are comparable."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from conftest import knobs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model import GPT, GPTConfig
from nanokv.config import UserError, as_text, check_range, cli, describe, from_dict, load, only_fields, parse
from nanokv.device import pick_device, pick_dtype
from nanokv.metrics import n_params
from train import TrainConfig, configure

ROOT = Path(__file__).parent.parent
NANO = [f"config/{name}.py" for name in ("mha", "mqa", "gqa", "mla")]
GPT2_SMALL = [f"config/124m/{name}.py" for name in ("mha", "mqa", "gqa", "mla")]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes) -> str:
        path = tmp_path / "run.py"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write


@dataclass
class Knobs:
    # numbers
    count: int = 1  # how many
    rate: float = 0.5  # how fast
    limit: int | None = None  # how far
    # choices

    # of a mode, whose comment
    # takes two lines
    mode: Literal["fast", "slow"] = "fast"
    flag: bool = False  # whether
    build: bool | Literal["auto"] = "auto"  # whether, or when it pays
    name: str | None = None  # what it is called


@pytest.mark.parametrize(
    ("arg", "expected"),
    [
        ("--count=5", 5),
        ("--count=-5", -5),
        ("--count=5_000", 5000),
        ("--count=1e3", 1000),
        ("--count=2.0", 2),
        ("--rate=2", 2.0),
        ("--rate=6e-4", 6e-4),
        ("--limit=7", 7),
        ("--limit=None", None),
        ("--mode=slow", "slow"),
        ("--flag", True),
        ("--flag=True", True),
        ("--flag=true", True),
        ("--flag=1", True),
        ("--flag=False", False),
        ("--flag=false", False),
        ("--flag=0", False),
        ("--build", True),
        ("--build=False", False),
        ("--build=auto", "auto"),
        ("--name=None", None),
        ("--name=12", "12"),
        ("--name=True", "True"),
        ("--name=", ""),
        ("--name=a=b", "a=b"),
        ("--name=nan", "nan"),
    ],
)
def test_command_line_values_are_typed_by_annotation(arg, expected):
    value = getattr(parse(Knobs, [arg]), arg[2:].partition("=")[0])
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("arg", "fault"),
    [
        ("--coutn=5", "command line: unknown key 'coutn'; did you mean 'count'?"),
        ("--zzzz=5", "command line: unknown key 'zzzz'; see --help"),
        ("--zzzz", "command line: unknown key 'zzzz'; see --help"),
        ("--count=four", "command line: count should be int, not 'four'"),
        ("--count=2.5", "command line: count should be int, not '2.5'"),
        ("--count=True", "command line: count should be int, not 'True'"),
        ("--count=None", "command line: count should be int, not 'None'"),
        ("--count=", "command line: count should be int, not ''"),
        ("--count=1e300", "command line: count should be int, not '1e300'"),
        ("--limit=x", "command line: limit should be int|None, not 'x'"),
        ("--rate=nan", "command line: rate should be float, not 'nan'"),
        ("--rate=inf", "command line: rate should be float, not 'inf'"),
        ("--flag=2", "command line: flag should be bool, not '2'"),
        ("--build=maybe", "command line: build should be bool|auto, not 'maybe'"),
        ("--mode=fsat", "command line: mode should be fast|slow, not 'fsat'; did you mean 'fast'?"),
        ("--count", "--count needs a value: --count=..."),
        ("--mode", "--mode needs a value: --mode=..."),
    ],
)
def test_command_line_faults(arg, fault):
    with pytest.raises(UserError) as error:
        parse(Knobs, [arg])
    assert str(error.value) == fault


def test_the_last_of_two_equal_keys_counts_and_the_command_line_overrides_the_file(write):
    file = write("count = 2\ncount = 3\nrate = 0.1\n")
    assert parse(Knobs, [file]) == Knobs(count=3, rate=0.1)
    assert parse(Knobs, ["--count=4", file, "--rate=1", "--count=5"]) == Knobs(count=5, rate=1.0)


def test_a_field_without_default_is_required():
    @dataclass
    class Required:
        path: str  # where

    assert parse(Required, ["--path=x"]).path == "x"
    with pytest.raises(UserError, match="--path=... is required"):
        parse(Required, [])


def test_a_file_may_hold_constants_names_above_and_arithmetic(write):
    text = '''"""A docstring."""
# a comment
_tokens = 3 * 4 ** 2 // 5 % 6  # a helper
count = _tokens - -1
rate = (1 + 2e-1) / 4
limit = None
mode = "sl" "ow"
flag = True
name = _also = mode
'''
    expected = Knobs(count=4, rate=0.3, limit=None, mode="slow", flag=True, name="slow")
    assert parse(Knobs, [write(text)]) == expected


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("import os", "Import is not allowed"),
        ("from os import path", "ImportFrom is not allowed"),
        ("count = int('3')", "Call is not allowed"),
        ("print('hello')", "Call is not allowed"),
        ("name = ''.join", "Attribute is not allowed"),
        ("name = 'abc'[0]", "Subscript is not allowed"),
        ("name = f'{1}'", "JoinedStr is not allowed"),
        ("def f(): pass", "FunctionDef is not allowed"),
        ("count = [1]", "List is not allowed"),
        ("count = 1 if True else 2", "IfExp is not allowed"),
        ("count = 1 < 2", "Compare is not allowed"),
        ("count = (lambda: 1)()", "Call is not allowed"),
        ("count = 1 << 2", "LShift is not allowed"),
        ("count = not 1", "Not is not allowed"),
        ("count = rate = f()", "Call is not allowed"),
        ("count.x = 1", "Attribute is not allowed"),
        ("count: int = 1", "AnnAssign is not allowed"),
        ("count += 1", "AugAssign is not allowed"),
        ("count, rate = 1, 2", "Tuple is not allowed"),
        ("count = (rate := 2)", "NamedExpr is not allowed"),
        ("name = b'bytes'", "bytes is not allowed"),
        ("count = 1j", "complex is not allowed"),
        ("count = limit", "'limit' is not assigned above"),
        ("count = __builtins__", "'__builtins__' is not assigned above"),
        ("name = 'a' * 3", "arithmetic is for numbers, not 'a'"),
        ("name = 'a' + 'b'", "arithmetic is for numbers, not 'a'"),
        ("name = '%s' % 3", "arithmetic is for numbers, not '%s'"),
        ("count = True + 1", "arithmetic is for numbers, not True"),
        ("count = -'a'", "arithmetic is for numbers, not 'a'"),
        ("rate = (-1) ** 0.5", "arithmetic is for numbers, not"),
        ("count = 1 // 0", "division by zero|modulo by zero"),
        ("rate = 1e200 ** 2", "a number is too large|out of range"),
        ("count = 10 ** 30", "a number is too large"),
        ("count = 9 ** 9 ** 9", "the exponent 387420489 is too large"),
        ("coutn = 3", "unknown key 'coutn'; did you mean 'count'?"),
        ("count = 'four'", "count should be int, not 'four'"),
        ("count = '4'", "count should be int, not '4'"),
        ("count = 1.5", "count should be int, not 1.5"),
        ("rate = 1e999", "rate should be float, not inf"),
        ("flag = 'True'", "flag should be bool, not 'True'"),
        ("name = 3", r"name should be str\|None, not 3"),
        ("mode = 'fastt'", r"mode should be fast\|slow, not 'fastt'; did you mean 'fast'"),
        ("count = = 3", "invalid syntax"),
        ("count = (3", "was never closed"),
    ],
)
def test_file_faults_name_file_and_line(write, line, fault):
    file = write(f"flag = True\n{line}\n")
    with pytest.raises(UserError, match=fault) as error:
        parse(Knobs, [file])
    assert str(error.value).startswith(f"{file}:2: ")
    assert "\n" not in str(error.value)


def test_a_file_with_code_does_not_run(write, tmp_path):
    trace = tmp_path / "trace"
    with pytest.raises(UserError, match="Call is not allowed"):
        parse(Knobs, [write(f"name = open({str(trace)!r}, 'w')\n")])
    with pytest.raises(UserError, match="Import is not allowed"):
        parse(Knobs, [write(f"import pathlib\npathlib.Path({str(trace)!r}).touch()\n")])
    assert not trace.exists()


@pytest.mark.parametrize(
    "expression",
    ["9**9**9", "2**64**64", "10**64**64**64", "1 + " * 50_000 + "1", "-" * 50_000 + "1", "(" * 5000 + "1"],
)
def test_hostile_arithmetic_ends_at_once(write, expression):
    start = time.monotonic()
    with pytest.raises(UserError):
        parse(Knobs, [write(f"count = {expression}\n")])
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("content", [b"\xff\xfe", b"count = 1\0", b"# coding: nonsense\n"])
def test_a_file_that_is_no_text(write, content):
    with pytest.raises(UserError):
        parse(Knobs, [write(content)])


def test_a_file_that_is_missing():
    with pytest.raises(UserError, match=r"no config file 'config/mla'; did you mean .*config/mla\.py"):
        configure(["config/mla"])
    with pytest.raises(UserError, match=r"did you mean config/train_shakespeare_char\.py"):
        configure(["config/train_shakespere_char.py"])
    with pytest.raises(UserError, match=r"no config file 'qqq'; there are .*config/mqa\.py"):
        configure(["qqq"])
    with pytest.raises(UserError, match="cannot read config file 'config'"):
        configure(["config"])
    with pytest.raises(UserError, match="unexpected argument .*after one config file at most"):
        configure(["config/mla.py", "config/mha.py"])


@pytest.mark.parametrize(
    "argv",
    [
        ["--n_head=6", "--attention=gqa", "--n_kv_head=4"],
        ["--n_embd=100", "--n_head=6"],
        ["--attention=mla", "--qk_rope_head_dim=15"],
        ["--attention=mha", "--kv_lora_rank=64"],
        ["--attention=mla", "--n_kv_head=2"],
        ["--attention=mhaa"],
        ["--optimizer=sgd"],
        ["--dtype=float8"],
        ["--device=gpu"],
        ["--device=cuda:"],
        ["--dropout=1"],
        ["--beta1=1"],
        ["--beta2=-0.1"],
        ["--batch_size=0"],
        ["--block_size=0"],
        ["--gradient_accumulation_steps=0"],
        ["--eval_interval=0"],
        ["--log_interval=0"],
        ["--max_iters=0"],
        ["--lr_decay_iters=0"],
        ["--eval_iters=-1"],
        ["--warmup_iters=-1"],
        ["--learning_rate=-1"],
        ["--muon_lr=-1"],
        ["--learning_rate=1e-4", "--min_lr=1e-3"],
        ["--grad_clip=-1"],
        ["--seed=-1"],
        ["--vocab_size=-1"],
        ["--cooldown=1.5"],
        ["--out_dir="],
        ["--dataset="],
        ["--wandb_entity="],
        ["--wandb_tags=a,,b"],
        [f"--wandb_tags=a,{'b' * 65}"],
    ],
)
def test_fields_that_do_not_fit_are_one_line(argv):
    with pytest.raises(UserError) as error:
        configure(argv)
    assert "\n" not in str(error.value)
    assert any(arg[2:].partition("=")[0] in str(error.value) for arg in argv)


def test_names_are_resolved_from_the_config_file():
    config = knobs(["config/mla.py", "--max_iters=7", "--learning_rate=0.5"])
    assert (config.out_dir, config.wandb_run_name) == ("out/mla", "mla")
    assert (config.lr_decay_iters, config.min_lr) == (7, 0.05)
    assert knobs(["--attention=mqa"]).out_dir == "out/mqa"
    config = knobs(["--out_dir=here/there/"])
    assert (config.out_dir, config.wandb_run_name) == ("here/there/", "there")
    assert knobs(["--out_dir=a", "--wandb_run_name=b"]).wandb_run_name == "b"


@pytest.mark.parametrize("file", [*NANO, *GPT2_SMALL, "config/train_shakespeare_char.py"])
def test_a_resolved_config_survives_json_and_replace(file):
    configs = configure([file])
    flat = json.loads(json.dumps(asdict(configs[0]) | asdict(configs[1])))
    assert from_dict(flat, "config.json", GPTConfig, TrainConfig) == configs
    assert only_fields(GPTConfig, flat, "config.json") == configs[0]
    assert replace(configs[0], vocab_size=512).vocab_size == 512


def test_from_dict_checks_as_strictly_as_the_command_line():
    with pytest.raises(UserError, match="config.json: unknown key 'n_haed'; did you mean 'n_head'"):
        from_dict({"n_haed": 4}, "config.json", GPTConfig, TrainConfig)
    with pytest.raises(UserError, match="config.json: n_head should be int, not '4'"):
        from_dict({"n_head": "4"}, "config.json", GPTConfig, TrainConfig)
    with pytest.raises(UserError, match=r"config.json: n_head should be int, not \[4\]"):
        only_fields(GPTConfig, {"n_head": [4], "else": 1}, "config.json")


def test_what_is_filled_in_depends_on_what_was_given(write):
    """The file overrides what is filled in, and the command line both, in several dataclasses at once."""

    @dataclass
    class More:
        size: int = 1  # how large

    asked = []

    def fill_in(in_file, on_line):
        asked.append((in_file, on_line))
        return {"count": 2, "rate": 0.25, "size": 9} | in_file | on_line

    arguments = [write("count = 3\nsize = 5\n"), "--size=6"]
    assert load(arguments, Knobs, More, fill_in=fill_in) == (Knobs(count=3, rate=0.25), More(6))
    assert asked == [({"count": 3, "size": 5}, {"size": 6})]


@pytest.mark.parametrize("value", [-1, 1, 2.5])
def test_a_range_names_the_knob_and_its_bounds(value):
    check_range(Knobs(), "rate", at_least=0, below=1)
    with pytest.raises(ValueError, match=f"rate must be at least 0 and below 1, not {value}"):
        check_range(Knobs(rate=value), "rate", at_least=0, below=1)


def test_the_loader_does_not_import_torch():
    code = "import sys, nanokv.config, nanokv.dataset_writer; print('torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True, env=environment)
    assert done == "False\n"


def test_devices_and_dtypes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    cpu = pick_device("auto")
    assert cpu == pick_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:1", "mps", "gpu"):
        with pytest.raises(UserError, match=name):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="cuda:2"):
        pick_device("cuda:2")

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert pick_dtype("auto", cpu) == pick_dtype("float32", cpu) == torch.float32
    assert pick_dtype("float16", cpu) == torch.float16
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert pick_dtype("auto", cpu) == torch.bfloat16


def test_nanogpts_own_recipe_is_accepted(write):
    recipe = {
        "out_dir": "out-shakespeare-char",
        "eval_interval": 250,
        "eval_iters": 200,
        "log_interval": 10,
        "always_save_checkpoint": False,
        "wandb_log": False,
        "wandb_project": "shakespeare-char",
        "wandb_run_name": "mini-gpt",
        "dataset": "shakespeare_char",
        "gradient_accumulation_steps": 1,
        "batch_size": 64,
        "block_size": 256,
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 384,
        "dropout": 0.2,
        "learning_rate": 1e-3,
        "max_iters": 5000,
        "lr_decay_iters": 5000,
        "min_lr": 1e-4,
        "beta2": 0.99,
        "warmup_iters": 100,
    }
    theirs = knobs([write("".join(f"{key} = {value!r}\n" for key, value in recipe.items()))])
    ours = knobs(["config/train_shakespeare_char.py"])
    assert {key: getattr(theirs, key) for key in recipe} == recipe
    assert {key: getattr(ours, key) for key in recipe} == recipe
    command = (
        "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
        "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
        "--lr_decay_iters=2000 --dropout=0.0"
    )
    config = knobs(command.split())
    assert (config.device, config.compile, config.n_embd, config.dropout) == ("cpu", False, 128, 0.0)


@pytest.mark.parametrize("files", [NANO, GPT2_SMALL], ids=["nano", "124m"])
def test_the_four_attentions_have_equal_parameters_and_recipes(files):
    models, configs = zip(*(configure([file]) for file in files), strict=True)
    with torch.device("meta"):
        sizes = [n_params(GPT(replace(config, vocab_size=config.vocab_size or 2048))) for config in models]
    assert all(abs(size / sizes[0] - 1) < 0.01 for size in sizes), sizes
    architecture = {f.name for f in fields(GPTConfig)} - {"block_size", "vocab_size", "n_layer", "n_embd", "dropout"}
    names = {"out_dir", "wandb_run_name"}
    recipes = [knobs([file]).__dict__.items() for file in files]
    recipes = [{k: v for k, v in recipe if k not in architecture | names} for recipe in recipes]
    assert all(recipe == recipes[0] for recipe in recipes)
    assert len({config.out_dir for config in configs}) == 4
    assert [config.attention for config in models] == ["mha", "mqa", "gqa", "mla"]


def test_the_124m_batch_is_half_a_million_tokens():
    config = knobs([GPT2_SMALL[0]])
    assert config.batch_size * config.block_size * config.gradient_accumulation_steps == 2**19
    assert config.max_iters * 2**19 == pytest.approx(10e9, rel=1e-3)


def test_help_is_the_manual_of_every_knob(capsys):
    with pytest.raises(SystemExit) as exit:
        configure(["--n_haed=1", "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("python train.py [config.py] [--key=value ...]\n\nmodel\n")
    for field in (*fields(GPTConfig), *fields(TrainConfig)):
        (line,) = [line for line in text.splitlines() if line.startswith(f"  --{field.name}=")]
        knob, comment = line.split(None, 1)
        assert knob == f"--{field.name}={as_text(field.default)}"
        assert len(comment.partition("[")[0].strip()) > 4, f"{field.name} has no comment"
    assert "\noptimizer\n  --optimizer=muon" in text


def test_help_reads_comments_beside_and_above_and_sections(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert describe([Knobs]).splitlines() == [
        "",
        "numbers",
        "  --count=1     how many [int]",
        "  --rate=0.5    how fast [float]",
        "  --limit=None  how far [int|None]",
        "",
        "choices",
        "  --mode=fast   of a mode, whose comment takes two lines [fast|slow]",
        "  --flag=False  whether [bool]",
        "  --build=auto  whether, or when it pays [bool|auto]",
        "  --name=None   what it is called [str|None]",
    ]


def run_cli(body: str, *argv: str) -> subprocess.CompletedProcess:
    code = f"from nanokv.config import cli\nfrom train import *\ndef main(argv):\n    {body}\ncli(main)"
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=120)


def test_cli_turns_a_user_error_into_a_line_and_exit_code_2():
    done = run_cli("configure(argv)", "--n_haed=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: command line: unknown key 'n_haed'; did you mean 'n_head'?\n"


def test_cli_exit_codes(monkeypatch, capsys):
    def fail(error: BaseException):
        def main(argv):
            raise error

        return main

    monkeypatch.setattr(sys, "argv", ["x.py", "--a", "b"])
    seen = []
    assert cli(seen.append) is None and seen == [["--a", "b"]]
    with pytest.raises(SystemExit) as exit:
        cli(fail(UserError("two\nlines")))
    assert exit.value.code == 2 and capsys.readouterr().err == "error: two lines\n"
    with pytest.raises(SystemExit) as exit:
        cli(fail(KeyboardInterrupt()))
    assert exit.value.code == 130
    with pytest.raises(ZeroDivisionError):
        cli(fail(ZeroDivisionError()))


def test_cli_is_quiet_when_the_reader_goes():
    code = "from nanokv.config import cli\ncli(lambda argv: print('x\\n' * 10**6))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 141


keys = st.sampled_from([f.name for f in (*fields(GPTConfig), *fields(TrainConfig))]) | st.text(max_size=8)
words = st.sampled_from(["None", "True", "auto", "mla", "gqa", "1e3", "-1", "0", "3", "1e400", "cuda:0", "muon"])
values = words | st.integers().map(str) | st.floats().map(str) | st.text(max_size=8)
arguments = st.builds("--{}={}".format, keys, values) | st.text(max_size=12)
expressions = st.recursive(
    values | st.text(max_size=5).map(repr),
    lambda inner: st.builds("{} {} {}".format, inner, st.sampled_from(["+", "-", "*", "/", "//", "%", "**"]), inner),
    max_leaves=6,
)
lines = st.builds("{} = {}".format, keys, expressions) | st.text(max_size=20)


@settings(max_examples=200, deadline=None)
@given(st.lists(arguments, max_size=5))
def test_any_command_line_loads_or_is_a_user_error(argv):
    try:
        configs = load(argv, GPTConfig, TrainConfig)
    except SystemExit as exit:
        assert exit.code == 0 and {"-h", "--help"} & set(argv)
    except UserError as error:
        assert str(error)
    else:
        flat = asdict(configs[0]) | asdict(configs[1])
        assert from_dict(flat, "config.json", GPTConfig, TrainConfig) == configs


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(lines, max_size=4).map("\n".join) | st.binary(max_size=40))
def test_any_file_loads_or_is_a_user_error(write, text):
    file = write(text.encode(errors="replace") if isinstance(text, str) else text)
    try:
        configs = load([file], GPTConfig, TrainConfig)
    except UserError as error:
        assert str(error)
    else:
        flat = asdict(configs[0]) | asdict(configs[1])
        assert from_dict(flat, "config.json", GPTConfig, TrainConfig) == configs


@dataclass
class Lists:
    name: str
    sizes: tuple[int, ...] = (1, 2)
    kinds: tuple[Literal["mha", "mla"], ...] = ()


def test_lists_are_words_with_commas_between(capsys):
    lists = parse(Lists, ["run", "--sizes=64,1e3", "--kinds=mla"], bare=1)
    assert lists == Lists("run", (64, 1000), ("mla",))
    assert parse(Lists, ["--name=run", "--sizes="]).sizes == ()
    assert from_dict({"name": "run", "sizes": [3, 4]}, "file", Lists)[0].sizes == (3, 4)
    for argv, fault in {
        "--sizes=64;128": "sizes should be a list of int with commas between, not '64;128'",
        "--sizes=1,,2": "sizes should be a list of int",
        "--kinds=mha,mqa": "kinds should be a list of mha|mla",
        "two": "unexpected argument 'two'",
    }.items():
        with pytest.raises(UserError, match=fault):
            parse(Lists, ["run", argv], bare=1)
    with pytest.raises(SystemExit):
        parse(Lists, ["--help"])
    assert "--sizes=1,2" in capsys.readouterr().out
