"""The model against itself: every path computes the same function, and caches what it says it caches."""

import math

import pytest
import torch
from equivalence import (
    CASES,
    VOCAB,
    cached_logits,
    check_chunks,
    check_footprint,
    check_ragged,
    close,
    force_form,
    small_config,
    small_model,
    tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cache import CACHE_FORMATS, KVCache, dequantise, quantise
from kernels import LinearCrossEntropy, attend_in_shares
from model import (
    ATTENTIONS,
    GPT,
    GPTConfig,
    attend,
    rope_angles,
    rotate,
)

every_case = pytest.mark.parametrize("knobs", CASES.values(), ids=CASES.keys())
MLA = {name: knobs for name, knobs in CASES.items() if knobs["attention"] == "mla"}
mla_cases = pytest.mark.parametrize("knobs", MLA.values(), ids=MLA.keys())
CHUNKS = {"token-by-token": [1] * 20, "uneven": [3, 1, 7, 2, 1, 6], "prefill-then-decode": [17, 1, 1, 1]}
# Tolerance on logits whose standard deviation is 1, where the cache rounds keys and values.
ROUNDED = {torch.bfloat16: 0.15, torch.float16: 0.02, torch.int8: 0.3, torch.float8_e4m3fn: 1.0}
BASE = {attention: CASES[attention] for attention in ATTENTIONS}
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
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_forms_and_rows_agree_in_what_a_quantised_cache_holds(knobs, dtype):
    """Codes are the same however they are read: what is left is a rare number at the edge of two codes."""
    model, idx = small_model(**knobs), tokens(3, 24)
    logits = [
        cached_logits(model, idx, chunks, model.new_cache(3, 24, dtype)) for chunks in ([8, 16], [8] * 3)
    ]
    if knobs["attention"] == "mla":
        for absorbed in (True, False):
            force_form(model, absorbed)
            logits.append(cached_logits(model, idx, [8, *[1] * 16], model.new_cache(3, 24, dtype)))
    rows = [cached_logits(model, row[None], [8, 16], model.new_cache(1, 24, dtype)) for row in idx]
    for other in (*logits[1:], torch.cat(rows)):
        assert (other - logits[0]).abs().mean() < 1e-4


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
        close(cached_logits(model, tokens(1, 24)[:, : n + 1], [n, 1], cache), full[:, : n + 1])


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
            close(cached_logits(model, guess, [4], cache)[:, 0], full[:, t])
            cache.rewind([t + 1, t + 1])
    cache.rewind([27, 26])
    close(model(torch.stack((idx[0, 27:29], idx[1, 26:28])), cache=cache)[0][1], full[1, 26:28])
    with pytest.raises(ValueError, match="window of 4 moved on") as fault:
        cache.rewind([10, 26])
    assert "\n" not in str(fault.value) and cache.lengths == [29, 28]
    cache.rewind([0, 1])  # nothing, and a sink: always there
    close(model(torch.stack((idx[0, :1], idx[1, 1:2])), cache=cache)[0][0], full[0, :1])


def test_a_window_slides_past_the_length_of_its_cache():
    model, idx = small_model(window=4), tokens(2, 40)
    cache = model.new_cache(2, 6)
    assert cache.endless and cache.nbytes == 2 * model.config.kv_bytes(10**6, torch.float32)
    close(cached_logits(model, idx, [7, 1, 1, 20, *[1] * 11], cache), model(idx)[0])
    for knobs in ({"window": 7}, {"window": 4, "window_pattern": "SL"}, {}):
        model = small_model(**knobs)
        with pytest.raises(ValueError, match="too short"):
            cached_logits(model, idx, [7, 33], model.new_cache(2, 6))


def test_quantised_codes_and_scales():
    x = torch.randn(3, 5, 300) * torch.logspace(-3, 3, 5)[:, None]
    x[0, 0] = 0
    for dtype, step in ((torch.int8, 1 / 127), (torch.float8_e4m3fn, 1 / 14)):
        codes, scale = quantise(x, dtype)
        assert codes.shape == x.shape and codes.dtype == dtype and scale.shape == (3, 5, 3)
        back = dequantise(codes, scale, torch.float32)
        largest = torch.cat([part.abs().amax(-1, True).expand_as(part) for part in x.split(128, -1)], -1)
        assert ((back - x).abs() <= largest * step * 0.51).all()
        if dtype == torch.int8:  # the spacing of codes is the scale
            assert (
                (back - x).abs().amax(-1) > 0.2 * step * largest.amax(-1) * (largest.amax(-1) > 0)
            ).sum() > 9
        again, scale_again = quantise(back, dtype)
        close(dequantise(again, scale_again, torch.float32), back, largest.max().item() * step)


@every_case
def test_bf16_weights_and_autocast_use_the_cache(knobs):
    idx, model = tokens(2, 20), small_model(**knobs)
    full = model(idx)[0]
    with torch.autocast("cpu", torch.bfloat16):
        close(cached_logits(model, idx, [9, 1, 6, 4]), full, 0.2)
    cached = cached_logits(model.bfloat16(), idx, [9, 1, 6, 4])
    assert cached.dtype == torch.bfloat16
    close(cached, full, 0.2)


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


@every_case
def test_rewind_then_continue_equals_fresh(knobs):
    model, idx = small_model(**knobs), tokens(2, 12)
    cache = model.new_cache(2, 14)
    cached_logits(model, tokens(2, 14, seed=9), [14], cache)
    cache.rewind([0, 0])
    close(cached_logits(model, idx, [5, 7], cache), model(idx)[0])
    cache.rewind([4, 4])
    assert cache.lengths == [4, 4]
    close(cached_logits(model, idx[:, 4:], [1, 7], cache), model(idx)[0][:, 4:])
    cache.rewind([10, 3])
    last = cached_logits(model, torch.stack((idx[0, 10:12], idx[1, 3:5])), [1, 1], cache)
    full = model(idx)[0]
    close(last, torch.stack((full[0, 10:12], full[1, 3:5])))


def test_cache_refuses_what_does_not_fit():
    model = small_model()
    cache = model.new_cache(2, 8)
    model(tokens(2, 6), cache=cache)
    with pytest.raises(ValueError, match="too short"):
        model(tokens(2, 3), cache=cache)
    assert cache.lengths == [6, 6]
    cache.rewind([6, 1])
    with pytest.raises(ValueError, match="too short"):
        model(tokens(2, 3), cache=cache)
    model(tokens(2, 2), cache=cache)
    for lengths in ([9, 3], [8, 4], [-1, 3], [3], [3, 3, 3]):
        with pytest.raises(ValueError):
            cache.rewind(lengths)
    assert cache.lengths == [8, 3]


@every_case
def test_causality(knobs):
    model, idx = small_model(**knobs), tokens(1, 16)
    changed = idx.clone()
    changed[0, 9] = (idx[0, 9] + 1) % VOCAB
    a, b = model(idx)[0][0], model(changed)[0][0]
    close(a[:9], b[:9], 1e-6)
    assert (a[9:] - b[9:]).abs().amax(-1).min() > 1e-3


# The parts: attention, RoPE, latents


def naive_attention(q, k, v, start, scale):
    """Query t of q (H, T, D) sees keys 0..start + t of k (H, S, D); all by loops."""
    out = q.new_zeros(*q.shape[:2], v.size(-1))
    for h in range(q.size(0)):
        for t in range(q.size(1)):
            n = start + t + 1
            p = (k[h, :n] @ q[h, t] * scale).softmax(0)
            out[h, t] = p @ v[h, :n]
    return out


@pytest.mark.parametrize("n", [1, 4], ids=["one-query", "chunk"])
@pytest.mark.parametrize("v_width", [3, 8, 11])
def test_attend_over_a_cache_is_not_causal_from_the_top_left(n, v_width):
    H, G, D, start = 4, 2, 8, 5
    q, k, v = torch.randn(1, H, n, D), torch.randn(1, G, start + n, D), torch.randn(1, G, start + n, v_width)
    cache = KVCache(small_config(), 1, 16, torch.float32, None)
    cache.advance(start)
    cache.advance(n)
    y = attend(q, k, v, cache.layers[0], D**-0.5)
    wide_k, wide_v = k[0].repeat_interleave(H // G, 0), v[0].repeat_interleave(H // G, 0)
    close(y[0], naive_attention(q[0], wide_k, wide_v, start, D**-0.5), 1e-6)


def test_absorbed_scale_is_that_of_the_expanded_keys():
    widths = {"kv_lora_rank": 40, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 5}
    model, idx = small_model(attention="mla", n_layer=1, **widths), tokens(2, 12)
    force_form(model, absorbed=True)
    absorbed, full = cached_logits(model, idx, [1] * 12), model(idx)[0]
    close(absorbed, full)
    with torch.no_grad():  # what the default scale of these wider keys would do
        model.layers[0].self_attn.q_proj.weight *= (6 / (40 + 2)) ** 0.5
    assert (absorbed - model(idx)[0]).abs().max() > 0.05


def test_mla_caches_the_normalised_latent_and_the_rotated_key():
    model, idx = small_model(attention="mla", n_layer=1), tokens(1, 6)
    a, config = model.layers[0].self_attn, model.config
    cache = model.new_cache(1, 6)
    cached_logits(model, idx, [4, 2], cache)
    with torch.no_grad():
        x = model.layers[0].input_layernorm(model.embed_tokens(idx))
        c, k_rope = a.kv_a_proj_with_mqa(x).split((config.kv_lora_rank, config.qk_rope_head_dim), -1)
        c = c / (c.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * a.kv_a_layernorm.weight
        k_rope = complex_rotation(k_rope[0], config.rope_theta)
    assert list(cache.layers[0].buffers) == ["latent"]
    close(cache.layers[0].buffers["latent"][0], torch.cat((c[0], k_rope), -1))


def complex_rotation(x, theta):
    """RoPE of x (T, D) at positions 0.. as multiplication by unit complex numbers, pairs (j, j + D/2)."""
    T, D = x.shape
    angle = torch.arange(T)[:, None] * theta ** (-torch.arange(0, D, 2) / D)
    turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.parametrize("width", [2, 6, 8])
@pytest.mark.parametrize("theta", [100.0, 10000.0])
def test_rope_turns_the_leading_dimensions_only(width, theta):
    x = torch.randn(1, 1, 50, 8)
    y = rotate(x, rope_angles(torch.arange(50)[None], width, theta))[0, 0]
    close(y[:, :width], complex_rotation(x[0, 0, :, :width], theta))
    assert torch.equal(y[:, width:], x[0, 0, :, width:])


@pytest.mark.parametrize(
    "knobs,ordered",
    [({}, True), ({"rotary_dim": 2}, True), ({"rotary_dim": 0}, False)]
    + [({"attention": "mla"}, True), ({"attention": "mla", "qk_rope_head_dim": 0}, False)],
    ids=str,
)
def test_order_is_seen_through_rope_alone(knobs, ordered):
    model, idx = small_model(n_layer=1, **knobs), tokens(1, 10)
    swapped = idx[:, [3, 1, 2, 0, *range(4, 10)]]
    difference = (model(idx)[0] - model(swapped)[0])[0, -1].abs().max()
    assert (difference > 1e-3) == ordered


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
    assert config.kv_elements_per_token_layer() == elements
    assert config.kv_bytes_per_token(torch.float32) == 2 * 4 * elements
    assert config.kv_ratio_to_mha() == elements / 64
    knobs |= {
        "window": 10,
        "sink_tokens": 2,
        "window_pattern": "SL",
    }  # one layer of two holds 12 of 64 tokens
    assert small_config(**knobs).kv_ratio_to_mha() == elements / 64 * (12 + 64) / 128


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
        assert KVCache(config, 2, 1000, torch.bfloat16, "meta").nbytes == published * 2000


def test_published_quantised_footprint():
    """FlashMLA's fp8 cache takes 656 bytes: 512 codes, 64 numbers of rope key in bf16, 4 scales in fp32."""
    config = GPTConfig(
        attention="mla", n_layer=1, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128
    )
    assert config.kv_bytes_per_token(torch.float8_e4m3fn) == 656 - 4 * 2  # our scales are bf16
    config = GPTConfig(attention="gqa", n_layer=3, n_kv_head=2, head_dim=64)
    assert config.kv_bytes_per_token(torch.int8) == 3 * 2 * 2 * (64 + 2)


# Training


@every_case
@pytest.mark.parametrize("window", [{}, {"window": 5}], ids=["full", "window"])
def test_training_runs_in_fused_attention(knobs, window):
    model, idx = small_model(**knobs, **window).train(), tokens(2, 16)
    for half in (False, True):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(idx, idx)[1]  # raises if no fused kernel can do it
            loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("width", [128, 768])
def test_loss_starts_at_that_of_a_uniform_guess(attention, tie, width):
    torch.manual_seed(0)
    knobs = {**CASES[attention], "tie_embeddings": tie, "n_embd": width}
    model, x = GPT(small_config(**knobs, vocab_size=512)), torch.randint(512, (4, 64))
    loss = model(x, torch.randint(512, (4, 64)))[1].item()
    assert abs(loss - math.log(512)) < 0.3


@every_case
def test_every_weight_learns_from_the_initial_state(knobs):
    torch.manual_seed(0)
    model, idx = GPT(small_config(**knobs)), tokens(2, 16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(4):
        optimizer.zero_grad()
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


def test_ignored_targets_do_not_count():
    model, x, y = small_model(), tokens(2, 10), tokens(2, 10, seed=1)
    y[0, 3:] = -1
    logits, loss = model(x, y)
    counted = [(0, 0), (0, 1), (0, 2), *((1, t) for t in range(10))]
    by_hand = -torch.stack([logits[b, t].log_softmax(0)[y[b, t]] for b, t in counted]).mean()
    close(loss, by_hand, 1e-6)
    assert model(x)[1] is None


def test_hidden_and_head_are_the_two_halves_of_forward():
    model, idx = small_model(tie_embeddings=False), tokens(2, 10)
    assert torch.equal(model.head(model.hidden(idx)), model(idx)[0])


def test_dropout_is_for_training_only():
    for attention in ("mha", "mla"):
        torch.manual_seed(0)
        model, idx = small_model(attention=attention, dropout=0.3), tokens(2, 10)
        assert torch.equal(model(idx)[0], model(idx)[0])
        model.train()
        assert not torch.equal(model(idx)[0], model(idx)[0])


# Accounting


@pytest.mark.parametrize(
    "knobs,attention",
    [  # n_embd 32, 4 heads of 8
        ({"attention": "mha"}, 4 * 32 * 32 + 2 * 8),
        ({"attention": "mha", "qk_norm": False}, 4 * 32 * 32),
        ({"attention": "gqa", "n_kv_head": 2, "head_dim": 6}, 2 * 32 * 24 + 2 * 32 * 12 + 2 * 6),
        ({"attention": "mqa"}, 2 * 32 * 32 + 2 * 32 * 8 + 2 * 8),
        ({"attention": "mla"}, 32 * 32 + 32 * (8 + 4) + 8 + 8 * 4 * (4 + 8) + 32 * 32),
        ({"attention": "mla", "q_lora_rank": 5}, 32 * 5 + 5 + 5 * 32 + 32 * 12 + 8 + 8 * 4 * 12 + 32 * 32),
    ],
    ids=str,
)
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_parameter_count(knobs, attention, tie):
    model = GPT(small_config(**knobs, intermediate_size=50, tie_embeddings=tie))
    blocks = 2 * (attention + 3 * 32 * 50 + 2 * 32) + 32
    assert model.n_params(embedding=False) == blocks
    assert model.n_params() == blocks + (1 if tie else 2) * VOCAB * 32


EQUAL_WIDTHS = {name: knobs for name, knobs in CASES.items() if "v_head_dim" not in knobs}


@pytest.mark.parametrize("knobs", EQUAL_WIDTHS.values(), ids=EQUAL_WIDTHS.keys())
def test_flops_per_token_are_those_of_the_operators(knobs):
    model, idx = small_model(**knobs), tokens(2, 16)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(idx, idx)[1].backward()
    assert model.flops_per_token(16) * idx.numel() == counter.get_total_flops()


def test_flops_do_not_count_padding_of_values():
    model = small_model(attention="mla", qk_nope_head_dim=10, qk_rope_head_dim=4, v_head_dim=6)
    assert model.flops_per_token(100) - model.flops_per_token(0) == 6 * 2 * 4 * (10 + 4 + 6) * 100


@pytest.mark.parametrize(
    "knobs,names",
    [
        ({"attention": "mta"}, ["attention", "mta", "mha", "mla"]),
        ({"attention": "gqa", "n_kv_head": 3}, ["n_head", "n_kv_head", "3"]),
        ({"attention": "gqa", "n_kv_head": 0}, ["n_kv_head"]),
        ({"attention": "gqa"}, ["n_kv_head"]),
        ({"attention": "mqa", "n_kv_head": 2}, ["mqa", "n_kv_head", "2"]),
        ({"attention": "mha", "n_kv_head": 2}, ["mha", "n_kv_head", "2"]),
        ({"n_embd": 30}, ["n_embd", "n_head"]),
        ({"attention": "mla", "n_embd": 30}, ["n_embd", "n_head"]),
        ({"rotary_dim": 3}, ["rotary_dim", "even", "3"]),
        ({"rotary_dim": 10}, ["rotary_dim", "10", "head_dim"]),
        ({"head_dim": 0}, ["head_dim"]),
        ({"attention": "mla", "qk_rope_head_dim": 3}, ["qk_rope_head_dim", "even", "3"]),
        ({"attention": "mla", "kv_lora_rank": 0}, ["kv_lora_rank"]),
        ({"attention": "mla", "q_lora_rank": 0}, ["q_lora_rank"]),
        ({"attention": "mla", "v_head_dim": 0}, ["v_head_dim"]),
        ({"attention": "mha", "kv_lora_rank": 8}, ["kv_lora_rank", "mla", "mha"]),
        ({"attention": "mla", "qk_norm": True}, ["qk_norm", "mla"]),
        ({"n_layer": 0}, ["n_layer"]),
        ({"n_head": 0}, ["n_head"]),
        ({"block_size": 0}, ["block_size"]),
        ({"dropout": 1.0}, ["dropout"]),
        ({"rope_theta": 0.0}, ["rope_theta"]),
        ({"vocab_size": -1}, ["vocab_size"]),
        ({"window": -1}, ["window"]),
        ({"window_pattern": "SSG"}, ["window_pattern", "SSG", "SSSL"]),
        ({"window_pattern": ""}, ["window_pattern"]),
        ({"sink_tokens": 2}, ["sink_tokens", "window"]),
    ],
    ids=str,
)
def test_faults_between_fields_are_named_in_one_line(knobs, names):
    with pytest.raises(ValueError) as fault:
        small_config(**knobs)
    assert "\n" not in str(fault.value)
    assert [name for name in names if name not in str(fault.value)] == []


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


# Decoding on CPUs


@pytest.mark.parametrize("keys", [1, 2, 7, 64, 131])
@pytest.mark.parametrize("shares", [1, 2, 5])
def test_attention_in_shares_of_the_keys_is_attention(keys, shares):
    random = torch.Generator().manual_seed(keys)
    q, k, v = (torch.randn(2, 3, n, 16, generator=random).double() * 3 for n in (4, keys + 5, keys + 5))
    k, v = k.narrow(2, 0, keys), v.narrow(2, 0, keys)  # as of a cache with room for more
    expected = (0.3 * q @ k.mT).softmax(-1) @ v
    close(attend_in_shares(q, k, v, 0.3, min(shares, keys)), expected, 1e-12)


@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_long_caches_are_read_by_several_cores(attention, monkeypatch):
    model, idx = small_model(**CASES[attention]), tokens(1, 2060)
    calls, real = [], attend_in_shares
    monkeypatch.setattr("model.attend_in_shares", lambda *args: calls.append(args[-1]) or real(*args))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    chunks = [2044] + [1] * 16
    close(cached_logits(model, idx, chunks), model(idx)[0])
    share = 9 // {"mha": 4, "gqa": 2}.get(attention, 1)
    assert calls == [share] * 2 * sum(n >= 2048 for n in range(2045, 2061))


@every_case
@pytest.mark.parametrize("cores", [1, 2])
def test_weights_joined_for_decoding_are_the_same_weights(knobs, cores, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    model, idx = small_model(**knobs), tokens(1, 9)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with torch.no_grad():
        full = model(idx)[0]
        close(cached_logits(model, idx, [4, 1, 1, 1, 1, 1]), full)
    gate, up = model.layers[0].mlp.gate_proj.weight, model.layers[0].mlp.up_proj.weight
    assert gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    model.load_state_dict({name: p * 1.01 for name, p in before.items()})
    with torch.no_grad():
        close(cached_logits(model, idx, [4, 1, 1, 1, 1, 1]), model(idx)[0])
    model.train()(idx, idx)[1].backward()  # the weights can still learn
    assert gate.grad.isfinite().all()


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_in_slices_is_the_loss(tied, monkeypatch):
    model = small_model(**CASES["mha"], tie_embeddings=tied).train()
    x, y = tokens(3, 20), tokens(3, 20, seed=1)
    y[0, :7] = y[2, 19] = -1
    logits, loss = model(x, y)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr(LinearCrossEntropy, "LOGITS", 7 * VOCAB)  # 60 rows, 7 at a time
    nothing, sliced = model(x, y, want_logits=False)
    (3 * sliced).backward()
    assert nothing is None
    close(sliced, loss, 1e-6)
    for name, p in model.named_parameters():
        close(p.grad / 3, expected[name], 1e-6)
    with torch.no_grad():
        close(model(x, y, want_logits=False)[1], loss, 1e-6)
