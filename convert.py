"""To and from Hugging Face: the config and the weights of the class that computes the same function.

| ours                            | theirs                                         |
|---------------------------------|------------------------------------------------|
| mha, gqa, mqa without QK-norm   | `LlamaForCausalLM`                             |
| mha, gqa, mqa with QK-norm      | `Qwen3ForCausalLM`                             |
| mla                             | `DeepseekV3ForCausalLM`, every layer dense     |
"""

from __future__ import annotations

from torch import Tensor, nn

from config import UserError
from model import ATTENTIONS, GPTConfig, GroupedQueryAttention, MultiHeadLatentAttention


def hf_config(config: GPTConfig) -> dict:
    """The contents of config.json for the Hugging Face class that computes what `config` does.

    Raises UserError, naming the knob, if there is no such class.
    """
    if config.window:
        raise UserError("a window is not exported; train with window = 0 for Hugging Face")
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    attention = attention_class(config)
    if attention is GroupedQueryAttention:
        if config.rotary_dim != config.head_dim:
            raise UserError(
                f"partial RoPE has no exact Hugging Face class; train with rotary_dim = {config.head_dim}"
            )
        heads = {"num_key_value_heads": config.n_kv_head, "head_dim": config.head_dim}
        if config.qk_norm:
            return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **common, **heads}
        if config.n_embd % config.n_head:
            raise UserError(f"Llama wants n_embd = {config.n_embd} divisible by n_head = {config.n_head}")
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **common, **heads}
    if config.qk_rope_head_dim == 0:
        raise UserError("DeepSeek-V3 has no form without RoPE; qk_rope_head_dim must be above 0")
    widths = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    experts = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group")
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **common,
        **{name: getattr(config, name) for name in widths},
        "num_key_value_heads": config.n_head,
        "rope_interleave": True,
        "first_k_dense_replace": config.n_layer,  # no layer left for experts, so their numbers mean nothing
        **dict.fromkeys(experts, 1),
        "moe_intermediate_size": config.intermediate_size,
        "num_nextn_predict_layers": 0,
    }


def hf_state_dict(model: nn.Module | dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Our model, or its state dict, under Hugging Face's names; a tied lm_head is left out."""
    state = model.state_dict() if isinstance(model, nn.Module) else model
    hf_config(config)  # is there such a class?
    return {
        name if name == "lm_head.weight" else f"model.{name}": order_rope_rows(
            name, weight, config, to_hf=True
        )
        for name, weight in state.items()
    }


def from_hf_state_dict(state: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """The inverse of `hf_state_dict`; a tied lm_head, if there is one, is dropped."""
    return {
        name.removeprefix("model."): order_rope_rows(name, weight, config, to_hf=False)
        for name, weight in state.items()
        if not (name == "lm_head.weight" and config.tie_embeddings)
    }


def order_rope_rows(name: str, weight: Tensor, config: GPTConfig, to_hf: bool) -> Tensor:
    """Reorder the rows that RoPE turns, the last dr of each head, if this is a weight that has them.

    Ours turns row j with row j + dr/2; DeepSeek's servers turn row 2j with row 2j + 1.
    """
    if attention_class(config) is not MultiHeadLatentAttention:
        return weight
    if name.endswith(("q_proj.weight", "q_b_proj.weight")):
        heads = config.n_head
    elif name.endswith("kv_a_proj_with_mqa.weight"):
        heads = 1
    else:
        return weight
    dr = config.qk_rope_head_dim
    rows = weight.unflatten(0, (heads, -1)).clone()  # (heads, dn + dr or r + dr, width in)
    pairs = rows[:, -dr:].unflatten(1, (2, dr // 2) if to_hf else (dr // 2, 2))
    rows[:, -dr:] = pairs.transpose(1, 2).flatten(1, 2).clone()
    return rows.flatten(0, 1)


def attention_class(config: GPTConfig) -> type[nn.Module]:
    """The attention class of a config; UserError if it is not one that Hugging Face has."""
    attention = ATTENTIONS[config.attention]
    if attention not in (GroupedQueryAttention, MultiHeadLatentAttention):
        raise UserError(f"no Hugging Face class is known for attention {config.attention!r}")
    return attention
