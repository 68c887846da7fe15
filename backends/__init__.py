"""Faster implementations of the model's maths, attached from outside.

`accelerate` swaps the classes of the modules that a backend knows. Parameters, names, hooks, copies and
checkpoints stay what they were, and each class computes as model.py does wherever it cannot be faster.
"""

from __future__ import annotations

import os
from typing import NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from backends import cpu_library
from nanokv.config import UserError

M = TypeVar("M", bound=nn.Module)
CHOICES = ("auto", "none", "cpu", "cuda")
_notes: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # why nothing was taken


class Piece(NamedTuple):
    """A class of model.py or nanokv, and the subclass that computes the same sooner."""

    name: str
    pure: type[nn.Module]
    fast: type[nn.Module]
    stands_for: tuple[str, ...]  # the functions that `fast` does not call, see fingerprints.py
    edited: bool  # whether one of these is no longer what `fast` was written for


def pieces() -> list[Piece]:
    from backends import cpu_decode, cpu_train
    from backends.fingerprints import edited

    loss = tuple(f"nanokv.loss.LanguageModelLoss.{method}" for method in ("cross_entropy", "head_loss"))
    table = {
        "norm": (cpu_train.CpuRMSNorm, ("model.RMSNorm.forward",)),
        "attention": (cpu_train.CpuAttend, ("model.Attend.forward",)),
        "mlp": (cpu_train.CpuMLP, ("model.MLP.forward",)),
        "loss": (cpu_train.CpuLanguageModelLoss, (*loss, "model.GPT.head")),
        "decoding": (cpu_decode.CpuGPT, cpu_decode.STANDS_FOR),
    }
    return [Piece(name, fast.__base__, fast, names, bool(edited(names))) for name, (fast, names) in table.items()]


def accelerate(module: M, dtype: torch.dtype | None = None) -> M:
    """Swap in the faster classes, in place, as NANOKV_BACKEND says: `auto` (the fastest), `none`, `cpu` or
    `cuda`. Returns the module. Only modules whose type is exactly one that a backend knows are swapped.
    dtype: of activations, where autocast makes it another than that of the weights.

    Raises UserError for another value of NANOKV_BACKEND.
    """
    choice = os.environ.get("NANOKV_BACKEND") or "auto"
    if choice not in CHOICES:
        raise UserError(f"NANOKV_BACKEND must be one of {', '.join(CHOICES)}, not {choice!r}")
    _notes[module] = why_not(module, choice, dtype)
    if _notes[module]:
        return module
    half = computes_in(module, dtype) == torch.bfloat16
    return swap(module, {piece.pure: piece.fast for piece in pieces() if not left_to_torch(piece, half)})


def pure(module: M) -> M:
    """Undo `accelerate`, in place. Returns the module."""
    return swap(module, {piece.fast: piece.pure for piece in pieces()})


def swap(module: M, classes: dict[type, type]) -> M:
    for part in module.modules():
        part.__class__ = classes.get(type(part), type(part))
    return module


def why_not(module: nn.Module, choice: str, dtype: torch.dtype | None) -> str:
    """Why no class can be swapped; empty if some can."""
    if choice == "none":
        return "none: torch"
    if choice == "cuda":
        return "cuda: torch (no kernels of this backend yet)"
    weights = list(module.parameters())
    if not all(w.is_cpu for w in weights):
        return f"{weights[0].device.type}: torch"
    if computes_in(module, dtype) is None:
        return "cpu: torch (C takes weights in fp32 or bf16, without autocast)"
    reason = cpu_library.why_not()
    return reason and f"cpu: torch ({reason})"


def left_to_torch(piece: Piece, half: bool) -> str:
    """Why a class is not swapped; empty if it is. half: weights and activations are in bf16."""
    if piece.edited:
        return "its code was edited"
    if half and piece.name != "decoding":
        return "in bf16, C only decodes"
    slower = piece.name != "decoding" and torch.get_num_threads() > 1 and not cpu_library.has_openmp()
    return "on one thread, without OpenMP, C is slower" if slower else ""


def computes_in(module: nn.Module, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype of the weights, fp32 if there are others too, if C reads it and computes for activations in dtype."""
    dtypes = {w.dtype for w in module.parameters()} or {torch.float32}
    if torch.float32 in dtypes:
        return torch.float32 if dtype in (None, torch.float32) else None
    return torch.bfloat16 if dtypes == {torch.bfloat16} and dtype in (None, torch.bfloat16) else None


def describe(module: nn.Module) -> str:
    """One line: which backend computes what, and what was left to torch, and why."""
    from backends.cpu_decode import DECODES

    types, known, note = {type(part) for part in module.modules()}, pieces(), _notes.get(module, "none: torch")
    foreign = {"decoding"} if types.isdisjoint(DECODES) else set()  # an attention that is not of model.py
    taken = ", ".join(piece.name for piece in known if piece.fast in types and piece.name not in foreign)
    if note and not taken:
        return f"backend {note}"
    half, left = computes_in(module, None) == torch.bfloat16, dict[str, list[str]]()  # reason -> names
    for piece in known:
        if piece.pure in types and (reason := left_to_torch(piece, half)):
            left.setdefault(reason, []).append(piece.name)
    n = torch.get_num_threads() if cpu_library.has_openmp() else 1
    parts = [f"{taken} in C ({n} thread{'s' * (n > 1)})"] if taken else []
    parts += [f"{', '.join(names)}: torch ({reason})" for reason, names in left.items()]
    return "backend cpu: " + "; ".join(parts) if parts else "backend none: torch"
