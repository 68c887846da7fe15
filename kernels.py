"""What the model computes with where torch's own form is slow, or takes much memory; results are the same.

Dimensions in comments: C width, N rows or outputs, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import native

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
        if native.takes(x, self.weight):
            return native.norm(x, self.weight, self.eps)
        if x.is_cpu and x.dtype == torch.float32 and not torch.compiler.is_compiling():
            return UnfusedRMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class UnfusedRMSNorm(torch.autograd.Function):
    """RMSNorm for training on CPUs, which lack a fused kernel, in fewer passes than autograd's."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()  # (..., 1), 1 / rms(x)
        ctx.save_for_backward(x, scale, weight)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale, weight = ctx.saved_tensors
        product, s = grad * x, scale.flatten()  # (..., C), (N,)
        rows = product.flatten(0, -2)
        along = torch.mv(rows, weight).mul_(s).mul_(s).div_(-x.size(-1)).view_as(scale)  # changes of rms(x)
        grad_weight = torch.mv(rows.mT, s)
        return torch.mul(grad, weight, out=product).addcmul_(x, along).mul_(scale), grad_weight, None


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the logits `hidden weight^T`, which never exist all at once.

    Some rows at a time: their logits, their loss and, while the logits are there, what the loss will send
    back (as Liger Kernel does, arXiv 2410.10989). At a vocabulary of 50,304 the logits of a batch, in fp32
    and with their gradient, would be most of a training step's memory. Rows of target -1 do not count.
    """

    LOGITS = 1 << 24  # at a time: 64 MB in fp32

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # (N, C), (V, C), (N,)
        rows = max(LinearCrossEntropy.LOGITS // len(weight), 1)
        count, total = (targets >= 0).sum(), hidden.new_zeros((), dtype=torch.float32)
        needed = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needed[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
        for at in range(0, len(hidden), rows):
            h, target = hidden[at : at + rows], targets[at : at + rows, None]
            logits = F.linear(h, weight).float()
            normaliser = logits.logsumexp(-1, keepdim=True)
            counts = target >= 0
            target = target.clamp(min=0)
            total += ((normaliser - logits.gather(1, target)) * counts).sum()
            if any(needed):  # softmax minus one-hot, in place of the logits
                grad = logits.sub_(normaliser).exp_()
                grad.scatter_add_(1, target, grad.new_full(target.shape, -1.0)).mul_(counts)
                grad = grad.to(h.dtype)
                if needed[0]:
                    grad_hidden[at : at + rows] = grad @ weight
                if needed[1]:
                    grad_weight += grad.mT @ h
        ctx.save_for_backward(grad_hidden, grad_weight, count)
        return total / count

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight, count = ctx.saved_tensors
        scale = grad / count
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * scale).type_as(grad_hidden)
        if grad_weight is not None:
            grad_weight = grad_weight * scale
        return grad_hidden, grad_weight, None
