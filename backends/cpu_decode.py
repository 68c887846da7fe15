"""Decoding on a CPU: one call of cpu_decode.c for each step of a model, in place of a hundred operators.

`CpuGPT` stands in for model.GPT. A `Step` has what the C function needs of one model and one cache: addresses
of weights and buffers, and widths. It is made at the first decode step over that cache, and used as long as
nothing has changed that it was made from: `Step.holds` compares the model's modules, their attributes, hooks,
weights and classes, and the cache, with what they were. That takes some microseconds for each block.
"""

from __future__ import annotations

import ctypes
from operator import attrgetter
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import model as pure
from backends import cpu_library
from backends.cpu_checks import as_written, can_replace, plain_operators, plain_weight, readable, unpatched
from backends.cpu_library import N, P, R
from backends.fingerprints import edited, resolve
from model import GPT, GPTConfig
from nanokv.cache import CACHE_FORMATS, KVCache, LayerCache, Plan
from nanokv.quantization import INT4

FEW_ROWS = 128  # of hidden states; for more a BLAS is faster, which first reorders the matrix
RETRY = 8  # decode steps that model.py takes after a change, before a new Step is tried

# What cpu_decode.c computes instead. If one of these was edited, it is not used: see fingerprints.py.
STANDS_FOR = (
    *("model.GPT.hidden", "model.GPT.head", "model.Block.forward", "model.MLP.forward"),
    *("model.RMSNorm.forward", "model.Attend.forward", "model.GroupedQueryAttention.forward"),
    *("model.MultiHeadLatentAttention.forward", "model.MultiHeadLatentAttention.absorbed"),
    *("model.MultiHeadLatentAttention.expanded", "model.MultiHeadLatentAttention.keys_and_values"),
    *("model.CausalConv.forward", "model.rotate", "model.rope_angles", "model.window_mask"),
    *("model.GPTConfig.layer_windows", "nanokv.cache.KVCache.advance", "nanokv.cache.KVCache.reserve"),
    *(f"nanokv.cache.LayerCache.{name}" for name in ("append", "store", "read", "held", "previous")),
    *("nanokv.cache.LayerCache.encode", "nanokv.cache.LayerCache.decode", "nanokv.cache.Plan.update"),
    *("nanokv.cache.Plan.positions_held", "nanokv.cache.Plan.slot_of"),
)
# Classes whose attributes must stay what they are while a Step is in use; FUNCTIONS of model.py likewise.
DECODES = (pure.GroupedQueryAttention, pure.MultiHeadLatentAttention)
CLASSES = (GPT, pure.Block, pure.MLP, pure.Attend, pure.RMSNorm, pure.Linear, pure.CausalConv)
CLASSES += (GPTConfig, KVCache, LayerCache, Plan)
FUNCTIONS = attrgetter("rotate", "rope_frequencies", "rope_angles", "rope_scaling.scale", "window_mask")
CACHE = attrgetter("layers", "batch_size", "max_len", "endless")
PLAN = attrgetter("window", "sinks", "slots", "ring", "last")
TENSOR = (type, Tensor.data_ptr, Tensor.size, Tensor.is_contiguous, Tensor.is_neg, attrgetter("dtype"))

FORMATS = {dtype: i for i, dtype in enumerate(CACHE_FORMATS.values())}  # cpu_storage.h numbers them
WEIGHTS = (torch.float32, torch.bfloat16)
Weights = dict[str, tuple]  # field of a C struct -> a module, and the shape of its weight


# The structs of cpu_decode.c.
class CNorm(ctypes.Structure):
    _fields_ = [("weight", P), ("eps", R)]


class CPart(ctypes.Structure):
    _fields_ = [
        *((name, P) for name in ("codes", "exact", "scales", "offsets")),
        *((name, N) for name in ("format", "width", "exact_width", "groups")),
    ]


class CConv(ctypes.Structure):
    _fields_ = [("weight", P), ("past", CPart), ("taps", N), ("slots", N)]


class CLayer(ctypes.Structure):
    _fields_ = [
        *((f"{name}_norm", CNorm) for name in ("attention", "mlp", "q", "k", "q_a", "kv_a")),
        *(("k_conv", CConv), ("v_conv", CConv)),
        *((name, P) for name in ("q_a", "q", "k", "v", "kv_a", "kv_b", "o", "gate", "up", "down")),
        *((name, CPart) for name in ("keys", "values", "key_factor")),
        *((name, N) for name in ("inner", "slots", "window", "sinks")),
    ]


class CModel(ctypes.Structure):
    _fields_ = [
        *(("embedding", P), ("final_norm", CNorm), ("layers", ctypes.POINTER(CLayer))),
        *((name, P) for name in ("frequency", "lengths", "scratch")),
        *((name, N) for name in ("n_layer", "batch", "width", "vocab", "heads", "groups", "max_len")),
        *((name, N) for name in ("endless", "head", "rope", "dv", "rank", "q_rank", "nope")),
        *(("threads", N), ("weights", N), ("scale", R), ("rope_factor", R)),
    ]


def require(condition: bool, fault: str) -> None:
    """Raises ValueError unless cpu_decode.c computes what the model does over the cache."""
    if not condition:
        raise ValueError(fault)


def grouped_query(a: Any, config: Any) -> tuple[dict[str, int], Weights]:
    """Numbers for `model` of cpu_decode.c, and weights for a `layer`."""
    C, H, G, D = config.n_embd, config.n_head, config.n_kv_head, a.head_dim
    weights = {"q": (a.q_proj, H * D, C), "o": (a.o_proj, C, H * D)}
    weights |= {"k": (a.k_proj, G * D, C), "v": (a.v_proj, G * D, C)}
    if a.qk_norm:
        weights |= {"q_norm": (a.q_norm, D), "k_norm": (a.k_norm, D)}
    return {"heads": H, "groups": G, "head": D, "dv": D, "scale": a.attend.scale}, weights


def latent(a: Any, config: Any) -> tuple[dict[str, int], Weights]:
    C, H, r, A, dn, dr, dv = config.n_embd, a.n_head, a.rank, a.q_rank, a.dn, a.dr, a.dv
    if A is None:
        weights = {"q": (a.q_proj, H * (dn + dr), C)}
    else:
        weights = {"q_a": (a.q_a_proj, A, C), "q_a_norm": (a.q_a_layernorm, A)}
        weights |= {"q": (a.q_b_proj, H * (dn + dr), A)}
    weights |= {"kv_a": (a.kv_a_proj_with_mqa, r + dr, C), "kv_a_norm": (a.kv_a_layernorm, r)}
    weights |= {"kv_b": (a.kv_b_proj, H * (dn + dv), r), "o": (a.o_proj, C, H * dv)}
    if a.qk_norm:
        weights |= {"q_norm": (a.q_norm, dn + dr), "k_norm": (a.k_norm, dr if a.qk_norm == "shared" else dn + dr)}
    numbers = {"heads": H, "groups": 1, "head": dn + dr, "rank": r, "q_rank": A or 0, "nope": dn, "dv": dv}
    return numbers | {"scale": a.attend.scale}, weights


def frozen(x: Any) -> Any:
    """A copy of containers that holds what is in them now, since they may change in place."""
    if isinstance(x, list):
        return [frozen(part) for part in x]
    if isinstance(x, dict | MappingProxyType):
        return {name: frozen(value) for name, value in x.items()}
    return x.copy() if isinstance(x, set) else x


def plans(cache: KVCache) -> list[Plan]:
    every = [plan for own in cache.layers for plan in (own.plan, own.plan_of_last)]
    return [plan for plan in every if plan is not None]


class Step:
    """One decode step of a model over a cache, by cpu_decode.c. Raises ValueError, AttributeError, KeyError
    or TypeError if cpu_decode.c does not compute what the model does.
    """

    def __init__(self, model: GPT, cache: KVCache):
        require(unpatched() and not edited(STANDS_FOR), "a function was replaced")
        self.model, self.lengths, self.threads = model, cache.lengths, 0
        self.tensors: list[Tensor] = []  # whose addresses are in the structs
        self.c, self.layers = CModel(), (CLayer * len(model.layers))()
        self.fill_model(model, model.config, cache)
        for block, layer, own in zip(model.layers, self.layers, cache.layers, strict=True):
            self.fill_layer(block, layer, model.config)
            self.fill_cache(own, layer, model.config, block.self_attn)
        self.objects = [*model.modules(), model.config, *cache.layers]
        patchable = [cache, *cache.layers, *plans(cache)]
        require(not any(callable(getattr(type(x), name, None)) for x in patchable for name in vars(x)), "a patch")
        self.functions = [resolve(name) for name in STANDS_FOR]
        self.was = frozen(self.state(cache))

    def fill_model(self, model: GPT, config: GPTConfig, cache: KVCache) -> None:
        c, embedding, attention = self.c, model.embed_tokens, model.layers[0].self_attn
        known = map(as_written, (model, model.layers, embedding), (GPT, nn.ModuleList, nn.Embedding))
        require(type(config) is GPTConfig and all(known), "other classes")
        require(embedding.max_norm is None and not (config.dropout and model.training), "the embedding")
        c.vocab, c.width = embedding.weight.shape
        self.dtype, c.weights = embedding.weight.dtype, FORMATS[embedding.weight.dtype]
        require(self.dtype in WEIGHTS, "weights in another dtype")
        c.embedding = self.address(embedding.weight, c.vocab, c.width)
        self.fill(c, {"final_norm": (model.norm, c.width)})
        c.n_layer, c.layers, c.rope = len(self.layers), self.layers, attention.rope_width
        is_mla = isinstance(attention, pure.MultiHeadLatentAttention)
        self.kind = pure.MultiHeadLatentAttention if is_mla else pure.GroupedQueryAttention
        self.parts = latent if is_mla else grouped_query
        self.numbers, _ = self.parts(attention, config)
        for name, number in self.numbers.items():
            setattr(c, name, number)
        require(c.heads % c.groups == 0 and c.rope <= c.head - c.nope, "heads do not fit")
        self.frequency = pure.rope_frequencies(config, c.rope).contiguous()
        require(self.frequency.shape == (c.rope // 2,) and c.rope % 2 == 0, "RoPE's width")
        c.rope_factor = 1.0 if config.rope_attention_factor is None else config.rope_attention_factor
        c.frequency, c.lengths = (
            self.frequency.data_ptr(),
            self.address(cache.lengths, cache.batch_size, dtype=torch.int64),
        )
        c.batch, c.max_len, c.endless = cache.batch_size, cache.max_len, cache.endless
        require([own.plan.window for own in cache.layers] == config.layer_windows(), "other windows")

    def fill_layer(self, block: pure.Block, layer: CLayer, config: GPTConfig) -> None:
        C, mlp, attention = self.c.width, block.mlp, block.self_attn
        kinds = pure.Block, pure.MLP, self.kind, pure.Attend
        require(all(map(as_written, (block, mlp, attention, attention.attend), kinds)), "a block")
        numbers, weights = self.parts(attention, config)
        require(numbers == self.numbers, "attention differs between layers")
        require(type(attention.attend.scale) in (int, float), "the scale is no number")
        I = layer.inner = mlp.gate_proj.weight.size(0)  # noqa: E741
        weights |= {"gate": (mlp.gate_proj, I, C), "up": (mlp.up_proj, I, C), "down": (mlp.down_proj, C, I)}
        weights |= {"attention_norm": (block.input_layernorm, C)}
        self.fill(layer, weights | {"mlp_norm": (block.post_attention_layernorm, C)})

    def fill_cache(self, own: LayerCache, layer: CLayer, config: GPTConfig, attention: Any) -> None:
        c, plan = self.c, own.plan
        require(type(own) is LayerCache and type(plan) is Plan and not own.joined, "another cache")
        layer.window, layer.sinks, layer.slots = plan.window, plan.sinks, plan.slots
        fits = plan.sinks == config.sink_tokens if plan.window else plan.slots == c.max_len
        require(fits and plan.ring == max(plan.slots - plan.sinks, 1), "other slots")
        names = ("latent", "latent") if c.rank else ("k", "v")
        layer.keys, layer.values = (self.part(own, name, plan.slots, c.groups) for name in names)
        require(own.layout.parts[names[0]].width == (c.rank + c.rope if c.rank else c.head), "another width")
        if "key_factor" in own.layout.parts:
            layer.key_factor = self.part(own, "key_factor", plan.slots, c.heads)
        names = ("latent_conv",) if c.rank else ("k_conv", "v_conv")
        for field, name in zip(("k_conv", "v_conv"), names if attention.kv_conv else (), strict=False):
            conv, ring = getattr(attention, name), own.plan_of_last
            assert ring is not None  # as its layout has such a part
            require(as_written(conv, pure.CausalConv) and conv.part == name, "a convolution")
            weight, past, taps = conv.weight, self.part(own, name, ring.slots, 1), attention.kv_conv
            require(past.width == (c.rank + c.rope if c.rank else c.groups * c.head), "another width")
            require(ring.last == taps <= ring.slots == ring.ring and weight is conv._parameters["weight"], "its ring")
            setattr(layer, field, CConv(self.address(weight, taps, 1, past.width), past, taps, ring.slots))

    def part(self, own: LayerCache, name: str, slots: int, heads: int) -> CPart:
        """The buffers of a part, which must be those that its layout declares."""
        part, codes = own.layout.parts[name], own.buffers[name]
        dtype = INT4 if f"{name}_offset" in own.buffers else codes.dtype
        declared = own.layout.buffers(dtype, last=part.last > 0)
        found = {}
        for ending in ("", "_exact", "_scale", "_offset"):
            of, width, kind = declared.get(name + ending, (heads, 0, None))
            require(of == heads and (name + ending in own.buffers) == bool(width), "other buffers")
            found[ending] = (
                width,
                self.address(own.buffers[name + ending], self.c.batch, of, slots, width, dtype=kind) if width else None,
            )
        (width, codes), (exact, exact_at), (groups, scales), (_, offsets) = found.values()
        return CPart(codes, exact_at, scales, offsets, FORMATS[dtype], part.width - exact, exact, groups)

    def fill(self, struct: CModel | CLayer, weights: Weights) -> None:
        for field, (module, *shape) in weights.items():
            norm = as_written(module, pure.RMSNorm)
            require(module.weight is module._parameters.get("weight"), "a weight is computed")
            require(not norm or type(module.eps) in (int, float), "eps is no number")
            address = self.address(module.weight if norm else plain_weight(module, self.dtype), *shape)
            setattr(struct, field, CNorm(address, module.eps) if norm else address)

    def address(self, t: Any, *shape: int, dtype: torch.dtype | None = None) -> int:
        """Of a tensor that C can read, contiguous and of this shape and dtype (None: that of the weights)."""
        fits = readable(t, dtype or self.dtype) and t.shape == shape and t.is_contiguous()
        require(fits, f"a tensor is not {shape}")
        # `==` of two tensors of one number is a truth value, so `holds` would miss that one was replaced
        require(t is self.lengths or t.numel() > 1, "a tensor is one number")
        self.tensors.append(t)
        return t.data_ptr()

    def state(self, cache: KVCache) -> list[Any]:
        """All that this was made from, but for the numbers in tensors."""
        used = plans(cache)
        return [
            list(map(vars, self.objects)),
            list(map(type, self.objects)),
            [list(map(part, self.tensors)) for part in TENSOR],
            [*CACHE(cache), *map(PLAN, used)],
            list(map(len, map(vars, [cache, *used]))),  # a patched method adds an attribute
            list(map(vars, CLASSES + DECODES)),
            [function.__code__ for function in self.functions],
            list(self.model.layers._modules.values()),  # dictionaries compare without their order
            [*FUNCTIONS(pure), unpatched()],
        ]

    def holds(self, model: GPT, cache: KVCache) -> bool:
        """Whether model and cache are what this was made from, but for the numbers in their tensors."""
        try:
            return model is self.model and cache.lengths is self.lengths and self.state(cache) == self.was
        except Exception:  # an attribute that changed may not even compare: two tensors do not
            return False

    def run(self, idx: Tensor, cache: KVCache) -> Tensor | None:
        """Token ids (B, 1) -> hidden states (B, 1, C) in the weights' dtype, or None if model.py has to do it,
        whose cache is then unchanged. Raises ValueError if the cache is full.
        """
        c, lib, threads, held = self.c, cpu_library.library(), torch.get_num_threads(), (cache.host_copy, cache.first)
        if threads != self.threads:
            self.threads = c.threads = threads
            c.scratch = None
            self.scratch = torch.empty(lib.decode_scratch(ctypes.byref(c)), dtype=torch.float32)
            c.scratch = self.scratch.data_ptr()
        cache.reserve(1)
        hidden = torch.empty(c.batch, 1, c.width, dtype=torch.float32)
        if lib.decode_step(ctypes.byref(c), idx.data_ptr(), idx.stride(0), hidden.data_ptr()):
            cache.host_copy, cache.first = held
            return None
        return hidden.to(self.dtype)


# of each cache: its Step, or how many decode steps to wait before one is made
STEPS: WeakKeyDictionary[KVCache, Step | int] = WeakKeyDictionary()


def step_for(model: GPT, cache: KVCache) -> Step | None:
    """The Step of this cache, made if there was none; None if this step is model.py's."""
    step = STEPS.get(cache, 0)
    if isinstance(step, Step) and step.holds(model, cache):
        return step
    if step:  # it no longer holds, or was tried recently
        STEPS[cache] = RETRY if isinstance(step, Step) else step - 1
        return None
    try:
        step = STEPS[cache] = Step(model, cache)
    except (ValueError, AttributeError, KeyError, TypeError):  # the model is put together in another way
        step, STEPS[cache] = None, RETRY
    return step


class CpuGPT(GPT):
    """GPT whose decode steps are one C call each, and whose head is another."""

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        if type(cache) is KVCache and not torch.is_grad_enabled() and plain_operators():
            one = readable(idx, torch.int64) and idx.shape == (cache.batch_size, 1) and cache.counts is None
            step = step_for(self, cache) if one and cpu_library.library() else None
            hidden = step.run(idx, cache) if step else None
            if hidden is not None:
                return hidden
        return super().hidden(idx, cache)

    def head(self, hidden: Tensor) -> Tensor:
        eager = type(hidden) is Tensor and not torch.is_grad_enabled()
        few = eager and 0 < hidden.numel() <= FEW_ROWS * hidden.size(-1) and hidden.dtype in WEIGHTS
        x = hidden.float() if few else None
        if x is not None and can_replace(GPT, "head", x) and x.is_contiguous():
            weight = head_weight(self, hidden.dtype)
            if weight is not None and weight.is_contiguous() and weight.size(1) == x.size(-1):
                V, C = weight.shape
                y, packed = x.new_empty(*x.shape[:-1], V), x.new_empty(FEW_ROWS, C)
                numbers = x.numel() // C, V, C, FORMATS[weight.dtype], torch.get_num_threads()
                cpu_library.call("few_rows_linear", [weight, x, packed, y], *numbers)
                return y.to(hidden.dtype)  # (..., V)
        return super().head(hidden)


def head_weight(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The matrix (V, C) in dtype that makes logits of hidden states; None where the head is more than a matrix."""
    replaced = "head" in vars(model) or getattr(type(model), "head", None) not in (GPT.head, CpuGPT.head)
    if replaced or not can_replace(GPT, "head"):
        return None
    weight = model.embed_tokens.weight if model.config.tie_embeddings else plain_weight(model.lm_head, dtype)
    return weight if readable(weight, dtype) else None
