"""The model's parts against their definitions, its training, what it counts, and what it refuses."""

import math

import pytest
import torch
from equivalence import (
    CASES,
    VOCAB,
    assert_close,
    cached_logits,
    every_case,
    force_form,
    small_config,
    small_model,
    tokens,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import ATTENTIONS, GPT, Attend, Linear, rope_angles, rotate, window_mask
from nanokv.metrics import flops_per_token, n_params

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
@pytest.mark.parametrize("factor", [False, True], ids=["", "key-factor"])
def test_attend_over_a_cache_is_not_causal_from_the_top_left(n, v_width, factor):
    H, G, D, start = 4, 2, 8, 5
    q, k, v = torch.randn(1, H, n, D), torch.randn(1, G, start + n, D), torch.randn(1, G, start + n, v_width)
    positions = torch.arange(start + n)
    mask = window_mask(positions[None, None, start:, None], positions[None, None, None], 0, 0)
    wide_k, wide_v = k[0].repeat_interleave(H // G, 0), v[0].repeat_interleave(H // G, 0)
    key_factor = torch.rand(1, H, start + n) + 0.5 if factor else None
    y = Attend(D**-0.5)(q, k, v, mask, key_factor=key_factor)
    wide_k = wide_k * key_factor[0, ..., None] if factor else wide_k
    assert_close(y[0], naive_attention(q[0], wide_k, wide_v, start, D**-0.5), 1e-6)


@pytest.mark.parametrize("factor", [False, True], ids=["", "key-factor"])
def test_attend_without_a_mask_is_causal(factor):
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    key_factor = torch.rand(2, 4, 6) + 0.5 if factor else None
    y = Attend(0.3)(q, k, v, key_factor=key_factor)
    for b in range(2):
        wide_k, wide_v = k[b].repeat_interleave(2, 0), v[b].repeat_interleave(2, 0)
        wide_k = wide_k * key_factor[b, ..., None] if factor else wide_k
        assert_close(y[b], naive_attention(q[b], wide_k, wide_v, 0, 0.3), 1e-6)


def test_absorbed_scale_is_that_of_the_expanded_keys():
    widths = {"kv_lora_rank": 40, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 5}
    model, idx = small_model(attention="mla", n_layer=1, **widths), tokens(2, 12)
    force_form(model, absorbed=True)
    absorbed, full = cached_logits(model, idx, [1] * 12), model(idx)[0]
    assert_close(absorbed, full)
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
    assert_close(cache.layers[0].buffers["latent"][0, 0], torch.cat((c[0], k_rope), -1))


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
    y = rotate(x, rope_angles(torch.arange(50)[None], width, small_config(rope_theta=theta)))[0, 0]
    assert_close(y[:, :width], complex_rotation(x[0, 0, :, :width], theta))
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


# Training


EQUAL_WIDTHS = {name: knobs for name, knobs in CASES.items() if "v_head_dim" not in knobs}


@pytest.mark.parametrize("knobs", EQUAL_WIDTHS.values(), ids=EQUAL_WIDTHS.keys())
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
    assert_close(loss, by_hand, 1e-6)
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


class Doubled(Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("change", ["subclass", "bias", "hook", "patch"])
def test_absorption_reads_no_weight_that_is_not_all_of_a_projection(change):
    model, idx = small_model(attention="mla"), tokens(2, 12)
    for layer in model.layers:
        projection = layer.self_attn.kv_b_proj
        if change == "subclass":
            projection.__class__ = type("Doubled", (Linear,), {"forward": lambda self, x: 2 * Linear.forward(self, x)})
        elif change == "bias":
            projection.bias = torch.nn.Parameter(torch.randn(len(projection.weight)))
        elif change == "hook":
            projection.register_forward_hook(lambda module, args, out: out + 1)
        else:
            projection.forward = lambda x, weight=projection.weight: (x @ weight.mT).relu()
    assert_close(cached_logits(model, idx, [5, *[1] * 7]), model(idx)[0])


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
    assert n_params(model, embedding=False) == blocks
    assert n_params(model) == blocks + (1 if tie else 2) * VOCAB * 32


@pytest.mark.parametrize("knobs", EQUAL_WIDTHS.values(), ids=EQUAL_WIDTHS.keys())
def test_flops_per_token_are_those_of_the_operators(knobs):
    model, idx = small_model(**knobs), tokens(2, 16)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(idx, idx)[1].backward()
    assert flops_per_token(model, 16) * idx.numel() == counter.get_total_flops()


def test_flops_do_not_count_padding_of_values():
    model = small_model(attention="mla", qk_nope_head_dim=10, qk_rope_head_dim=4, v_head_dim=6)
    assert flops_per_token(model, 100) - flops_per_token(model, 0) == 6 * 2 * 4 * (10 + 4 + 6) * 100


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
        ({"attention": "mla", "qk_rope_head_dim": 0, "qk_norm": "shared"}, ["not 0 if qk_norm = shared"]),
        ({"attention": "mla", "kv_lora_rank": 0}, ["kv_lora_rank"]),
        ({"attention": "mla", "q_lora_rank": 0}, ["q_lora_rank"]),
        ({"attention": "mla", "v_head_dim": 0}, ["v_head_dim"]),
        ({"attention": "mha", "kv_lora_rank": 8}, ["kv_lora_rank", "mla", "mha"]),
        ({"attention": "mha", "qk_norm": "shared"}, ["qk_norm", "mla"]),
        ({"kv_conv": -1}, ["kv_conv"]),
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
