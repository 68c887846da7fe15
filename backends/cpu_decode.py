"""Decoding on a CPU: one call of cpu_decode.c for each step of a model, in place of a hundred operators.

`CpuGPT` stands in for model.GPT. A `Step` has what the C function needs of one model and one cache: addresses
of weights and buffers, and widths. It is made at the first decode step over that cache, and used as long as
nothing has changed that it was made from: before each step `Step.holds` compares the model's modules, their
attributes, hooks, weights and classes, and the cache, with what they were. That takes some microseconds for
each block. After a change, the step is left to model.py, and the next one makes a new Step, if cpu_decode.c
still computes what the model does.
"""

from __future__ import annotations

import ctypes
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model as model_py
from backends import cpu_library, fingerprints
from backends.cpu_structs import CannotDecode, Structs, check
from backends.torch_private import plain_eager
from model import GPT, MLP, Attend, Block, GroupedQueryAttention, Linear, MultiHeadLatentAttention, RMSNorm
from nanokv.cache import KVCache, LayerCache, Plan

FEW_ROWS = 128  # of hidden states; for more a BLAS is faster, which first reorders the matrix
LONGEST_PAUSE = 64  # decode steps, before it is tried again to make a Step of a model that could not be one

# What cpu_decode.c computes instead. If one of these was edited, it is not used: see fingerprints.py.
STANDS_FOR = (
    *("model.GPT.hidden", "model.GPT.head", "model.Block.forward", "model.MLP.forward"),
    *("model.RMSNorm.forward", "model.Attend.forward", "model.GroupedQueryAttention.forward"),
    *("model.MultiHeadLatentAttention.forward", "model.MultiHeadLatentAttention.absorbed"),
    *("model.MultiHeadLatentAttention.expanded", "model.rotate", "model.rope_angles", "model.visible"),
    *("model.GPTConfig.layer_windows", "nanokv.cache.KVCache.advance", "nanokv.cache.KVCache.reserve"),
    *("nanokv.cache.LayerCache.append", "nanokv.cache.LayerCache.store", "nanokv.cache.LayerCache.read"),
    *("nanokv.cache.LayerCache.held", "nanokv.cache.Plan.make", "nanokv.cache.Plan.held"),
    "nanokv.cache.Plan.slot_of",
)
# What these classes and modules define must not change while a Step is in use.
CLASSES = (GPT, Block, MLP, GroupedQueryAttention, MultiHeadLatentAttention, Attend, RMSNorm, Linear)
CLASSES += (model_py.GPTConfig, KVCache, LayerCache, Plan)
MODEL_FUNCTIONS = attrgetter("rotate", "rope_angles", "visible")
MODULE_FUNCTIONS = attrgetter("__call__", "__getattr__", "_call_impl", "_wrapped_call_impl")
TORCH_FUNCTIONS = attrgetter("linear", "rms_norm", "silu", "embedding", "scaled_dot_product_attention")


def torch_functions() -> tuple[Any, ...]:
    forwards = nn.Linear.forward, nn.Embedding.forward
    return *forwards, *TORCH_FUNCTIONS(F), *MODULE_FUNCTIONS(nn.Module)


IMPORTED = torch_functions()


def snapshot(module: nn.Module) -> tuple[dict[str, Any], list[Any]]:
    """A module's attributes, to be compared with its `__dict__` later, and those containers that are empty.

    Of a container that is not empty it has a copy, since it could be changed in place.
    """
    attributes, empty = dict(vars(module)), []
    for name, value in attributes.items():
        if isinstance(value, dict | set):
            if value:
                attributes[name] = value.copy()
            else:
                empty.append(value)
    return attributes, empty


ATTRIBUTES, DTYPE = attrgetter("__dict__"), attrgetter("dtype")
CACHE = attrgetter("layers", "batch_size", "max_len", "endless", "counts")
PLAN = attrgetter("window", "sinks", "slots", "ring")


class Step:
    """One decode step of a model over a cache, by cpu_decode.c. Raises CannotDecode."""

    def __init__(self, model: GPT, cache: KVCache, lib: ctypes.CDLL):
        edited = fingerprints.edited(STANDS_FOR) or torch_functions() != IMPORTED
        if type(cache) is not KVCache or cache.counts is not None or edited:
            raise CannotDecode("the cache, or a function that this stands for, was replaced")
        try:
            self.structs = Structs(model, cache)
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise CannotDecode("the model is put together in another way") from e
        self.lib, self.threads = lib, 0
        self.tensors = self.structs.tensors
        self.storages = [
            t.detach() for t in self.tensors
        ]  # so that nothing else comes to be at their addresses
        self.model, self.config, self.lengths = model, model.config, cache.lengths
        self.objects = [*model.modules(), *cache.layers]
        self.plans = [layer.plan for layer in cache.layers]
        attributes, empty = zip(*map(snapshot, self.objects), strict=True)
        self.attributes, self.empty = list(attributes), sum(empty, [])
        self.config_was = dict(vars(model.config))
        self.classes, self.functions = list(map(dict, map(vars, CLASSES))), MODEL_FUNCTIONS(model_py)
        self.types, self.tensors_were, self.cache_was = self.look(cache)

    def look(self, cache: KVCache) -> tuple[list[Any], ...]:
        """What has to stay as it is, besides attributes."""
        types = list(map(type, self.objects))
        # of a contiguous tensor: number and strides give the shape
        parts = (type, Tensor.data_ptr, Tensor.stride, Tensor.numel, DTYPE)
        tensors = [list(map(part, self.tensors)) for part in parts]
        layers, *numbers = CACHE(cache)
        methods = len(vars(cache)), *map(len, map(vars, self.plans))  # a patched one is an attribute more
        return types, tensors, [list(layers), numbers, methods, list(map(PLAN, self.plans))]

    def holds(self, model: GPT, cache: KVCache) -> bool:
        """Whether model and cache are what this was made from, but for the numbers in their tensors."""
        try:
            return (
                model is self.model
                and cache.lengths is self.lengths
                and list(map(ATTRIBUTES, self.objects)) == self.attributes
                and not any(self.empty)
                and vars(self.config) == self.config_was
                and self.look(cache) == (self.types, self.tensors_were, self.cache_was)
                and list(map(vars, CLASSES)) == self.classes
                and MODEL_FUNCTIONS(model_py) == self.functions
                and torch_functions() == IMPORTED
            )
        except Exception:  # an attribute that changed may not even compare: two tensors do not
            return False

    def run(self, idx: Tensor, cache: KVCache) -> Tensor | None:
        """Token ids (B, 1) -> hidden states (B, 1, C), or None if model.py has to do it, which then finds the
        cache as it was. Raises ValueError if the cache is full.
        """
        c, threads, held = self.structs.model, torch.get_num_threads(), cache.host_copy
        if threads != self.threads:
            self.threads = c.threads = threads
            c.scratch = None
            self.scratch = torch.empty(self.lib.decode_scratch(ctypes.byref(c)), dtype=torch.float32)
            c.scratch = self.scratch.data_ptr()
        cache.reserve(1)
        hidden = torch.empty(c.batch, 1, c.width, dtype=torch.float32)
        if self.lib.decode_step(ctypes.byref(c), idx.data_ptr(), idx.stride(0), hidden.data_ptr()):
            cache.host_copy = held
            return None
        cache.first = False
        return hidden


class Pause:
    """In place of a Step that could not be made: for how many decode steps not to try again."""

    def __init__(self, last: Pause | None):
        self.length = min(2 * last.length, LONGEST_PAUSE) if last else 1
        self.left = self.length


STEPS: WeakKeyDictionary[KVCache, Step | Pause] = WeakKeyDictionary()


def step_for(model: GPT, cache: KVCache) -> Step | None:
    """The Step of this cache, made anew if there was none; None if this step is model.py's."""
    step, lib = STEPS.get(cache), cpu_library.library()
    if lib is None:
        return None
    if isinstance(step, Step):
        if step.holds(model, cache):
            return step
        del STEPS[cache]
        return None
    if step is not None and step.left > 0:
        step.left -= 1
        return None
    try:
        STEPS[cache] = Step(model, cache, lib)
    except CannotDecode:
        STEPS[cache] = Pause(step)
        return None
    return STEPS[cache]


def few_rows_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., C) weight^T (C, V) -> (..., V), both fp32 and contiguous, for few rows. Raises MemoryError."""
    (V, C), y = weight.shape, torch.empty(*x.shape[:-1], len(weight), dtype=torch.float32)
    cpu_library.call("few_rows_linear", [weight, x, y], x.numel() // C, V, C, torch.get_num_threads())
    return y


def is_plain(t: Tensor) -> bool:
    """Whether C can read it as fp32 numbers in a row."""
    return (
        type(t) in (Tensor, nn.Parameter)
        and t.dtype == torch.float32
        and t.device.type == "cpu"
        and t.layout == torch.strided
        and t.is_contiguous()
        and not t.is_neg()
    )


class CpuGPT(GPT):
    """GPT whose decode steps are one C call each, and whose head is another."""

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        if cache is not None and type(cache) is KVCache and plain_eager():
            one = type(idx) is Tensor and idx.dtype == torch.int64 and idx.shape == (cache.batch_size, 1)
            step = step_for(self, cache) if one and idx.device.type == "cpu" else None
            hidden = step.run(idx, cache) if step else None
            if hidden is not None:
                return hidden
        return super().hidden(idx, cache)

    def head(self, hidden: Tensor) -> Tensor:
        few = 0 < hidden.numel() <= FEW_ROWS * hidden.size(-1)
        if (
            few
            and plain_eager()
            and is_plain(hidden)
            and cpu_library.library()
            and torch_functions() == IMPORTED
        ):
            weight = self.head_weight()
            if weight is not None and is_plain(weight) and weight.size(1) == hidden.size(-1):
                return few_rows_linear(hidden, weight)
        return super().head(hidden)

    def head_weight(self) -> Tensor | None:
        """The matrix that is all of the output head; None if there is more to it."""
        try:
            if self.config.tie_embeddings:
                return self.embed_tokens.weight
            linear = check(self.lm_head, Linear)
            return linear.weight if linear.bias is None else None
        except (AttributeError, CannotDecode):
            return None


PIECES = (("decoding", GPT, CpuGPT, STANDS_FOR),)
