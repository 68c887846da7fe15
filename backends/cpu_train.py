"""Training in C on a CPU: RMSNorm, causal attention, SwiGLU and the cross-entropy, forward and backward.

If C cannot take an input, the class calls its pure class. torch computes second derivatives, from the same
function written in torch. Dimensions in comments: N rows, C width, I width inside the MLP, V vocabulary;
others as in model.py.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.func import vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from backends.cpu_checks import can_replace, plain_weight, readable
from backends.cpu_decode import head_weight
from backends.cpu_library import N, P, call
from model import MLP, Attend, RMSNorm
from nanokv.loss import LanguageModelLoss

COLUMNS, LONGEST = 16, 1024  # attention's widths are multiples of it; most tokens, so that scores stay cached
LOGITS = 1 << 20  # at a time, to stay in the cache; but at least 256 rows


class CpuRMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        known = type(self.eps) is float and can_replace(RMSNorm, "forward", x, self.weight)
        if known and self.weight.shape == x.shape[-1:]:
            return Norm.apply(x, self.weight, self.eps)
        return super().forward(x)


class Norm(torch.autograd.Function):
    """x (..., C), weight (C,) -> x / rms(x) * weight."""

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        y = x.new_empty(x.shape)
        call("rms_norm", [x.contiguous(), weight.contiguous(), y], x.numel() // len(weight), len(weight), eps)
        return y

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *vjp(lambda x, w: F.rms_norm(x, w.shape, w, ctx.eps), x, weight)[1](grad), None
        inputs, grads = ([t.contiguous() for t in (x, weight, grad)], [x.new_empty(x.shape), x.new_empty(len(weight))])
        call("rms_norm_backward", [*inputs, *grads], x.numel() // len(weight), len(weight), ctx.eps)
        return *grads, None


class CpuAttend(Attend):
    def forward(self, q: Tensor, k, v, mask=None, cache=None, key_factor=None) -> Tensor:
        plain = mask is None and key_factor is None and not (self.training and self.dropout)
        plain = plain and type(self.scale) is float
        if plain and can_replace(Attend, "forward", q, k, v):
            (B, H, T, D), G = q.shape, k.size(1)
            fits = k.shape == (B, G, T, D) and v.shape[:3] == (B, G, T) and H % G == 0 and self.scale > 0
            whole = D % COLUMNS == v.size(-1) % COLUMNS == 0 and T <= LONGEST
            if fits and whole and torch.get_num_threads() <= B * G:  # at least one key head for each thread
                return CausalAttention.apply(q, k, v, self.scale)
        return super().forward(q, k, v, mask, cache, key_factor)


class CausalAttention(torch.autograd.Function):
    """softmax(scale q k^T) v over keys up to a query's own: q (B, H, T, D), k and v (B, G, T, D or Dv)."""

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        (B, H, T, D), G, Dv = q.shape, k.size(1), v.size(-1)
        y, logs = q.new_empty(B, T, H, Dv).transpose(1, 2), q.new_empty(B, H, T)
        call_strided("causal", (q, k, v, y), logs, B, H, G, T, D, Dv, scale)
        ctx.save_for_backward(q, k, v, y, logs)
        ctx.scale = scale
        return y

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, logs = ctx.saved_tensors
        logs = logs.contiguous()  # hooks on saved tensors may return other strides
        (B, H, T, D), G, Dv = q.shape, k.size(1), v.size(-1)
        if torch.is_grad_enabled():
            options = dict(is_causal=True, scale=ctx.scale, enable_gqa=G < H)
            with sdpa_kernel(SDPBackend.MATH):
                return *vjp(lambda *qkv: F.scaled_dot_product_attention(*qkv, **options), q, k, v)[1](grad), None
        grads = q.new_empty(B, T, H, D), q.new_zeros(B, T, G, D), q.new_zeros(B, T, G, Dv)
        grads = tuple(t.transpose(1, 2) for t in grads)
        call_strided("causal_backward", (q, k, v, y, grad, *grads), logs, B, H, G, T, D, Dv, ctx.scale)
        return *grads, None


class Strided(ctypes.Structure):
    """`tensor` of cpu_train.c: a tensor (B, H, T, D) with contiguous rows."""

    _fields_ = [("x", P), ("batch", N), ("head", N), ("token", N)]


def call_strided(name: str, tensors: tuple[Tensor, ...], logs: Tensor, *numbers: float) -> None:
    tensors = tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)  # kept alive for the call
    call(name, [*(Strided(t.data_ptr(), *t.stride()[:3]) for t in tensors), logs], *numbers)


class CpuMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        if can_replace(MLP, "forward", x) and x.ndim > 1:
            gate, up, down = map(plain_weight, (self.gate_proj, self.up_proj, self.down_proj))
            known = all(isinstance(weight, Tensor) for weight in (gate, up, down))
            if known and gate.shape == up.shape == down.shape[::-1] == (len(gate), x.size(-1)):
                return SwiGLU.apply(x, gate, up, down)
        return super().forward(x)


class SwiGLU(torch.autograd.Function):
    """x (..., C), gate and up (I, C), down (C, I) -> down (silu(gate x) * up x). One product makes both."""

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        both = torch.cat((gate, up))  # (2 I, C)
        wide = F.linear(x, both).flatten(0, -2)  # (N, 2 I)
        y = wide.new_empty(len(wide), len(gate))  # (N, I) silu(gate x) * up x
        call("swiglu", [*wide.split(len(gate), 1), None, y, None, None], *y.shape, wide.size(1))
        ctx.save_for_backward(x, gate, up, down, both, wide)
        return F.linear(y, down).view(*x.shape[:-1], -1)

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, down, both, wide = ctx.saved_tensors
        if torch.is_grad_enabled():
            pure = lambda x, g, u, d: F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d)  # noqa: E731
            return vjp(pure, x, gate, up, down)[1](grad)
        grad, wide = grad.reshape(-1, grad.size(-1)), wide.contiguous()  # (N, C), (N, 2 I)
        inner = grad @ down  # (N, I)
        y, dwide, I = torch.empty_like(inner), torch.empty_like(wide), len(gate)  # noqa: E741
        call("swiglu", [*wide.split(I, 1), inner, y, *dwide.split(I, 1)], *inner.shape, wide.size(1))
        dboth = dwide.mT @ x.reshape(-1, x.size(-1))  # (2 I, C)
        return (dwide @ both).view(x.shape), *dboth.split(I), grad.mT @ y


class CpuLanguageModelLoss(LanguageModelLoss):
    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        pure = LanguageModelLoss
        if can_replace(pure, "cross_entropy", hidden) and can_replace(pure, "head_loss"):
            own = "head_loss" not in vars(self) and type(self).head_loss is pure.head_loss
            head = head_weight(self.model) if own else None
            if head is not None and hidden.size(1) == head.size(1) and are_tokens(targets, len(hidden), len(head)):
                head = head if torch.is_grad_enabled() else head.detach()
                return CrossEntropy.apply(hidden, head, targets)
        return super().cross_entropy(hidden, targets)


def are_tokens(targets: Tensor, rows: int, vocabulary: int) -> bool:
    """Whether targets (N,) are token ids or -1; if not, torch computes, and raises the error."""
    fits = readable(targets, torch.int64) and targets.shape == (rows,)
    return fits and bool(targets.min() >= -1 and targets.max() < vocabulary)


class CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the logits hidden weight^T: hidden (N, C), weight (V, C), targets (N,) -> ().

    The logits never exist all at once: some rows at a time, with their loss and, while the logits are cached,
    what the loss will send back (as Liger Kernel does, arXiv 2410.10989). Targets of -1 do not count.
    """

    @staticmethod
    @custom_fwd(device_type="cpu")
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
            if grad_hidden is not None:
                torch.mm(part, weight, out=grad_hidden[i * rows :][: len(h)])
            if grad_weight is not None:
                grad_weight.addmm_(part.mT, h)
        ctx.save_for_backward(hidden, weight, targets, grad_hidden, grad_weight, count)
        return losses.sum() / count

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, *grads, count = ctx.saved_tensors
        if torch.is_grad_enabled():
            pure = lambda h, w: F.cross_entropy(F.linear(h, w), targets, ignore_index=-1)  # noqa: E731
            return *vjp(pure, hidden, weight)[1](grad), None
        return *(None if g is None else g * (grad / count.clamp(min=1)) for g in grads), None
