"""Our logits against Hugging Face's, on small random models: nothing is downloaded."""

import pytest
import torch
import transformers
from equivalence import assert_close, cached_logits, force_form, small_config, small_model, tokens

from nanokv.config import UserError
from tools.hugging_face import from_hf_state_dict, hf_config, hf_state_dict

LLAMA, QWEN3, DEEPSEEK = "LlamaForCausalLM", "Qwen3ForCausalLM", "DeepseekV3ForCausalLM"
LLAMA3 = {"rope_scaling": "llama3", "rope_theta": 5e5, "rope_factor": 8.0, "rope_trained_length": 64}
YARN = {"rope_scaling": "yarn", "rope_theta": 1e6, "rope_factor": 4.0, "block_size": 32}
CASES = {
    "mha": (LLAMA, {"attention": "mha", "qk_norm": False, "norm_eps": 1e-2}),
    "gqa": (LLAMA, {"attention": "gqa", "n_kv_head": 2, "qk_norm": False, "rope_theta": 500.0}),
    "gqa-free-head": (LLAMA, {"attention": "gqa", "n_kv_head": 2, "qk_norm": False, "head_dim": 12}),
    "mqa": (LLAMA, {"attention": "mqa", "qk_norm": False}),
    "qk-norm-mha": (QWEN3, {"attention": "mha", "norm_eps": 1e-2}),
    "qk-norm-gqa": (QWEN3, {"attention": "gqa", "n_kv_head": 2, "rope_theta": 500.0}),
    "qk-norm-mqa-free-head": (QWEN3, {"attention": "mqa", "head_dim": 6, "n_embd": 30}),
    "qkv-bias": ("Qwen2ForCausalLM", {"attention": "gqa", "n_kv_head": 2, "qk_norm": False, "qkv_bias": True}),
    "linear": (LLAMA, {"attention": "mha", "qk_norm": False, "rope_scaling": "linear", "rope_factor": 4.0}),
    "llama3": (LLAMA, {"attention": "gqa", "n_kv_head": 2, "qk_norm": False, **LLAMA3}),
    "yarn": (QWEN3, {"attention": "mha", **YARN}),
    "yarn-attention-factor": (QWEN3, {"attention": "mqa", "rope_attention_factor": 0.9, "rope_high": 9.0, **YARN}),
    "mla-llama3": (DEEPSEEK, {"attention": "mla", **LLAMA3}),
    "mla-yarn": (DEEPSEEK, {"attention": "mla", **YARN}),
    "mla-score-factor": (DEEPSEEK, {"attention": "mla", "score_factor": 1.8, "rope_attention_factor": 0.9, **YARN}),
    "mla": (DEEPSEEK, {"attention": "mla"}),
    "mla-q-lora": (DEEPSEEK, {"attention": "mla", "q_lora_rank": 10, "rope_theta": 500.0}),
    "mla-free-widths": (
        DEEPSEEK,
        {"attention": "mla", "n_embd": 30, "kv_lora_rank": 9, "qk_nope_head_dim": 5}
        | {"qk_rope_head_dim": 8, "v_head_dim": 7},
    ),
}
every_class = pytest.mark.parametrize("cls,knobs", CASES.values(), ids=CASES.keys())
both_heads = pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])


def hugging_face(model):
    """The Hugging Face model that `hf_config` names, with our weights."""
    fields = hf_config(model.config)
    cls = getattr(transformers, fields["architectures"][0])
    theirs = cls(cls.config_class(**fields, attn_implementation="eager")).eval()
    faults = theirs.load_state_dict(hf_state_dict(model, model.config), strict=False)
    assert faults.unexpected_keys == []
    assert faults.missing_keys == (["lm_head.weight"] if model.config.tie_embeddings else [])
    return theirs


@every_class
@both_heads
def test_logits_equal_hugging_face(cls, knobs, tie):
    model, idx = small_model(tie_embeddings=tie, **knobs), tokens(2, 40)
    theirs = hugging_face(model)
    assert type(theirs).__name__ == cls
    with torch.no_grad():
        expected = theirs(idx).logits
        assert expected.std() > 0.5
        assert_close(model(idx)[0], expected, 1e-4)
        assert_close(cached_logits(model, idx, [25, 1, 1, 6, 1, 6]), expected, 1e-4)
        if cls == DEEPSEEK:
            for absorbed in (True, False):
                force_form(model, absorbed)
                assert_close(cached_logits(model, idx, [5, 1, 1, 32, 1]), expected, 1e-4)


@every_class
@both_heads
def test_there_and_back_is_the_identity(cls, knobs, tie):
    model = small_model(tie_embeddings=tie, **knobs)
    ours, theirs = model.state_dict(), hugging_face(model).state_dict()
    for state in (hf_state_dict(model, model.config), hf_state_dict(ours, model.config), theirs):
        back = from_hf_state_dict(state, model.config)
        assert back.keys() == ours.keys()
        assert all(torch.equal(back[name], ours[name]) for name in ours)


@pytest.mark.parametrize(
    "knobs,named",
    [
        ({"rotary_dim": 4}, "rotary_dim"),
        ({"window": 8}, "window"),
        ({"qk_norm": False, "n_embd": 30, "head_dim": 8}, "n_embd"),
        ({"attention": "mla", "qk_rope_head_dim": 0}, "qk_rope_head_dim"),
        ({"attention": "mla", "qk_rope_head_dim": 4, "qk_rope_repeat": 2}, "qk_rope_repeat"),
        ({"attention": "mla", "norm_eps": 1e-5}, "norm_eps"),
        ({"kv_conv": 2}, "mha with kv_conv = 2 .*train a model with kv_conv = 0"),
        ({"attention": "mla", "kv_conv": 1}, "kv_conv = 1"),
        ({"attention": "mla", "qk_norm": True}, "mla with qk_norm = True .*train a model with qk_norm = False"),
        ({"attention": "mla", "qk_norm": "shared"}, "qk_norm = shared"),
        ({"qkv_bias": True}, "qkv_bias = True .*train a model with qkv_bias = False"),
        ({"score_factor": 2.0}, "score_factor = 2.0 .*train a model with score_factor = 1.0"),
        ({"attention": "mla", "score_factor": 2.0}, "score_factor = 2.0 only with yarn"),
    ],
    ids=str,
)
def test_what_has_no_exact_class_is_refused(knobs, named):
    with pytest.raises(UserError, match=named):
        hf_config(small_config(**knobs))
