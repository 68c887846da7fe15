"""The documents hold what they say: commands parse, links lead somewhere, MLA's reference equals model.py,
and docs/add_an_attention.md alone is enough to add one.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from glob import glob
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import compare
import sample
import train
from model import ATTENTIONS, rope_angles
from nanokv.config import UserError
from tools import bench, bench_cache, change_attention, convert, recall, sweep, uptrain

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
MLA, RECIPE = ROOT / "docs/mla.md", ROOT / "docs/add_an_attention.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = {"train.py": train, "sample.py": sample, "compare.py": compare, "tools.convert": convert}
COMMANDS |= {"tools.bench": bench, "tools.bench cache": bench_cache, "tools.change_attention": change_attention}
COMMANDS |= {"tools.recall": recall, "tools.sweep": sweep, "tools.uptrain": uptrain}
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


# Commands


def commands(page: Path, languages: tuple[str, ...] = ("", "sh")) -> list[list[str]]:
    """The command lines of a page's code blocks, as words, without comments."""
    text = "\n".join(code for language, code in BLOCK.findall(page.read_text("utf-8")) if language in languages)
    lines = text.replace("\\\n", " ").splitlines()
    starts = re.compile(r"(python|make|torchrun|sbatch) ")
    return [shlex.split(line, comments=True) for line in lines if starts.match(line)]


class Parsed(Exception):
    """A command's loader took its arguments."""


@pytest.fixture
def check(monkeypatch):
    """check(words): whether a command's own loader takes its arguments; it goes no further than that."""

    def only_parse(function):
        def parse(*args, **knobs):
            knobs.pop("fill_in", None)  # which reads the run that is resumed
            function(*args, **knobs)
            raise Parsed

        return parse

    for module in COMMANDS.values():
        for name in ("load", "parse"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, only_parse(getattr(module, name)))
    monkeypatch.chdir(ROOT)

    def check_words(words: list[str]) -> None:
        if words[0] == "make":
            target = next(word for word in words[1:] if "=" not in word)
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE), target
            return
        if words[0] == "sbatch":
            assert (ROOT / words[1]).exists()
            return
        start = words.index("train.py") if words[0] == "torchrun" else 1
        command, *argv = [word for word in words[start:] if word != "-m"]
        if command in COMMANDS:
            with suppress(SystemExit), pytest.raises(Parsed):
                COMMANDS[command].main(argv)
        elif command != "pytest":
            command = command.replace("NAME", "stdlib")
            assert (ROOT / command).exists(), command

    return check_words


@every_page
def test_commands_are_taken_by_their_loaders(page, check):
    lines = commands(page)
    assert lines or page != README
    for words in lines:
        if not any("gta" in word for word in words):  # those are run, see below
            check(words)


def test_a_command_that_does_not_parse_is_found(check):
    with pytest.raises(UserError):
        check(["python", "train.py", "config/mla.py", "--n_layers=6"])


def test_what_readme_shows_of_sampling_runs(tmp_path, monkeypatch, capsys):
    run = str(ROOT / "tests/runs/mla")
    monkeypatch.chdir(tmp_path)
    Path("prompt.txt").write_text("import ")
    for words in commands(README):
        if "sample.py" in words:
            sample.main([run, *words[3:], "--max_new_tokens=20", "--device=cpu", "--dtype=float32"])
    (example,) = [code for language, code in BLOCK.findall(README.read_text("utf-8")) if language == "python"]
    exec(example.replace("out/mla", run).replace("200", "20"), {})
    assert "class " in capsys.readouterr().out


# Text


def test_readme_is_short():
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 200
    assert len(text.replace("|", " ").split()) <= 1800


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    text = BLOCK.sub("", page.read_text("utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@every_page
def test_links_and_pictures_exist(page):
    for link in re.findall(r"\]\(([^)]+)\)", BLOCK.sub("", page.read_text("utf-8"))):
        if link.startswith("http"):
            continue
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def test_figures_of_readme_are_those_of_results():
    results = re.sub(r"[ *]+", " ", (ROOT / "docs/results.md").read_text("utf-8"))
    rows = re.findall(
        r"^\| `(\w+)`[^|]*\| ([\d,]{9}) \| ([\d,]+) \| \d+ % \| (.*) \|$", README.read_text("utf-8"), re.M
    )
    assert [row[0] for row in rows] == ["mha", "gqa", "mla", "mqa"]
    for attention, parameters, cache, losses in rows:
        assert re.search(
            rf"\| {attention} \| {attention} \| {parameters} \| {cache} \| [\d.]+% \| {losses} \|", results
        )


def test_pins_are_within_the_ranges_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    ranges = {r.name.lower(): r for r in map(Requirement, wanted)}
    for file in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / file).read_text("utf-8").splitlines():
            if not line.startswith("-r"):
                pin = Requirement(line)
                (version,) = pin.specifier
                assert version.version in ranges[pin.name.lower()].specifier, line


# docs/mla.md


@pytest.mark.parametrize("T", [1, 20])
def test_the_reference_of_mla_equals_the_model(T):
    (code,) = [code for language, code in BLOCK.findall(MLA.read_text("utf-8")) if language == "python"]
    namespace = {"torch": torch}
    exec(code, namespace)
    config, _ = train.configure([str(ROOT / "config/mla.py")])
    attention = ATTENTIONS["mla"](config)
    for p in attention.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, width = torch.randn(T, config.n_embd), attention.rope_width
    expected = attention(x[None], rope_angles(torch.arange(T)[None], width, config))[0]
    torch.testing.assert_close(namespace["mla"](x, attention), expected, atol=1e-5, rtol=1e-5)


def test_the_shapes_in_mla_md_are_those_of_its_config():
    text = MLA.read_text("utf-8")
    config, _ = train.configure([str(ROOT / "config/mla.py")])
    for knob, value in re.findall(r"^\|[^|]*\| `(\w+)` \| (\d+) \|$", text, re.MULTILINE):
        assert getattr(config, knob) == int(value), knob
    for name, shape in re.findall(r"(\w+_proj\w*) \((\d+, \d+)\)", text):
        weight = ATTENTIONS["mla"](config).get_submodule(name).weight
        assert tuple(weight.shape) == tuple(map(int, shape.split(", "))), name


# docs/add_an_attention.md

EDIT = re.compile(
    r"^(?:Create `(?P<new>[^`]+)`|Add to `(?P<file>[^`]+)`, (?P<where>before|after) "
    r"the line that starts with `(?P<line>[^`]+)`):\n\n```\w*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def apply_edits(text: str, root: Path) -> None:
    """Makes the edits that a page describes, in the copy of the repository at root."""
    for edit in EDIT.finditer(text):
        if edit["new"]:
            (root / edit["new"]).write_text(edit["code"], "utf-8")
            continue
        lines = (root / edit["file"]).read_text("utf-8").splitlines(keepends=True)
        (at,) = [i for i, line in enumerate(lines) if line.startswith(edit["line"])]
        at += edit["where"] == "after"
        (root / edit["file"]).write_text("".join([*lines[:at], edit["code"], *lines[at:]]), "utf-8")


@pytest.fixture(scope="module")
def checkout(corpus, tmp_path_factory) -> Path:
    """A copy of the repository with the edits of docs/add_an_attention.md, whose config trains in seconds."""
    root = tmp_path_factory.mktemp("copy") / "nanokv"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "out*", "wandb", "data", "assets")
    shutil.copytree(ROOT, root, ignore=ignored)
    for prepare in ROOT.glob("data/*/prepare.py"):
        (root / prepare.relative_to(ROOT)).parent.mkdir(parents=True)
        shutil.copy(prepare, root / prepare.relative_to(ROOT))
    apply_edits(RECIPE.read_text("utf-8"), root)
    small = f'dataset = "{corpus}"\nn_layer = 2\nblock_size = 32\nbatch_size = 4\n'
    small += 'max_iters = 6\neval_interval = 6\nsample_tokens = 8\nwarmup_iters = 2\ndevice = "cpu"\n'
    with open(root / "config/gta.py", "a") as file:
        file.write(small)
    runs = root / "config/gta.txt"
    runs.write_text("".join(runs.read_text("utf-8").splitlines(keepends=True)[:2]), "utf-8")
    recalled = root / "config/gta_recall.txt"
    short = " --max_iters=2 --eval_interval=2 --batch_size=4 --warmup_iters=1 --n_embd=32\n"
    recalled.write_text(recalled.read_text("utf-8").replace("\n", short), "utf-8")
    return root


SMALL = {"cache": ["--tokens=256", "--formats=fp32,int8", "--windows=16", "--sinks=0"]}
SMALL["train"] = ["--block_sizes=32", "--tokens=64", "--steps=1", "--n_layer=1", "--vocab_size=64"]
SMALL["decode"] = ["--contexts=8", "--batches=1", "--n=1", "--n_layer=1", "--vocab_size=64", "--max_cache=0.1"]
SMALL["tools.recall"] = ["--pairs=2"]


def run(words: list[str], root: Path) -> str:
    """Standard output of a command, which must succeed."""
    module = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[words[0]]
    words = sum((sorted(glob(word, root_dir=root)) if "*" in word else [word] for word in words), [])
    words += [option for word in words for option in SMALL.get(word, [])]
    done = subprocess.run([sys.executable, *module, *words[1:]], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
def test_the_recipe_of_a_new_attention_is_enough(checkout):
    tests, *others = commands(RECIPE, ("sh",))  # the tests need nothing of the other commands
    with ThreadPoolExecutor() as pool:
        tested = pool.submit(run, tests, checkout)
        printed = {" ".join(words): run(words, checkout) for words in others}
    assert int(re.search(r"(\d+) passed", tested.result())[1]) >= 50
    summary = json.loads((checkout / "out/gta/summary.json").read_text())
    assert summary["attention"] == "gta" and summary["kv_cache/elements_per_token_layer"] == 2 * 32 + 16
    assert summary["final/val_loss"] < 5.5
    for command in ("compare.py", "bench train", "bench decode", "recall"):
        (table,) = [out for words, out in printed.items() if command in words]
        assert re.search(r"^(\| )?gta", table, re.MULTILINE), table
    assert (checkout / "compare.png").exists()
