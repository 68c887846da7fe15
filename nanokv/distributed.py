"""Runs of many processes: the ranks that torchrun starts, and how they share the work.

    torchrun --standalone --nproc_per_node=8 train.py config/124m/mla.py [--parallel=fsdp]

Without torchrun there is one rank. Ranks meet over NCCL on GPUs and over gloo on CPUs.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from nanokv.config import UserError


@contextmanager
def process_group() -> Iterator[None]:
    """In this block, the process can communicate with the other ranks that torchrun started, if it did."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    store, rank, size = rendezvous()
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=rank, world_size=size)
    try:
        yield
    except SystemExit:  # all ranks exit; after any other exception, other ranks may still wait for this one
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def rendezvous() -> tuple[Any, int, int]:
    """A store for the ranks that are alive now, this rank, and the number of ranks. torchrun's own store survives
    a restart and still has the addresses of dead ranks. So each rank writes a token, the first rank lists the
    tokens that it reads, and a list that all of its ranks have signed becomes the prefix of their store.
    """
    c10d: Any = dist  # its stores have no public types
    store, rank, size = next(c10d.rendezvous("env://"))
    token = secrets.token_hex(8)
    store.set(f"token/{rank}", token)
    while True:
        if rank == 0:
            store.set("tokens", ",".join(store.get(f"token/{r}").decode() for r in range(size)))
        tokens = store.get("tokens").decode()
        if token in tokens:
            store.set(f"{tokens}/{rank}", "signed")
            if store.check([f"{tokens}/{r}" for r in range(size)]):
                return c10d.PrefixStore(tokens, store), rank, size
        time.sleep(0.02)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Number of ranks, on all nodes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Number of this process among those of its node."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else 0


def launch() -> str | None:
    """An id of the torchrun command, which stays the same when it restarts its workers; None without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def restarted() -> bool:
    """Whether torchrun may have restarted the ranks of this launch after one died. A collective."""
    unique = launch() not in (None, "none")  # "none": a launch without --standalone and --rdzv-id
    return all_reduce_max(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))) > 0 or unique


def own_device(device: torch.device) -> torch.device:
    """This rank's device on its node. Raises UserError if the node has fewer devices than ranks."""
    if size() == 1 or device.type != "cuda":
        return device
    here, ranks = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if ranks > here:
        raise UserError(f"{ranks} ranks do not fit the {here} GPUs of this node; lower --nproc_per_node")
    device = torch.device("cuda", local_rank())
    torch.cuda.set_device(device)
    return device


@contextmanager
def collective_errors() -> Iterator[None]:
    """If this block fails on one rank, it ends on all ranks: the lowest rank that failed raises its error, the others
    exit. Otherwise they would wait forever in their next collective. The block itself must not call a collective.
    """
    failed = True
    try:
        yield
        failed = False
    finally:
        lowest = size() - all_reduce_max(size() - rank() if failed else 0)  # of the ranks that failed
        if lowest not in (size(), rank()):
            sys.exit(2)


def all_reduce_max(value: int) -> int:
    """The greatest `value` of all ranks. All must call it, as any collective."""
    tensor = torch.tensor(value, dtype=torch.int64)  # on the CPU, so that no GPU has to wait
    if size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def all_reduce_sum(*values: float) -> list[float]:
    """The sum over ranks of each value, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor.tolist()


def share(micro_steps: int, rows: int) -> tuple[int, int]:
    """A rank's share of a step: (micro-batches, rows in each, at most `rows`). UserError if no even share exists."""
    mine, sequences = -(-micro_steps // size()), micro_steps * rows
    rows, rest = divmod(sequences, mine * size())
    if rest:
        fault = f"{size()} ranks of {mine} micro-batches cannot share a step of {sequences} sequences evenly"
        raise UserError(f"{fault}; make gradient_accumulation_steps x batch_size a multiple of {mine * size()}")
    return mine, rows


def parallelize(loss_model: Any, device, dtype, compile=False, strategy="ddp", activation_checkpointing=False) -> Any:
    """Prepare `loss_model` (a LanguageModelLoss) for all ranks; call the result in its place. "ddp": each rank holds
    the whole model, and gradients are averaged. "fsdp": each rank holds a share of every parameter (a DTensor, cut
    along the first dimension), and gathers the parameters of a block, in `dtype`, when the block runs. Parameters
    outside of blocks stay fp32. Gradients are reduced in fp32. Parameters keep their names.
    """
    blocks = loss_model.model.layers
    if activation_checkpointing:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if size() > 1 and strategy == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh  # takes a second; one rank does without
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(device.type, (size(),))
        # do not cast inputs: autocast casts them, as without FSDP, and RoPE's angles need fp32
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in blocks:
            if compile:
                block.compile()
            fully_shard(block, mesh=mesh, mp_policy=replace(policy, param_dtype=dtype))
        return fully_shard(loss_model, mesh=mesh, mp_policy=policy)
    if size() > 1:
        ids = [device] if device.type == "cuda" else None
        loss_model = DistributedDataParallel(loss_model, device_ids=ids, gradient_as_bucket_view=True)
    # compile outside of DDP, so that the compiler splits graphs at DDP's buckets
    return torch.compile(loss_model) if compile else loss_model


def sync_gradients(loss_model: nn.Module, now: bool) -> None:
    """Set whether the next backward pass averages gradients over ranks: only the last one of a step does."""
    module: Any
    for module in loss_model.modules():  # also finds those that torch.compile wraps
        if isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = now
        elif hasattr(module, "set_requires_gradient_sync"):  # FSDP's
            module.set_requires_gradient_sync(now, recurse=False)


def clip_grad_norm(params: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients down to a norm of `max_norm` over all parameters. Returns the norm before, ()."""
    norm: Any = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    norm = norm.full_tensor() if is_dtensor(norm) else norm
    if not norm <= max_norm:  # waits for the device
        nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    return norm


def is_dtensor(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor, of which each rank holds a share. Does not import that class."""
    return hasattr(tensor, "to_local")


def to_local(tensor: Any) -> Tensor:
    """The part of a tensor that this rank holds, in the same memory."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def full_state_dict(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """The whole tensors, gathered from all ranks, on rank 0; empty on the others. All ranks must call it."""
    gathered = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if is_dtensor(tensor) else tensor
        if rank() == 0:
            gathered[name] = whole.cpu() if is_dtensor(tensor) else whole
    return gathered


def placed_like(value: Tensor, parameter: Any) -> Tensor:
    """`value` (whole, the same on all ranks) on the device of `parameter`, and sharded like it if shapes are equal."""
    value = value.to(parameter.device)
    if is_dtensor(parameter) and value.shape == parameter.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value


def each_matrix_once(function: Callable, values: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
    """Apply function((N, m, n)) -> (N, m, n) to N matrices. Each matrix is computed whole, on one rank only. `values`
    and the result are the parts that this rank holds, as of `parameters`, which have the same shapes: all rows, or
    with FSDP ceil(m / size) rows of each matrix, fewer on the last ranks.
    """
    if size() == 1:
        return list(function(torch.stack(values)).unbind())
    (m, n), count = parameters[0].shape, len(values)
    slots = -(-count // size())  # matrices per rank; the last slots may be unused
    used = min(max(count - rank() * slots, 0), slots)
    results = values[0].new_zeros(slots, m, n)
    if not is_dtensor(parameters[0]):
        if used:
            results[:used] = function(torch.stack(values[rank() * slots :][:used]))
        gathered = results.new_empty(size() * slots, m, n)
        dist.all_gather(list(gathered.chunk(size())), results)
        return list(gathered[:count].unbind())
    rows, held = -(-m // size()), len(values[0])
    parts = values[0].new_zeros(size() * slots, rows, n)  # this rank's rows, in the order of their owners
    parts[:count, :held] = torch.stack(values)
    received = torch.empty_like(parts)  # (source, slot) of this rank's matrices
    dist.all_to_all_single(received, parts)
    matrices = received.unflatten(0, (size(), slots)).transpose(0, 1).flatten(1, 2)[:, :m]  # (slots, m, n)
    if used:
        results[:used] = function(matrices[:used])
    padded = nn.functional.pad(results, (0, 0, 0, size() * rows - m))
    parts = padded.unflatten(1, (size(), rows)).transpose(0, 1).flatten(0, 1).contiguous()
    dist.all_to_all_single(received, parts)  # (owner, slot) of this rank's rows
    return list(received[:count, :held].unbind())
