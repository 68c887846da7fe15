"""Whether C may compute in place of torch and model.py now: every question about that is asked here.

Torch's hidden states are partly known to private functions only. If a torch release removes one, the answer
is no, so that torch does the work; tests/test_cpu_decode.py names the function that is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from types import FunctionType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import model
from backends.cpu_library import library
from backends.fingerprints import is_known
from model import Linear
from nanokv import loss

# Functions of `torch` that return something falsy in plain eager mode.
PRIVATE = (
    "nn.modules.module._has_any_global_hook",
    "_C._len_torch_function_stack",  # TorchFunctionMode, which torch.set_default_device is too
    "_C._len_torch_dispatch_stack",  # TorchDispatchMode: fake tensors, FLOP counters
    "_C._functorch.maybe_current_level",  # vmap, grad, jvp
)
# What model.py and nanokv/loss.py use of torch, which a patch may replace.
TORCH_FUNCTIONS = attrgetter(
    *(f"nn.functional.{name}" for name in ("linear", "rms_norm", "silu", "embedding", "dropout", "cross_entropy")),
    *("nn.functional.scaled_dot_product_attention", "cat", "einsum", "arange", "where", "minimum"),
    *("nn.Linear.forward", "nn.Embedding.forward", "nn.Linear.__call__", "nn.Embedding.__call__"),
    *(f"nn.Module.{name}" for name in ("__call__", "__getattr__", "_call_impl", "_wrapped_call_impl")),
    "nn.ModuleList.__iter__",
)
MODULES = attrgetter("F", "torch", "nn")  # of model.py and nanokv/loss.py
IMPORTED = [TORCH_FUNCTIONS(torch), MODULES(model), MODULES(loss)]
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def find(names: tuple[str, ...]) -> list[Callable] | None:
    """These functions of torch; None if one is missing."""
    try:
        return [attrgetter(name)(torch) for name in names]
    except AttributeError:
        return None


STATES = find(PRIVATE)


def plain_operators() -> bool:
    """Whether operators on the CPU run eagerly and unchanged: no autocast, tracing, compiling, function
    or dispatch modes, functorch transforms, forward-mode gradients, or hooks on all modules. A microsecond.
    """
    forward_mode = getattr(forward_ad, "_current_level", 0) >= 0  # -1 outside of it
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or STATES is None or forward_mode:  # pyright: ignore
        return False
    return not (torch.is_autocast_enabled("cpu") or any([state() for state in STATES]))


def unpatched() -> bool:
    """Whether the functions of torch listed above, and the modules, are those that were imported."""
    return [TORCH_FUNCTIONS(torch), MODULES(model), MODULES(loss)] == IMPORTED


def readable(t: Any, dtype: torch.dtype = torch.float32) -> TypeGuard[Tensor]:
    """Whether t's memory has numbers of this dtype, which C can read; not necessarily in a row."""
    if type(t) not in (Tensor, nn.Parameter) or t.is_neg():  # a subclass may have no memory of its own
        return False
    return t.dtype == dtype and t.is_cpu and t.layout == torch.strided and t.numel() > 0


def can_replace(owner: type, method: str, *tensors: Tensor) -> bool:
    """Whether C may compute this method of a pure class for these tensors: fp32 numbers on the CPU, in plain
    eager mode, and the method and torch are what the C was written for.
    """
    if not (plain_operators() and all(map(readable, tensors)) and unpatched()):
        return False
    name = f"{owner.__module__}.{owner.__name__}.{method}"
    return is_known(name, getattr(owner, method)) and library() is not None


def as_written(module: nn.Module, known: type) -> bool:
    """Whether the module computes what this class of model.py says: it has that class, or the one of this
    folder that stands for it, and no hook, dropout, or attribute in place of a method, weight or child.
    """
    cls, own = type(module), vars(module)
    methods = [f for f in vars(cls).values() if isinstance(f, FunctionType)]
    ours = cls.__module__.startswith("backends.") and cls.__base__ is known
    ours = ours and all(f.__module__ == cls.__module__ for f in methods)
    if cls.__call__ is not nn.Module.__call__ or not (cls is known or ours):
        return False
    children = module._parameters.keys() | module._modules.keys() | module._buffers.keys()
    changed = own.keys() & children or any(own[name] for name in HOOKS) or any(hasattr(known, k) for k in own)
    return not changed and not (module.training and own.get("dropout"))


def plain_weight(linear: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The weight of a Linear; None if it computes more than x weight^T, or C cannot read the weight in dtype."""
    plain = as_written(linear, Linear) and Linear.forward is nn.Linear.forward and linear.bias is None
    return linear.weight if plain and readable(linear.weight, dtype) else None
