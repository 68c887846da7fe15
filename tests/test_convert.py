"""Runs to and from Hugging Face, by the command, on small random models: nothing is downloaded."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers as hugging_face_tokenizers
import torch
import transformers
from conftest import build
from equivalence import assert_close, cached_logits, small_model, tokens
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from nanokv import checkpoint, rope_scaling, tokenizer
from nanokv.config import UserError
from nanokv.generate import generate_lists
from nanokv.tokenizer_json import from_json, to_json
from sample import load_run
from tools import convert, hugging_face
from tools.change_attention import factorize, pool_heads
from train import TrainConfig, read_knobs

BYTE = tokenizer.train("byte", [])
TEXT = [Path(__file__).read_text(encoding="utf-8"), "naïve café 数学 🙂 " * 20]
BPE = tokenizer.train("bpe", TEXT, 400)
OLD_BPE = tokenizer.load(Path(__file__).with_name("sets") / "bpe")  # made before the split became Qwen2's
SHAPES = {
    "mha": {"attention": "mha", "qk_norm": False},
    "mqa": {"attention": "mqa", "qk_norm": False},
    "gqa": {"attention": "gqa", "n_kv_head": 2, "qk_norm": False},
    "qk-norm": {"attention": "gqa", "n_kv_head": 2},
    "qkv-bias": {"attention": "gqa", "n_kv_head": 2, "qk_norm": False, "qkv_bias": True},
    "mla": {"attention": "mla"},
    "mla-q-lora": {"attention": "mla", "q_lora_rank": 10},
}
VARIANTS = {f"{name}-{tie}": (knobs, tie == "tied") for name, knobs in SHAPES.items() for tie in ("tied", "untied")}
GREEDY = 100
UNSCALED = dict.fromkeys(("rope_scaling", *rope_scaling.KNOBS)) | {"rope_factor": 1.0, "score_factor": 1.0}

IN_A_FRESH_PROCESS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
idx, texts, prompt = torch.load("in.pt")
torch.set_num_threads(1)
results = {}
with torch.no_grad():
    for name in sys.argv[1:]:
        model, tok = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        start = tok(prompt, return_tensors="pt", add_special_tokens=False)
        new = model.generate(**start, max_new_tokens=100, do_sample=False)[0, start["input_ids"].size(1) :]
        results[name] = {"class": type(model).__name__, "logits": model(idx).logits}
        results[name]["greedy"] = tok.decode(new, skip_special_tokens=True)
        ids = tok(texts, add_special_tokens=False)["input_ids"] if texts and "untied" in name else []
        results[name] |= {"ids": ids, "back": tok.batch_decode(ids)}
torch.save(results, "out.pt")
"""


def random_texts(n: int) -> list[str]:
    """Of any code points, of those that splitting turns on, of ASCII, and of words."""
    draw = random.Random(0)
    words = ["def", "  return", "\n\n    self", "it's", "WE'LL", "数学", "🙂", "naïve", "a    b", "1234", "\t\t"]
    kinds = [
        lambda: chr(draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)])),
        lambda: draw.choice(" \t\r\n.'x3éſK<|>sdllverE0٣Ⅷ½\u00a0\u2003\u0085"),
        lambda: chr(draw.randrange(0x20, 0x7F)),
        lambda: draw.choice(words) + " ",
    ]
    return ["".join(kinds[i % 4]() for _ in range(draw.randrange(40))) for i in range(n)]


def make_run(folder: Path, tok=BPE, **knobs):
    """A run folder with a random model; returns the model."""
    model = small_model(vocab_size=tok.n_vocab, block_size=160, **knobs)
    checkpoint.claim(folder, resume=False, overwrite=False)
    checkpoint.write_config(folder, model.config, TrainConfig(out_dir=str(folder), dataset="text"))
    tokenizer.save(tok, folder)
    checkpoint.save(folder, "best", checkpoint.Checkpoint(model.state_dict(), {}, {"step": 1}))
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Every variant as a run and as a Hugging Face folder, and what a fresh process makes of the latter."""
    root = tmp_path_factory.mktemp("exported")
    for i, (name, (knobs, tie)) in enumerate(VARIANTS.items()):
        tok = BYTE if i % 4 > 1 else BPE
        make_run(root / "runs" / name, tok, tie_embeddings=tie, **knobs)
        convert.main(["to-hf", str(root / "runs" / name / "best"), str(root / name), "--check=False"])
    torch.save((tokens(2, 40), random_texts(1000), "class A:"), root / "in.pt")
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, *VARIANTS]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    return root, torch.load(root / "out.pt")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_fresh_process_computes_the_same(exported, name):
    root, results = exported
    model, tok = load_run(root / "runs" / name, "cpu", "float32")
    theirs = results[name]
    with torch.no_grad():
        assert_close(model(tokens(2, 40))[0], theirs["logits"], 1e-4)
    prompt = tok.encode_ordinary("class A:")
    (ours,) = generate_lists(model, [prompt], GREEDY, temperature=0, stop_ids=(tok.eot_token,))
    assert tok.decode(ours) == theirs["greedy"]
    expected = {"mla": "DeepseekV3", "qk-": "Qwen3"}.get(name[:3], "Llama")
    assert theirs["class"] == f"{expected}ForCausalLM"


@pytest.mark.parametrize("tok", [BYTE, BPE], ids=["byte", "bpe"])
def test_a_fresh_process_reads_text_the_same(exported, tok):
    root, results = exported
    texts = random_texts(1000)
    (name, *_) = [n for n in VARIANTS if "untied" in n and load_run(root / "runs" / n)[1].name == tok.name]
    assert results[name]["ids"] == [tok.encode_ordinary(text) for text in texts]
    assert results[name]["back"] == texts


@pytest.mark.parametrize("name", ["mqa-tied", "qk-norm-untied", "qkv-bias-tied", "mla-untied", "mla-q-lora-tied"])
def test_from_hf_and_to_hf_again_is_the_identity(exported, name, tmp_path):
    root, _ = exported
    convert.main(["from-hf", str(root / name), str(tmp_path / "run"), "--check=False"])
    convert.main(["to-hf", str(tmp_path / "run"), str(tmp_path / "hf"), "--check=False"])
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (root / name / file).read_text() == (tmp_path / "hf" / file).read_text()
    before, after = (load_file(folder / "model.safetensors") for folder in (root / name, tmp_path / "hf"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_command_checks_what_it_wrote(tmp_path, capsys, monkeypatch):
    make_run(tmp_path / "run", attention="mla")
    command = ["to-hf", f"--run={tmp_path / 'run'}", f"--out={tmp_path / 'hf'}"]
    convert.main([*command, "--dtype=bfloat16"])
    assert "wrote DeepseekV3ForCausalLM" in (said := capsys.readouterr().out)
    assert "logits as in transformers" in said and "token ids equal" in said
    assert load_file(tmp_path / "hf" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    with pytest.raises(UserError, match="already holds a model.*--overwrite=True"):
        convert.main(command)
    monkeypatch.setattr(hugging_face, "order_rope_rows", lambda name, weight, config, to_hf: weight)
    with pytest.raises(UserError, match="logits of transformers .* differ"):
        convert.main([*command, "--overwrite=True"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    convert.main([*command, "--overwrite=True"])
    assert "NOT checked: transformers is not installed" in capsys.readouterr().out


# from Hugging Face


def foreign_model(folder: Path, cls="Llama", **fields) -> torch.nn.Module:
    """A model as transformers itself makes and saves it, in several files."""
    small = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "head_dim": 12}
    config = getattr(transformers, f"{cls}Config")(**small | fields)
    model = getattr(transformers, f"{cls}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=p.size(1) ** -0.5) if p.ndim == 2 else p.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


DENSE = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5, "q_lora_rank": None}
DENSE |= {"first_k_dense_replace": 2, "num_key_value_heads": 4, "n_routed_experts": 1, "head_dim": 4}


@pytest.mark.parametrize(
    "cls,fields",
    [
        ("Llama", {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
        ("Qwen3", {"tie_word_embeddings": True}),
        ("DeepseekV3", DENSE),
        ("DeepseekV3", DENSE | {"rope_interleave": False, "q_lora_rank": 7}),
    ],
)
def test_a_foreign_model_becomes_a_run(cls, fields, tmp_path, capsys):
    theirs = foreign_model(tmp_path / "hf", cls, **fields)
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    convert.main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "logits as in transformers" in said and "prompts and samples are token ids" in said
    model, tok = load_run(tmp_path / "run", "cpu", "float32")
    idx = tokens(2, 40)
    with torch.no_grad():
        assert_close(model(idx)[0], theirs(idx).logits, 1e-4)
    assert tok.encode_ordinary("1 60") == [1, 60]


# the published hyperparameters, on a trained context of 64 tokens, but for the first
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
DEEPSEEK = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40, "original_max_position_embeddings": 64}
DEEPSEEK |= {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
V2 = DEEPSEEK | {"mscale": 0.707, "mscale_all_dim": 0.707}
WIDE = DENSE | {"qk_rope_head_dim": 32, "head_dim": 32}
SCALED = {
    "linear": ("Llama", {"head_dim": 32}, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "llama3": ("Llama", {"head_dim": 32}, LLAMA3 | {"original_max_position_embeddings": 64}),
    "llama3-without-length": ("Llama", {"head_dim": 32}, LLAMA3),
    "yarn": ("Llama", {"head_dim": 32}, YARN | {"rope_theta": 1e4, "factor": 16.0}),
    "yarn-attention-factor": ("Llama", {"head_dim": 32}, YARN | {"attention_factor": 0.8, "beta_fast": 9}),
    "qwen2": ("Qwen2", {"head_dim": 8}, YARN),
    "qwen3": ("Qwen3", {"head_dim": 32}, YARN),
    "deepseek-v3": ("DeepseekV3", WIDE, DEEPSEEK),
    "deepseek-v3-mscale": ("DeepseekV3", WIDE | {"q_lora_rank": 7}, DEEPSEEK | {"mscale_all_dim": 0.5}),
    "deepseek-v3-no-mscale": ("DeepseekV3", WIDE, DEEPSEEK | {"mscale": 0.0, "mscale_all_dim": 0.0}),
    "deepseek-v2": ("DeepseekV2", WIDE, V2),
}


@pytest.mark.parametrize("cls,fields,rope", SCALED.values(), ids=SCALED)
def test_scaled_rope_comes_and_goes(cls, fields, rope, tmp_path):
    longest = 64 * int(rope["factor"]) if "original_max_position_embeddings" in rope else 64
    fields = fields | {"max_position_embeddings": longest}
    theirs = foreign_model(tmp_path / "hf", cls, rope_parameters=dict(rope), **fields)
    idx = tokens(1, 256)
    convert.main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "run")])
    model, _ = load_run(tmp_path / "run", "cpu", "float32")
    convert.main(["to-hf", str(tmp_path / "run"), str(tmp_path / "again")])
    content = json.loads((tmp_path / "again" / "config.json").read_text())
    assert content["max_position_embeddings"] == longest
    unscaled = build(replace(model.config, **UNSCALED), model.state_dict())
    with torch.no_grad():
        expected = theirs(idx).logits
        assert_close(model(idx)[0], expected, 1e-4)
        assert (unscaled(idx)[0] - expected).abs().max() > 0.01
        for name in ("rope_parameters", "rope_scaling"):  # as transformers 5 writes them, and those before
            left = {key: value for key, value in content.items() if key == name or not key.startswith("rope_")}
            theta = {} if name == "rope_parameters" else {"rope_theta": rope["rope_theta"]}
            (tmp_path / "again" / "config.json").write_text(json.dumps(left | theta))
            again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
            assert_close(again(idx).logits, expected, 1e-4)
            assert_close(build(hugging_face.gpt_config(left | theta), model.state_dict())(idx)[0], expected, 1e-4)


def test_the_published_spelling_of_yarn_is_read(tmp_path):
    """DeepSeek-V3's config.json."""
    foreign_model(tmp_path / "hf", "DeepseekV3", **DENSE)
    path = tmp_path / "hf" / "config.json"
    content = json.loads(path.read_text())
    del content["rope_parameters"]
    old = {"type" if key == "rope_type" else key: value for key, value in DEEPSEEK.items() if key != "rope_theta"}
    config = hugging_face.gpt_config(content | {"rope_theta": 10000, "rope_scaling": old})
    assert (config.rope_scaling, config.rope_factor, config.rope_trained_length) == ("yarn", 40.0, 64)
    assert (config.rope_low, config.rope_high, config.rope_attention_factor) == (1.0, 32.0, 1.0)
    assert config.score_factor == pytest.approx(1.8738, abs=1e-4)
    back = hugging_face.hf_config(config)["rope_scaling"]
    assert back == pytest.approx(old | {"rope_type": "yarn", "attention_factor": 1.0})


def test_the_old_way_of_writing_rope_is_read(tmp_path):
    foreign_model(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    content = json.loads(path.read_text())
    del content["rope_parameters"]
    path.write_text(json.dumps(content | {"rope_theta": 500.0, "rope_scaling": None}))
    assert hugging_face.gpt_config(json.loads(path.read_text())).rope_theta == 500.0


@pytest.mark.parametrize(
    "change,named",
    [
        ({"model_type": "mamba"}, "'mamba'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 5e5, "factor": 8.0}}, "'longrope'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic' .*only default, linear, llama3, yarn"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False}}, "truncate = False"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "attn_factor": 2.0}}, "'yarn' with attn_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0, "mscale_all_dim": 1.0}}, "'linear' with mscale_all_dim"),
        ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, "not understood"),
        ({"rope_scaling": {"type": "yarn", "factor": 0}}, "not understood"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_factor must be at least 1"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "with full_attention"),
        ({"rope_parameters": "yarn"}, "rope_parameters should be an object"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"attention_bias": True}, r"lacks the weights layers\.0\.self_attn\.k_proj\.bias"),
        ({"attention_bias": 2}, "qkv_bias"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"model_type": "deepseek_v3", "first_k_dense_replace": 1}, "first_k_dense_replace = 1"),
        ({"model_type": "deepseek_v3", "first_k_dense_replace": 2, "rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05"),
        ({"num_key_value_heads": 3}, "n_kv_head = 3"),
        ({"hidden_size": None}, "n_embd|hidden_size"),
        ({"intermediate_size": 52}, "shape"),
        ({"num_hidden_layers": 1}, r"no place here for the weights layers\.1"),
        ({"num_hidden_layers": 3}, r"lacks the weights layers\.2"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_map_is_refused_by_name(change, named, tmp_path):
    foreign_model(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    content = json.loads(path.read_text())
    if "rope_scaling" in change:
        del content["rope_parameters"]
    path.write_text(json.dumps(content | change))
    with pytest.raises(UserError, match=named):
        convert.main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "run"), "--check=False"])
    assert not (tmp_path / "run").exists()


def test_faults_of_a_folder_are_one_line(tmp_path, monkeypatch):
    command = ["from-hf", str(tmp_path / "hf"), str(tmp_path / "run")]
    with pytest.raises(UserError, match="no folder"):
        convert.main(command)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="cannot fetch nobody/nothing .*connect to the network"):
        convert.main(["from-hf", "nobody/nothing", str(tmp_path / "run")])
    foreign_model(tmp_path / "hf")
    (shard, *_) = (tmp_path / "hf").glob("*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    with pytest.raises(UserError, match=f"{shard.name} is missing or damaged"):
        convert.main(command)
    (tmp_path / "hf" / "model.safetensors.index.json").unlink()
    torch.save({}, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin: pickles can run code and are not loaded"):
        convert.main(command)


def test_a_converted_run_does_not_resume(tmp_path):
    weights = small_model(vocab_size=5).state_dict()
    checkpoint.save(tmp_path, "last", checkpoint.Checkpoint(weights, {}, {}))
    with pytest.raises(UserError, match="holds weights only.*--init_from="):
        checkpoint.load(tmp_path, "last")


@pytest.mark.parametrize("argv", [[], ["to-gguf"], ["to-hf", "a", "b", "c"], ["to-hf", "a"]])
def test_a_wrong_command_is_one_line(argv):
    with pytest.raises(UserError, match="which conversion|unexpected argument|--out"):
        convert.main(argv)


# tokenizers


@pytest.mark.parametrize(
    "tok", [BYTE, BPE, tokenizer.train("char", TEXT), tokenizer.IdsTokenizer(20)], ids=lambda tok: tok.name
)
def test_tokenizer_json_and_back_is_the_identity(tok):
    back = from_json(to_json(tok), None if tok.eot_token is None else tokenizer.END_OF_TEXT)
    assert tokenizer.sha256(back) == tokenizer.sha256(tok) or tok is BYTE  # whose kind is a bpe without merges
    assert (back.n_vocab, back.eot_token) == (tok.n_vocab, tok.eot_token)


def test_bpe_is_exported_with_the_split_of_qwen2():
    theirs = transformers.Qwen2Tokenizer().backend_tokenizer.to_str()
    assert to_json(BPE)["pre_tokenizer"] == json.loads(theirs)["pre_tokenizer"]


@pytest.mark.parametrize("tok", [BPE, OLD_BPE], ids=["new", "old"])
def test_transformers_gives_the_ids_of_each_split(tok, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(to_json(tok)))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    texts = random_texts(200)
    assert theirs(texts, add_special_tokens=False)["input_ids"] == [tok.encode_ordinary(text) for text in texts]


def test_char_tokenizers_agree_on_newlines_and_on_the_unknown():
    tok = tokenizer.train("char", TEXT)
    theirs = hugging_face_tokenizers.Tokenizer.from_str(json.dumps(to_json(tok)))
    for text in TEXT:
        ids = theirs.encode(text).ids
        assert ids == tok.encode_ordinary(text)
        assert theirs.decode(ids) == text
    with pytest.raises(Exception, match="(?i)unk"):
        theirs.encode(chr(0x416))  # not written out: this file is the text


def foreign_tokenizer(pre, normalizer=None) -> hugging_face_tokenizers.Tokenizer:
    """A byte-level BPE as others ship them: special tokens first, merges as trained."""
    theirs = hugging_face_tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer, theirs.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        theirs.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|end|>", "<|begin|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    theirs.train_from_iterator(TEXT, trainer)
    return theirs


LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def by_regex(pattern):
    split = pre_tokenizers.Split(hugging_face_tokenizers.Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def gpt2_style():
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    "theirs",
    [
        foreign_tokenizer(gpt2_style()),
        foreign_tokenizer(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2_style()])),
        foreign_tokenizer(by_regex(LLAMA3_SPLIT)),
        foreign_tokenizer(by_regex(LLAMA3_SPLIT), normalizers.NFC()),
    ],
    ids=["gpt2", "smollm2", "llama3", "qwen3"],
)
def test_a_foreign_tokenizer_gives_the_same_ids(theirs, tmp_path):
    tok = from_json(json.loads(theirs.to_str()), "<|end|>")
    tokenizer.save(tok, tmp_path)
    tok = tokenizer.load(tmp_path)
    texts = [*random_texts(1000), "e\u0301 a  5", "12  34"]
    assert [tok.encode_ordinary(text) for text in texts] == [theirs.encode(text).ids for text in texts]
    assert (tok.eot_token, tok.n_vocab) == (theirs.token_to_id("<|end|>"), theirs.get_vocab_size())
    again = hugging_face_tokenizers.Tokenizer.from_str(json.dumps(to_json(tok)))
    assert [again.encode(text).ids for text in texts] == [theirs.encode(text).ids for text in texts]


@pytest.mark.parametrize(
    "change,named",
    [
        (lambda spec: spec["model"].update(type="Unigram"), "Unigram"),
        (lambda spec: spec["model"].update(byte_fallback=True), "no byte-level"),
        (lambda spec: spec.update(decoder={"type": "Metaspace"}), "no byte-level"),
        (lambda spec: spec.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        (lambda spec: spec.update(pre_tokenizer={"type": "Metaspace"}), "Metaspace"),
        (lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True), "ByteLevel"),
        (lambda spec: spec["model"]["merges"].reverse(), "another order"),
        (lambda spec: spec["model"]["vocab"].update({"word here": 500}), "no sequence of bytes"),
        (lambda spec: spec["model"]["vocab"].update({"Ġ!Ġ": 501}), "without gaps"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused_by_name(change, named):
    spec = json.loads(foreign_tokenizer(gpt2_style()).to_str())
    change(spec)
    with pytest.raises(UserError, match=named):
        from_json(spec, "<|end|>")


def test_qwen2_comes_and_goes_with_its_tokenizer(tmp_path, capsys):
    foreign_model(tmp_path / "hf", "Qwen2", vocab_size=500, head_dim=8, eos_token_id=0)
    spec = foreign_tokenizer(by_regex(LLAMA3_SPLIT.replace("{1,3}", "")), normalizers.NFC()).to_str()
    (tmp_path / "hf" / "tokenizer.json").write_text(spec)
    convert.main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "run")])
    assert "token ids equal" in capsys.readouterr().out
    convert.main(["to-hf", str(tmp_path / "run"), str(tmp_path / "again")])
    assert "wrote Qwen2ForCausalLM" in (said := capsys.readouterr().out) and "token ids equal" in said


def test_a_bias_of_the_output_projection_is_refused_unless_zero(tmp_path):
    foreign_model(tmp_path / "hf", attention_bias=True)
    with pytest.raises(UserError, match=r"no place here for the weights layers\.0\.self_attn\.o_proj\.bias"):
        convert.main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "run"), "--check=False"])


def test_data_is_prepared_under_the_tokenizer_of_a_converted_run(tmp_path):
    spec = foreign_tokenizer(by_regex(LLAMA3_SPLIT)).to_str()
    foreign_model(tmp_path / "hf", vocab_size=500, eos_token_id=[7, 0])
    (tmp_path / "hf" / "tokenizer.json").write_text(spec)
    convert.main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "run")])
    tok = tokenizer.load(tmp_path / "run")
    assert tok.end_of_text == "<|end|>"
    assert tokenizer.sha256(tokenizer.train(str(tmp_path / "run"), [])) == tokenizer.sha256(tok)


def test_tied_weights_that_are_stored_twice_are_read_once(tmp_path):
    foreign_model(tmp_path / "hf", tie_word_embeddings=True)
    (tmp_path / "hf" / "model.safetensors.index.json").unlink()
    weights = {}
    for shard in (tmp_path / "hf").glob("*.safetensors"):
        weights |= load_file(shard)
        shard.unlink()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    convert.main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "run"), "--check=False"])
    assert "lm_head.weight" not in checkpoint.load_weights(tmp_path / "run", "last")


# from one attention to another


def as_run(model) -> torch.nn.Module:
    """The model as load_run gives it."""
    return build(model.config, model.state_dict())


@torch.no_grad()
def furthest(model, other, idx) -> float:
    return (model(idx)[0] - other(idx)[0]).abs().max().item()


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("knobs", [{"qk_norm": False}, {"qk_norm": True}, {"qkv_bias": True}], ids=str)
def test_pooling_takes_the_mean_of_heads(groups, knobs):
    model = as_run(small_model(attention="mha", **knobs))
    config, weights = pool_heads(model, groups)
    assert (config.attention, config.n_kv_head) == ({4: "mha", 2: "gqa", 1: "mqa"}[groups], groups)
    pooled, idx = build(config, weights), tokens(2, 40)
    if groups == 4:
        assert furthest(model, pooled, idx) == 0
    with torch.no_grad():  # heads that are alike lose nothing
        for layer in model.layers:
            for proj in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                for part in proj.parameters():
                    heads = part.view(groups, 4 // groups, 8, -1)
                    heads[:] = heads.mean(1, keepdim=True).clone()
    alike = build(*pool_heads(model, groups))
    assert furthest(model, alike, idx) < 1e-5
    assert all(torch.allclose(alike.state_dict()[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    "knobs", [{"kv_conv": 1}, {"qkv_bias": True}, {"rope_scaling": "linear", "rope_factor": 2.0}], ids=str
)
def test_what_is_not_converted_is_named(knobs):
    model = as_run(small_model(attention="mha", **knobs))
    with pytest.raises(UserError, match=f"train one without {next(iter(knobs))}"):
        factorize(model, tokens(2, 20), 8, 4)
    if "kv_conv" in knobs:
        with pytest.raises(UserError, match="kv_conv"):
            pool_heads(model, 1)


FULL = {
    "mha": {"attention": "mha", "qk_norm": False},
    "mha-tied": {"attention": "mha", "qk_norm": False, "tie_embeddings": True},
    "gqa-free-head": {"attention": "gqa", "n_kv_head": 2, "qk_norm": False, "head_dim": 12},
    "mqa-partial-rope": {"attention": "mqa", "qk_norm": False, "rotary_dim": 4, "rope_theta": 500.0},
    "no-rope": {"attention": "mha", "qk_norm": False, "rotary_dim": 0},
    "window": {"attention": "mha", "qk_norm": False, "window": 8, "sink_tokens": 1},
}


@pytest.mark.parametrize("knobs", FULL.values(), ids=FULL)
@pytest.mark.parametrize("rank", [32, 64])
def test_factorising_at_full_rank_is_exact(knobs, rank):
    model = as_run(small_model(**knobs))
    config = model.config
    idx, unseen = tokens(4, 64), tokens(2, 64, seed=1)
    latent = build(*factorize(model, idx, rank, config.n_kv_head * config.rotary_dim))
    assert latent.config.attention == "mla"
    with torch.no_grad():
        assert_close(latent(unseen)[0], model(unseen)[0], 1e-4)
        assert_close(cached_logits(latent, unseen, [30, 1, 1, 32]), model(unseen)[0], 1e-4)


def test_one_rotated_key_is_exact_where_the_heads_keys_are_alike():
    model = as_run(small_model(attention="mha", qk_norm=False))
    with torch.no_grad():
        for layer in model.layers:
            heads = layer.self_attn.k_proj.weight.view(4, 8, 32)
            heads[:] = heads[:1].clone() * torch.tensor([1.0, -2.0, 0.5, 3.0]).view(4, 1, 1)
    config, weights = factorize(model, tokens(4, 64), 32, 8)
    assert (config.qk_rope_head_dim, config.qk_rope_repeat, config.rope_theta) == (8, 1, 10000.0)
    assert furthest(model, build(config, weights), tokens(2, 64, seed=1)) < 1e-4


def test_a_narrower_rotated_key_keeps_frequencies_of_the_model():
    model = as_run(small_model(attention="mqa", qk_norm=False))
    with torch.no_grad():
        for layer in model.layers:  # keys only at the frequencies 0 and 2 of 4
            layer.self_attn.k_proj.weight.view(2, 4, 32)[:, 1::2] = 0
    config, weights = factorize(model, tokens(4, 64), 32, 4)
    assert config.rope_theta == 10000.0  # every second frequency
    assert furthest(model, build(config, weights), tokens(2, 64, seed=1)) < 1e-4


def test_a_smaller_rank_loses_little_of_keys_and_values_of_low_rank():
    model = as_run(small_model(attention="mqa", qk_norm=False, n_embd=64))
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.v_proj.weight[12:] = layer.self_attn.v_proj.weight[:4].clone()
    idx = tokens(8, 64)
    errors = [furthest(model, build(*factorize(model, idx, r, 16)), idx) for r in (2, 12, 63, 64)]
    assert errors[0] > errors[1] > errors[3] and errors[2] > errors[3] and errors[3] < 1e-4


@pytest.mark.parametrize("rank,rope_width", [(0, 8), (8, 3), (8, 40), (8, 12), (8, -2)])
def test_widths_that_do_not_fit_are_refused(rank, rope_width):
    with pytest.raises(UserError, match="qk_rope_head_dim"):
        factorize(as_run(small_model(attention="mha")), tokens(1, 8), rank, rope_width)


def test_changed_runs_by_the_command(tmp_path, capsys):
    make_run(tmp_path / "run", attention="mha", tie_embeddings=True)
    (tmp_path / "text.txt").write_text(TEXT[0], encoding="utf-8")
    run, text = str(tmp_path / "run"), f"--text={tmp_path / 'text.txt'}"
    convert.main(["to-gqa", run, str(tmp_path / "gqa"), "--n_kv_head=2"])
    assert "wrote gqa" in (said := capsys.readouterr().out) and "64 -> 32 numbers" in said
    convert.main(["to-mla", run, str(tmp_path / "mla"), text, "--kv_lora_rank=12"])
    assert "64 -> 20 numbers" in (said := capsys.readouterr().out) and "QK-norm became a fixed scale" in said
    model, tok = load_run(tmp_path / "mla", "cpu", "float32")
    assert (model.config.kv_lora_rank, model.config.qk_rope_head_dim) == (12, 8)
    assert tokenizer.sha256(tok) == tokenizer.sha256(BPE)
    convert.main(["to-mla", str(tmp_path / "gqa"), str(tmp_path / "full"), text])
    model, _ = load_run(tmp_path / "full", "cpu", "float32")
    assert (model.config.kv_lora_rank, model.config.qk_rope_head_dim, model.config.qk_rope_repeat) == (32, 16, 2)
    for command, fault in {
        ("to-mla", "mla", "again", text): "attention mla",
        ("to-gqa", "gqa", "again", "--n_kv_head=4"): "no divisor of the 2",
        ("to-gqa", "run", "gqa", "--n_kv_head=1"): "already holds a run",
        ("to-mla", "run", "again", "--text=none"): "cannot read none",
    }.items():
        name, source, out, option = command
        with pytest.raises(UserError, match=fault):
            convert.main([name, str(tmp_path / source), str(tmp_path / out), option])


def test_a_changed_run_trains_further_with_its_own_shape(tmp_path, monkeypatch):
    import train
    from data.text.prepare import main as prepare_text

    (tmp_path / "text.txt").write_text("\n".join(TEXT) * 20, encoding="utf-8")
    data = ["--tokenizer=byte", "--val_fraction=0.2", f"--out_dir={tmp_path / 'data'}"]
    prepare_text([f"--input={tmp_path / 'text.txt'}", *data])
    make_run(tmp_path / "run", BYTE, attention="mha", tie_embeddings=True)
    convert.main(["to-gqa", str(tmp_path / "run"), str(tmp_path / "mqa"), "--n_kv_head=1"])
    knobs = [f"--dataset={tmp_path / 'data'}", "--max_iters=2", "--sample_tokens=0", "--eval_iters=1"]
    train.main([f"--init_from={tmp_path / 'mqa'}", f"--out_dir={tmp_path / 'more'}", *knobs])
    config, _ = read_knobs(tmp_path / "more")
    assert (config.attention, config.n_embd, config.tie_embeddings) == ("mqa", 32, True)
    with pytest.raises(UserError, match="--init_from="):
        train.main(["--init_from=resume", f"--out_dir={tmp_path / 'mqa'}", *knobs])
