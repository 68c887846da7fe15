"""Change the attention of a trained model: mean-pool its key and value heads, or factorize them into latents.

Each function takes a model and returns the config and the weights of another. A complex number stands for the
two dimensions of a head that RoPE turns together.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import ATTENTIONS, GPT, GPTConfig, GroupedQueryAttention
from nanokv.config import UserError


def grouped(config: GPTConfig, *unknown: str) -> Any:
    """The config itself. Raises UserError if its attention is not mha, mqa or gqa, or if it has kv_conv or one of
    the `unknown` knobs.
    """
    if ATTENTIONS[config.attention] is not GroupedQueryAttention:
        raise UserError(f"the run has attention {config.attention}; what is converted is mha, mqa or gqa")
    for knob in ("kv_conv", *unknown):
        if value := getattr(config, knob):
            raise UserError(f"the run has {knob} = {value}, which is not converted; train one without {knob}")
    return config


def group_name(n_head: int, n_kv_head: int) -> str:
    return "mha" if n_kv_head == n_head else "mqa" if n_kv_head == 1 else "gqa"


def pool_heads(model: GPT, n_kv_head: int) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The config and weights of a model whose key and value heads are means of groups of `model`'s.

    The GQA paper's conversion (Ainslie et al. 2023, section 2.1). Raises UserError.
    """
    config = grouped(model.config)
    if n_kv_head < 1 or config.n_kv_head % n_kv_head:
        raise UserError(f"n_kv_head = {n_kv_head} is no divisor of the {config.n_kv_head} that there are")
    weights = dict(model.state_dict())
    for name, weight in weights.items():
        if ".k_proj." in name or ".v_proj." in name:
            heads = weight.unflatten(0, (n_kv_head, -1, config.head_dim))  # (new heads, of each, D, C), biases (..., D)
            weights[name] = heads.mean(1).flatten(0, 1)
    return replace(config, attention=group_name(config.n_head, n_kv_head), n_kv_head=n_kv_head), weights


@torch.no_grad()
def factorize(model: GPT, idx: Tensor, rank: int, rope_width: int) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The config and weights of an MLA model with latents of width `rank` that does nearly what `model` does.

    idx: token ids (rows, T), whose activations decide what is kept. The ideas are TransMLA's (arXiv
    2502.07864).

    RoPE. For each frequency any combination of the heads' keys can be turned instead of the keys, as turning
    is a multiplication. The rotated key, which all heads share, holds the combinations that matter most to
    the scores, `repeat` of them for each of its frequencies; the queries undo the combining. MLA's
    frequencies are a geometric series: every `stride`-th of the model's, with the stride that rotates most
    energy. What is left is multiplied by its mean turn over the distances of a context, near ones counting
    more, as 1 / (1 + distance): a slow frequency loses next to nothing.

    Latent. The rest of the keys, and the values, are linear in the unit vector u that the norm in front
    makes. Both are given the same energy; their principal components choose the subspace of u that the latent
    spans, in an orthonormal basis. The latent's RMSNorm keeps its direction only, which loses nothing of all
    of u, whose length is fixed; of a part, least squares give the keys and values that come nearest.

    Exact, but for rounding, if rank >= n_embd and rope_width = n_kv_head * rotary_dim. Raises UserError if
    rope_width does not fit.
    """
    config = grouped(model.config, "qkv_bias", "rope_scaling")
    G, D, R = config.n_kv_head, config.head_dim, config.rotary_dim
    repeat = max(-(-rope_width // max(R, 1)), 1)
    width = rope_width // repeat  # of one RoPE among the `repeat`
    if rank < 1 or rope_width < 0 or rope_width % 2 or rope_width > G * R or (repeat > 1 and width != R):
        wanted = f"the former is at least 1, the latter even and at most {R}, or a multiple of {R} and at most {G * R}"
        raise UserError(f"kv_lora_rank = {rank}, qk_rope_head_dim = {rope_width}: {wanted}")
    mean_turn = mean_turns(config)
    units = attention_inputs(model, idx)  # of each layer (N, C)
    layers = [key_combinations(config, layer, u) for layer, u in zip(model.layers, units, strict=True)]
    stride = best_stride(config, layers, mean_turn, width, repeat)
    turned = torch.arange(width // 2) * stride  # which frequencies are turned
    weights = dict(model.state_dict())
    for i, (layer, u, combinations) in enumerate(zip(model.layers, units, layers, strict=True)):
        prefix = f"layers.{i}.self_attn."
        for name in ("k_proj", "v_proj", "q_norm", "k_norm"):
            weights.pop(f"{prefix}{name}.weight", None)
        q, k, v = plain_projections(layer, u)  # (H, D, C), (G, D, C), (G, D, C)
        q_rope, k_rope, k_nope = split_keys(config, k, combinations, turned, repeat, mean_turn)
        basis, kv_b = factorize_latent(config, k_nope, v, u, rank)
        scale = ((D + rope_width) / D) ** 0.5  # MLA divides scores by the root of the wider key
        new = {"q_proj": torch.cat((q, q_rope), 1).flatten(0, 1) * scale, "kv_b_proj": kv_b}
        new |= {"kv_a_proj_with_mqa": torch.cat((basis, k_rope)), "kv_a_layernorm": torch.ones(rank)}
        weights |= {f"{prefix}{name}.weight": w.float() for name, w in new.items()}
        weights[f"layers.{i}.input_layernorm.weight"] = torch.ones(config.n_embd)  # in the projections now
    widths = {"kv_lora_rank": rank, "qk_rope_head_dim": rope_width, "qk_rope_repeat": repeat}
    theta = config.rope_theta ** (stride * width / R) if width else config.rope_theta
    widths |= {"qk_nope_head_dim": D, "v_head_dim": D, "rope_theta": theta}
    return replace(config, attention="mla", **dict.fromkeys(GroupedQueryAttention.KNOBS), **widths), weights


def mean_turns(config: Any) -> Tensor:
    """Of each frequency, its mean turn (R/2,) over the distances of a context, near ones counting more."""
    R = config.rotary_dim
    frequency = config.rope_theta ** -(torch.arange(0, R, 2, dtype=torch.float64) / max(R, 1))  # (R/2,)
    distance = torch.arange(config.block_size, dtype=torch.float64)
    turns = torch.exp(-1j * frequency[:, None] * distance)
    return (turns / (1 + distance)).sum(1) / (1 / (1 + distance)).sum()


class Combinations(NamedTuple):
    """The rotated queries and keys of a layer, and which combinations of its keys matter, by frequency."""

    zq: Tensor  # queries (H, R/2, C)
    zk: Tensor  # keys (G, R/2, C)
    weigh: Tensor  # (R/2, G), how much queries look at a key
    keys: Tensor  # weighed keys (R/2, G, C)
    energy: Tensor  # of each combination (R/2, G), the largest first
    vectors: Tensor  # the combinations (R/2, G, G), in the last dimension


def key_combinations(config: Any, layer: nn.Module, u: Tensor) -> Combinations:
    R, G = config.rotary_dim, config.n_kv_head
    q, k, _ = plain_projections(layer, u)
    second = (u.T @ u / len(u)) + 0j  # (C, C)
    zq, zk = (torch.complex(w[:, : R // 2], w[:, R // 2 : R]) for w in (q, k))  # (heads, R/2, C)
    energy = torch.einsum("hjc,cd,hjd->hj", zq, second, zq.conj()).real
    weigh = energy.unflatten(0, (G, -1)).sum(1).sqrt().T + 1e-12  # (R/2, G)
    keys = weigh[..., None] * zk.transpose(0, 1)  # (R/2, G, C)
    values, vectors = torch.linalg.eigh(keys @ second @ keys.mH)
    return Combinations(zq, zk, weigh, keys, values.flip(-1), vectors.flip(-1))


def best_stride(config: Any, layers: list[Combinations], mean_turn: Tensor, width: int, repeat: int):
    """Every how many-th frequency to turn, so that what is turned has the most energy."""
    lost = 1 - mean_turn.abs().square()  # share of a frequency's energy that counts only if it is turned
    kept = dict.fromkeys(range(1, config.rotary_dim // width + 1 if width else 2), 0.0)
    for layer in layers:
        for stride in kept:
            of = torch.arange(width // 2) * stride
            share = (layer.energy[of, :repeat] * lost[of, None]).sum() / layer.energy.sum().clamp(min=1e-30)
            kept[stride] += float(share)
    return max(kept, key=kept.__getitem__)


def split_keys(config: Any, k: Tensor, layer: Combinations, turned: Tensor, repeat: int, mean_turn: Tensor):
    """The rotated query of each head (H, rope_width, C) and the rotated key that all heads share
    (rope_width, C), and what is left of each head's key (G, D, C).
    """
    vectors, weigh = layer.vectors[..., :repeat], layer.weigh
    shared = vectors[turned].mH @ layer.keys[turned]  # (width/2, repeat, C)
    undo = (vectors[turned] / weigh[turned, :, None]).repeat_interleave(len(layer.zq) // len(k), 1)
    q_rope = torch.einsum("jhm,hjc->hmjc", undo.conj(), layer.zq[:, turned]).flatten(1, 2)
    k_rope = shared.transpose(0, 1).flatten(0, 1)
    q_rope = torch.cat((q_rope.real, q_rope.imag), 1)
    k_rope = torch.cat((k_rope.real, k_rope.imag), 0)
    rest = layer.zk.clone()
    rest[:, turned] -= ((vectors[turned] @ shared) / weigh[turned, :, None]).transpose(0, 1)
    rest *= mean_turn[:, None]
    return q_rope, k_rope, torch.cat((rest.real, rest.imag, k[:, config.rotary_dim :]), 1)


def factorize_latent(config: Any, k_nope: Tensor, v: Tensor, u: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """An orthonormal basis (rank, C) of what of u (N, C) the latent keeps, and the matrix (H 2 D, rank) that
    makes keys and values of the latent.
    """
    C, H, G, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
    both = torch.stack((k_nope, v)).flatten(1, 2)  # (2, G D, C)
    balanced = both / (u @ both.mT).square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-9)
    balanced = balanced.flatten(0, 1)
    second = balanced @ (u.T @ u / len(u)) @ balanced.T
    principal = torch.linalg.eigh(second)[1].flip(-1)[:, :rank].T @ balanced  # (up to rank, C)
    basis = torch.linalg.qr(principal.T, mode="complete")[0].T[:rank]
    basis = torch.cat((basis, basis.new_zeros(rank - len(basis), C)))  # (rank, C)
    latent = u @ basis.T
    size = (latent.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()  # what its norm divides by
    latent /= size
    target = both.flatten(0, 1)  # (2 G D, C)
    kv_b = target @ basis.T * size.mean()  # right if the size were the same for all tokens
    gram = latent.T @ latent
    gram += 1e-4 * gram.diagonal().mean() * torch.eye(rank)
    kv_b += torch.linalg.solve(gram, latent.T @ (u @ target.T - latent @ kv_b.T)).T
    kv_b = kv_b.unflatten(0, (2, G, D)).transpose(0, 1).repeat_interleave(H // G, 0)  # (H, 2, D, rank)
    return basis, kv_b.flatten(0, 2)


def attention_inputs(model: GPT, idx: Tensor) -> list[Tensor]:
    """What the norm in front of each attention makes of idx, less its weight: (N, C) in float64."""
    inputs, hooks = [[] for _ in model.layers], []
    for layer, units in zip(model.layers, inputs, strict=True):

        def keep(norm, args, into=units) -> None:
            into.append(F.rms_norm(args[0].flatten(0, 1), norm.weight.shape, None, norm.eps))

        hooks.append(layer.input_layernorm.register_forward_pre_hook(keep))
    for rows in idx.split(8):
        model.hidden(rows)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts).double() for parts in inputs]


def plain_projections(layer: Any, u: Tensor) -> list[Tensor]:
    """The matrices (heads, D, C) that make queries, keys and values of unit vectors u (N, C), in float64.

    The weight of the norm in front is in them, and so is a QK-norm, as the one factor a head that comes
    nearest to its effect on u.
    """
    attention = layer.self_attn
    result = []
    for name in ("q", "k", "v"):
        w = getattr(attention, f"{name}_proj").weight.double() * layer.input_layernorm.weight
        w = w.unflatten(0, (-1, attention.head_dim))
        if (norm := getattr(attention, f"{name}_norm", None)) is not None:
            square = torch.einsum("nc,hdc->nhd", u, w).square().mean(-1)  # (N, heads)
            factor = (square / (square + norm.eps).sqrt()).mean(0) / square.mean(0)
            w = w * factor[:, None, None] * norm.weight[:, None]
        result.append(w)
    return result
