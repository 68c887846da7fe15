"""What the model computes with where torch's own form is slow, or takes much memory; results are the same.

Dimensions in comments: C width, N rows or outputs, V vocabulary; in attention B batch, G key heads, S keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_one_vector(x: Tensor) -> bool:
    """Whether x is a single row on a CPU, in decoding.

    A step then is bound by reading weights, and by so many kernels that their code is cold: this case has
    ways of its own through `linear`, `project` and RMSNorm.
    """
    single = x.numel() == x.size(-1) and x.dtype == torch.float32
    return single and not (x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling())


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., C) weight^T (C, N) -> (..., N).

    On CPUs the BLAS leaves the product of a matrix with one vector to one core, which cannot read memory as
    fast as all of them: here each takes a share of the rows.
    """
    shares = torch.get_num_threads()
    if is_one_vector(x) and shares > 1 and len(weight) % shares == 0:
        vectors = x.view(1, 1, -1).expand(shares, -1, -1).mT  # these strides are what the BLAS can take
        return torch.bmm(weight.view(shares, -1, weight.size(1)), vectors).view(*x.shape[:-1], -1)
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


def project(x: Tensor, *layers: Linear) -> list[Tensor]:
    """x through each of the layers; one vector through all of them in one product."""
    weights = [layer.weight for layer in layers]
    if not is_one_vector(x):
        return [linear(x, weight) for weight in weights]
    first, rows = weights[0], [len(weight) for weight in weights]
    if first.untyped_storage().nbytes() != sum(weight.nbytes for weight in weights):
        join(layers)
    return linear(x, first.as_strided((sum(rows), first.size(1)), (first.size(1), 1))).split(rows, -1)


@torch.inference_mode(False)
@torch.no_grad()
def join(layers: tuple[Linear, ...]) -> None:
    """Put the weights of layers side by side in one piece of memory, which a move or a copy undoes."""
    joint = torch.cat([layer.weight for layer in layers])
    for layer, part in zip(layers, joint.split([len(layer.weight) for layer in layers]), strict=True):
        layer.weight.data = part


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or x.dtype != torch.float32 or torch.compiler.is_compiling():
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        if torch.is_grad_enabled():
            return UnfusedRMSNorm.apply(x, self.weight, self.eps)
        if is_one_vector(x):
            mean_square = torch.dot(x.flatten(), x.flatten()).item() / x.size(-1)
            return (x * self.weight).mul_((mean_square + self.eps) ** -0.5)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


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


def attend_in_shares(q: Tensor, k: Tensor, v: Tensor, scale: float, shares: int) -> Tensor:
    """softmax(scale q k^T) v with the keys cut in equal shares, one for each core, and what is left over.

    q (B, G, N, D), k and v (B, G, S, D) -> (B, G, N, D). On CPUs the fused kernel leaves a key head to one
    core. A share's output counts by its part of the softmax's total ("Flash-Decoding", Dao et al. 2023).
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    q1, k1, v1 = (t.flatten(0, 1).unsqueeze(1) for t in (q, k, v))  # (B G, 1, N or S, D)
    cut = k.size(2) // shares * shares
    k2, v2 = (t[:, 0, :cut].unflatten(1, (shares, -1)) for t in (k1, v1))  # (B G, shares, S / shares, D)
    y, log_sum = flash(q1.expand(-1, shares, -1, -1), k2, v2, scale=scale)  # and (B G, shares, N)
    if cut < k.size(2):
        rest = flash(q1, k1[:, :, cut:], v1[:, :, cut:], scale=scale)
        y, log_sum = torch.cat((y, rest[0]), 1), torch.cat((log_sum, rest[1]), 1)
    return (y * log_sum.softmax(1)[..., None]).sum(1).view_as(q)


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
