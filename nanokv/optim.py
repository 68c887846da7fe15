"""Optimizers: Muon for the matrices inside the blocks, AdamW for everything else."""

from collections import defaultdict
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from nanokv import distributed as parallel
from nanokv.config import UserError
from nanokv.torch_private import private

EMBEDDING_LR = 10  # learning rate of an untied embedding / learning_rate


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """Matrices (N, m, n) -> roughly the nearest semi-orthogonal matrices, by Newton-Schulz iteration in bf16 or
    fp32. Keller Jordan's coefficients (https://kellerjordan.github.io/posts/muon) bring all singular values
    to about 0.7 .. 1.2, which works as well as 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16() if g.is_cuda else g
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).type_as(g)


def muon_update(g: Tensor, row_groups: tuple[int, ...] = ()) -> Tensor:
    """Momenta (N, m, n) of matrices of one shape -> their updates: orthogonalized, and scaled by sqrt(max(1, m / n)),
    so that their effect on activations does not depend on the shape. row_groups: sizes of the row groups that alternate
    in a fused matrix, such as (16, 48) for keys and values. Each group is orthogonalized separately: else the group
    with the largest gradient would set the direction for all. m is then the number of rows of one head in the group.
    """
    updates = []
    for group in g.unflatten(1, (-1, sum(row_groups) or g.size(1))).split(row_groups or g.size(1), 2):
        scale = max(1, group.size(2) / group.size(3)) ** 0.5  # group: (N, heads, m, n)
        updates.append((newton_schulz(group.flatten(1, 2)) * scale).view_as(group))
    return torch.cat(updates, 2).flatten(1, 2)


class Optimizer:
    """The part of torch.optim.Optimizer that training needs. The original imports a compiler for two seconds."""

    def __init__(self, groups: list[dict], **defaults):
        groups = [defaults | group for group in groups]
        self.param_groups = [group | {"initial_lr": group["lr"]} for group in groups]
        self.state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


def local(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """The part of each tensor that this rank holds."""
    return [parallel.to_local(tensor) for tensor in tensors]


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
                    self.state[p]["step"] = torch.zeros((), device=p.device)
            states = [self.state[p] for p in params]
            means, squares, steps = (local(state[key] for state in states) for key in ("exp_avg", "exp_avg_sq", "step"))
            private("_foreach_add_")(steps, 1)
            beta1, beta2 = group["betas"]
            knobs = {"lr": group["lr"], "beta1": beta1, "beta2": beta2, "weight_decay": group["weight_decay"]}
            knobs |= {"eps": 1e-8, "amsgrad": False, "maximize": False}
            grads = local(p.grad for p in params)
            private("_fused_adamw_")(local(params), grads, means, squares, [], steps, **knobs)


class Muon(Optimizer):
    """Momentum with orthogonalized updates (Jordan et al. 2024), for matrices. Matrices of one shape are updated
    together, each by one rank, in the `row_groups` of their parameter group (see `muon_update`). Decoupled decay.
    """

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            same_shape, update = defaultdict(list), partial(muon_update, row_groups=group["row_groups"])
            for p in group["params"]:
                if p.grad is not None:
                    same_shape[p.shape].append(p)
            for params in same_shape.values():
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                grads = local(p.grad for p in params)
                momenta = local(self.state[p]["momentum"] for p in params)
                private("_foreach_lerp_")(momenta, grads, 1 - group["momentum"])
                nesterov = private("_foreach_lerp")(grads, momenta, group["momentum"])
                updates = parallel.each_matrix_once(update, nesterov, params)
                weights = local(params)
                private("_foreach_mul_")(weights, 1 - group["lr"] * group["weight_decay"])
                private("_foreach_add_")(weights, updates, alpha=-group["lr"])


def make_optimizers(model, optimizer, lr=1e-3, muon_lr=0.02, momentum=0.95, weight_decay=0.1, betas=(0.9, 0.95)):
    """A list of optimizers. "adamw": AdamW for all. "muon": Muon for the blocks' matrices, AdamW for the rest. Only
    matrices have weight decay.
    """
    embedding, heads, matrices, vectors = [], [], defaultdict(list), []
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    row_groups = {module.weight: getattr(module, "row_groups", ()) for module in linears}
    tied = not hasattr(model, "lm_head")
    for name, p in model.named_parameters():
        if p.ndim != 2:
            vectors.append(p)
        elif name == "embed_tokens.weight" and not tied:
            embedding.append(p)
        elif name in ("embed_tokens.weight", "lm_head.weight") or optimizer == "adamw":
            heads.append(p)
        else:
            matrices[row_groups.get(p, ())].append(p)
    groups = [{"params": heads}, {"params": vectors, "weight_decay": 0.0}]
    # embedding entries start at size 1, and few tokens update each of them, so they need larger steps
    groups.append({"params": embedding, "lr": lr * EMBEDDING_LR})
    adamw = AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay)
    if optimizer == "adamw":
        return [adamw]
    groups = [{"params": alike, "row_groups": rows} for rows, alike in matrices.items()]
    return [Muon(groups, lr=muon_lr, momentum=momentum, weight_decay=weight_decay), adamw]


def state_tensors(model: nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state, by the name of parameter and state."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    states = [item for optimizer in optimizers for item in optimizer.state.items()]
    return {f"{names[p]}.{key}": value for p, state in states for key, value in state.items()}


def load_state_tensors(model: nn.Module, optimizers: Iterable[Optimizer], tensors: dict[str, Tensor]):
    """Inverse of `state_tensors`. Raises UserError if they are not those of these optimizers."""
    by_name, names = defaultdict(dict), {p: name for name, p in model.named_parameters()}
    shapes = {name: p.shape for p, name in names.items()}
    for name, value in tensors.items():
        parameter, _, key = name.rpartition(".")
        if parameter == "rng":  # earlier versions kept the random-number state
            continue
        if value.shape not in (shapes.get(parameter), torch.Size()):
            raise UserError(f"the optimizer's state does not fit its model: {name} is {list(value.shape)}")
        by_name[parameter][key] = value
    for optimizer in optimizers:
        for p in [p for group in optimizer.param_groups for p in group["params"] if names[p] in by_name]:
            state = by_name[names[p]]
            optimizer.state[p] = {key: parallel.placed_like(value, p) for key, value in state.items()}
