"""What is made of tokens: text as it comes, and the command."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import split_knobs
from equivalence import VOCAB, small_model
from test_generate import ATTENTIONS, BLOCK, BYTE, sharp_model

import sample
from nanokv import checkpoint
from nanokv import tokenizer as tokenizers
from nanokv.config import UserError
from nanokv.metrics import decode_probe, kv_elements_per_token_layer
from nanokv.text import TextStream, encode_prompt, generate_text
from sample import Options, load_run

ROOT = Path(__file__).parent.parent


# text


def pieces(text: str | bytes, stop: list[str] = ()) -> list[str]:
    """What a stream prints for each byte, and at its close."""
    stream = TextStream(BYTE, stop)
    data = text.encode() if isinstance(text, str) else text
    return [stream.push(b) for b in data] + [stream.close()]


def test_half_a_character_is_never_printed():
    text = "aé€😀z"
    assert [piece for piece in pieces(text) if piece] == list(text)
    assert "".join(pieces(text.encode()[:-2])) == "aé€\ufffd"
    assert pieces(b"\xe2\x82") == ["", "", "\ufffd"]
    assert "".join(pieces(b"a\xff\xc3b")) == "a\ufffd\ufffdb"


@pytest.mark.parametrize(
    ("text", "stop", "printed"),
    [
        ("one END two", ["END"], "one "),
        ("one ENEND two", ["END"], "one EN"),
        ("aaab", ["aab"], "a"),
        ("one EN", ["END"], "one EN"),
        ("x\n\ny", ["\n\n"], "x"),
        ("x€€y", ["€€"], "x"),
        ("one two", ["two", "one t"], ""),
        ("one two", [], "one two"),
    ],
)
def test_stop_strings_span_tokens_and_are_not_printed(text, stop, printed):
    out = pieces(text, stop)
    assert "".join(out) == printed
    assert not any(s in "".join(out[:i]) for s in stop for i in range(len(out)))


def test_text_is_held_back_only_while_it_may_be_a_stop():
    assert pieces("aENbENc", ["END"])[:-1] == ["a", "", "", "ENb", "", "", "ENc"]


def test_a_token_that_holds_two_stops_and_more():
    tok = tokenizers.train("char", ["abcd"])
    tok.decode_single_token_bytes = {0: b"12", 1: b"3 45 6"}.__getitem__
    stream = TextStream(tok, ["5 6", "3 4"])
    assert [stream.push(0), stream.push(1), stream.push(0), stream.close()] == ["12", "", "", ""]
    assert stream.ended


# command


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", BYTE)


def make_run(path: Path, tokenizer, names=("best", "last")) -> Path:
    """A run folder; best/ and last/ hold different weights."""
    path.mkdir()
    shape = dict(n_layer=1, n_head=2, n_embd=16, block_size=BLOCK, attention="mla")
    shape["vocab_size"] = tokenizer.n_vocab + 7
    checkpoint.write_config(path, *split_knobs(**shape))
    tokenizers.save(tokenizer, path)
    for name in names:
        weights = small_model(seed=int(name == "last"), **shape).state_dict()
        checkpoint.save(path, name, checkpoint.Checkpoint(weights, {}, {"step": 1}))
    return path


def run_main(capsys, *argv: str) -> tuple[str, str]:
    sample.main([str(arg) for arg in argv] + ["--device=cpu", "--dtype=float32"])
    return capsys.readouterr()


def test_load_run_takes_a_run_or_a_checkpoint_in_it(run_dir, tmp_path):
    best, last = (checkpoint.load_weights(run_dir, name) for name in ("best", "last"))

    def loads(weights, *args) -> bool:
        model, tokenizer = load_run(*args)
        assert not model.training and tokenizer.n_vocab == BYTE.n_vocab
        state = model.state_dict()
        return state.keys() == weights.keys() and all(torch.equal(state[k], w) for k, w in weights.items())

    cpu = ("cpu", "float32")
    assert loads(best, run_dir, *cpu) and loads(last, run_dir, *cpu, "last")
    assert loads(last, run_dir / "last", *cpu) and loads(best, f"{run_dir}/best/", *cpu)
    assert loads(last, make_run(tmp_path / "best", BYTE, names=["last"]), *cpu)
    assert load_run(run_dir, "cpu", "bfloat16")[0].embed_tokens.weight.dtype == torch.bfloat16


def test_command_prints_text_and_costs_apart(run_dir, capsys):
    out, err = run_main(capsys, run_dir, "--start=def ", "--max_new_tokens=30")
    assert out.startswith("def ") and len(out) > 10 and out.endswith("\n") and sample.SEPARATOR not in out
    costs, cache = err.splitlines()
    assert costs.startswith("prefill 4 tokens, ") and "; decode " in costs and costs.endswith("; batch of 1")
    per_token = 4 * kv_elements_per_token_layer(load_run(run_dir, "cpu")[0].config)
    assert cache == f"kv cache (mla, float32) {per_token} bytes a token, {per_token * 34:,} bytes allocated"
    cache = run_main(capsys, run_dir, "--start=def ", "--max_new_tokens=30", "--cache_dtype=int8")[1]
    assert f"kv cache (mla, int8) {4 + 2 + 2 * 4} bytes a token, {34 * (4 + 2 + 2 * 4)} bytes" in cache
    assert run_main(capsys, f"--out_dir={run_dir}", "--start=def ", "--max_new_tokens=30")[0] == out
    assert run_main(capsys, run_dir, "--start=def ", "--max_new_tokens=30", "--which=last")[0] != out


def test_command_runs_prompts_as_one_batch(run_dir, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("first\n\nthe second é\n")
    common = ["--max_new_tokens=20", "--top_k=0", "--temperature=0.3"]
    lines = f"--start=FILE:{tmp_path / 'prompts.txt'}"
    out, err = run_main(capsys, run_dir, lines, "--split_lines", "--num_samples=2", *common)
    alone = [
        run_main(capsys, run_dir, f"--start={prompt}", f"--seed={1337 + i}", *common)[0]
        for i, prompt in enumerate(["first", "first", "the second é", "the second é"])
    ]
    assert out == f"{sample.SEPARATOR}\n".join(alone)
    assert "batch of 4" in err
    parts, err = run_main(capsys, run_dir, lines, "--split_lines", "--num_samples=2", "--batch_size=3", *common)
    assert parts == out and "batch of 3" in err


def test_command_drafts_with_a_run_or_by_look_up(run_dir, tmp_path, capsys):
    common = ["--start=aaaa", "--num_samples=2", "--max_new_tokens=40", "--temperature=0.3"]
    out, err = run_main(capsys, run_dir, *common)
    assert "draft" not in err
    for draft in ("lookup", run_dir / "last"):
        drafted, err = run_main(capsys, run_dir, *common, f"--draft={draft}")
        assert drafted == out
    assert err.splitlines()[2].startswith("draft: ")  # look-up may have had nothing to guess
    other = make_run(tmp_path / "other", tokenizers.train("char", ["abc"]))
    with pytest.raises(UserError, match="another tokenizer"):
        run_main(capsys, run_dir, *common, f"--draft={other}")


def test_command_reads_stdin(run_dir, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("héllo\n".encode())))
    assert run_main(capsys, run_dir, "--start=-", "--max_new_tokens=3")[0].startswith("héllo\n")


def test_greedy_flag_and_zero_temperature(run_dir, capsys):
    outputs = [
        run_main(capsys, run_dir, "--max_new_tokens=30", *knobs)[0]
        for knobs in (["--greedy"], ["--greedy", "--seed=1"], ["--temperature=0"], ["--temperature=0.8"])
    ]
    assert outputs[0] == outputs[1] == outputs[2] != outputs[3]


def test_stop_strings_on_the_command_line(run_dir, capsys):
    out = run_main(capsys, run_dir, "--start=a", "--max_new_tokens=40")[0]
    cut = out[1:].index(out[7:9]) + 1
    assert run_main(capsys, run_dir, "--start=a", f"--stop=no such||{out[7:9]}")[0] == out[:cut] + "\n"


def test_a_stopped_sample_lets_the_next_be_printed_as_it_comes(monkeypatch):
    written = []
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys.stdout, "flush", lambda: written.append(sys.stdout.getvalue()))
    steps = iter([[*b"aA"], [*b"bB"], [*b".C"], [*b"?D"]])
    sample.print_samples(steps, ["> ", "< "], [TextStream(BYTE, ["."]), TextStream(BYTE)])
    line = f"\n{sample.SEPARATOR}\n"
    assert written == ["> ", "> a", "> ab", f"> ab{line}< ABC", f"> ab{line}< ABCD", f"> ab{line}< ABCD\n"]


def test_nothing_is_computed_once_all_samples_have_stopped(capsys):
    steps = iter([[*b"aA"], [*b".B"], [*b"c."], [*b"dD"]])
    sample.print_samples(steps, ["", ""], [TextStream(BYTE, ["."]), TextStream(BYTE, ["."])])
    assert capsys.readouterr().out == f"a\n{sample.SEPARATOR}\nAB\n"
    assert list(steps) == [[*b"dD"]]


def test_empty_start_begins_a_document(tmp_path, capsys):
    ends = {"byte": BYTE.eot_token, "char": 1, "no newline": 0}
    for name, tokenizer in {
        "byte": BYTE,
        "char": tokenizers.train("char", ["\tx\ny"]),
        "no newline": tokenizers.train("char", ["abc"]),
    }.items():
        assert encode_prompt(tokenizer, "") == [ends[name]]
        out, _ = run_main(capsys, make_run(tmp_path / name, tokenizer), "--max_new_tokens=5")
        assert "endoftext" not in out


def test_a_sample_ends_at_endoftext():
    model, tokenizer = sharp_model(), tokenizers.train("char", [bytes(range(40, 40 + VOCAB)).decode()])
    free = generate_text(model, tokenizer, 30, "(")
    tokenizer.eot_token = tokenizer.encode_ordinary(free[20])[0]
    assert generate_text(model, tokenizer, 30, "(") == "(" + free[1:].split(free[20])[0]


def test_a_long_prompt_is_cut_with_a_note(run_dir, capsys):
    out, err = run_main(capsys, run_dir, f"--start={'x' * 100}", "--max_new_tokens=5")
    assert out.startswith("x" * 100)
    assert err.splitlines()[0] == "a prompt of 100 tokens is cut to its last 64, the context"


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_decode_probe(attention):
    model = sharp_model(attention=attention, **ATTENTIONS[attention])
    probe = decode_probe(model, 20, n=4)
    assert probe["decode/tokens_per_s"] > 0 and probe["decode/context"] == 20
    assert probe["kv_cache/allocated_bytes"] == 24 * model.config.kv_bytes_per_token(torch.float32)
    half = decode_probe(model.bfloat16(), 20, n=4)
    assert half["kv_cache/allocated_bytes"] * 2 == probe["kv_cache/allocated_bytes"]


@pytest.mark.parametrize(
    ("knob", "message"),
    [
        ("--temperature=-1", "temperature must be at least 0"),
        ("--top_p=0", "top_p must be above 0"),
        ("--top_p=1.5", "top_p must be above 0"),
        ("--min_p=-0.1", "min_p must be from 0 to 1"),
        ("--top_k=-1", "top_k must be at least 0"),
        ("--num_samples=0", "num_samples must be at least 1"),
        ("--batch_size=0", "batch_size must be at least 1"),
        ("--max_new_tokens=0", "max_new_tokens must be at least 1"),
        ("--seed=-1", "seed must be at least 0"),
        ("--temprature=1", "did you mean 'temperature'"),
        ("--which=first", "which should be best|last"),
        ("--device=tpu", "unknown device"),
        ("--start=FILE:nowhere.txt", "cannot read the prompt FILE:nowhere.txt"),
        ("--start=FILE:empty.txt", "the prompt FILE:empty.txt is empty"),
        ("--start=FILE:latin.txt", "the prompt FILE:latin.txt is not UTF-8"),
        ("--out_dir=nowhere", "nowhere is not a run folder"),
        ("--out_dir=.", "is not a run folder: it has no config.json"),
        ("--out_dir=no_tokenizer", "no_tokenizer holds no tokenizer"),
        ("--out_dir=no_weights", "no_weights has no checkpoint last/"),
        ("--out_dir=damaged", "is damaged"),
        ("--out_dir=misfit", "do not fit"),
        ("--out_dir=char --start=hello?", "does not know the character '?'"),
        ("--start=\t\n --split_lines", "the prompt --start is empty"),
    ],
)
def test_faults_are_one_line(run_dir, tmp_path, monkeypatch, knob, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("latin.txt").write_bytes(b"\xe9t\xe9")
    if "no_tokenizer" in knob:
        (make_run(Path("no_tokenizer"), BYTE) / "tokenizer_spec.json").unlink()
    elif "no_weights" in knob:
        make_run(Path("no_weights"), BYTE, names=[])
    elif "damaged" in knob:
        os.truncate(make_run(Path("damaged"), BYTE) / "best/model.safetensors", 100)
    elif "misfit" in knob:
        make_run(Path("misfit"), BYTE)
        checkpoint.write_config(Path("misfit"), *split_knobs(vocab_size=9, n_embd=18, n_head=3))
    elif "char" in knob:
        make_run(Path("char"), tokenizers.train("char", ["helo"]))
    with pytest.raises(UserError) as error:
        sample.main([str(run_dir), "--device=cpu", *knob.split(" ")])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_options_are_the_manual(capsys):
    with pytest.raises(SystemExit):
        sample.main(["--help"])
    manual = capsys.readouterr().out
    assert "RUN" in manual and all(f"--{name}=" in manual for name in Options.__annotations__)


def test_a_reader_that_leaves_ends_it_quietly(run_dir):
    command = [sys.executable, str(ROOT / "sample.py"), str(run_dir), "--device=cpu", "--max_new_tokens=100000"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}  # which lacks most of what is printed
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(30) == 141
    process.stderr.close()
