"""Generation: what is drawn, from which tokens, and how it is printed."""

import io
import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from equivalence import VOCAB, small_model

import checkpoint
import sample
from config import Config, UserError
from data import tokenizer as tokenizers
from model import GPT
from sample import Options, Stats, TextStream, generate, generate_lists, generate_text, load_run

ROOT = Path(__file__).parent.parent
ATTENTIONS = {"mha": {}, "mqa": {}, "gqa": {"n_kv_head": 2}, "mla": {}}
BLOCK = 64
PROMPTS = [[5, 6, 7], list(range(50)), [i % VOCAB for i in range(90)], [8]]  # the third is longer than BLOCK
BYTE = tokenizers.train("byte", [])


@pytest.fixture(params=ATTENTIONS)
def model(request) -> GPT:
    return sharp_model(attention=request.param, **ATTENTIONS[request.param])


def sharp_model(**knobs) -> GPT:
    """A random model that is sure enough of each token for rounding not to change it."""
    model = small_model(block_size=BLOCK, **knobs)
    with torch.no_grad():
        model.norm.weight.mul_(4)
    return model


@torch.no_grad()
def drawn_without_a_cache(model: GPT, prompt: list[int], new: list[int], seed: int, **options) -> list[int]:
    """What each step draws, from logits without a cache, when the steps before it have drawn `new`."""
    context, drawn, uniform = prompt[-BLOCK:], [], sample.uniforms(seed, 1, "cpu")
    while len(drawn) < len(new):
        steps = min(BLOCK - len(context) + 1, len(new) - len(drawn))  # until the context is full
        context = context + new[len(drawn) : len(drawn) + steps - 1]
        logits = model(torch.tensor([context]))[0][0, -steps:]
        drawn += sample.sample(logits, torch.cat(list(islice(uniform, steps))), **options).tolist()
        context = context[-BLOCK // 2 :] + new[len(drawn) - 1 :][:1]
    return drawn


# generation


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 0.9, "top_k": 40}], ids=["greedy", "drawn"]
)
def test_tokens_with_a_cache_are_those_without_past_the_contexts_end(model, options):
    new = generate_lists(model, PROMPTS, 200, seed=7, **options)
    assert [len(row) for row in new] == [200] * 4
    for i, prompt in enumerate(PROMPTS):
        assert drawn_without_a_cache(model, prompt, new[i], 7 + i, **options) == new[i]


def test_rows_draw_as_if_alone(model):
    options = dict(temperature=0.9, top_k=30, top_p=0.95, min_p=0.01)
    together = generate_lists(model, PROMPTS, 80, seed=3, **options)
    for i, prompt in enumerate(PROMPTS):
        assert generate_lists(model, [prompt], 80, seed=3 + i, **options) == [together[i]]


def test_a_stop_ends_its_row_alone(model):
    free = generate_lists(model, PROMPTS, 100, seed=3)
    stop = free[0][40]
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert len({len(row) for row in expected}) > 1
    assert generate_lists(model, PROMPTS, 100, seed=3, stop_ids=[stop]) == expected


@pytest.mark.parametrize("knobs", [{}, {"window": 9, "sink_tokens": 2, "window_pattern": "SL"}], ids=str)
def test_prefill_in_chunks(model, monkeypatch, knobs):
    model.config = replace(model.config, **knobs)
    whole = generate_lists(model, PROMPTS, 30, temperature=0)
    monkeypatch.setattr(sample, "PREFILL_CHUNK", 7)
    assert generate_lists(model, PROMPTS, 30, temperature=0) == whole


def test_seeds_reproduce_and_differ(model):
    first = generate_lists(model, [[1]], 40, seed=1)
    assert generate_lists(model, [[1]], 40, seed=1) == first
    assert generate_lists(model, [[1]], 300, seed=1)[0][:40] == first[0]
    samples = generate_lists(model, [[1]] * 8, 40, seed=1)
    assert len({tuple(row) for row in samples}) == 8


def test_no_token_asked_for_is_none_made(model):
    assert generate_lists(model, [[1, 2], [3]], 0) == [[], []]


def test_cache_is_as_long_as_needed_and_no_longer(model):
    per_token = model.config.kv_bytes_per_token(torch.float32)
    stats = Stats()
    generate_lists(model, [[1, 2], [3]], 10, stats=stats)
    assert stats.cache_bytes == 2 * per_token * (2 + 10)
    assert (stats.prompt_tokens, stats.decode_tokens) == (3, 2 * 9)
    stats = Stats()
    generate_lists(model, [[1, 2], [3]], 3 * BLOCK, stats=stats)
    assert stats.cache_bytes == 2 * per_token * BLOCK
    stats = Stats()
    generate_lists(model, [[1, 2], [3]], 10, cache_dtype=torch.bfloat16, stats=stats)
    assert stats.cache_bytes == 2 * per_token * (2 + 10) // 2


def test_memory_stays_flat_past_the_contexts_end(model, monkeypatch):
    made, new_cache = [], GPT.new_cache
    monkeypatch.setattr(GPT, "new_cache", lambda *args: made.append(new_cache(*args)) or made[-1])
    storage = lambda: [b.data_ptr() for layer in made[0].layers for b in layer.buffers.values()]  # noqa: E731
    steps = generate(model, PROMPTS, 4 * BLOCK)
    next(steps)
    before = storage()
    for _ in steps:
        assert max(made[0].lengths) <= made[0].max_len == BLOCK
    assert storage() == before
    assert max(cache.max_len for cache in made[1:]) == BLOCK // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_a_window_slides_past_the_contexts_end_at_flat_memory(model, dtype, monkeypatch):
    model.config = replace(model.config, window=12)
    made, new_cache = [], GPT.new_cache
    monkeypatch.setattr(GPT, "new_cache", lambda *args: made.append(new_cache(*args)) or made[-1])
    stats, storage, rows = Stats(), set(), [[], [], [], []]
    for ids in generate(model, PROMPTS, 4 * BLOCK, temperature=0, cache_dtype=dtype, stats=stats):
        for row, token in zip(rows, ids, strict=True):
            row.append(token)
        storage.add(tuple(b.data_ptr() for layer in made[0].layers for b in layer.buffers.values()))
    assert len(made) == len(storage) == 1 and stats.cache_bytes == made[0].nbytes
    assert made[0].nbytes == 4 * 12 * model.config.kv_bytes_per_token(dtype)
    for prompt, new in zip(PROMPTS, rows, strict=True):
        text = prompt[-BLOCK:] + new
        likeliest = model(torch.tensor([text[:-1]]))[0][0, -len(new) :].argmax(-1).tolist()
        same = sum(a == b for a, b in zip(likeliest, new, strict=True)) / len(new)
        assert same == 1 if dtype == torch.float32 else same > 0.9


@pytest.mark.parametrize("knobs", [{"window_pattern": "SL"}, {"sink_tokens": 2}], ids=str)
def test_windows_beside_whole_layers_or_sinks_past_the_contexts_end(model, knobs):
    model.config = replace(model.config, window=12, **knobs)
    new = generate_lists(model, PROMPTS, 4 * BLOCK, temperature=0)
    for i, prompt in enumerate(PROMPTS):
        assert drawn_without_a_cache(model, prompt, new[i], 0, temperature=0) == new[i]


def test_one_transfer_from_the_device_a_step(model, monkeypatch):
    calls = []
    for name in ("tolist", "item", "cpu", "__bool__", "__int__", "__float__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *a, real=real, name=name: calls.append(name) or real(*a)
        )
    steps = generate(model, PROMPTS, 60, top_k=10, top_p=0.9, min_p=0.1)
    next(steps)
    calls.clear()
    for _ in islice(steps, 50):
        assert calls == ["tolist"]
        calls.clear()


@pytest.mark.parametrize(
    ("prompts", "options"),
    [
        ([], {}),
        ([[1], []], {}),
        ([[1]], {"temperature": -1}),
        ([[1]], {"top_k": -1}),
        ([[1]], {"top_p": 0}),
        ([[1]], {"min_p": 2}),
    ],
)
def test_generate_refuses(prompts, options):
    with pytest.raises(ValueError):
        next(generate(small_model(), prompts, 5, **options))


# speculative decoding


class Oracle:
    """Guesses what it was told to, right or wrong."""

    ahead = 5

    def __init__(self, prompt: list[int], new: list[int], wrong: int):
        self.n, self.new, self.wrong = len(prompt), new, wrong

    def guess(self, text, k, numbers, draw):
        at = len(text) - self.n
        return [(token + (i % self.wrong == 2)) % VOCAB for i, token in enumerate(self.new[at : at + k], at)]


GREEDY, DRAWN = {"temperature": 0}, {"temperature": 0.9, "top_k": 40, "min_p": 0.01}
DRAFTS = {"lookup": GREEDY, "itself": DRAWN, "another": DRAWN, "mistaken": GREEDY}


@pytest.mark.parametrize("draft,options", DRAFTS.items(), ids=DRAFTS)
@pytest.mark.parametrize("window", [{}, {"window": 24, "window_pattern": "SL"}, {"window": 20}], ids=str)
def test_a_draft_changes_no_token(model, draft, options, window):
    """Past the context's end, where the cache begins anew, and in windows, where it slides."""
    model.config = replace(model.config, **window)
    prompt, stats = [1, 2, 3, 1, 2, 3, 1], Stats()
    alone = generate_lists(model, [prompt], 90, seed=5, **options)
    drafts = {
        "lookup": sample.Lookup,
        "itself": lambda: sample.DraftModel(model),
        "another": lambda: sample.DraftModel(sharp_model(n_layer=1, attention="mqa")),
        "mistaken": lambda: Oracle(prompt[:BLOCK], alone[0], 4),
    }
    drafted = generate_lists(model, [prompt], 90, seed=5, draft=drafts[draft](), stats=stats, **options)
    assert drafted == alone
    assert stats.decode_tokens == 89 and 0 <= stats.right <= stats.guessed
    if draft == "mistaken" and not window:
        assert 0 < stats.right < stats.guessed


def test_sampled_tokens_are_distributed_as_without_a_draft():
    """The first two of three tokens, in many samples, of which a draft guesses the second, often wrongly."""
    model, prompt, n = small_model(attention="mla"), [3, 1, 4], 250
    with torch.no_grad():
        first = model(torch.tensor([prompt]))[0][0, -1]
    counts, stats = torch.zeros(2, VOCAB), Stats()
    noisy = sample.inference_model(model.config, {k: w.clone() for k, w in model.state_dict().items()})
    with torch.no_grad():
        for p in noisy.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)), alpha=0.2 * p.std())
    draft = sample.DraftModel(noisy)
    for seed in range(n):
        a, b, _ = generate_lists(model, [prompt], 3, seed=seed, top_k=3, draft=draft, stats=stats)[0]
        counts[0, a] += 1
        counts[1, b] += 1
    p = torch.zeros(2, VOCAB)
    top = first.topk(3)
    p[0, top.indices] = top.values.softmax(-1)
    for token in top.indices.tolist():
        with torch.no_grad():
            then = model(torch.tensor([[*prompt, token]]))[0][0, -1].topk(3)
        p[1, then.indices] += p[0, token] * then.values.softmax(-1)
    assert 0.05 < stats.right / stats.guessed < 0.95, stats
    assert ((counts > 0) <= (p > 0)).all()
    chi2 = ((counts - n * p) ** 2 / (n * p))[p > 0].sum()
    assert chi2 < 2 * int((p > 0).sum())  # mean: at most that number; 99.9 % quantile of 10 is 29.6


def test_a_model_guesses_its_own_tokens(model):
    for options in ({"temperature": 0}, {"temperature": 0.9, "top_k": 40}):
        stats = Stats()
        for prompt in PROMPTS[:2]:
            generate_lists(model, [prompt], 10, draft=sample.DraftModel(model), stats=stats, **options)
        assert stats.right == stats.guessed == 2 * 8, options


def test_a_draft_saves_passes(model, monkeypatch):
    passes, hidden = [], GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda *args: passes.append(args[1].shape) or hidden(*args))
    prompt = [1, 2, 3]
    alone = generate_lists(model, [prompt], 41, temperature=0)
    passes.clear()
    generate_lists(model, [prompt], 41, temperature=0, draft=Oracle(prompt, alone[0], 10**9))
    # the second guess is wrong; the last pass has no more room than it needs
    assert [shape[1] for shape in passes] == [3] + [6] * 7 + [3]
    with pytest.raises(ValueError, match="one prompt"):
        generate_lists(model, [prompt] * 2, 5, draft=sample.Lookup())


# sampling


def reference(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    """The distribution that the four options define, one token at a time."""
    weights = torch.tensor(logits, dtype=torch.float64).div(temperature).softmax(0).tolist()
    ranked = sorted(range(len(weights)), key=lambda i: -weights[i])[: top_k or None]
    total, kept, mass = sum(weights[i] for i in ranked), [], 0.0
    for i in ranked:
        if mass < top_p and weights[i] >= min_p * weights[ranked[0]]:
            kept.append(i)
        mass += weights[i] / total
    return [weights[i] / sum(weights[j] for j in kept) if i in kept else 0.0 for i in range(len(weights))]


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0),
        dict(temperature=0.5, top_k=0, top_p=1.0, min_p=0.0),
        dict(temperature=2.0, top_k=5, top_p=1.0, min_p=0.0),
        dict(temperature=1.0, top_k=0, top_p=0.8, min_p=0.0),
        dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.2),
        dict(temperature=1.3, top_k=9, top_p=0.9, min_p=0.05),
        dict(temperature=1.0, top_k=1, top_p=1.0, min_p=0.0),
        dict(temperature=1.0, top_k=99, top_p=1e-6, min_p=1.0),
    ],
)
def test_distribution(options):
    n = 100_000
    logits = torch.randn(12, generator=torch.Generator().manual_seed(5)) * 1.5
    uniform = (torch.arange(n) + 0.5) / n
    drawn = sample.sample(logits.expand(n, -1), uniform, **options)
    frequency = torch.bincount(drawn, minlength=12) / n
    expected = torch.tensor(reference(logits.tolist(), **options))
    assert ((frequency > 0) == (expected > 0)).all()
    assert (frequency - expected).abs().max() < 1e-4


def test_the_numbers_drawn_are_uniform_over_rows_and_steps():
    blocks = torch.stack(list(islice(sample.uniforms(0, 64, "cpu"), 600)))  # (steps, rows)
    for values in (blocks.flatten(), blocks[0], blocks[256]):
        ranked = values.double().sort().values
        gap = (ranked - torch.linspace(0, 1, len(values), dtype=torch.float64)).abs().max()
        assert gap < 1.63 / len(values) ** 0.5  # Kolmogorov-Smirnov at 1 %
    assert blocks.unique().numel() > 0.99 * blocks.numel()


def test_extreme_temperatures_and_logits():
    logits = torch.tensor([[0.0, 80.0, -torch.inf, 79.0]])
    for uniform in (0.0, 1 - 2**-24):
        u = torch.tensor([uniform])
        assert sample.sample(logits, u, temperature=1e-40).item() == 1
        assert sample.sample(logits, u, temperature=1e30).item() != 2
        assert sample.sample(logits, u, temperature=0).item() == 1
        assert 0 <= sample.sample(logits * torch.nan, u, temperature=1.0).item() < 4


def test_padding_of_the_vocabulary_is_never_drawn(model):
    with torch.no_grad():
        model.embed_tokens.weight[50:] *= 10
    for temperature in (0, 1.0):
        free, bounded = (
            generate_lists(model, [[1]] * 8, 40, temperature=temperature, n_vocab=n) for n in (None, 50)
        )
        assert max(map(max, free)) >= 50 > max(map(max, bounded))


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
    checkpoint.write_config(path, Config(**shape))
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
    per_token = 4 * load_run(run_dir, "cpu")[0].config.kv_elements_per_token_layer()
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
    parts, err = run_main(
        capsys, run_dir, lines, "--split_lines", "--num_samples=2", "--batch_size=3", *common
    )
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
        assert sample.encode_prompt(tokenizer, "") == [ends[name]]
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


def test_decode_probe(model):
    model.train()
    probe = sample.decode_probe(model, 20, n=4)
    assert probe["decode/tokens_per_s"] > 0 and probe["decode/context"] == 20
    assert probe["kv_cache/allocated_bytes"] == 24 * model.config.kv_bytes_per_token(torch.float32)
    half = sample.decode_probe(model, 20, n=4, dtype=torch.bfloat16)
    assert half["kv_cache/allocated_bytes"] * 2 == probe["kv_cache/allocated_bytes"]
    assert model.training and model.embed_tokens.weight.dtype == torch.float32


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
        checkpoint.write_config(Path("misfit"), Config(vocab_size=9, n_embd=18, n_head=3))
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
    command = [
        sys.executable,
        str(ROOT / "sample.py"),
        str(run_dir),
        "--device=cpu",
        "--max_new_tokens=100000",
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}  # which lacks most of what is printed
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(30) == 141
    process.stderr.close()
