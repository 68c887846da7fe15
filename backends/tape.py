"""Training on a CPU: all blocks of a model as one call of native.c forward and one back, by their tape.

A tape is the list of the blocks' operators, as `record` of each block, attention and MLP writes it down.
native.c (see `tape` there) runs it over some sequences on each core, and from its end back for the gradients.
Operators of torch would each cost some microseconds of Python and autograd, wait for all cores, and pass
everything through memory. Products are those of torch's BLAS, one for all matrices that read the same.

Dimensions in comments: B batch, T tokens, C n_embd.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from backends import cpu as native
from backends.cpu import N, P
from nanokv.loss import Linear, RMSNorm

NORM, LINEAR, ROTATE, COPY, SWIGLU, CAUSAL = range(6)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of a module
TOKENS = 192  # at a time: enough for fast products
OPERATION = struct.Struct("@19lf0l")  # `operation` of native.c
OUT = 16  # which of its numbers is the slot that it makes


class Job(ctypes.Structure):
    """`job` of native.c."""

    _fields_ = [(name, P) for name in ("sgemm", "operations", "widths", "kept", "shared", "ends")]
    _fields_ += [(name, P) for name in ("weights", "cosine", "sine")]
    _fields_ += [(name, N) for name in ("blocks", "slots", "vectors", "tokens", "batch", "each", "threads")]


class Columns(NamedTuple):
    """Columns of a slot: `n` from each head's `column` on, the heads' `step` apart."""

    slot: int
    column: int
    step: int
    n: int
    heads: int = 1

    def split(self, *widths: int) -> list[Columns]:
        """Each head's columns in turn: the first widths[0], and so on."""
        slot, column, step, _, heads = self
        pairs = zip(widths, accumulate(widths), strict=True)
        return [Columns(slot, column + end - n, step, n, heads) for n, end in pairs]

    def as_heads(self, heads: int) -> Columns:
        """The columns of one head as those of `heads`."""
        return Columns(self.slot, self.column, self.n // heads, self.n // heads, heads)


NONE = Columns(0, 0, 0, 0)


class CannotRecord(Exception):
    """A module computes something else than native.c would."""


def check(module: nn.Module) -> None:
    """Raises CannotRecord unless it computes what its class is known for; one that inherits its `record` has
    changed something that this knows nothing of.
    """
    known, own = type(module) in (Linear, RMSNorm) or "record" in vars(type(module)), vars(module)
    drops = module.training and own.get("dropout")
    if not known or drops or "forward" in own or own.get("_compiled_call_impl") or any(own[h] for h in HOOKS):
        raise CannotRecord


class Tape:
    """Operators in their order; the methods take and return columns of slots, as native.c has them."""

    def __init__(self, width: int):
        self.widths = [width, width]  # of slots; the first is what goes in, the second what comes out
        self.shared = [(0, 0), (0, 0)]  # which half of memory that blocks share a slot is in, and where
        self.operations, self.weights, self.begins = [], [], []  # begins: of the blocks' operations
        self.n_weights, self.n_vectors = 0, 0  # numbers in all weights; in those of norms

    def next_block(self) -> None:
        """What the block before has made stays in shared memory, what was made before that gives way."""
        self.half, self.used = len(self.begins) % 2, 0
        self.begins.append(len(self.operations))

    def slot(self, width: int) -> Columns:
        self.widths.append(width)
        self.shared.append((self.half, self.used))
        self.used += width
        return Columns(len(self.widths) - 1, 0, 0, width)

    def add(
        self, kind: int, x: Columns, y=NONE, modules=(), u=NONE, v=NONE, n=0, m=0, other=0, number=0.0
    ) -> None:
        heads = x.heads, u.heads, n, m, other
        self.operations.append([kind, self.n_weights, *heads, *x[:3], *u[:3], *v[:3], *y[:3], number])
        for weight in (module.weight for module in modules):
            if weight.shape[-1] != n:
                raise CannotRecord
            self.n_weights += weight.numel()
            self.weights.append(weight)

    def record(self, module: nn.Module, *columns: Columns) -> Columns:
        """What a block, an attention or an MLP does, as it says itself."""
        check(module)
        return module.record(self, *columns)

    def norm(self, x: Columns, module: nn.Module, used_again: bool = False) -> Columns:
        """RMSNorm of each head of x; used_again: an operator further on takes x, too."""
        check(module)
        y = self.slot(x.n * x.heads).as_heads(x.heads)
        self.add(NORM, x, y, [module], n=x.n, m=self.n_vectors, other=used_again, number=module.eps)
        self.n_vectors += x.n
        return y

    def linear(self, x: Columns, *modules: nn.Module, plus: Columns | None = None) -> list[Columns]:
        """x W^T of each module, or plus, a whole slot, + x W^T; no operator further on takes x."""
        for module in modules:
            check(module)
        outs = [module.weight.shape[0] for module in modules]
        y = self.slot(sum(outs))
        self.add(LINEAR, x, y, modules, u=plus or NONE, n=x.n * x.heads, m=y.n, other=plus is not None)
        return y.split(*outs)

    def rotate(self, x: Columns) -> None:
        """RoPE of each head of x, in place."""
        if x.n:
            self.add(ROTATE, x, n=x.n)

    def copy(self, x: Columns, y: Columns) -> None:
        """y = x, head by head; x may have one for all."""
        self.add(COPY, x._replace(heads=y.heads), y, n=x.n)

    def swiglu(self, gate: Columns, up: Columns) -> Columns:
        y = self.slot(gate.n)
        self.add(SWIGLU, gate, y, u=up, n=gate.n)
        return y

    def causal(self, q: Columns, k: Columns, v: Columns, scale: float) -> Columns:
        """softmax(scale q k^T) v over keys up to a query's own."""
        if q.n % native.COLUMNS or v.n % native.COLUMNS:
            raise CannotRecord
        y, logs = self.slot(q.heads * v.n).as_heads(q.heads), self.slot(q.heads)
        self.add(CAUSAL, q, y, u=k, v=v, n=q.n, m=v.n, other=logs.slot, number=scale)
        return y

    def close(self) -> Tape:
        """The last operator makes what comes out."""
        self.operations[-1][OUT] = 1
        del self.widths[-1], self.shared[-1]
        kept = [0, 0, *accumulate(self.widths[2:], initial=0)]
        self.kept_width = kept.pop()
        ends = [(half, at + width) for (half, at), width in zip(self.shared, self.widths, strict=True)]
        first, second = (max((end for h, end in ends[2:] if h == half), default=0) for half in (0, 1))
        self.shared_width = first + second
        shared = [half * first + at for half, at in self.shared]
        ends = [*self.begins[1:], len(self.operations)]
        operations = b"".join(OPERATION.pack(*operation) for operation in self.operations)
        self.arrays = [ctypes.create_string_buffer(operations, len(operations))]
        self.arrays += [(N * len(numbers))(*numbers) for numbers in (self.widths, kept, shared, ends)]
        return self

    def run(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """What it makes of x (B, T, C). Raises MemoryError."""
        if torch.is_grad_enabled():
            return NativeBlocks.apply(self, x, *rope, *self.weights)
        return self.forward(x.contiguous(), rope, in_a_row(self.weights), keep=False)[0]

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], row: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor]:
        """Its output and the slots, all of them to `keep`; row: all weights."""
        y, slots = torch.empty_like(x), self.room(x, keep)
        native.call("tape_forward", (self.job(x, row, rope), x, y, slots), keep)
        return y, slots

    def job(self, x: Tensor, row: Tensor, rope: tuple[Tensor, Tensor]) -> Job:
        (B, T, _), threads = x.shape, torch.get_num_threads()
        pointers = *map(ctypes.addressof, self.arrays), *(t.data_ptr() for t in (row, *rope))
        each = max(1, min(TOKENS // T, B // threads))
        return Job(
            sgemm(), *pointers, len(self.begins), len(self.widths), self.n_vectors, T, B, each, threads
        )

    def room(self, x: Tensor, keep: bool) -> Tensor:
        return x.new_empty(x.size(0) * x.size(1) * (self.kept_width if keep else self.shared_width))


def grouped_query(self, tape: Tape, x: Columns, h: Columns) -> Columns:
    """`record` of model.GroupedQueryAttention: x + forward(h)."""
    q, k, v = tape.linear(h, self.q_proj, self.k_proj, self.v_proj)
    q, k, v = q.as_heads(self.n_head), k.as_heads(self.n_kv_head), v.as_heads(self.n_kv_head)
    if self.qk_norm:
        q, k = tape.norm(q, self.q_norm), tape.norm(k, self.k_norm)
    for part in (q, k):
        tape.rotate(part.split(self.rotary_dim)[0])
    y = tape.causal(q, k, v, self.head_dim**-0.5)
    return tape.linear(y, self.o_proj, plus=x)[0]


def multi_head_latent(self, tape: Tape, x: Columns, h: Columns) -> Columns:
    """`record` of model.MultiHeadLatentAttention, in its expanded form."""
    first = self.q_proj if self.q_rank is None else self.q_a_proj
    q, latent = tape.linear(h, first, self.kv_a_proj_with_mqa)
    if self.q_rank is not None:
        (q,) = tape.linear(tape.norm(q, self.q_a_layernorm), self.q_b_proj)
    q = q.as_heads(self.n_head)
    tape.rotate(q.split(self.dn, self.dr)[1])
    c, k_rope = latent.split(self.rank, self.dr)
    tape.rotate(k_rope)
    (kv,) = tape.linear(tape.norm(c, self.kv_a_layernorm), self.kv_b_proj)
    k_nope, v = kv.as_heads(self.n_head).split(self.dn, self.dv)
    k = tape.slot(q.n * q.heads).as_heads(q.heads)  # [k_nope | k_rope] of each head
    for part, to in zip((k_nope, k_rope), k.split(self.dn, self.dr), strict=True):
        tape.copy(part, to)
    y = tape.causal(q, k, v, self.scale)
    return tape.linear(y, self.o_proj, plus=x)[0]


def mlp(self, tape: Tape, x: Columns, h: Columns) -> Columns:
    """`record` of model.MLP: x + forward(h)."""
    y = tape.swiglu(*tape.linear(h, self.gate_proj, self.up_proj))
    return tape.linear(y, self.down_proj, plus=x)[0]


def block(self, tape: Tape, x: Columns) -> Columns:
    """`record` of model.Block."""
    x = tape.record(self.self_attn, x, tape.norm(x, self.input_layernorm, used_again=True))
    return tape.record(self.mlp, x, tape.norm(x, self.post_attention_layernorm, used_again=True))


@functools.cache
def sgemm() -> int | None:
    """The address of the matrix product that torch itself calls; None where that is not MKL's, which uses one
    thread where many of gcc's OpenMP, which torch has too, call it.
    """
    path = Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"
    if not torch.backends.mkl.is_available() or not path.exists():
        return None
    return ctypes.cast(getattr(ctypes.CDLL(str(path)), "sgemm_", None), P).value


def tape_of(model: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tape | None:
    """The tape of a model.GPT's blocks and last norm; None where native.c cannot run it over x (B, T, C), or
    is not faster: without sequences for all cores, or with more weights, which are copied, than activations.
    """
    if torch.is_autocast_enabled("cpu") or not native.handles(x, *rope) or sgemm() is None:
        return None
    (B, T, _), threads = x.shape, torch.get_num_threads()
    uneven = B % threads and 4 * threads > B
    if T > native.LONGEST or len(rope[0]) > 1 or uneven or _has_any_global_hook():
        return None
    try:
        tape = recorded(model)  # anew each time, as modules change: a millisecond
    except CannotRecord:
        return None
    if tape.n_weights > B * T * tape.kept_width or not native.handles(*tape.weights):
        return None
    return tape


def recorded(model: nn.Module) -> Tape:
    """Raises CannotRecord if a part of the model is not such that native.c knows it."""
    tape, x = Tape(model.config.n_embd), Columns(0, 0, 0, model.config.n_embd)
    for block in model.layers:
        tape.next_block()
        x = tape.record(block, x)
    tape.norm(x, model.norm)
    return tape.close()


def in_a_row(weights: list[Tensor]) -> Tensor:
    return torch.cat([w.flatten() for w in weights])


class NativeBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tape: Tape, x: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> Tensor:
        x, row = x.contiguous(), in_a_row(weights)
        y, slots = tape.forward(x, (cos, sin), row, keep=True)
        ctx.tape, ctx.shapes = tape, [w.shape for w in weights]
        ctx.save_for_backward(x, cos, sin, row, slots)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, cos, sin, row, slots), tape = ctx.saved_tensors, ctx.tape
        grad, grad_x, slot_grads = grad.contiguous(), torch.empty_like(x), tape.room(x, keep=False)
        grads, sums = torch.empty_like(row), row.new_zeros(len(x), tape.n_vectors)
        job = tape.job(x, row, (cos, sin))
        native.call("tape_backward", (job, x, slots, grad, grad_x, slot_grads, grads, sums))
        grads = grads.split([shape.numel() for shape in ctx.shapes])
        return None, grad_x, None, None, *(g.view(shape) for g, shape in zip(grads, ctx.shapes, strict=True))
