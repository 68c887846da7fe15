"""The cache against a pass without one, in every format, window and batch; and the bytes that it takes."""

import math

import pytest
import torch
from equivalence import (
    BASE,
    CASES,
    VOCAB,
    assert_close,
    cached_logits,
    check_chunks,
    check_footprint,
    check_ragged,
    every_case,
    force_form,
    small_config,
    small_model,
    tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from model import ATTENTIONS, CausalConv, GPTConfig
from nanokv.cache import CACHE_FORMATS, KVCache, LayerLayout, Part, kv_bytes
from nanokv.metrics import kv_elements_per_token_layer, kv_ratio_to_mha
from nanokv.quantization import dequantize, quantize

MLA = {name: knobs for name, knobs in CASES.items() if knobs["attention"] == "mla"}
mla_cases = pytest.mark.parametrize("knobs", MLA.values(), ids=MLA.keys())
CHUNKS = {"token-by-token": [1] * 20, "uneven": [3, 1, 7, 2, 1, 6], "prefill-then-decode": [17, 1, 1, 1]}
# Tolerance on logits whose standard deviation is 1, where the cache rounds keys and values.
ROUNDED = {torch.bfloat16: 0.15, torch.float16: 0.02, torch.int8: 0.3, torch.float8_e4m3fn: 1.0, torch.int4: 2.5}
QUANTIZED = [torch.int8, torch.float8_e4m3fn, torch.int4]
every_attention = pytest.mark.parametrize("knobs", BASE.values(), ids=BASE.keys())
WINDOWS = [
    {"window": 1},
    {"window": 4},
    {"window": 5, "sink_tokens": 2},
    {"window": 3, "window_pattern": "SL"},
    {"window": 50, "sink_tokens": 1},
]
every_window = pytest.mark.parametrize("window", WINDOWS, ids=str)


# The cache: full forward = token by token = chunks = absorbed = ragged batches


@every_case
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
def test_cached_equals_full(knobs, chunks):
    check_chunks(small_model(**knobs), chunks)


@every_case
def test_logits_under_test_are_not_small(knobs):
    assert 0.5 < small_model(**knobs)(tokens(2, 20))[0].std() < 2


@mla_cases
@pytest.mark.parametrize("absorbed", [True, False], ids=["absorbed", "expanded"])
def test_both_forms_of_mla_equal_full(knobs, absorbed):
    model = small_model(**knobs)
    force_form(model, absorbed)
    for chunks in CHUNKS.values():
        check_chunks(model, chunks)
    check_ragged(model, [5, 2, 7], [1, 4, 1])


@every_case
@pytest.mark.parametrize("lengths", [[1, 9, 4], [6, 6], [3, 0, 8], [0, 0]], ids=str)
def test_ragged_batch_equals_each_prompt_alone(knobs, lengths):
    check_ragged(small_model(**knobs), lengths, [1, 1, 4, 1, 3])


@every_case
@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_a_cache_in_any_format_stays_near_full_precision(knobs, dtype):
    model = small_model(**knobs)
    check_chunks(model, CHUNKS["uneven"], dtype, ROUNDED[dtype])
    check_ragged(model, [1, 9, 4], [1, 4, 1], dtype, ROUNDED[dtype])


@every_attention
@pytest.mark.parametrize("dtype", QUANTIZED, ids=str)
def test_forms_and_rows_agree_in_what_a_quantized_cache_holds(knobs, dtype):
    """Codes are the same however they are read: what is left is a rare number at the edge of two codes."""
    model, idx = small_model(**knobs), tokens(3, 24)
    logits = [cached_logits(model, idx, chunks, model.new_cache(3, 24, dtype)) for chunks in ([8, 16], [8] * 3)]
    if knobs["attention"] == "mla":
        for absorbed in (True, False):
            force_form(model, absorbed)
            logits.append(cached_logits(model, idx, [8, *[1] * 16], model.new_cache(3, 24, dtype)))
    rows = [cached_logits(model, row[None], [8, 16], model.new_cache(1, 24, dtype)) for row in idx]
    for other in (*logits[1:], torch.cat(rows)):
        assert (other - logits[0]).abs().mean() < 1e-4


class Reference:
    """A layer's cache as a list: what each format makes of a token, by its definition, one after another."""

    def __init__(self, layer, layout, dtype):
        self.layer, self.layout, self.dtype, self.kept = layer, layout, dtype, {}

    first = property(lambda self: self.layer.first)
    positions = property(lambda self: self.layer.positions)

    def append(self, **new):
        for name, value in new.items():
            coded = value.size(-1) - self.layout.parts[name].exact
            rounded = value.to(self.dtype).float() if self.dtype not in QUANTIZED else self.round(value, coded)
            self.kept[name] = torch.cat((self.kept.get(name, rounded[..., :0, :]), rounded), -2)
        return list(new.values()) if self.first else list(new)

    def previous(self, name, new):
        kept, last = self.kept.get(name, new[..., :0, :]), self.layout.parts[name].last
        rounded = new.to(torch.bfloat16 if self.dtype in QUANTIZED else self.dtype).float()
        self.kept[name] = torch.cat((kept, rounded), -2)
        return torch.nn.functional.pad(kept, (0, 0, last, 0))[..., -last:, :]

    def round(self, x, coded):
        """The first numbers as codes, the others in bf16."""
        width = 32 if self.dtype == torch.int4 else 128
        groups = [self.codes(group) for group in x[..., :coded].split(width, -1) if coded]
        return torch.cat((*groups, x[..., coded:].bfloat16().float()), -1)

    def codes(self, x):
        """A group by a bf16 scale: its largest to the largest code, or for int4 its range to 15 codes."""
        if self.dtype == torch.int4:
            low, high = x.amin(-1, True), x.amax(-1, True)
            scale = torch.stack(((high - low) / 15, low.abs() / 127, high.abs() / 127)).amax(0)
            scale = scale.clamp(min=1e-30).bfloat16().float()
            offset = (low / scale).round()
            return ((x / scale).round().clamp(offset, offset + 15)) * scale
        largest = 127.0 if self.dtype == torch.int8 else 448.0
        scale = (x.abs().amax(-1, True) / largest).clamp(min=1e-30).bfloat16().float()
        codes = (x / scale).clamp(-largest, largest)
        return (codes.round() if self.dtype == torch.int8 else codes.to(self.dtype).float()) * scale

    def read(self, name, like):
        return self.kept[name]


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, *ROUNDED], ids=str)
def test_a_cache_in_any_format_is_what_the_format_makes_of_each_token(knobs, dtype):
    model, idx, chunks = small_model(**knobs), tokens(2, 20), [9, 1, 1, 5, *[1] * 4]
    logits = cached_logits(model, idx, chunks, model.new_cache(2, 20, dtype))
    cache = model.new_cache(2, 20, dtype)
    pairs = zip(cache.layers, cache.layouts, strict=True)
    cache.layers = [Reference(layer, layout, dtype) for layer, layout in pairs]
    assert_close(logits, cached_logits(model, idx, chunks, cache))


@every_attention
@every_window
def test_a_ring_equals_the_mask(knobs, window):
    model = small_model(**knobs, **window)
    for chunks in (*CHUNKS.values(), [2, 18], [5, 5, 5, 5]):
        check_chunks(model, chunks)
    for lengths in ([1, 9, 4], [6, 6], [3, 0, 8]):
        check_ragged(model, lengths, [1, 1, 4, 1, 3])
        check_ragged(model, lengths, [2, 7, 1])
    for dtype in (torch.float32, torch.int8):
        check_footprint(model, dtype)


@every_attention
@pytest.mark.parametrize("sinks", [0, 3])
def test_a_ring_equals_the_mask_at_every_length_around_its_edge(knobs, sinks):
    model = small_model(**knobs, window=5, sink_tokens=sinks)
    full = model(tokens(1, 24))[0]
    cache = model.new_cache(1, 24)
    for n in range(1, 24):
        cache.rewind([0])
        assert_close(cached_logits(model, tokens(1, 24)[:, : n + 1], [n, 1], cache), full[:, : n + 1])


@every_attention
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("cached", [False, True], ids=["mask", "ring"])
def test_a_layer_sees_its_window_and_the_sinks_alone(knobs, sinks, cached):
    model, idx, window, T = small_model(**knobs, n_layer=1, window=4, sink_tokens=sinks), tokens(1, 12), 4, 12
    run = lambda idx: cached_logits(model, idx, [1] * T) if cached else model(idx)[0]  # noqa: E731
    before = run(idx)
    for j in range(T):
        changed = idx.clone()
        changed[0, j] = (idx[0, j] + 1) % VOCAB
        seen = (run(changed) - before)[0].abs().amax(-1) > 1e-5
        assert seen.tolist() == [j <= t and (j > t - window or j < sinks) for t in range(T)]


@every_attention
def test_rewind_in_a_window(knobs):
    model, idx = small_model(**knobs, window=4, sink_tokens=1), tokens(2, 30)
    full, cache = model(idx)[0], model.new_cache(2, 30, spare=3)
    for n in (2, 6, 20):  # as in speculative decoding: go on by 4, keep 1
        cache.rewind([0, 0])
        cached_logits(model, idx[:, :n], [n], cache)
        for t in range(n, 27):
            guess = torch.cat((idx[:, t : t + 1], tokens(2, 3, seed=t)), 1)
            assert_close(cached_logits(model, guess, [4], cache)[:, 0], full[:, t])
            cache.rewind([t + 1, t + 1])
    cache.rewind([27, 26])
    assert_close(model(torch.stack((idx[0, 27:29], idx[1, 26:28])), cache=cache)[0][1], full[1, 26:28])
    with pytest.raises(ValueError, match="what a next token sees is overwritten") as fault:
        cache.rewind([10, 26])
    assert "\n" not in str(fault.value) and cache.host_lengths() == [29, 28]
    cache.rewind([0, 1])  # nothing, and a sink: always there
    assert_close(model(torch.stack((idx[0, :1], idx[1, 1:2])), cache=cache)[0][0], full[0, :1])


def test_a_window_slides_past_the_length_of_its_cache():
    model, idx = small_model(window=4), tokens(2, 40)
    cache = model.new_cache(2, 6)
    assert cache.endless and cache.nbytes == 2 * kv_bytes(model.config.kv_layouts(), 10**6, torch.float32)
    assert_close(cached_logits(model, idx, [7, 1, 1, 20, *[1] * 11], cache), model(idx)[0])
    for knobs in ({"window": 7}, {"window": 4, "window_pattern": "SL"}, {}):
        model = small_model(**knobs)
        with pytest.raises(ValueError, match="too short"):
            cached_logits(model, idx, [7, 33], model.new_cache(2, 6))


def test_quantized_codes_and_scales():
    x = torch.randn(3, 5, 300) * torch.logspace(-3, 3, 5)[:, None]
    x[0, 0] = 0
    for dtype, step in ((torch.int8, 1 / 127), (torch.float8_e4m3fn, 1 / 14)):
        parts = quantize(x, dtype)
        assert parts[""].shape == x.shape and parts[""].dtype == dtype and parts["_scale"].shape == (3, 5, 3)
        back = dequantize(parts, 300, torch.float32)
        largest = torch.cat([part.abs().amax(-1, True).expand_as(part) for part in x.split(128, -1)], -1)
        assert ((back - x).abs() <= largest * step * 0.51).all()
        if dtype == torch.int8:  # the spacing of codes is the scale
            assert ((back - x).abs().amax(-1) > 0.2 * step * largest.amax(-1) * (largest.amax(-1) > 0)).sum() > 9
        assert_close(dequantize(quantize(back, dtype), 300, torch.float32), back, largest.max().item() * step)


@pytest.mark.parametrize("width", [1, 2, 31, 32, 33, 95, 300])
@pytest.mark.parametrize("shift", [0.0, 3.0, -100.0])
def test_int4_is_two_codes_a_byte_a_scale_and_an_offset(width, shift):
    x = torch.randn(3, 5, width) * torch.logspace(-3, 3, 5)[:, None] * (1 + 0.1 * abs(shift)) + shift
    x[0, 0] = 0
    parts, groups = quantize(x, torch.int4), -(-width // 32)
    assert parts[""].shape == (3, 5, (width + 1) // 2) and parts[""].dtype == torch.uint8
    assert parts["_scale"].shape == parts["_offset"].shape == (3, 5, groups)
    back = dequantize(parts, width, torch.float32)
    for part, mine in zip(x.split(32, -1), back.split(32, -1), strict=True):
        step = torch.maximum((part.amax(-1) - part.amin(-1)) / 15, part.abs().amax(-1) / 127)
        assert ((mine - part).abs() <= 0.6 * step[..., None] + 1e-30).all()
    assert torch.equal(back[0, 0], x[0, 0])


@every_case
def test_what_a_convolution_remembers_has_a_constant_size(knobs):
    for dtype in CACHE_FORMATS.values():
        layout, spare = small_config(**knobs).kv_layouts()[0], 3
        sizes = [layout.bytes_per_token(dtype) * n + layout.fixed_bytes(dtype, spare) for n in (8, 9, 1000)]
        caches = [KVCache([layout], 1, n, dtype, "meta", spare) for n in (8, 9, 1000)]
        assert [cache.nbytes for cache in caches] == sizes
        assert (layout.fixed_bytes(dtype) > 0) == bool(knobs.get("kv_conv"))


@pytest.mark.parametrize("knobs", [k for k in CASES.values() if k.get("kv_conv")], ids=str)
def test_rewind_reaches_as_far_as_spare(knobs):
    model, idx = small_model(**knobs), tokens(2, 30)
    full, cache = model(idx)[0], model.new_cache(2, 30, spare=3)
    cached_logits(model, idx[:, :6], [6], cache)
    for t in range(6, 27):  # as in speculative decoding: go on by 4, keep 1
        guess = torch.cat((idx[:, t : t + 1], tokens(2, 3, seed=t)), 1)
        assert_close(cached_logits(model, guess, [4], cache)[:, 0], full[:, t])
        cache.rewind([t + 1, t + 1])
    with pytest.raises(ValueError, match="make the cache with more spare"):
        cache.rewind([26, 22])
    cache.rewind([0, 27])  # an empty row needs nothing
    logits = model(torch.stack((idx[0, :1], idx[1, 27:28])), cache=cache)[0][:, 0]
    assert_close(logits, torch.stack((full[0, 0], full[1, 27])))


@every_case
def test_a_convolution_mixes_in_previous_vectors_alone(knobs):
    """Of one layer's inputs: a change at t reaches what is cached at t to t + N, and nothing before."""
    taps, width, t = knobs.get("kv_conv"), 8, 4
    if not taps:
        return
    conv = CausalConv("part", width, taps)
    x = torch.randn(2, 10, width)
    assert torch.equal(conv(x), x)  # weights start at zero
    torch.nn.init.normal_(conv.weight)
    expected = x.clone()
    for i in range(1, taps + 1):
        expected[:, i:] += conv.weight[i - 1] * x[:, :-i]
    assert_close(conv(x), expected)
    changed = x.clone()
    changed[:, t] += 1
    reached = (conv(changed) - conv(x)).abs().amax((0, 2)) > 1e-5
    assert reached.tolist() == [t <= s <= t + taps for s in range(10)]


@every_case
def test_bf16_weights_and_autocast_use_the_cache(knobs):
    idx, model = tokens(2, 20), small_model(**knobs)
    full = model(idx)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(cached_logits(model, idx, [9, 1, 6, 4]), full, 0.2)
    cached = cached_logits(model.bfloat16(), idx, [9, 1, 6, 4])
    assert cached.dtype == torch.bfloat16
    assert_close(cached, full, 0.2)


@torch.no_grad()
def greedy(model, prompt, n, cache, ban):
    """The prompt (1, T) and n tokens more, each the likeliest that is not among the last `ban`: no loops."""
    text = new = prompt
    for _ in range(n):
        logits = model(text if cache is None else new, cache=cache)[0][:, -1]
        logits[:, text[0, text.size(1) - ban :]] = -math.inf
        new = logits.argmax(-1, keepdim=True)
        text = torch.cat((text, new), 1)
    return text


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("ban", [0, 20])
def test_greedy_200_tokens_with_cache_are_those_without(attention, ban):
    model, prompt = small_model(**CASES[attention]), tokens(1, 7)
    text = greedy(model, prompt, 200, None, ban)
    assert greedy(model, prompt, 200, model.new_cache(1, 207), ban).tolist() == text.tolist()
    assert len(text.unique()) > ban


def test_parts_of_a_layer_may_be_kept_of_different_numbers_of_last_tokens(monkeypatch):
    """A convolution of one tap in a layer whose other has three."""
    model = small_model(attention="gqa", n_kv_head=2, kv_conv=3)
    parts = ATTENTIONS["gqa"].cached_parts(model.config)
    parts["v_conv"] = Part(1, parts["v_conv"].width, last=1)
    monkeypatch.setattr(ATTENTIONS["gqa"], "cached_parts", staticmethod(lambda config: parts))
    for layer in model.layers:
        layer.self_attn.v_conv.weight = torch.nn.Parameter(layer.self_attn.v_conv.weight[:1].detach())
    check_chunks(model, CHUNKS["uneven"])


@every_case
def test_rewind_then_continue_equals_fresh(knobs):
    model, idx = small_model(**knobs), tokens(2, 12)
    cache = model.new_cache(2, 14, spare=14)
    cached_logits(model, tokens(2, 14, seed=9), [14], cache)
    cache.rewind([0, 0])
    assert_close(cached_logits(model, idx, [5, 7], cache), model(idx)[0])
    cache.rewind([4, 4])
    assert cache.host_lengths() == [4, 4]
    assert_close(cached_logits(model, idx[:, 4:], [1, 7], cache), model(idx)[0][:, 4:])
    cache.rewind([10, 3])
    last = cached_logits(model, torch.stack((idx[0, 10:12], idx[1, 3:5])), [1, 1], cache)
    full = model(idx)[0]
    assert_close(last, torch.stack((full[0, 10:12], full[1, 3:5])))


def test_cache_refuses_what_does_not_fit():
    model = small_model()
    cache = model.new_cache(2, 8)
    model(tokens(2, 6), cache=cache)
    with pytest.raises(ValueError, match="too short"):
        model(tokens(2, 3), cache=cache)
    assert cache.host_lengths() == [6, 6]
    cache.rewind([6, 1])
    with pytest.raises(ValueError, match="too short"):
        model(tokens(2, 3), cache=cache)
    model(tokens(2, 2), cache=cache)
    for lengths in ([9, 3], [8, 4], [-1, 3], [3], [3, 3, 3]):
        with pytest.raises(ValueError):
            cache.rewind(lengths)
    assert cache.host_lengths() == [8, 3]


def test_counts_of_a_padded_chunk_do_not_outlive_it():
    model, cache = small_model(), small_model().new_cache(2, 8)
    for wrong in (lambda: model(tokens(3, 2), cache=cache), lambda: model(tokens(2, 1), cache=cache)):
        cache.expect([2, 1])
        with pytest.raises(ValueError):
            wrong()
        model(tokens(2, 2), cache=cache)
        assert cache.host_lengths() == [2, 2]
        cache.expect([0, 0])
        cache.rewind([0, 0])


def test_a_forward_pass_that_fails_leaves_the_cache_as_it_was():
    model = small_model()
    cache = model.new_cache(1, 8)
    with pytest.raises(IndexError):
        model(torch.tensor([[VOCAB]]), cache=cache)
    model(tokens(1, 0), cache=cache)
    assert cache.first and cache.lengths.tolist() == cache.host_lengths() == [0]
    with pytest.raises(ValueError, match="at least one row"):
        model.new_cache(0, 8)


def test_rows_are_replaced_by_as_many_of_a_cache_with_the_same_spare():
    model = small_model(window=4)
    cache = model.new_cache(3, 20, spare=2)
    cached_logits(model, tokens(3, 9), [9], cache)
    for rows, other in ([0, 1], model.new_cache(1, 9, spare=2)), ([0], model.new_cache(1, 9, spare=1)):
        with pytest.raises(ValueError, match="cannot replace"):
            cache.replace_rows(rows, other)
    other = model.new_cache(1, 10, spare=2)
    cached_logits(model, tokens(1, 10, seed=5), [10], other)
    cache.replace_rows([1], other)
    assert cache.host_lengths() == cache.lengths.tolist() == [9, 10, 9]
    new = tokens(3, 1, seed=6)
    expected = model(torch.cat((tokens(1, 10, seed=5), new[1:2]), 1))[0][:, -1:]
    assert_close(model(new, cache=cache)[0][1:2], expected)


@every_case
def test_causality(knobs):
    model, idx = small_model(**knobs), tokens(1, 16)
    changed = idx.clone()
    changed[0, 9] = (idx[0, 9] + 1) % VOCAB
    a, b = model(idx)[0][0], model(changed)[0][0]
    assert torch.equal(a[:9], b[:9])  # bit for bit
    assert (a[9:] - b[9:]).abs().amax(-1).min() > 1e-3


# Footprints


@every_case
@pytest.mark.parametrize("dtype", CACHE_FORMATS.values(), ids=CACHE_FORMATS.keys())
def test_formula_declaration_and_allocation_agree(knobs, dtype):
    check_footprint(small_model(**knobs), dtype)


@pytest.mark.parametrize(
    "knobs,elements",
    [
        ({"attention": "mha"}, 2 * 4 * 8),
        ({"attention": "mha", "head_dim": 6}, 2 * 4 * 6),
        ({"attention": "gqa", "n_kv_head": 2}, 2 * 2 * 8),
        ({"attention": "mqa"}, 2 * 8),
        ({"attention": "mla"}, 8 + 4),
        ({"attention": "mla", "kv_lora_rank": 20, "qk_rope_head_dim": 6, "v_head_dim": 3}, 20 + 6),
    ],
    ids=str,
)
def test_elements_per_token(knobs, elements):
    config = small_config(**knobs)
    assert kv_elements_per_token_layer(config) == elements
    assert config.kv_bytes_per_token(torch.float32) == 2 * 4 * elements
    assert kv_ratio_to_mha(config) == elements / 64
    knobs |= {"window": 10, "sink_tokens": 2, "window_pattern": "SL"}  # one layer of two holds 12 of 64 tokens
    assert kv_ratio_to_mha(small_config(**knobs)) == elements / 64 * (12 + 64) / 128


def test_published_footprints():
    mha = GPTConfig(attention="mha", n_layer=80, n_head=64, n_embd=64 * 128)
    deepseek_v3 = GPTConfig(
        attention="mla",
        n_layer=61,
        n_head=128,
        n_embd=7168,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
    for config, published in ((mha, 2_621_440), (deepseek_v3, 70_272)):
        assert config.kv_bytes_per_token(torch.bfloat16) == published
        assert KVCache(config.kv_layouts(), 2, 1000, torch.bfloat16, "meta").nbytes == published * 2000


def test_published_quantized_footprint():
    """FlashMLA's fp8 cache takes 656 bytes: 512 codes, 64 numbers of rope key in bf16, 4 scales in fp32."""
    config = GPTConfig(attention="mla", n_layer=1, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128)
    assert config.kv_bytes_per_token(torch.float8_e4m3fn) == 656 - 4 * 2  # our scales are bf16
    config = GPTConfig(attention="gqa", n_layer=3, n_kv_head=2, head_dim=64)
    assert config.kv_bytes_per_token(torch.int8) == 3 * 2 * 2 * (64 + 2)


def test_a_part_that_is_exact_throughout_is_kept_in_bf16():
    layout = LayerLayout({"rope": Part(2, 8, exact=8), "v": Part(1, 8)})
    assert layout.bytes_per_token(torch.int8) == 2 * 8 * 2 + 8 + 2
    cache = KVCache([layout], 1, 5, torch.int8, "cpu")
    assert cache.nbytes == 5 * layout.bytes_per_token(torch.int8)
    rope, v = torch.randn(1, 2, 5, 8).bfloat16().float(), torch.randn(1, 1, 5, 8)
    for t in range(5):
        cache.advance(1, 1)
        cache.layers[0].append(rope=rope[:, :, t : t + 1], v=v[:, :, t : t + 1])
    assert torch.equal(cache.layers[0].read("rope", like=v), rope)
    assert_close(cache.layers[0].read("v", like=v), v, 0.05)


# Any configuration


@st.composite
def configurations(draw):
    """Knobs of a random model of any attention; one that is not known here is drawn with its own defaults.

    Widths are small but not tiny: the RMS of a few numbers can be so near 0 that fp32 itself misses 1e-5.
    """
    attention, n_head = draw(st.sampled_from(sorted(ATTENTIONS))), draw(st.integers(1, 4))
    knobs = {
        "attention": attention,
        "n_layer": draw(st.integers(1, 2)),
        "n_head": n_head,
        "n_embd": n_head * 4 * draw(st.integers(2, 4)),
        "intermediate_size": draw(st.integers(4, 40)),
        "tie_embeddings": draw(st.booleans()),
        "rope_theta": draw(st.sampled_from([100.0, 10000.0, 500000.0])),
    }
    if attention in ("mha", "mqa", "gqa"):
        head_dim = draw(st.integers(2, 18))
        knobs |= {"head_dim": head_dim, "rotary_dim": 2 * draw(st.integers(0, head_dim // 2))}
        knobs |= {"qk_norm": draw(st.booleans()), "n_embd": draw(st.integers(16, 48))}
    knobs["kv_conv"] = draw(st.none() | st.integers(0, 3))
    if draw(st.booleans()):
        knobs |= {"window": draw(st.integers(1, 12)), "sink_tokens": draw(st.integers(0, 4))}
        knobs["window_pattern"] = draw(st.text("SL", min_size=1, max_size=3))
    if attention == "gqa":
        knobs["n_kv_head"] = draw(st.sampled_from([g for g in range(1, n_head + 1) if n_head % g == 0]))
    if attention == "mla":
        knobs |= {
            "n_embd": draw(st.integers(16, 48)),
            "kv_lora_rank": draw(st.integers(6, 24)),
            "q_lora_rank": draw(st.none() | st.integers(6, 24)),
            "qk_nope_head_dim": draw(st.integers(1, 12)),
            "qk_rope_head_dim": 2 * draw(st.integers(0, 6)),
            "v_head_dim": draw(st.integers(1, 24)),
            "qk_norm": draw(st.sampled_from([None, False, True, "shared"])),
        }
    return knobs


DTYPES = [(torch.float64, torch.float64)] + [(torch.float32, dtype) for dtype in (torch.float32, *ROUNDED)]
chunkings = st.lists(st.integers(1, 8), min_size=1, max_size=5)


@settings(max_examples=80)
@given(
    knobs=configurations(),
    chunks=chunkings,
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    rest=chunkings,
    dtypes=st.sampled_from(DTYPES),
    absorbed=st.none() | st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_configuration(knobs, chunks, lengths, rest, dtypes, absorbed, seed):
    dtype, cache_dtype = dtypes
    model = small_model(dtype=dtype, seed=seed, **knobs)
    if knobs["attention"] == "mla" and absorbed is not None:
        force_form(model, absorbed)
    tolerance = ROUNDED.get(cache_dtype, 1e-5)
    check_chunks(model, chunks, cache_dtype, tolerance)
    check_ragged(model, lengths, rest, cache_dtype, tolerance)
    check_footprint(model, cache_dtype)
