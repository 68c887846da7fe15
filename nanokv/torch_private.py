"""Private functions of torch, and stand-ins that compute the same if a torch release removes them.

backends/cpu_checks.py reads private states of torch. All other private functions are called from here.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor


def one_by_one(method: str) -> Callable[..., list[Tensor]]:
    """A function that calls a method of Tensor on each tensor of a list. An argument may be a list of values."""

    def for_each(tensors: list[Tensor], *args: Any, **knobs: Any) -> list[Tensor]:
        rows = zip(*(arg if isinstance(arg, list) else [arg] * len(tensors) for arg in args), strict=True)
        return [getattr(tensor, method)(*row, **knobs) for tensor, row in zip(tensors, rows, strict=True)]

    return for_each


def adamw(params, grads, means, squares, _, steps, *, lr, beta1, beta2, weight_decay, eps, **unused) -> None:
    """One step of AdamW for lists of tensors, in place. `steps` already include this step."""
    for p, g, mean, square, step in zip(params, grads, means, squares, steps, strict=True):
        mean.lerp_(g, 1 - beta1)
        square.lerp_(g * g, 1 - beta2)
        p.mul_(1 - lr * weight_decay)
        p.sub_(lr * mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + eps))


STAND_INS: dict[str, Callable] = {
    "_foreach_add_": one_by_one("add_"),
    "_foreach_mul_": one_by_one("mul_"),
    "_foreach_lerp": one_by_one("lerp"),
    "_foreach_lerp_": one_by_one("lerp_"),
    "_fused_adamw_": adamw,
    "cpu._is_avx512_bf16_supported": lambda: False,
    "cpu._is_amx_tile_supported": lambda: False,
}


def private(name: str) -> Callable:
    """The function `torch.{name}`, or its stand-in if torch does not have it."""
    stand_in = STAND_INS[name]
    try:
        return attrgetter(name)(torch)
    except AttributeError:
        return stand_in
