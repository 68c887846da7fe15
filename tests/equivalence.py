"""What every attention must satisfy, as checks that take a model.

test_cache.py and test_model.py run them for each entry of `model.ATTENTIONS`, one that you add included. An
attention whose knobs have no defaults, or which has variants worth a test of their own, gets a line in
VARIANTS.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model import ATTENTIONS, GPT, GPTConfig
from nanokv.cache import kv_bytes

VOCAB = 61

VARIANTS = {
    "mha": {
        "": {},
        "no-qk-norm": {"qk_norm": False},
        "free-head": {"head_dim": 12, "n_embd": 30},
        "no-rope": {"rotary_dim": 0},
        "conv": {"kv_conv": 1, "qk_norm": False},
        "linear-rope": {"rope_scaling": "linear", "rope_factor": 4.0},
    },
    "mqa": {
        "": {},
        "partial-rope": {"rotary_dim": 4},
        "conv": {"kv_conv": 2},
        "yarn-rope": {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_trained_length": 16},
    },
    "gqa": {
        "": {"n_kv_head": 2},
        "partial-rope": {"n_kv_head": 2, "rotary_dim": 6, "tie_embeddings": True},
        "conv": {"n_kv_head": 2, "kv_conv": 2},
        "llama3-rope": {"n_kv_head": 2, "rope_scaling": "llama3", "rope_factor": 8.0, "rope_trained_length": 16},
    },
    "mla": {
        "": {},
        "q-lora": {"q_lora_rank": 10, "tie_embeddings": True},
        "narrow-values": {"v_head_dim": 6},
        "wide-values": {"v_head_dim": 20},
        "repeated-rope": {"qk_rope_head_dim": 4, "qk_rope_repeat": 2},
        "free-head": {"n_embd": 30, "qk_nope_head_dim": 10, "qk_rope_head_dim": 4, "kv_lora_rank": 9},
        "no-rope": {"qk_rope_head_dim": 0},
        "norm": {"qk_norm": True},
        "norm-no-rope": {"qk_norm": True, "qk_rope_head_dim": 0},
        "shared-norm": {"qk_norm": "shared", "q_lora_rank": 10},
        "conv": {"kv_conv": 2},
        "conv-norm": {"kv_conv": 1, "qk_norm": True},
        "conv-shared-norm": {"kv_conv": 2, "qk_norm": "shared"},
        "yarn-rope": {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_trained_length": 16, "score_factor": 1.5},
    },
}
CASES = {
    f"{attention}-{variant}" if variant else attention: {"attention": attention, **knobs}
    for attention in ATTENTIONS
    for variant, knobs in VARIANTS.get(attention, {"": {}}).items()
}
BASE = {attention: CASES[attention] for attention in ATTENTIONS}  # one of each
every_case = pytest.mark.parametrize("knobs", CASES.values(), ids=CASES.keys())


def small_config(**knobs) -> GPTConfig:
    small = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": VOCAB, "block_size": 64}
    return GPTConfig(**{**small, **knobs})


def small_model(dtype: torch.dtype = torch.float32, seed: int = 0, **knobs) -> GPT:
    """A model without a single trivial weight, whose logits have a standard deviation of about 1."""
    model = GPT(small_config(**knobs)).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(std=p.size(1) ** -0.5, generator=generator)
            elif p.ndim == 3:  # of a convolution
                p.normal_(std=0.5, generator=generator)
            else:
                p.uniform_(0.5, 1.5, generator=generator)
    return model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape
    difference = (a.double() - b.double()).abs().max().item()
    assert difference <= tolerance, f"differ by {difference:.2e}"


def force_form(model: GPT, absorbed: bool) -> None:
    """Make MLA use one of its two forms, whatever it would prefer."""
    for layer in model.layers:
        layer.self_attn.prefers_absorbed = lambda n: absorbed


@torch.no_grad()
def cached_logits(model: GPT, idx: Tensor, chunks: list[int], cache=None) -> Tensor:
    """Logits of idx (B, T), fed through a cache in chunks of these lengths."""
    assert sum(chunks) == idx.size(1)
    cache = cache or model.new_cache(len(idx), idx.size(1))
    return torch.cat([model(part, cache=cache)[0] for part in idx.split(chunks, 1)], 1)


@torch.no_grad()
def check_chunks(model: GPT, chunks: list[int], cache_dtype=None, tolerance: float = 1e-5) -> None:
    """Fed in chunks through a cache, the logits are those of one pass without a cache."""
    idx = tokens(2, sum(chunks), seed=len(chunks))
    cache = model.new_cache(2, idx.size(1), dtype=cache_dtype)
    assert_close(cached_logits(model, idx, chunks, cache), model(idx)[0], tolerance)
    assert cache.lengths.tolist() == cache.host_lengths() == [idx.size(1)] * 2


@torch.no_grad()
def check_ragged(model: GPT, lengths: list[int], chunks: list[int], cache_dtype=None, tolerance: float = 1e-5) -> None:
    """A batch of prompts of unequal length, padded, continues as each prompt does alone."""
    longest, B = max(lengths), len(lengths)
    prompts, rest = tokens(B, longest, seed=1), tokens(B, sum(chunks), seed=2)
    cache = model.new_cache(B, longest + sum(chunks), dtype=cache_dtype)
    if longest:
        cache.expect(lengths)
        prefill = model(prompts, cache=cache)[0]
    continued = cached_logits(model, rest, chunks, cache)
    assert cache.lengths.tolist() == cache.host_lengths() == [n + sum(chunks) for n in lengths]
    for b, n in enumerate(lengths):
        alone = model(torch.cat((prompts[b : b + 1, :n], rest[b : b + 1]), 1))[0][0]
        assert_close(continued[b], alone[n:], tolerance)
        if n:
            assert_close(prefill[b, :n], alone[:n], tolerance)


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is on."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.total += out.untyped_storage().nbytes()
        return out


def check_footprint(model: GPT, dtype: torch.dtype, batch_size: int = 3, max_len: int = 7) -> None:
    """Formula = declaration = bytes allocated, and decoding allocates no other buffers."""
    config, declared = model.config, 0  # declared: bytes of a token in a layer
    fixed = 0  # bytes in a layer that do not grow
    for part in ATTENTIONS[config.attention].cached_parts(config).values():
        coded = part.width - part.exact
        if part.last:
            fixed += part.last * part.width * max(dtype.itemsize, 2)
        elif dtype.itemsize > 1:
            declared += part.heads * part.width * dtype.itemsize
        elif dtype == torch.int4:  # half a byte a number, and for each 32 a scale of two bytes and an offset of one
            declared += part.heads * (math.ceil(coded / 2) + 3 * math.ceil(coded / 32) + 2 * part.exact)
        else:  # a byte a number and a scale of two for each 128; rope keys of two bytes a number
            declared += part.heads * (coded + 2 * math.ceil(coded / 128) + 2 * part.exact)
    assert config.kv_bytes_per_token(dtype) == config.n_layer * declared
    slots = 0
    for i in range(config.n_layer):
        full = not config.window or config.window_pattern[i % len(config.window_pattern)] == "L"
        slots += max_len if full else min(config.sink_tokens + config.window, max_len)
    with Allocations() as allocations:
        cache = model.new_cache(batch_size, max_len, dtype=dtype)
    lengths = cache.lengths.nbytes
    assert allocations.total - lengths == cache.nbytes == (declared * slots + fixed * config.n_layer) * batch_size
    assert kv_bytes(config.kv_layouts(), max_len, dtype) == declared * slots + fixed * config.n_layer
    buffers = [buffer for layer in cache.layers for buffer in layer.buffers.values()]
    assert (torch.uint8 if dtype == torch.int4 else dtype) in {buffer.dtype for buffer in buffers}
    addresses = [buffer.data_ptr() for buffer in buffers]
    cached_logits(model, tokens(batch_size, max_len), [max_len - 2, 1, 1], cache)
    assert [buffer.data_ptr() for layer in cache.layers for buffer in layer.buffers.values()] == addresses
    assert cache.nbytes == allocations.total - lengths
