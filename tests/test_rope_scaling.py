"""RoPE scaling: faults between its knobs, and its frequencies, against transformers' at published hyperparameters."""

import pytest
import torch
import transformers
from equivalence import assert_close, cached_logits, small_config, small_model, tokens
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model import rope_angles, rope_frequencies
from tools.hugging_face import gpt_config, hf_config

# of config.json: the width that RoPE turns, the longest context, rope_parameters
PUBLISHED = {
    "llama-3.1-8b": (128, 131072, {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}),
    "llama-3.2-1b": (64, 131072, {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0}),
    "longchat-13b": (128, 16384, {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}),
    "qwen2.5-7b": (128, 32768, {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}),
    "deepseek-v3": (64, 163840, {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40, "mscale": 1.0}),
    "yarn-short": (16, 8, {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
}
TRAINED = {"llama-3.1-8b": 8192, "llama-3.2-1b": 8192, "qwen2.5-7b": 32768, "deepseek-v3": 4096, "yarn-short": 5}


@pytest.mark.parametrize("name", PUBLISHED)
def test_frequencies_are_those_of_transformers(name):
    width, longest, rope = PUBLISHED[name]
    if name in TRAINED:
        rope = rope | {"original_max_position_embeddings": TRAINED[name]}
    if rope["rope_type"] == "llama3":
        rope = rope | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if "mscale" in rope:
        rope = rope | {"mscale_all_dim": 0.5, "beta_fast": 32, "beta_slow": 1}
    fields = {"hidden_size": 4 * width, "num_attention_heads": 4, "num_hidden_layers": 1, "head_dim": width}
    fields |= {"vocab_size": 61, "intermediate_size": 64, "max_position_embeddings": longest, "rms_norm_eps": 1e-6}
    theirs = transformers.LlamaConfig(**fields, rope_parameters=dict(rope))
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs)
    ours = gpt_config({"model_type": "llama", **fields, "rope_parameters": rope})
    torch.testing.assert_close(rope_frequencies(ours, width), expected, rtol=1e-6, atol=0)
    cos, sin = rope_angles(torch.tensor([[0]]), width, ours)
    assert cos[0, 0, 0].tolist() == pytest.approx([factor] * (width // 2)) and not sin.any()
    again = transformers.LlamaConfig(**(written := hf_config(ours)))
    if rope["rope_type"] == "yarn":  # transformers 4 divides the two for the factor
        assert written["max_position_embeddings"] == max(rope["factor"] * TRAINED[name], longest)
    torch.testing.assert_close(ROPE_INIT_FUNCTIONS[rope["rope_type"]](again)[0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "knobs,names",
    [
        ({"rope_scaling": "ntk"}, ["rope_scaling", "'ntk'", "linear, llama3, yarn"]),
        ({"rope_scaling": "dynamic"}, ["rope_scaling", "'dynamic'", "changes what is cached"]),
        ({"rope_factor": 2.0}, ["rope_factor", "rope_scaling"]),
        ({"rope_low": 1.0, "rope_high": 4.0}, ["rope_high, rope_low", "rope_scaling"]),
        ({"rope_trained_length": 64}, ["rope_trained_length", "rope_scaling"]),
        ({"rope_attention_factor": 1.1}, ["rope_attention_factor", "rope_scaling"]),
        ({"rope_scaling": "linear", "rope_trained_length": 64}, ["rope_trained_length", "linear"]),
        ({"rope_scaling": "llama3", "rope_attention_factor": 1.1}, ["rope_attention_factor", "llama3"]),
        ({"rope_scaling": "llama3", "rope_low": 4.0}, ["rope_low", "rope_high"]),
        ({"rope_scaling": "llama3", "rope_low": 5.0, "rope_high": 3.0}, ["rope_low", "rope_high"]),
        ({"rope_scaling": "yarn", "rope_low": 0.0}, ["rope_low"]),
        ({"rope_scaling": "yarn", "rope_high": 0.5}, ["rope_high"]),
        ({"rope_scaling": "yarn", "rope_trained_length": 0}, ["rope_trained_length"]),
        ({"rope_scaling": "yarn", "rope_theta": 1.0}, ["rope_theta"]),
        ({"rope_scaling": "linear", "rope_factor": 0.5}, ["rope_factor"]),
        ({"score_factor": 0.0}, ["score_factor"]),
    ],
    ids=str,
)
def test_faults_between_knobs_are_named_in_one_line(knobs, names):
    with pytest.raises(ValueError) as fault:
        small_config(**knobs)
    assert "\n" not in str(fault.value)
    assert [name for name in names if name not in str(fault.value)] == []


def test_none_stands_for_the_published_defaults():
    config = small_config(rope_scaling="yarn", rope_factor=4.0)
    assert (config.rope_trained_length, config.rope_low, config.rope_high) == (64, 1.0, 32.0)
    assert config.rope_attention_factor == pytest.approx(1.13863, abs=1e-5)
    config = small_config(rope_scaling="llama3", rope_factor=4.0, rope_trained_length=32)
    assert (config.rope_trained_length, config.rope_low, config.rope_high) == (32, 1.0, 4.0)
    assert config.rope_attention_factor == 1.0


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_a_factor_of_one_changes_nothing(kind):
    idx = tokens(1, 64)
    plain, scaled = small_model(), small_model(rope_scaling=kind)
    assert_close(scaled(idx)[0], plain(idx)[0], 1e-5)


def test_fast_pairs_stay_and_slow_pairs_slow_down():
    plain = rope_frequencies(small_config(rope_theta=1e6), 32)
    for kind in ("llama3", "yarn"):
        scaled = rope_frequencies(small_config(rope_theta=1e6, rope_scaling=kind, rope_factor=8.0), 32)
        slowed = (plain / scaled).tolist()
        assert slowed[0] == pytest.approx(1.0) and slowed[-1] == pytest.approx(8.0)
        assert slowed == sorted(slowed)


@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_score_factor_multiplies_the_scores(attention):
    scaled, plain = (small_model(attention=attention, qk_norm=False, score_factor=s) for s in (1.7, 1.0))
    with torch.no_grad():
        for layer in plain.layers:
            layer.self_attn.q_proj.weight *= 1.7
    idx = tokens(2, 20)
    assert_close(scaled(idx)[0], plain(idx)[0])
    assert_close(cached_logits(scaled, idx, [5, 1, 10, 4]), plain(idx)[0])
