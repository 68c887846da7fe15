"""What the model computes with where torch's own form is slow, or takes much memory; results are the same.

Dimensions in comments: C width, N rows or outputs, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from backends import cpu as native

FEW = 128  # rows; for more, a BLAS is faster, which copies the matrix into an order of its own


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., C) weight^T (C, N) -> (..., N)."""
    if x.numel() <= FEW * x.size(-1) and native.takes(x, weight):
        return native.linear(x, weight)
    return F.linear(x, weight)


class Linear(nn.Linear):
    """nn.Linear without bias, by `linear`.

    parts: of rows that compute different things, how many of each there are in turn: (16, 48) for 16 of a
    key, 48 of a value, 16 of the next key, ... The optimizer wants to know.
    """

    def __init__(self, width: int, out: int, parts: tuple[int, ...] = ()):
        super().__init__(width, out, bias=False)
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if native.handles(x, self.weight):
            return NativeNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class NativeNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return native.norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *native.norm_backward(*ctx.saved_tensors, ctx.eps, grad), None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020)."""
    return NativeSwiGLU.apply(gate, up) if native.handles(gate, up) else F.silu(gate) * up


class NativeSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return native.swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return native.swiglu_backward(*ctx.saved_tensors, grad)


class NativeRotation(torch.autograd.Function):
    """model.rotate of x (B, H, T, D)."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, lead: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.lead = lead
        return native.rotate(x, cos, sin, lead)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return native.rotate(grad, *ctx.saved_tensors, ctx.lead, sign=-1.0), None, None, None


class NativeCausalAttention(torch.autograd.Function):
    """softmax(scale q k^T) v over keys up to a query's own: q (B, H, T, D), k and v (B, G, T, D or Dv)."""

    @staticmethod
    def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether native.c has these widths, and is faster: a key head for each core, scores cached."""
        fits = q.size(-1) % native.COLUMNS == v.size(-1) % native.COLUMNS == 0 and q.size(2) <= native.LONGEST
        return fits and native.handles(q, k, v) and k.size(0) * k.size(1) >= torch.get_num_threads()

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        y, logs = native.causal(q, k, v, scale)
        ctx.save_for_backward(q, k, v, y, logs)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *native.causal_backward(*ctx.saved_tensors, ctx.scale, grad), None


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the logits `hidden weight^T`, which never exist all at once.

    Some rows at a time: their logits, their loss and, while the logits are there, what the loss will send
    back (as Liger Kernel does, arXiv 2410.10989). At a vocabulary of 50,304 the logits of a batch, in fp32
    and with their gradient, would be most of a training step's memory. Rows of target -1 do not count.
    """

    LOGITS = 1 << 24  # at a time: 64 MB in fp32
    CACHED = 1 << 20  # at a time by native.c, to stay in a CPU's cache; but at least 256 rows

    @staticmethod
    def takes(hidden: Tensor, weight: Tensor) -> bool:
        """Whether it is faster than the logits all at once, or those would take much memory."""
        many = hidden.numel() // hidden.size(-1) * len(weight) > LinearCrossEntropy.LOGITS
        return many or native.handles(hidden, weight)

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # (N, C), (V, C), (N,)
        by_native = native.handles(hidden, weight)
        rows = max(LinearCrossEntropy.LOGITS // len(weight), 1)
        if by_native:
            rows = min(max(LinearCrossEntropy.CACHED // len(weight), 256), rows)
        count, total = (targets >= 0).sum(), hidden.new_zeros((), dtype=torch.float32)
        needed = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needed[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
        for at in range(0, len(hidden), rows):
            h, target = hidden[at : at + rows], targets[at : at + rows]
            logits = F.linear(h, weight).float()
            if by_native:
                total += native.cross_entropy(logits, target).sum()
            else:
                counts, target = target[:, None] >= 0, target[:, None].clamp(min=0)
                logits -= logits.logsumexp(-1, keepdim=True)
                total -= (logits.gather(1, target) * counts).sum()
                if any(needed):
                    logits.exp_().scatter_add_(1, target, logits.new_full(target.shape, -1.0)).mul_(counts)
            grad = logits.to(h.dtype) if any(needed) else None  # softmax minus one-hot
            if needed[0]:
                grad_hidden[at : at + rows] = grad @ weight
            if needed[1]:
                grad_weight += grad.mT @ h
        ctx.save_for_backward(grad_hidden, grad_weight, count)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight, count = ctx.saved_tensors
        scale = grad / count
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * scale).type_as(grad_hidden)
        if grad_weight is not None:
            grad_weight = grad_weight * scale
        return grad_hidden, grad_weight, None


class LanguageModelLoss(nn.Module):
    """A model's mean cross-entropy, as one module to train: DDP, FSDP and torch.compile wrap this one."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Token ids and targets (B, T) -> loss in nats a token (); targets of -1 do not count."""
        return self.model(idx, targets, want_logits=False)[1]
