"""Training in C on a CPU: RMSNorm, causal attention, SwiGLU and the cross-entropy, forward and backward.

Each class computes as its pure class where C cannot: see `takes`. Dimensions in comments: N rows, C width,
I width inside the MLP, V vocabulary; others as in model.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backends.cpu_decode import IMPORTED, CpuGPT, torch_functions
from backends.cpu_library import N, P, call, takes
from backends.cpu_structs import CannotDecode, check
from backends.fingerprints import is_known
from model import GPT, MLP, Attend, Linear, RMSNorm
from nanokv.loss import LanguageModelLoss

COLUMNS, LONGEST = 16, 1024  # attention's widths are multiples of it; most tokens, so that scores stay cached
LOGITS = 1 << 20  # at a time, to stay in the cache; but at least 256 rows
CROSS_ENTROPY = F.cross_entropy


def is_plain(linear: nn.Module) -> bool:
    """Whether it is a Linear that computes x weight^T, and nobody watches."""
    try:
        return check(linear, Linear).bias is None and Linear.forward is nn.Linear.forward
    except CannotDecode:
        return False


def unpatched(name: str, function: Callable) -> bool:
    """Whether the function is that which its class here stands for, and torch's are torch's."""
    torch_is = torch_functions() == IMPORTED and F.cross_entropy is CROSS_ENTROPY
    return torch_is and is_known(name, function)


def differentiable(pure: Callable, ctx, inputs: tuple, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of `pure`, whose inputs these are, for whoever wants gradients of gradients."""
    # views, since one input may be made of another, and no path from one to another counts here
    inputs = [t.view_as(t) if isinstance(t, Tensor) else t for t in inputs]
    wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
    grads = iter(torch.autograd.grad(pure(*inputs), wanted, grad, create_graph=True))
    return tuple(next(grads) if needed else None for needed in ctx.needs_input_grad)


class CpuRMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        fits = takes(x, self.weight) and self.weight.shape == x.shape[-1:]
        if fits and unpatched("model.RMSNorm.forward", RMSNorm.forward):
            return Norm.apply(x, self.weight, self.eps)
        return super().forward(x)


class Norm(torch.autograd.Function):
    """x (..., C), weight (C,) -> x / rms(x) * weight."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        rows, y, weight = as_rows(x), x.new_empty(x.shape), weight.contiguous()
        call("rms_norm", [rows, weight, y], *rows.shape, rows.stride(0), eps)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            norm = lambda x, w, eps: F.rms_norm(x, w.shape, w, eps)  # noqa: E731
            return differentiable(norm, ctx, (x, weight, ctx.eps), grad)
        rows, grad, weight = as_rows(x), grad.contiguous(), weight.contiguous()
        grads = x.new_empty(x.shape), torch.empty_like(weight)
        call("rms_norm_backward", [rows, weight, grad, *grads], *rows.shape, rows.stride(0), ctx.eps)
        return *grads, None


def as_rows(x: Tensor) -> Tensor:
    """x (..., C) -> (N, C) whose rows are contiguous; a copy only if it must be."""
    x = x.reshape(-1, x.size(-1))
    return x if x.stride(1) == 1 else x.contiguous()


class CpuAttend(Attend):
    def forward(self, q: Tensor, k, v, mask=None, cache=None, key_factor=None) -> Tensor:
        plain = mask is None and key_factor is None and not (self.training and self.dropout)
        if plain and takes(q, k, v) and unpatched("model.Attend.forward", Attend.forward):
            (B, H, T, D), G = q.shape, k.size(1)
            fits = k.shape == (B, G, T, D) and v.shape[:3] == (B, G, T) and H % G == 0 and self.scale > 0
            whole = D % COLUMNS == v.size(-1) % COLUMNS == 0 and T <= LONGEST
            if fits and whole and torch.get_num_threads() <= B * G:  # a key head for each core
                return CausalAttention.apply(q, k, v, self.scale)
        return super().forward(q, k, v, mask, cache, key_factor)


class Strided(ctypes.Structure):
    """`tensor` of cpu_train.c: a tensor (B, H, T, D) with contiguous rows."""

    _fields_ = [("x", P), ("batch", N), ("head", N), ("token", N)]


class CausalAttention(torch.autograd.Function):
    """softmax(scale q k^T) v over keys up to a query's own: q (B, H, T, D), k and v (B, G, T, D or Dv)."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        (B, H, T, D), G, Dv = q.shape, k.size(1), v.size(-1)
        y, logs = q.new_empty(B, T, H, Dv).transpose(1, 2), q.new_empty(B, H, T)
        call_strided("causal", (q, k, v, y), logs, B, H, G, T, D, Dv, scale)
        ctx.save_for_backward(q, k, v, y, logs)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, logs = ctx.saved_tensors
        (B, H, T, D), G, Dv = q.shape, k.size(1), v.size(-1)
        if torch.is_grad_enabled():
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                causal = lambda q, k, v, scale: F.scaled_dot_product_attention(  # noqa: E731
                    q, k, v, is_causal=True, scale=scale, enable_gqa=G < H
                )
                return differentiable(causal, ctx, (q, k, v, ctx.scale), grad)
        grads = q.new_empty(B, T, H, D), q.new_empty(B, T, G, D), q.new_empty(B, T, G, Dv)
        grads = tuple(t.transpose(1, 2) for t in grads)
        call_strided("causal_backward", (q, k, v, y, grad, *grads), logs, B, H, G, T, D, Dv, ctx.scale)
        return *grads, None


def call_strided(name: str, tensors: tuple[Tensor, ...], logs: Tensor, *numbers: float) -> None:
    tensors = tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)  # kept until the call ends
    call(name, [*(Strided(t.data_ptr(), *t.stride()[:3]) for t in tensors), logs], *numbers)


class CpuMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        if takes(x) and unpatched("model.MLP.forward", MLP.forward):
            children, C = (self.gate_proj, self.up_proj, self.down_proj), x.size(-1)
            if all(is_plain(child) for child in children):
                gate, up, down = weights = [child.weight for child in children]
                fits = gate.shape == up.shape == down.shape[::-1] == (len(gate), C)
                if fits and takes(*weights):
                    return SwiGLU.apply(x, *weights)
        return super().forward(x)


class SwiGLU(torch.autograd.Function):
    """x (..., C), gate and up (I, C), down (C, I) -> down (silu(gate x) * up x). One product for both."""

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        both = torch.cat((gate, up))  # (2 I, C)
        wide = F.linear(x, both).flatten(0, -2)  # (N, 2 I)
        ctx.save_for_backward(x, gate, up, down, both, wide)
        return F.linear(gated(wide), down).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, down, both, wide = ctx.saved_tensors
        if torch.is_grad_enabled():
            mlp = lambda x, g, u, d: F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d)  # noqa: E731
            return differentiable(mlp, ctx, (x, gate, up, down), grad)
        grad = grad.reshape(-1, grad.size(-1))  # (N, C)
        inner = grad @ down  # (N, I)
        y, dwide = torch.empty_like(inner), torch.empty_like(wide)
        call("swiglu", [*halves(wide), inner, y, *halves(dwide)], *inner.shape, wide.size(1))
        weights = dwide.mT @ x.reshape(-1, x.size(-1))  # (2 I, C)
        return (dwide @ both).view(x.shape), *weights.split(len(gate)), grad.mT @ y


def gated(wide: Tensor) -> Tensor:
    """[gate | up] (N, 2 I) -> silu(gate) * up (N, I)."""
    y = wide.new_empty(len(wide), wide.size(1) // 2)
    call("swiglu", [*halves(wide), None, y, None, None], *y.shape, wide.size(1))
    return y


def halves(wide: Tensor) -> tuple[Tensor, Tensor]:
    return wide[:, : wide.size(1) // 2], wide[:, wide.size(1) // 2 :]


class CpuLanguageModelLoss(LanguageModelLoss):
    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        own = LanguageModelLoss
        known = takes(hidden) and type(self).total is own.total and "total" not in vars(self)
        known = known and unpatched("nanokv.loss.LanguageModelLoss.total", own.total)
        if known and unpatched("nanokv.loss.LanguageModelLoss.cross_entropy", own.cross_entropy):
            weight = head_weight(self.model)
            fits = weight is not None and takes(weight) and hidden.size(1) == weight.size(1)
            if fits and are_tokens(targets, len(hidden), len(weight)):
                weight = weight if torch.is_grad_enabled() else weight.detach()
                return CrossEntropy.apply(hidden, weight, targets)
        return super().cross_entropy(hidden, targets)


def head_weight(model: nn.Module) -> Tensor | None:
    """The matrix (V, C) that makes logits of hidden states; None where the head is more than a matrix."""
    head = getattr(type(model), "head", None)
    if (
        "head" in vars(model)
        or head not in (GPT.head, CpuGPT.head)
        or not unpatched("model.GPT.head", GPT.head)
    ):
        return None
    if model.config.tie_embeddings:
        return model.embed_tokens.weight
    return model.lm_head.weight if is_plain(model.lm_head) else None


def are_tokens(targets: Tensor, rows: int, vocabulary: int) -> bool:
    """Whether targets (N,) are token ids or -1; if not, it is torch's to refuse them."""
    if type(targets) is not Tensor or targets.dtype != torch.int64 or targets.shape != (rows,):
        return False
    return targets.is_cpu and bool(targets.min() >= -1 and targets.max() < vocabulary)


class CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the logits hidden weight^T: hidden (N, C), weight (V, C), targets (N,) -> ().

    The logits never exist all at once: some rows at a time, with their loss and, while the logits are cached,
    what the loss will send back (as Liger Kernel does, arXiv 2410.10989). Targets of -1 do not count.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        rows, needed = max(LOGITS // len(weight), 256), ctx.needs_input_grad
        count, losses = (targets >= 0).sum(), hidden.new_empty(len(hidden))
        logits, targets = hidden.new_empty(min(rows, len(hidden)), len(weight)), targets.contiguous()
        grad_hidden = torch.empty_like(hidden) if needed[0] else None
        grad_weight = torch.zeros_like(weight) if needed[1] else None
        parts = zip(hidden.split(rows), targets.split(rows), losses.split(rows), strict=True)
        for i, (h, target, loss) in enumerate(parts):
            part = torch.mm(h, weight.mT, out=logits[: len(h)])
            call("cross_entropy", [part, target, loss], *part.shape)  # logits become their gradient
            if needed[0]:
                torch.mm(part, weight, out=grad_hidden[i * rows :][: len(h)])
            if needed[1]:
                grad_weight.addmm_(part.mT, h)
        ctx.save_for_backward(hidden, weight, targets, grad_hidden, grad_weight, count)
        return losses.sum() / count

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, grad_hidden, grad_weight, count = ctx.saved_tensors
        if torch.is_grad_enabled():
            loss = lambda h, w, t: F.cross_entropy(F.linear(h, w), t, ignore_index=-1)  # noqa: E731
            return differentiable(loss, ctx, (hidden, weight, targets), grad)
        scale = grad / count
        return *(None if g is None else g * scale for g in (grad_hidden, grad_weight)), None


# name, pure class, its faster subclass, and the functions that the subclass does not call
PIECES = [
    ("norm", RMSNorm, CpuRMSNorm, ("model.RMSNorm.forward",)),
    ("attention", Attend, CpuAttend, ("model.Attend.forward",)),
    ("mlp", MLP, CpuMLP, ("model.MLP.forward",)),
    (
        "loss",
        LanguageModelLoss,
        CpuLanguageModelLoss,
        (
            "nanokv.loss.LanguageModelLoss.cross_entropy",
            "nanokv.loss.LanguageModelLoss.total",
            "model.GPT.head",
        ),
    ),
]
