"""Generation: what is drawn, and from which tokens."""

import copy
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from equivalence import VOCAB, small_model

from model import GPT
from nanokv import tokenizer as tokenizers
from nanokv.generate import DraftModel, PromptLookup, Stats, generate, generate_lists, sample, uniforms

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
    context, drawn, uniform = prompt[-BLOCK:], [], uniforms(seed, 1, "cpu")
    while len(drawn) < len(new):
        steps = min(BLOCK - len(context) + 1, len(new) - len(drawn))  # until the context is full
        context = context + new[len(drawn) : len(drawn) + steps - 1]
        logits = model(torch.tensor([context]))[0][0, -steps:]
        drawn += sample(logits, torch.cat(list(islice(uniform, steps))), **options).tolist()
        context = context[-BLOCK // 2 :] + new[len(drawn) - 1 :][:1]
    return drawn


# generation


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.9, "top_k": 40}], ids=["greedy", "drawn"])
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
    monkeypatch.setattr("nanokv.generate.PREFILL_CHUNK", 7)
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
        assert max(made[0].host_lengths()) <= made[0].max_len == BLOCK
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
        monkeypatch.setattr(torch.Tensor, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
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

    num_draft_tokens = 5

    def __init__(self, prompt: list[int], new: list[int], wrong: int):
        self.n, self.new, self.wrong = len(prompt), new, wrong

    def propose(self, text, k, numbers, draw):
        at = len(text) - self.n
        return [(token + (i % self.wrong == 2)) % VOCAB for i, token in enumerate(self.new[at : at + k], at)]


GREEDY, DRAWN = {"temperature": 0}, {"temperature": 0.9, "top_k": 40, "min_p": 0.01}
SLIDING = {"window": 24, "window_pattern": "SL"}, {"window": 20}
DRAFTS = {"lookup": GREEDY, "itself": DRAWN, "another": DRAWN, "mistaken": GREEDY}


@pytest.mark.parametrize("draft,options", DRAFTS.items(), ids=DRAFTS)
@pytest.mark.parametrize(
    "window", [{}, *(pytest.param(w, marks=pytest.mark.slow) for w in SLIDING)], ids=["whole", "some", "all"]
)
def test_a_draft_changes_no_token(model, draft, options, window):
    """Past the context's end, where the cache begins anew, and in windows, where it slides."""
    model.config = replace(model.config, **window)
    prompt, stats = [1, 2, 3, 1, 2, 3, 1], Stats()
    alone = generate_lists(model, [prompt], 90, seed=5, **options)
    drafts = {
        "lookup": PromptLookup,
        "itself": lambda: DraftModel(model),
        "another": lambda: DraftModel(sharp_model(n_layer=1, attention="mqa")),
        "mistaken": lambda: Oracle(prompt[:BLOCK], alone[0], 4),
    }
    drafted = generate_lists(model, [prompt], 90, seed=5, draft=drafts[draft](), stats=stats, **options)
    assert drafted == alone
    assert stats.decode_tokens == 89 and 0 <= stats.accepted <= stats.drafted
    if draft == "mistaken" and not window:
        assert 0 < stats.accepted < stats.drafted


def test_sampled_tokens_are_distributed_as_without_a_draft():
    """The first two of three tokens, in many samples, of which a draft guesses the second, often wrongly."""
    model, prompt, n = small_model(attention="mla"), [3, 1, 4], 250
    with torch.no_grad():
        first = model(torch.tensor([prompt]))[0][0, -1]
    counts, stats = torch.zeros(2, VOCAB), Stats()
    noisy = copy.deepcopy(model)
    with torch.no_grad():
        for p in noisy.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)), alpha=0.2 * p.std())
    draft = DraftModel(noisy)
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
    assert 0.05 < stats.accepted / stats.drafted < 0.95, stats
    assert ((counts > 0) <= (p > 0)).all()
    chi2 = ((counts - n * p) ** 2 / (n * p))[p > 0].sum()
    assert chi2 < 2 * int((p > 0).sum())  # mean: at most that number; 99.9 % quantile of 10 is 29.6


def test_a_model_guesses_its_own_tokens(model):
    for options in ({"temperature": 0}, {"temperature": 0.9, "top_k": 40}):
        stats = Stats()
        for prompt in PROMPTS[:2]:
            generate_lists(model, [prompt], 10, draft=DraftModel(model), stats=stats, **options)
        assert stats.accepted == stats.drafted == 2 * 8, options


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
        generate_lists(model, [prompt] * 2, 5, draft=PromptLookup())


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
    drawn = sample(logits.expand(n, -1), uniform, **options)
    frequency = torch.bincount(drawn, minlength=12) / n
    expected = torch.tensor(reference(logits.tolist(), **options))
    assert ((frequency > 0) == (expected > 0)).all()
    assert (frequency - expected).abs().max() < 1e-4


def test_the_numbers_drawn_are_uniform_over_rows_and_steps():
    blocks = torch.stack(list(islice(uniforms(0, 64, "cpu"), 600)))  # (steps, rows)
    for values in (blocks.flatten(), blocks[0], blocks[256]):
        ranked = values.double().sort().values
        gap = (ranked - torch.linspace(0, 1, len(values), dtype=torch.float64)).abs().max()
        assert gap < 1.63 / len(values) ** 0.5  # Kolmogorov-Smirnov at 1 %
    assert blocks.unique().numel() > 0.99 * blocks.numel()


def test_extreme_temperatures_and_logits():
    logits = torch.tensor([[0.0, 80.0, -torch.inf, 79.0]])
    for uniform in (0.0, 1 - 2**-24):
        u = torch.tensor([uniform])
        assert sample(logits, u, temperature=1e-40).item() == 1
        assert sample(logits, u, temperature=1e30).item() != 2
        assert sample(logits, u, temperature=0).item() == 1
        assert 0 <= sample(logits * torch.nan, u, temperature=1.0).item() < 4


def test_padding_of_the_vocabulary_is_never_drawn(model):
    with torch.no_grad():
        model.embed_tokens.weight[50:] *= 10
    for temperature in (0, 1.0):
        free, bounded = (generate_lists(model, [[1]] * 8, 40, temperature=temperature, n_vocab=n) for n in (None, 50))
        assert max(map(max, free)) >= 50 > max(map(max, bounded))


@pytest.mark.parametrize("window", [BLOCK, BLOCK - 3])
def test_a_draft_is_taken_back_in_a_window_as_wide_as_the_context(window):
    model, prompt = sharp_model(window=window), [1, 2, 3]
    (alone,) = generate_lists(model, [prompt], 90, temperature=0)
    mistaken = Oracle(prompt, [token + 1 for token in alone], 1)
    assert generate_lists(model, [prompt], 90, temperature=0, draft=mistaken) == [alone]


@pytest.mark.parametrize("attention, dtype", [("gqa", torch.bfloat16), ("mla", torch.int8)], ids=str)
def test_a_draft_changes_nothing_where_a_ring_rounds(attention, dtype):
    """The tokens of a drafted chunk see each other as the cache holds them, not as they were computed."""
    model = sharp_model(attention=attention, window=8, **ATTENTIONS[attention])
    options = dict(temperature=1.0, seed=3, cache_dtype=dtype)
    (expected,) = generate_lists(model, [[1, 2, 3]], 60, **options)
    stats = Stats()
    (drafted,) = generate_lists(model, [[1, 2, 3]], 60, draft=DraftModel(model), stats=stats, **options)
    assert drafted == expected and stats.accepted > 0


@pytest.mark.parametrize("make", [PromptLookup, lambda: DraftModel(sharp_model())])
def test_a_draft_serves_one_text_after_another(make):
    model, used = sharp_model(), make()
    generate_lists(model, [[5, 6, 7, 8] * 2], 20, draft=used, temperature=0)
    counts = []
    for draft in (used, make()):
        stats = Stats()
        generate_lists(model, [[9, 8, 7, 6, 5, 4] * 6], 20, draft=draft, stats=stats, temperature=0)
        counts.append((stats.drafted, stats.accepted))
    assert counts[0] == counts[1]
