"""Our models as Hugging Face's: config, names of the weights, tokenizer; in both directions.

| ours                            | theirs                                         |
|---------------------------------|------------------------------------------------|
| mha, gqa, mqa without QK-norm   | `LlamaForCausalLM`                             |
| mha, gqa, mqa with QK-norm      | `Qwen3ForCausalLM`                             |
| mla                             | `DeepseekV3ForCausalLM`, every layer dense     |
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from model import ATTENTIONS, GPTConfig, GroupedQueryAttention, MultiHeadLatentAttention
from nanokv import checkpoint
from nanokv import tokenizer as tokenizers
from nanokv.config import UserError, from_dict
from nanokv.tokenizer_json import from_json
from tools.change_attention import group_name

# ours: theirs, in config.json
KEYS = {name: name for name in ("vocab_size", "intermediate_size", "rope_theta")}
KEYS |= {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
KEYS |= {"block_size": "max_position_embeddings", "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings"}
MLA_WIDTHS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
TOLERANCE = 1e-4  # largest difference of logits from Hugging Face's, in fp32, relative above 1
FAMILIES = {"llama": "mha", "qwen3": "mha", "deepseek_v3": "mla", "youtu": "mla"}
# what a config.json may not ask for but in this way
ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
ONLY |= {"partial_rotary_factor": 1.0, "quantization_config": None}


@torch.no_grad()
def check(folder: Path, model: Any, tok: tokenizers.Tokenizer | None) -> str:
    """Compare model and tokenizer with what transformers loads from `folder`; says what came of it.

    Raises UserError if logits differ by more than TOLERANCE in fp32, or token ids at all.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, logging
    except ImportError:
        return "NOT checked: transformers is not installed"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    n_vocab = model.config.vocab_size if tok is None else tok.n_vocab
    size = 1, min(model.config.block_size, 256)
    idx = torch.randint(n_vocab, size, generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    ours, expected = model(idx)[0], theirs(idx).logits
    difference = (ours - expected).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
        raise UserError(f"the logits of transformers from {folder} differ by {difference:.1e}; do not use it")
    verdict = f"logits as in transformers to {difference:.1e}"
    if tok is None:
        return verdict
    specials = getattr(tok, "specials", {}).values()
    text = tok.decode([i for i in idx[0].tolist() if i not in specials])
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    if ids != tok.encode_ordinary(text):
        raise UserError(f"transformers' tokenizer from {folder} gives other ids; do not use it")
    return f"{verdict}, token ids equal"


def hf_config(config: GPTConfig) -> dict:
    """The contents of config.json for the Hugging Face class that computes what `config` does.

    Raises UserError, naming the knob, if there is no such class.
    """
    mla = attention_class(config) is MultiHeadLatentAttention
    faults = {"a window is not exported; train with window = 0 for Hugging Face": config.window}
    if mla:
        repeat, eps = config.qk_rope_repeat, config.norm_eps
        faults["DeepSeek-V3 needs RoPE; qk_rope_head_dim must be above 0"] = config.qk_rope_head_dim == 0
        faults[f"DeepSeek-V3 has qk_rope_repeat = 1, not {repeat}"] = repeat != 1
        faults[f"DeepSeek-V3's latent norms have norm_eps = 1e-6, not {eps}"] = eps != 1e-6
    else:
        C, H, D = config.n_embd, config.n_head, config.head_dim
        faults[f"partial RoPE has no exact Hugging Face class; train with rotary_dim = {D}"] = config.rotary_dim != D
        faults[f"Llama wants n_embd = {C} divisible by n_head = {H}"] = not config.qk_norm and C % H
    for fault, found in faults.items():
        if found:
            raise UserError(fault)
    content = {theirs: getattr(config, ours) for ours, theirs in KEYS.items()}
    # rope_theta stands in both places: readers from before transformers 5 look for it outside
    content |= {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
    content |= {"hidden_act": "silu", "attention_bias": False, "bos_token_id": None, "eos_token_id": None}
    if not mla:
        name, kind = ("Qwen3", "qwen3") if config.qk_norm else ("Llama", "llama")
        content |= {"num_key_value_heads": config.n_kv_head, "head_dim": config.head_dim}
        return {"architectures": [f"{name}ForCausalLM"], "model_type": kind} | content
    content |= {width: getattr(config, width) for width in MLA_WIDTHS}
    content |= {"num_key_value_heads": config.n_head, "rope_interleave": True, "num_nextn_predict_layers": 0}
    content |= {"first_k_dense_replace": config.n_layer}  # no layer left for experts, whose numbers mean nothing
    experts = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group")
    content |= dict.fromkeys(experts, 1) | {"moe_intermediate_size": config.intermediate_size}
    return {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"} | content


def hf_state_dict(model: nn.Module | dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Our model, or its state dict, under Hugging Face's names; a tied lm_head is left out."""
    state = model.state_dict() if isinstance(model, nn.Module) else model
    hf_config(config)  # is there such a class?
    weights = {name: order_rope_rows(name, weight, config, to_hf=True) for name, weight in state.items()}
    return {name if name == "lm_head.weight" else f"model.{name}": w for name, w in weights.items()}


def from_hf_state_dict(state: dict[str, Tensor], config: GPTConfig, interleaved: bool = True) -> dict:
    """The inverse of `hf_state_dict`; a tied lm_head, if there is one, is dropped.

    interleaved: whether MLA's rows are in pairs (`rope_interleave`), as `hf_state_dict` writes them.
    """
    return {
        name.removeprefix("model."): order_rope_rows(name, w, config, to_hf=False) if interleaved else w
        for name, w in state.items()
        if not (name == "lm_head.weight" and config.tie_embeddings)
    }


def order_rope_rows(name: str, weight: Tensor, config: Any, to_hf: bool) -> Tensor:
    """Reorder the rows that RoPE turns, the last dr of each head, if this is a weight that has them.

    Ours turns row j with row j + dr/2; DeepSeek's servers turn row 2j with row 2j + 1.
    """
    heads_of = {"q_proj": config.n_head, "q_b_proj": config.n_head, "kv_a_proj_with_mqa": 1}
    heads = heads_of.get(name.split(".")[-2])
    if heads is None or attention_class(config) is not MultiHeadLatentAttention:
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


def find_model(source: str) -> Path:
    """The folder of a model, fetched if `source` is the id of one on the hub. Raises UserError."""
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise UserError(f"no folder {source!r}, nor is that the id of a model on the Hugging Face hub")
    try:  # asked first, since a download tries for half a minute
        import huggingface_hub

        huggingface_hub.HfApi().model_info(source, timeout=10)
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except ImportError:
        raise UserError("the hub is reached by huggingface_hub: pip install huggingface_hub") from None
    except Exception as e:  # its HTTP client, and so the class of its errors, varies by version
        fault = f"cannot fetch {source} from the Hugging Face hub ({type(e).__name__})"
        raise UserError(f"{fault}: connect to the network, or give a folder") from None


def read_object(path: Path) -> dict:
    """Raises UserError if `path` holds no JSON object."""
    value = checkpoint.read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it is no JSON object")
    return value


def gpt_config(content: dict) -> GPTConfig:
    """The inverse of `hf_config`. Raises UserError, naming what has no counterpart here."""
    kind = content.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"model_type {kind!r} is not known here, only {', '.join(FAMILIES)}")
    rope = content.get("rope_parameters") or {}
    rope = {"rope_theta": content.get("rope_theta", 10000.0), **(content.get("rope_scaling") or {}), **rope}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        raise UserError(f"RoPE scaling {scaling!r} is not supported")
    for name, value in ONLY.items():
        found = (rope if name in rope else content).get(name)
        if found not in (None, value):
            raise UserError(f"{name} = {found!r} is not supported, only {value!r}")
    if set(content.get("layer_types") or []) - {"full_attention"}:
        raise UserError("layer_types: only full_attention is supported, no windows")
    content = {"rms_norm_eps": 1e-6, "tie_word_embeddings": kind == "youtu"} | content
    content["rope_theta"] = rope["rope_theta"]
    try:
        knobs = {ours: content[theirs] for ours, theirs in KEYS.items()}
        if FAMILIES[kind] == "mla":
            dense = knobs["n_layer"] if kind == "youtu" else content["first_k_dense_replace"]
            if dense < knobs["n_layer"]:
                raise UserError(f"first_k_dense_replace = {dense}: layers of experts are not supported")
            knobs |= {"attention": "mla"} | {name: content[name] for name in MLA_WIDTHS if name in content}
        else:
            groups = content.get("num_key_value_heads") or knobs["n_head"]
            knobs |= {"attention": group_name(knobs["n_head"], groups), "n_kv_head": groups}
            knobs |= {"qk_norm": kind == "qwen3", "head_dim": content.get("head_dim")}
    except KeyError as e:
        raise UserError(f"config.json lacks {e.args[0]}") from e
    return from_dict(knobs, "config.json", GPTConfig)[0]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face model, in fp32. Raises UserError if there are none as safetensors."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_object(index).get("weight_map", {}).values()))
    elif (folder / "model.safetensors").exists():
        names = ["model.safetensors"]
    else:
        pickles = ", ".join(path.name for path in folder.glob("*.bin"))
        why = f"; {pickles}: pickles can run code and are not loaded" if pickles else ""
        raise UserError(f"{folder} has no model.safetensors{why}")
    weights = {}
    for name in names:
        try:
            weights |= load_file(folder / name)
        except (OSError, SafetensorError) as e:
            raise UserError(f"{folder / name} is missing or damaged") from e
    return {name: w.float() for name, w in weights.items() if not name.endswith("rotary_emb.inv_freq")}


def read_tokenizer(folder: Path, content: dict, vocab_size: int) -> tokenizers.Tokenizer:
    """The tokenizer of a Hugging Face model; where there is none, one that reads and prints ids.

    Raises UserError if it is of a kind unknown here.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return tokenizers.IdsTokenizer(vocab_size)
    spec = read_object(path)
    ends = content.get("eos_token_id")
    try:
        by_id = {token["id"]: token["content"] for token in spec["added_tokens"]}
        known = [by_id[i] for i in (ends if isinstance(ends, list) else [ends]) if i in by_id]
        tok = from_json(spec, known[0] if known else None)
    except (LookupError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is not understood: {type(e).__name__} {e}") from e
    except UserError as e:
        raise UserError(f"{folder}: {e}") from e
    if tok.n_vocab > vocab_size:
        raise UserError(f"{path} has {tok.n_vocab} ids, the model {vocab_size}")
    return tok
