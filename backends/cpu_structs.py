"""The structs of cpu_decode.c, filled in from a model and its cache.

Everything that cpu_decode.c does not compute ends in CannotDecode: other classes, hooks, adapters, biases,
weights that are not contiguous fp32 numbers on the CPU, other cache formats.

Dimensions in comments: B batch, C n_embd, V vocabulary.
"""

from __future__ import annotations

import ctypes
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from model import (
    GPT,
    MLP,
    Attend,
    Block,
    GPTConfig,
    GroupedQueryAttention,
    Linear,
    MultiHeadLatentAttention,
    RMSNorm,
)
from nanokv.cache import KVCache, LayerCache, Plan

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
P, N, R = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


class CannotDecode(Exception):
    """cpu_decode.c does not compute what this model does over this cache."""


class CNorm(ctypes.Structure):
    """`norm` of cpu_decode.c."""

    _fields_ = [("weight", P), ("eps", R)]


class CLayer(ctypes.Structure):
    """`layer` of cpu_decode.c."""

    _fields_ = [
        *((f"{name}_norm", CNorm) for name in ("attention", "mlp", "q", "k", "q_a", "kv_a")),
        *((name, P) for name in ("q_a", "q", "k", "v", "kv_a", "kv_b", "o", "gate", "up", "down")),
        *((name, P) for name in ("keys", "values")),
        *((name, N) for name in ("inner", "slots", "window", "sinks")),
    ]


class CModel(ctypes.Structure):
    """`model` of cpu_decode.c."""

    _fields_ = [
        *(("embedding", P), ("final_norm", CNorm), ("layers", ctypes.POINTER(CLayer))),
        *((name, P) for name in ("frequency", "lengths", "scratch")),
        *((name, N) for name in ("n_layer", "batch", "width", "vocab", "heads", "groups", "max_len")),
        *((name, N) for name in ("endless", "head", "rope", "rank", "q_rank", "nope", "dv")),
        *(("threads", N), ("scale", R)),
    ]


def is_known(cls: type, known: type) -> bool:
    """Whether cls is this class of model.py, or the one of this folder that computes the same."""
    if cls is known:
        return True
    own = [f for f in vars(cls).values() if isinstance(f, FunctionType)]
    ours = cls.__module__.startswith("backends.") and cls.__base__ is known
    return ours and all(f.__module__ == cls.__module__ for f in own)


def check(module: nn.Module, known: type) -> Any:
    """The module, if it computes what this class of model.py says. Raises CannotDecode if it has another
    class, a hook, dropout, or an attribute of its own in place of a method, weight or child.
    """
    own = vars(module)
    children = module._parameters.keys() | module._modules.keys() | module._buffers.keys()
    changed = own.keys() & children or any(own[name] for name in HOOKS) or any(hasattr(known, k) for k in own)
    drops = module.training and own.get("dropout")
    if not is_known(type(module), known) or changed or drops:
        raise CannotDecode(f"{type(module).__name__} is not as model.py has it")
    return module


class Structs:
    """`model` and its layers for cpu_decode.c, and the tensors whose addresses are in them.

    Raises CannotDecode, or an AttributeError, KeyError or TypeError where a module is put together otherwise.
    """

    def __init__(self, model: GPT, cache: KVCache):
        self.tensors: list[Tensor] = []
        self.model, self.layers = CModel(), (CLayer * len(model.layers))()
        self.fill_model(check(model, GPT), model.config)
        self.fill_cache(model.config, cache)
        shapes = set()
        for block, layer, own in zip(model.layers, self.layers, cache.layers, strict=True):
            self.fill_mlp(check(block, Block), layer)
            fill = self.fill_latent if "latent" in own.buffers else self.fill_grouped
            shapes.add(fill(block.self_attn, layer, own.buffers))
        if len(shapes) > 1:
            raise CannotDecode("attention differs between layers")
        names = ("heads", "groups", "head", "rank", "q_rank", "nope", "dv", "scale")
        for name, number in zip(names, shapes.pop(), strict=True):
            setattr(self.model, name, number)

    def address(self, t: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> int:
        """Of a contiguous tensor of this shape. One number would not show that it was replaced: see Step."""
        plain = type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided and not t.is_neg()
        if not plain or t.dtype != dtype or t.device.type != "cpu" or t.shape != shape or t.numel() == 0:
            raise CannotDecode(f"a tensor is not {list(shape)} {dtype} numbers on the CPU")
        if not t.is_contiguous() or (t.numel() == 1 and dtype == torch.float32):
            raise CannotDecode("a tensor is not contiguous, or one number")
        self.tensors.append(t)
        return t.data_ptr()

    def weight(self, module: nn.Module, out: int, width: int) -> int:
        linear = check(module, Linear)
        if linear._parameters["bias"] is not None:
            raise CannotDecode("a matrix has a bias")
        return self.address(linear._parameters["weight"], out, width)

    def norm(self, module: nn.Module, width: int) -> CNorm:
        return CNorm(self.address(check(module, RMSNorm)._parameters["weight"], width), module.eps)

    def fill_model(self, model: GPT, config: GPTConfig) -> None:
        c, embedding = self.model, check(model.embed_tokens, nn.Embedding)
        check(model.layers, nn.ModuleList)
        if type(config) is not GPTConfig or embedding.max_norm is not None:
            raise CannotDecode("the config or the embedding is not as model.py has it")
        if config.dropout and model.training:
            raise CannotDecode("dropout is on")
        weight = embedding._parameters["weight"]
        c.vocab, c.width = weight.shape
        c.embedding, c.final_norm = self.address(weight, c.vocab, c.width), self.norm(model.norm, c.width)
        c.n_layer, c.layers = len(self.layers), self.layers
        c.rope, repeat = model.layers[0].self_attn.rope_width, config.qk_rope_repeat or 1
        # in radians a token, as model.rope_angles has them
        width = c.rope // repeat
        exponent = torch.arange(0, width, 2, dtype=torch.float32) / -max(width, 1)
        self.frequency = (config.rope_theta**exponent).repeat(repeat).contiguous()  # (rope / 2)
        c.frequency = self.frequency.data_ptr()

    def fill_cache(self, config: GPTConfig, cache: KVCache) -> None:
        c, sinks = self.model, config.sink_tokens
        c.batch, c.max_len, c.endless = cache.batch_size, cache.max_len, cache.endless
        c.lengths = self.address(cache.lengths, c.batch, dtype=torch.int64)
        for own, layer, window in zip(cache.layers, self.layers, config.layer_windows(), strict=True):
            plan = own.plan
            layer.window, layer.sinks, layer.slots = plan.window, plan.sinks, plan.slots
            if type(own) is not LayerCache or type(plan) is not Plan or own.joined:
                raise CannotDecode("the cache of a layer is not as nanokv/cache.py has it")
            if plan.window != window or (window and plan.sinks != sinks):
                raise CannotDecode("the cache has other windows than the model")
            if plan.ring != max(plan.slots - plan.sinks, 1) or (not window and plan.slots != cache.max_len):
                raise CannotDecode("the cache has other slots than nanokv/cache.py gives it")

    def fill_mlp(self, block: Block, c: CLayer) -> None:
        width, mlp = self.model.width, check(block.mlp, MLP)
        c.inner = mlp.gate_proj.weight.size(0)
        c.attention_norm = self.norm(block.input_layernorm, width)
        c.mlp_norm = self.norm(block.post_attention_layernorm, width)
        c.gate, c.up = (self.weight(linear, c.inner, width) for linear in (mlp.gate_proj, mlp.up_proj))
        c.down = self.weight(mlp.down_proj, width, c.inner)

    def fill_grouped(self, module: nn.Module, c: CLayer, buffers: dict[str, Tensor]) -> tuple[float, ...]:
        attention, width = check(module, GroupedQueryAttention), self.model.width
        d, (q, k) = attention.head_dim, (p.weight.size(0) for p in (attention.q_proj, attention.k_proj))
        heads, groups = q // d, k // d
        if heads % groups or self.model.rope > d or buffers.keys() != {"k", "v"}:
            raise CannotDecode("heads do not fit")
        c.q, c.o = self.weight(attention.q_proj, heads * d, width), self.weight(attention.o_proj, width, q)
        c.k, c.v = (self.weight(p, groups * d, width) for p in (attention.k_proj, attention.v_proj))
        if attention.qk_norm:
            c.q_norm, c.k_norm = (self.norm(norm, d) for norm in (attention.q_norm, attention.k_norm))
        shape = (self.model.batch, groups, c.slots, d)
        c.keys, c.values = (self.address(buffers[name], *shape) for name in ("k", "v"))
        return heads, groups, d, 0, 0, 0, 0, check(attention.attend, Attend).scale

    def fill_latent(self, module: nn.Module, c: CLayer, buffers: dict[str, Tensor]) -> tuple[float, ...]:
        attention, width = check(module, MultiHeadLatentAttention), self.model.width
        heads, r, q_rank = attention.n_head, attention.rank, attention.q_rank
        dn, dr, dv = attention.dn, attention.dr, attention.dv
        if dr != self.model.rope or buffers.keys() != {"latent"}:
            raise CannotDecode("the latent does not fit")
        if q_rank is None:
            c.q = self.weight(attention.q_proj, heads * (dn + dr), width)
        else:
            c.q_a, c.q_a_norm = (
                self.weight(attention.q_a_proj, q_rank, width),
                self.norm(attention.q_a_layernorm, q_rank),
            )
            c.q = self.weight(attention.q_b_proj, heads * (dn + dr), q_rank)
        c.kv_a = self.weight(attention.kv_a_proj_with_mqa, r + dr, width)
        c.kv_a_norm = self.norm(attention.kv_a_layernorm, r)
        c.kv_b = self.weight(attention.kv_b_proj, heads * (dn + dv), r)
        c.o = self.weight(attention.o_proj, width, heads * dv)
        c.keys = c.values = self.address(buffers["latent"], self.model.batch, 1, c.slots, r + dr)
        scale = check(attention.attend, Attend).scale
        return heads, 1, dn + dr, r, q_rank or 0, dn, dv, scale
