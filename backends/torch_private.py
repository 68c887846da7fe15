"""The one place that asks torch about its hidden states, partly by private functions.

If a torch release removes one of them, `plain_eager` answers no, so that its callers leave the work to torch;
tests/test_cpu_decode.py names the function that is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

import torch
from torch.autograd import forward_ad

# Functions of `torch` that return something falsy in plain eager mode.
PRIVATE = (
    "nn.modules.module._has_any_global_hook",
    "_C._len_torch_function_stack",  # TorchFunctionMode, which torch.set_default_device is too
    "_C._len_torch_dispatch_stack",  # TorchDispatchMode: fake tensors, FLOP counters
    "_C._functorch.maybe_current_level",  # vmap, grad, jvp
)


def find(names: tuple[str, ...]) -> list[Callable] | None:
    """These functions of torch; None if one is missing."""
    try:
        return [attrgetter(name)(torch) for name in names]
    except AttributeError:
        return None


STATES = find(PRIVATE)


def plain_eager() -> bool:
    """Whether operators on the CPU run as in `plain_operators`, and nothing records gradients."""
    return not torch.is_grad_enabled() and plain_operators()


def plain_operators() -> bool:
    """Whether operators on the CPU run now, once and as they are: no autocast, tracing, compiling, function
    or dispatch modes, functorch transforms, forward-mode gradients, or hooks on all
    modules. Takes a microsecond.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or STATES is None:
        return False
    if getattr(forward_ad, "_current_level", 0) >= 0:  # -1 outside of forward-mode differentiation
        return False
    return not (torch.is_autocast_enabled("cpu") or any([state() for state in STATES]))
