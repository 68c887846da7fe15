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
    """Whether operators on the CPU run now, once and as they are: no gradients, autocast, tracing, compiling,
    function or dispatch modes, functorch transforms, or hooks on all modules. Takes about a microsecond.
    """
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or STATES is None:
        return False
    if getattr(forward_ad, "_current_level", 0) >= 0:  # -1 outside of forward-mode differentiation
        return False
    states = [state() for state in STATES]
    return not (any(states) or torch.compiler.is_compiling() or torch.jit.is_tracing())
