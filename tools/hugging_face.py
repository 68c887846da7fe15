"""Our models as Hugging Face's: config, names of the weights, tokenizer; in both directions.

| ours                            | theirs                                         |
|---------------------------------|------------------------------------------------|
| mha, gqa, mqa without QK-norm   | `LlamaForCausalLM`                             |
| the same with qkv_bias          | `Qwen2ForCausalLM`, or Llama if `not is_qwen2` |
| mha, gqa, mqa with QK-norm      | `Qwen3ForCausalLM`                             |
| mla                             | `DeepseekV3ForCausalLM`, every layer dense     |

RoPE scaling is linear, llama3 or yarn in all of them.
"""

from __future__ import annotations

import math
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
FAMILIES: dict[Any, str] = dict.fromkeys(("llama", "qwen2", "qwen3"), "mha")
FAMILIES |= dict.fromkeys(("deepseek_v2", "deepseek_v3", "youtu"), "mla")
# of each rope_type, ours: theirs, in rope_parameters (called rope_scaling before transformers 5)
SCALINGS = {"default": {}, "linear": {"rope_factor": "factor"}}
LONGER = SCALINGS["linear"] | {"rope_trained_length": "original_max_position_embeddings"}
SCALINGS["llama3"] = LONGER | {"rope_low": "low_freq_factor", "rope_high": "high_freq_factor"}
SCALINGS["yarn"] = LONGER | {"rope_low": "beta_slow", "rope_high": "beta_fast"}
SCALINGS["yarn"] |= {"rope_attention_factor": "attention_factor"}
# what a config.json may not ask for but in this way
ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
ONLY |= {"partial_rotary_factor": 1.0, "quantization_config": None, "truncate": True}


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


def is_qwen2(tok: tokenizers.Tokenizer) -> bool:
    """Whether a model with qkv_bias is exported as Qwen2. transformers reads text for every Qwen2 by NFC and
    Qwen2's pattern, whatever tokenizer.json says; with another tokenizer it is a Llama whose o_proj.bias is 0.
    """
    return getattr(tok, "nfc", False)


def hf_config(config: GPTConfig, qwen2: bool = True) -> dict:
    """The contents of config.json for the Hugging Face class that computes what `config` does.

    qwen2: see `is_qwen2`. Raises UserError, naming the knob, if there is no such class.
    """
    mla = attention_class(config) is MultiHeadLatentAttention
    off = {"window": 0, "kv_conv": 0} | ({"qk_norm": False} if mla else {"score_factor": 1.0})
    off |= {"qkv_bias": False} if config.qk_norm else {}
    faults = {
        f"{config.attention} with {knob} = {getattr(config, knob)} has no Hugging Face class; "
        f"train a model with {knob} = {value} to export it": getattr(config, knob) not in (None, value)
        for knob, value in off.items()
    }
    if mla:
        repeat, eps, score = config.qk_rope_repeat, config.norm_eps, config.score_factor
        yarn = config.rope_scaling == "yarn" and config.rope_factor > 1
        only = f"DeepSeek-V3 has score_factor = {score} only with yarn"
        faults[f"{only}; train a model with score_factor = 1 to export it"] = score != 1 and not yarn
        faults["DeepSeek-V3 needs RoPE; qk_rope_head_dim must be above 0"] = config.qk_rope_head_dim == 0
        faults[f"DeepSeek-V3 has qk_rope_repeat = 1, not {repeat}"] = repeat != 1
        faults[f"DeepSeek-V3's latent norms have norm_eps = 1e-6, not {eps}"] = eps != 1e-6
    else:
        C, H, D = config.n_embd, config.n_head, config.head_dim
        faults[f"partial RoPE has no exact Hugging Face class; train with rotary_dim = {D}"] = config.rotary_dim != D
        faults[f"Llama and Qwen2 want n_embd = {C} divisible by n_head = {H}"] = not config.qk_norm and C % H != 0
    for fault, found in faults.items():
        if found:
            raise UserError(fault)
    content = {theirs: getattr(config, ours) for ours, theirs in KEYS.items()}
    content |= {"hidden_act": "silu", "attention_bias": False, "bos_token_id": None, "eos_token_id": None}
    content |= hf_rope(config, mla)
    if not mla:
        name = "Qwen3" if config.qk_norm else "Qwen2" if config.qkv_bias and qwen2 else "Llama"
        content |= {"attention_bias": name == "Llama" and bool(config.qkv_bias)}
        content |= {"num_key_value_heads": config.n_kv_head, "head_dim": config.head_dim}
        return {"architectures": [f"{name}ForCausalLM"], "model_type": name.lower()} | content
    content |= {width: getattr(config, width) for width in MLA_WIDTHS}
    content |= {"num_key_value_heads": config.n_head, "rope_interleave": True, "num_nextn_predict_layers": 0}
    content |= {"first_k_dense_replace": config.n_layer}  # no layer left for experts, whose numbers mean nothing
    experts = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group")
    content |= dict.fromkeys(experts, 1) | {"moe_intermediate_size": config.intermediate_size}
    return {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"} | content


def hf_rope(config: Any, mla: bool) -> dict:
    """What config.json says of RoPE scaling, for transformers 5 and for readers of what came before."""
    kind = config.rope_scaling or "default"
    scaling = {theirs: getattr(config, ours) for ours, theirs in SCALINGS[kind].items()}
    # rope_theta stands in two places, see KEYS: readers from before transformers 5 look for it outside
    new: dict[str, Any] = {"rope_parameters": {"rope_type": kind, "rope_theta": config.rope_theta}}
    if kind == "default":
        return new
    if kind == "yarn":
        log, root = 0.1 * math.log(config.rope_factor), math.sqrt(config.score_factor)
        if mla and log:  # get_mscale(mscale_all_dim) = root, and get_mscale(mscale) is attention_factor times that
            scaling["mscale"] = round((config.rope_attention_factor * root - 1) / log, 12)
            scaling["mscale_all_dim"] = round((root - 1) / log, 12)
        # transformers 4 takes the quotient of the two lengths for the factor
        reach = math.ceil(config.rope_factor * config.rope_trained_length)
        new["max_position_embeddings"] = max(config.block_size, reach)
    new["rope_parameters"] |= scaling
    # `type` is the oldest name; with linear, its readers allow nothing else beside the factor
    return new | {"rope_scaling": {"type": kind} | scaling | ({} if kind == "linear" else {"rope_type": kind})}


def hf_state_dict(model: nn.Module | dict[str, Tensor], config: GPTConfig, qwen2: bool = True) -> dict[str, Tensor]:
    """Our model, or its state dict, under Hugging Face's names; a tied lm_head is left out. qwen2: see `is_qwen2`."""
    state = dict(model.state_dict() if isinstance(model, nn.Module) else model)
    if hf_config(config, qwen2)["attention_bias"]:  # Llama's are four
        for i in range(config.n_layer):
            state[f"layers.{i}.self_attn.o_proj.bias"] = state["norm.weight"].new_zeros(config.n_embd)
    weights = {name: order_rope_rows(name, weight, config, to_hf=True) for name, weight in state.items()}
    return {name if name == "lm_head.weight" else f"model.{name}": w for name, w in weights.items()}


def from_hf_state_dict(state: dict[str, Tensor], config: GPTConfig, interleaved: bool = True) -> dict:
    """The inverse of `hf_state_dict`; a tied lm_head, if there is one, is dropped, and an o_proj.bias of zeros.

    interleaved: whether MLA's rows are in pairs (`rope_interleave`), as `hf_state_dict` writes them.
    """
    return {
        name.removeprefix("model."): order_rope_rows(name, w, config, to_hf=False) if interleaved else w
        for name, w in state.items()
        if not (name == "lm_head.weight" and config.tie_embeddings or name.endswith("o_proj.bias") and not w.any())
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
    rope = content.get("rope_scaling") or content.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"config.json: rope_parameters should be an object, not {rope!r}")
    for name, value in ONLY.items():
        found = (rope if name in rope else content).get(name)
        if found not in (None, value) and (kind, name) != ("llama", "attention_bias"):
            raise UserError(f"{name} = {found!r} is not supported, only {value!r}")
    if set(content.get("layer_types") or []) - {"full_attention"}:
        raise UserError("layer_types: only full_attention is supported, no windows")
    content = {"rms_norm_eps": 1e-6, "tie_word_embeddings": kind == "youtu"} | content
    content |= {"rope_theta": rope.get("rope_theta", content.get("rope_theta", 10000.0))}
    try:
        knobs = {ours: content[theirs] for ours, theirs in KEYS.items()}
        knobs |= rope_knobs(rope, mla=FAMILIES[kind] == "mla")
        if FAMILIES[kind] == "mla":
            dense = knobs["n_layer"] if kind == "youtu" else content["first_k_dense_replace"]
            if dense < knobs["n_layer"]:
                raise UserError(f"first_k_dense_replace = {dense}: layers of experts are not supported")
            if knobs["norm_eps"] != 1e-6:
                raise UserError(f"rms_norm_eps = {knobs['norm_eps']} is not supported with latents, only 1e-06")
            knobs |= {"attention": "mla"} | {name: content[name] for name in MLA_WIDTHS if name in content}
        else:
            groups = content.get("num_key_value_heads") or knobs["n_head"]
            knobs |= {"attention": group_name(knobs["n_head"], groups), "n_kv_head": groups}
            knobs |= {"qk_norm": kind == "qwen3", "head_dim": content.get("head_dim")}
            knobs |= {"qkv_bias": kind == "qwen2" or content.get("attention_bias")}
    except KeyError as e:
        raise UserError(f"config.json lacks {e.args[0]}") from e
    return from_dict(knobs, "config.json", GPTConfig)[0]


def rope_knobs(rope: dict, mla: bool) -> dict:
    """Our knobs for `rope`, the rope_parameters of a config.json, as transformers reads it.

    Raises UserError, naming what has no counterpart here, and KeyError if it lacks the factor.
    """
    given = {name: value for name, value in rope.items() if value is not None}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in tuple(SCALINGS):
        raise UserError(f"RoPE scaling {kind!r} is not supported, only {', '.join(SCALINGS)}")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *SCALINGS[kind].values()}
    known |= {"mscale", "mscale_all_dim", "truncate"} if kind == "yarn" else set()
    for name in sorted(given.keys() - known):
        raise UserError(f"RoPE scaling {kind!r} with {name} is not supported")
    if kind == "default":
        return {}
    knobs = {ours: given[theirs] for ours, theirs in SCALINGS[kind].items() if theirs in given}
    knobs |= {"rope_scaling": kind, "rope_factor": given["factor"]}
    both = [given.get(name) or 0 for name in ("mscale", "mscale_all_dim")]
    try:
        mscale, of_all = (0.1 * m * math.log(given["factor"]) + 1 for m in both)
        if all(both):
            knobs.setdefault("rope_attention_factor", mscale / of_all)
        return knobs | ({"score_factor": of_all**2} if mla else {})
    except (TypeError, ValueError, ArithmeticError):
        raise UserError(f"config.json: {rope} is not understood as the numbers of RoPE scaling") from None


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
