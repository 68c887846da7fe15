"""Convert runs: to and from Hugging Face, and from one attention to another.

    python -m tools.convert to-hf RUN DIR           a folder for transformers, and servers that read the same
    python -m tools.convert from-hf DIR_OR_ID OUT   a Llama, Qwen2, Qwen3 or dense DeepSeek as a run
    python -m tools.convert to-gqa RUN OUT --n_kv_head=2        mean-pool key and value heads; 1: multi-query
    python -m tools.convert to-mla RUN OUT --kv_lora_rank=64    factorize keys and values into a latent

`--help` after a command lists its options. A run that comes out can be sampled, and trained further by
`python train.py --init_from=OUT --out_dir=...`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from model import GPT, GPTConfig
from nanokv import checkpoint
from nanokv import tokenizer as tokenizers
from nanokv.config import UserError, cli, parse
from nanokv.dataset import open_dataset
from nanokv.loss import LanguageModelLoss
from nanokv.metrics import kv_elements_per_token_layer, n_params
from nanokv.tokenizer_json import to_json
from sample import load_run
from tools import hugging_face
from tools.change_attention import factorize, grouped, pool_heads
from train import TrainConfig, read_knobs


@dataclass(kw_only=True)
class Options:
    run: str  # the run: its folder, or the best/ or last/ in it; may be given without its name
    out: str  # the folder to write; likewise
    overwrite: bool = False  # give up what is there


@dataclass(kw_only=True)
class ToHfOptions(Options):
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the weights written
    check: bool = True  # compare logits and token ids with transformers', if it is installed


@dataclass
class FromHfOptions:
    source: str  # a folder with config.json and safetensors, or the id of one on the hub
    out: str  # the run folder to write
    check: bool = True  # compare logits with transformers', if it is installed
    overwrite: bool = False  # give up a run that is there


@dataclass(kw_only=True)
class ToGqaOptions(Options):
    n_kv_head: int  # key and value heads that remain, a divisor of those there are; 1: multi-query


@dataclass(kw_only=True)
class ToMlaOptions(Options):
    kv_lora_rank: int | None = None  # width of the latent; None: n_embd, at which nothing is lost
    qk_rope_head_dim: int | None = None  # width of the rotated key; None: a head's, or all if nothing is lost
    text: str = ""  # text file to calibrate on; empty: the training data of the run
    tokens: int = 8192  # tokens to calibrate on


def main(argv: list[str]) -> None:
    if argv[:1] in (["--help"], ["-h"]):
        return print(__doc__)
    if not argv or argv[0] not in COMMANDS:
        raise UserError(f"which conversion? python -m tools.convert COMMAND, one of {', '.join(COMMANDS)}")
    command, options = COMMANDS[argv[0]]
    command(parse(options, argv[1:], __doc__ or "", bare=2))


def to_hf(options: ToHfOptions) -> None:
    """Write a run as a Hugging Face model, and compare what transformers makes of it with ours."""
    out, dtype = Path(options.out), getattr(torch, options.dtype)
    model, tok = load_run(options.run, "cpu", "float32")
    model = model.to(dtype).float()  # what is compared has the precision of what is written
    qwen2 = hugging_face.is_qwen2(tok)
    content = hugging_face.hf_config(model.config, qwen2)
    if (out / "config.json").exists() and not options.overwrite:
        raise UserError(f"{out} already holds a model; choose another folder, or give --overwrite=True")
    # a document begins after another's end
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tok.eot_token)
    eot = {} if tok.eot_token is None else dict.fromkeys(("bos_token", "eos_token"), getattr(tok, "end_of_text", None))
    eot |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    files = {
        # torch_dtype is what dtype was called before transformers 4.56
        "config.json": content | ends | dict.fromkeys(("dtype", "torch_dtype"), options.dtype),
        "generation_config.json": ends,
        "tokenizer.json": to_json(tok),
        "tokenizer_config.json": eot | {"model_max_length": model.config.block_size},
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (out / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        weights = hugging_face.hf_state_dict(model, model.config, qwen2)
        weights = {name: w.to(dtype).contiguous() for name, w in weights.items()}
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    except OSError as e:
        raise UserError(f"cannot write to {out}: {e.strerror or e}") from e
    checked = hugging_face.check(out, model, tok) if options.check else "not checked"
    print(f"wrote {content['architectures'][0]} to {out}; {checked}")


def from_hf(options: FromHfOptions) -> None:
    """Write a Hugging Face model as a run."""
    folder = hugging_face.find_model(options.source)
    content = hugging_face.read_object(folder / "config.json")
    config = hugging_face.gpt_config(content)
    weights, interleaved = hugging_face.read_weights(folder), content.get("rope_interleave", True)
    weights = hugging_face.from_hf_state_dict(weights, config, interleaved)
    tok = hugging_face.read_tokenizer(folder, content, config.vocab_size)
    expected = checkpoint.on_meta(partial(GPT, config)).state_dict()
    for name in sorted(weights.keys() ^ expected.keys()):
        verb = "lacks" if name in expected else "has no place here for"
        raise UserError(f"{folder} {verb} the weights {name}")
    for name, weight in weights.items():
        there, wanted = tuple(weight.shape), tuple(expected[name].shape)
        if there != wanted:
            raise UserError(f"{folder}: {name} has shape {there}, not {wanted}")
    model = checkpoint.build(partial(GPT, config), weights)
    plain = isinstance(tok, tokenizers.IdsTokenizer) and not (folder / "tokenizer.json").exists()
    checked = hugging_face.check(folder, model, None if plain else tok) if options.check else "not checked"
    write_run(options, config, TrainConfig(), weights, tok)
    print(f"wrote {config.attention} with {n_params(model):,} parameters to {options.out}; {checked}")
    if plain:
        print("it has no tokenizer.json: prompts and samples are token ids")


def write_run(options, config: GPTConfig, knobs: TrainConfig, weights: dict[str, Tensor], tok) -> None:
    """A run folder at options.out from which to sample, and from which to train with --init_from."""
    out = Path(options.out)
    checkpoint.claim(out, resume=False, overwrite=options.overwrite)
    checkpoint.write_config(out, config, replace(knobs, out_dir=str(out), wandb_run_name=out.name))
    tokenizers.save(tok, out)
    checkpoint.save(out, "last", checkpoint.Checkpoint(weights, {}, {}))


def to_gqa(options: ToGqaOptions) -> None:
    """Mean-pool the key and value heads of a run."""
    model, tok = load_run(options.run, "cpu", "float32")
    config, weights = pool_heads(model, options.n_kv_head)
    write_run(options, config, read_knobs(checkpoint.find(options.run)[0])[1], weights, tok)
    print(f"wrote {config.attention} to {options.out}; {cache_change(model.config, config)}")


def to_mla(options: ToMlaOptions) -> None:
    """Factorize the keys and values of a run into latents, on calibration text."""
    model, tok = load_run(options.run, "cpu", "float32")
    source = grouped(model.config)
    rank, rope_width = options.kv_lora_rank or source.n_embd, options.qk_rope_head_dim
    if rope_width is None:
        rope_width = source.rotary_dim * (source.n_kv_head if rank >= source.n_embd else 1)
    knobs = read_knobs(checkpoint.find(options.run)[0])[1]
    idx = calibration_tokens(source, knobs, tok, options)
    config, weights = factorize(model, idx, rank, rope_width)
    write_run(options, config, knobs, weights, tok)
    after = checkpoint.build(partial(GPT, config), weights)
    with torch.no_grad():
        before, after = (LanguageModelLoss(m)(idx[:, :-1], idx[:, 1:]).item() for m in (model, after))
    cost = f"loss on {idx.numel():,} tokens of calibration {before:.4f} -> {after:.4f}"
    print(f"wrote mla to {options.out}; {cache_change(source, config)}; {cost}")
    if source.qk_norm:
        print("its QK-norm became a fixed scale a head, which is not exact; --qk_norm=False makes it so")


def cache_change(before: GPTConfig, after: GPTConfig) -> str:
    return "cache of {} -> {} numbers a token a layer".format(*map(kv_elements_per_token_layer, (before, after)))


def calibration_tokens(config: GPTConfig, knobs: TrainConfig, tok, options: ToMlaOptions) -> Tensor:
    """Token ids (rows, block_size + 1), or one shorter row. Raises UserError if there are none."""
    length = config.block_size + 1
    rows = -(-options.tokens // length)
    if options.text:
        try:
            ids = tok.encode_ordinary(Path(options.text).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"cannot read {options.text} as UTF-8 text") from e
    else:
        data = open_dataset(knobs.dataset, knobs.tokenizer)
        if tokenizers.sha256(data.tokenizer) != tokenizers.sha256(tok):
            raise UserError(f"{knobs.dataset} has another tokenizer than the run; give a text file by --text")
        ids = data.train.read(0, rows * length).tolist()
    if len(ids) < 2:
        raise UserError("there is no text to calibrate on")
    length = min(length, len(ids))
    return torch.tensor(ids[: min(rows, len(ids) // length) * length]).view(-1, length)


COMMANDS = {"to-hf": (to_hf, ToHfOptions), "from-hf": (from_hf, FromHfOptions)}
COMMANDS |= {"to-gqa": (to_gqa, ToGqaOptions), "to-mla": (to_mla, ToMlaOptions)}

if __name__ == "__main__":
    cli(main)
