"""A GPT with a choice of attention: mha, mqa, gqa or mla. Only the maths, in torch, as in the papers.

Pre-norm blocks of RMSNorm, attention, RMSNorm and SwiGLU; rotary position embedding, full or partial, without a
length limit. The KV cache is in nanokv/cache.py; each attention class declares what it caches. Parameter names
are those of Hugging Face's Llama, Qwen2, Qwen3 and dense DeepseekV3 classes, without the prefix `model.`.

Dimensions in comments: B batch, T new tokens, S tokens that attention reads, C n_embd, H n_head, G n_kv_head,
D head width, V vocabulary.
"""

# pyright: reportOptionalOperand=false, reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanokv import rope_scaling
from nanokv.cache import KVCache, LayerCache, LayerLayout, Part, kv_bytes_per_token
from nanokv.config import at_least

Rope = tuple[Tensor, Tensor]  # cosines and sines, see `rope_angles`
Mask = Tensor | None  # (B or 1, 1, T, S), true where a query sees a key; None: causal, T = S


@dataclass
class GPTConfig:
    """The shape of a model. The attention class replaces its fields that are None by values. Raises ValueError."""

    # model
    attention: str = "mha"  # which attention: mha, mqa, gqa or mla
    block_size: int = 256  # context length that the model is trained on, in tokens
    vocab_size: int = 0  # number of token ids; 0: that of the data set
    n_layer: int = 6  # number of blocks
    n_head: int = 6  # query heads in a layer
    n_embd: int = 384  # width of the residual stream
    intermediate_size: int | None = None  # width of the MLP; None: 8/3 n_embd, rounded down to a multiple of 64
    dropout: float = 0.0  # on attention weights, on each residual branch and on the embedding
    rope_theta: float = 10000.0  # base of RoPE's frequencies
    rope_scaling: str | None = None  # linear, llama3 or yarn: extends the context beyond the trained one
    rope_factor: float = 1.0  # extended context length / trained context length
    rope_trained_length: int | None = None  # llama3, yarn: the trained context in tokens; None: block_size
    rope_low: float | None = None  # pairs with fewer turns in that length are slowed by rope_factor; None: 1
    rope_high: float | None = None  # pairs with more turns are unchanged; None: 4 (llama3) or 32 (yarn)
    rope_attention_factor: float | None = None  # yarn: factor of cosines and sines; None: 0.1 ln(rope_factor) + 1
    score_factor: float = 1.0  # multiplies all attention scores (DeepSeek's mscale squared)
    norm_eps: float = 1e-6  # added to the mean square in every RMSNorm
    tie_embeddings: bool = False  # one matrix for the token embedding and the output head
    qk_norm: bool | Literal["shared"] | None = None  # RMSNorm of queries and keys, see docs/mla.md; None: not in mla
    kv_conv: int | None = None  # previous tokens mixed into each cached vector, see CausalConv; None: 0
    # sliding window
    window: int = 0  # number of last tokens that an S layer sees, the current one included; 0: full attention
    window_pattern: str = "S"  # repeated over the layers: S sliding window, L full; SSSL: every fourth is full
    sink_tokens: int = 0  # first tokens that an S layer sees besides its window (attention sinks)
    # mha, mqa, gqa
    n_kv_head: int | None = None  # key and value heads, a divisor of n_head; mha: n_head, mqa: 1
    head_dim: int | None = None  # width of a head; None: n_embd / n_head
    rotary_dim: int | None = None  # leading dimensions of a head that RoPE rotates; None: all of them
    qkv_bias: bool | None = None  # biases of the query, key and value projections (Qwen2); None: False
    # mla
    kv_lora_rank: int | None = None  # width r of the cached latent; None: n_embd / 4
    qk_rope_head_dim: int | None = None  # width of the rotated part of a key, shared by all heads; None: D/2
    qk_nope_head_dim: int | None = None  # width of a head's unrotated query and key; None: the rest of D
    v_head_dim: int | None = None  # width of a head's value; None: that of its key, D
    q_lora_rank: int | None = None  # width of the query's latent; None: a full-rank query projection
    qk_rope_repeat: int | None = None  # times that each RoPE frequency occurs in qk_rope_head_dim; None: 1

    def __post_init__(self):
        if self.attention not in ATTENTIONS:
            raise ValueError(f"unknown attention {self.attention!r}; choose one of {', '.join(ATTENTIONS)}")
        at_least(self, 1, "block_size", "n_layer", "n_head", "n_embd", "intermediate_size")
        at_least(self, 0, "vocab_size", "window", "sink_tokens", "kv_conv")
        if not (self.rope_theta > 0 and self.norm_eps > 0 and 0 <= self.dropout < 1):
            raise ValueError("rope_theta and norm_eps must be above 0, dropout at least 0 and below 1")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(f"window_pattern is made of S and L, as in SSSL, not {self.window_pattern!r}")
        if self.sink_tokens and not self.window:
            raise ValueError("sink_tokens come besides a window; set window, or remove sink_tokens")
        attention = ATTENTIONS[self.attention]
        for other in ATTENTIONS.values():
            for knob in other.KNOBS:
                if knob not in attention.KNOBS and getattr(self, knob) is not None:
                    users = "/".join(name for name, cls in ATTENTIONS.items() if knob in cls.KNOBS)
                    raise ValueError(f"{knob} is a knob of {users}, not of {self.attention}; remove it")
        attention.resolve(self)
        rope_scaling.resolve(self)
        if self.intermediate_size is None:
            self.intermediate_size = max(8 * self.n_embd // 3 // 64, 1) * 64

    def layer_windows(self) -> list[int]:
        """The window of each layer, in tokens; 0: full attention."""
        repeated = self.window_pattern * self.n_layer
        return [self.window if kind == "S" else 0 for kind in repeated[: self.n_layer]]

    def kv_layouts(self) -> list[LayerLayout]:
        parts = ATTENTIONS[self.attention].cached_parts(self)
        return [LayerLayout(parts, w, self.sink_tokens if w else 0) for w in self.layer_windows()]

    def kv_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that all layers together cache for one token, scales of quantized formats included."""
        return kv_bytes_per_token(self.kv_layouts(), dtype)


def rope_frequencies(config: GPTConfig, width: int, device=None) -> Tensor:
    """RoPE's frequencies (width / 2), in fp32 and radians per token (Su et al. 2021): theta^(-2j / width) for pair j,
    then changed by rope_scaling. With `qk_rope_repeat`, those for width / repeat, repeated that many times.
    """
    repeat = config.qk_rope_repeat or 1
    exponent = torch.arange(0, width // repeat, 2, device=device, dtype=torch.float32) / -max(width // repeat, 1)
    return rope_scaling.scale(config.rope_theta**exponent, config).repeat(repeat)


def rope_angles(positions: Tensor, width: int, config: GPTConfig) -> Rope:
    """Cosines and sines, (B, 1, T, width / 2) each, at `positions` (B, T), times rope_attention_factor."""
    angle = positions[:, None, :, None] * rope_frequencies(config, width, positions.device)
    factor = config.rope_attention_factor
    return (angle.cos(), angle.sin()) if factor is None else (angle.cos() * factor, angle.sin() * factor)


def rotate(x: Tensor, rope: Rope, start: int = 0) -> Tensor:
    """Apply RoPE to x (B, H, T, D) from dimension `start` on. Pairs are (j, half + j), as in Llama."""
    (cos, sin), half = rope, rope[0].size(-1)
    before, x1, x2, after = x.split((start, half, half, x.size(-1) - start - 2 * half), -1)
    return torch.cat((before, x1 * cos - x2 * sin, x2 * cos + x1 * sin, after), -1).type_as(x)


def window_mask(q: Tensor, k: Tensor, window: int, sinks: int) -> Tensor:
    """The attention mask: whether a query at position q sees a key at position k (-1: no key). Causal. With a
    window, a query sees only the last `window` keys and the first `sinks` keys. Shapes broadcast.
    """
    seen = (k >= 0) & (k <= q)
    return seen & ((k > q - window) | (k < sinks)) if window else seen


class Linear(nn.Linear):
    """row_groups: sizes of the row groups that alternate in a fused matrix. Muon orthogonalizes each separately."""

    def __init__(self, width: int, out: int, row_groups: tuple[int, ...] = (), bias: bool = False):
        super().__init__(width, out, bias)
        self.row_groups = row_groups


def is_plain(linear: nn.Module) -> bool:
    """Whether `linear` computes x weight^T and nothing else: no subclass, adapter, bias, hook or patch."""
    changed = linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear)
    return type(linear) is Linear and linear.bias is None and not changed


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class CausalConv(nn.Module):
    """x_t + sum of w_i x_(t - i), i = 1..N. Weights are per channel and start at zero (compare Primer, arXiv
    2109.08668). The cache keeps the last N vectors x, however long the text grows.
    """

    def __init__(self, part: str, width: int, taps: int):
        super().__init__()
        self.part, self.weight = part, nn.Parameter(torch.zeros(taps, 1, width))

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """x (B, T, width) -> (B, T, width)"""
        (taps, _, width), T, weights = self.weight.shape, x.size(1), self.weight.to(x.dtype)
        before = x.new_zeros(len(x), taps, width) if cache is None else cache.previous(self.part, x[:, None])[:, 0]
        padded = torch.cat((before, x), 1)
        return x + sum(w * padded[:, taps - i : taps - i + T] for i, w in enumerate(weights, 1))


class Attend(nn.Module):
    """softmax(scale q k^T) v. It gets the layer's cache, so that a faster kernel can read quantized codes."""

    def __init__(self, scale: float, dropout: float = 0.0):
        super().__init__()
        self.scale, self.dropout = scale, dropout

    def forward(self, q: Tensor, k, v, mask: Mask = None, cache: LayerCache | None = None, key_factor=None) -> Tensor:
        """q (B, H, T, D), k (B, G, S, D), v (B, G, S, Dv) -> (B, H, T, Dv); H / G heads share a key head.
        k, v, key_factor: tensors, or names of cache parts. key_factor (B, H, S) multiplies each key's scores.
        """
        if cache is not None and not isinstance(k, Tensor):
            same, k = k == v, cache.read(k, like=q)
            v = k if same else cache.read(v, like=q)
            key_factor = None if key_factor is None else cache.read(key_factor, like=q).squeeze(-1)
        (B, H, T, D), G = q.shape, k.size(1)
        dropout = self.dropout if self.training else 0.0
        if key_factor is not None:
            if mask is None:  # causal, T = S
                mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()[None, None]
            scores = (q.reshape(B, G, H // G * T, D) @ k.mT).view(B, H, T, -1) * (self.scale * key_factor[:, :, None])
            weights = F.dropout(scores.masked_fill(~mask, -torch.inf).float().softmax(-1).type_as(v), dropout)
            return (weights.view(B, G, H // G * T, -1) @ v).view(B, H, T, -1)
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v, None, dropout, True, scale=self.scale, enable_gqa=G < H)
        # treat the heads that share a key as further queries of one head, so that keys are not copied in memory
        q, mask = q.reshape(B, G, H // G * T, D), mask.repeat(1, 1, H // G, 1)
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scale)
        return y.reshape(B, H, T, -1)


class GroupedQueryAttention(nn.Module):
    """Attention in which H / G query heads share each of the G key and value heads: G = H is multi-head
    attention (Vaswani et al. 2017), G = 1 multi-query (Shazeer 2019), between them grouped-query (Ainslie et al.
    2023). Caches 2 G D numbers a token.
    """

    KNOBS = ("n_kv_head", "head_dim", "rotary_dim", "qk_norm", "kv_conv", "qkv_bias")

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.head_dim, self.rope_width = config.head_dim, config.rotary_dim
        self.qk_norm, self.kv_conv = config.qk_norm, config.kv_conv
        self.score_width = 2 * config.n_head * config.head_dim  # multiply-adds per query-key pair
        width, bias = config.n_kv_head * config.head_dim, bool(config.qkv_bias)
        self.q_proj = Linear(config.n_embd, config.n_head * config.head_dim, bias=bias)
        self.k_proj = Linear(config.n_embd, width, bias=bias)
        self.v_proj = Linear(config.n_embd, width, bias=bias)
        self.o_proj = Linear(config.n_head * config.head_dim, config.n_embd)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)
        if config.kv_conv:
            self.k_conv = CausalConv("k_conv", width, config.kv_conv)
            self.v_conv = CausalConv("v_conv", width, config.kv_conv)
        self.attend = Attend(config.score_factor * config.head_dim**-0.5, config.dropout)

    @staticmethod
    def resolve(config: GPTConfig) -> None:  # replace the knobs that are None by values
        H, G = config.n_head, config.n_kv_head
        expected = {"mha": H, "mqa": 1}.get(config.attention, G)
        if expected is None:
            raise ValueError(f"{config.attention} needs n_kv_head, a divisor of n_head = {H}")
        if G is not None and expected != G:
            raise ValueError(f"{config.attention} has n_kv_head = {expected}, not {G}; for others use gqa")
        if expected < 1 or H % expected:
            raise ValueError(f"n_head = {H} is not divisible by n_kv_head = {expected}")
        config.n_kv_head = expected
        config.head_dim = head_width(config) if config.head_dim is None else config.head_dim
        config.rotary_dim = config.head_dim if config.rotary_dim is None else config.rotary_dim
        config.qk_norm = True if config.qk_norm is None else config.qk_norm
        at_least(config, 1, "head_dim")
        if config.qk_norm == "shared":
            raise ValueError("qk_norm = shared is for mla, whose heads share a key; use True")
        if not 0 <= config.rotary_dim <= config.head_dim or config.rotary_dim % 2:
            raise ValueError(f"rotary_dim = {config.rotary_dim} must be even and in 0..head_dim = {config.head_dim}")

    @staticmethod
    def cached_parts(config: GPTConfig) -> dict[str, Part]:
        G, D, taps = config.n_kv_head, config.head_dim, config.kv_conv
        conv = {name: Part(1, G * D, last=taps) for name in ("k_conv", "v_conv")} if taps else {}
        return {"k": Part(G, D), "v": Part(G, D)} | conv

    def forward(self, x: Tensor, rope: Rope, mask: Mask = None, cache: LayerCache | None = None) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.kv_conv:
            k, v = self.k_conv(k, cache), self.v_conv(v, cache)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q.transpose(1, 2), rope)  # (B, H, T, D)
        k, v = rotate(k.transpose(1, 2), rope), v.transpose(1, 2)  # (B, G, T, D)
        if cache is not None:
            k, v = cache.append(k=k, v=v)
        y = self.attend(q, k, v, mask, cache)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MultiHeadLatentAttention(nn.Module):
    """DeepSeek-V2's multi-head latent attention (arXiv 2405.04434, section 2.1).

    Keys and values of all heads are linear in one latent c of width r. Only [c | k_rope] is cached, r + dr
    numbers a token:

        score_h = (q_nope_h . W_uk_h c + q_rope_h . k_rope) / sqrt(dn + dr)        out_h = sum p W_uv_h c

    Expanded form, for training: compute W_uk_h c and W_uv_h c of every token, then ordinary attention.
    Absorbed form, for decoding: q . (W_uk c) = (W_uk^T q) . c, so W_uk_h is applied to the query, and W_uv_h
    after the sum. The heads attend directly to the cached latents.

    RoPE has a separate key, k_rope. Rotated keys W_uk c would prevent absorption: in the score q^T R_(t-s) W_uk c
    the rotation R depends on the distance, so the absorbed query W_uk^T R^T q would differ for every cached token.
    All heads share one rope key of width dr. The latent is normed before it is cached, so that W_uk and W_uv
    read a vector of fixed size, however large the residual stream becomes in training.

    qk_norm=True (arXiv 2606.16310) divides a head's key [W_uk c | k_rope] by its rms, which RoPE does not change.
    1 / rms is cached for each head and multiplies the key's scores; the norm's weight multiplies the query.
    """

    KNOBS = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "q_lora_rank")
    KNOBS += ("qk_rope_repeat", "qk_norm", "kv_conv")

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.rank, self.q_rank = config.n_head, config.kv_lora_rank, config.q_lora_rank
        self.dn, self.dr, self.dv = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.rope_width, self.score_width = self.dr, self.n_head * (self.dn + self.dr + self.dv)
        q_width = self.n_head * (self.dn + self.dr)
        if config.q_lora_rank is None:
            self.q_proj = Linear(config.n_embd, q_width)
        else:
            self.q_a_proj = Linear(config.n_embd, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.norm_eps)
            self.q_b_proj = Linear(config.q_lora_rank, q_width)
        self.kv_a_proj_with_mqa = Linear(config.n_embd, self.rank + self.dr, row_groups=(self.rank, self.dr))
        self.kv_a_layernorm = RMSNorm(self.rank, config.norm_eps)
        self.kv_b_proj = Linear(self.rank, self.n_head * (self.dn + self.dv), row_groups=(self.dn, self.dv))
        self.o_proj = Linear(self.n_head * self.dv, config.n_embd)
        self.qk_norm, self.kv_conv = config.qk_norm, config.kv_conv
        if config.qk_norm:
            self.q_norm = RMSNorm(self.dn + self.dr, config.norm_eps)
            self.k_norm = RMSNorm(self.dr if config.qk_norm == "shared" else self.dn + self.dr, config.norm_eps)
        if config.kv_conv:
            self.latent_conv = CausalConv("latent_conv", self.rank + self.dr, config.kv_conv)
        # the absorbed form has wider keys, but the same scores, so it uses the scale of the expanded form
        self.attend = Attend(config.score_factor * (self.dn + self.dr) ** -0.5, config.dropout)

    @staticmethod
    def resolve(config: GPTConfig) -> None:
        r, dr, dn, dv = config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim
        config.kv_lora_rank = max(config.n_embd // 4, 1) if r is None else r
        config.qk_rope_head_dim = dr = head_width(config) // 4 * 2 if dr is None else dr
        config.qk_nope_head_dim = dn = head_width(config) - dr if dn is None else dn
        config.v_head_dim = dn + dr if dv is None else dv
        config.qk_rope_repeat = repeat = 1 if config.qk_rope_repeat is None else config.qk_rope_repeat
        at_least(config, 1, "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "q_lora_rank", "qk_rope_repeat")
        if dr < (config.qk_norm == "shared") or dr % (2 * repeat):
            raise ValueError(f"qk_rope_head_dim = {dr} must be even, fit qk_rope_repeat, not 0 if qk_norm = shared")

    @staticmethod
    def cached_parts(config: GPTConfig) -> dict[str, Part]:
        width = config.kv_lora_rank + config.qk_rope_head_dim
        parts = {"latent": Part(1, width, exact=config.qk_rope_head_dim)}
        parts |= {"key_factor": Part(config.n_head, 1, exact=1)} if config.qk_norm is True else {}
        return parts | ({"latent_conv": Part(1, width, last=config.kv_conv)} if config.kv_conv else {})

    def prefers_absorbed(self, T: int) -> bool:
        """Whether T new tokens take fewer multiply-adds absorbed than expanded. Per head and cached token, the
        absorbed form takes T (2 r + dr), the expanded form T (dn + dr + dv) + r (dn + dv).
        """
        if not is_plain(self.kv_b_proj):  # with an adapter or a hook, its weight is not all that it computes
            return False
        return T * (2 * self.rank - self.dn - self.dv) < self.rank * (self.dn + self.dv)

    def forward(self, x: Tensor, rope: Rope, mask: Mask = None, cache: LayerCache | None = None) -> Tensor:
        q = self.q_proj(x) if self.q_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q, kv = q.unflatten(-1, (self.n_head, -1)), self.kv_a_proj_with_mqa(x)
        q = self.q_norm(q) if self.qk_norm else q
        q = rotate(q.transpose(1, 2), rope, start=self.dn)  # (B, H, T, dn + dr)
        kv = self.latent_conv(kv, cache) if self.kv_conv else kv
        c, k_rope = kv[:, None].split((self.rank, self.dr), -1)
        k_rope = self.k_norm(k_rope) if self.qk_norm == "shared" else k_rope
        c, k_rope = self.kv_a_layernorm(c), rotate(k_rope, rope)  # (B, 1, T, r), (B, 1, T, dr)
        if cache is not None:
            new = {"latent": torch.cat((c, k_rope), -1)}
            if self.qk_norm is True:  # 1 / rms of each head's key
                k, _ = self.keys_and_values(c, k_rope)
                new["key_factor"] = (k.float().square().mean(-1, keepdim=True) + self.k_norm.eps).rsqrt()
            latent, *factor = cache.append(**new)
        if cache is None or cache.first:
            return self.expanded(q, c, k_rope, mask)
        if self.prefers_absorbed(x.size(1)):
            return self.absorbed(q, latent, mask, cache, *factor)
        c, k_rope = cache.read(latent, like=x).split((self.rank, self.dr), -1)  # (B, 1, S, ...)
        return self.expanded(q, c, k_rope, mask, *(cache.read(name, like=x) for name in factor))

    def keys_and_values(self, c: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B, H, S, dn + dr) and values (B, H, S, dv) of each head, from the latents c (B, 1, S, r)."""
        kv = self.kv_b_proj(c[:, 0]).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        k_nope, v = kv.split((self.dn, self.dv), -1)
        return torch.cat((k_nope, k_rope.expand(-1, self.n_head, -1, -1)), -1), v

    def expanded(self, q: Tensor, c: Tensor, k_rope: Tensor, mask: Mask, factor: Tensor | None = None) -> Tensor:
        """Attention over each head's own keys and values -> (B, T, C). factor: the keys' cached 1 / rms."""
        k, v = self.keys_and_values(c, k_rope)
        if self.qk_norm is True:
            k = self.k_norm(k) if factor is None else (k * factor * self.k_norm.weight).type_as(k)
        y = self.attend(q, k, v, mask)  # (B, H, T, dv)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def absorbed(self, q: Tensor, latent: str, mask: Mask, cache: LayerCache, factor: str | None = None) -> Tensor:
        """The same result by multi-query attention over the cached latents -> (B, T, C). [c | k_rope] is read
        once and is both key and value; of the output, only the first r columns (from c) are used.
        """
        if factor is not None:
            q = (q * self.k_norm.weight).type_as(q)
        q_nope, q_rope = q.split((self.dn, self.dr), -1)
        w_uk, w_uv = self.kv_b_proj.weight.unflatten(0, (self.n_head, -1)).split((self.dn, self.dv), 1)
        q = torch.cat((torch.einsum("bhtn,hnr->bhtr", q_nope, w_uk), q_rope), -1)
        y = self.attend(q, latent, latent, mask, cache, factor)  # (B, H, T, r + dr)
        return self.o_proj(torch.einsum("bhtr,hvr->bthv", y[..., : self.rank], w_uv).flatten(2))


# A new attention is a class with the same members, and an entry here: see docs/add_an_attention.md.
ATTENTIONS: dict[str, Any] = dict.fromkeys(("mha", "mqa", "gqa"), GroupedQueryAttention)
ATTENTIONS["mla"] = MultiHeadLatentAttention


def head_width(config: GPTConfig) -> int:
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd = {config.n_embd} is not divisible by n_head = {config.n_head}; set head widths")
    return config.n_embd // config.n_head


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x) (Shazeer 2020)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_proj = Linear(config.n_embd, config.intermediate_size)
        self.up_proj = Linear(config.n_embd, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = ATTENTIONS[config.attention](config)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, x: Tensor, rope: Rope, mask: Mask = None, cache: LayerCache | None = None) -> Tensor:
        y = self.self_attn(self.input_layernorm(x), rope, mask, cache)
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.mlp(self.post_attention_layernorm(x))
        return x + F.dropout(y, self.dropout, self.training)


class GPT(nn.Module):
    """The language model: token embedding, blocks, final norm, output head."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        at_least(config, 1, "vocab_size")
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers: Any = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.n_embd, config.vocab_size)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Output matrices of attention and MLP start at zero, so each block starts as the identity. Other matrices
        of a block have std 1/sqrt(fan-in), so their outputs have the variance of their inputs.
        """
        tied, std = self.config.tie_embeddings, 0.02
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight", ".bias")):
                nn.init.zeros_(p)
            elif name == "embed_tokens.weight":
                nn.init.normal_(p, std=std if tied else 1.0)
            elif p.ndim == 2:
                nn.init.normal_(p, std=p.size(1) ** -0.5)
        if tied:  # a small norm: a token's own logit starts at std * C * norm, so with 1 it would predict itself
            nn.init.constant_(self.norm.weight, 0.5 / (std * self.config.n_embd))

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Token ids (B, T) -> final hidden states (B, T, C), appending to `cache` if one is given."""
        config, windows, masks = self.config, self.config.layer_windows(), {}
        x = F.dropout(self.embed_tokens(idx), config.dropout, self.training)  # (B, T, C)
        if cache is None:
            positions, caches = torch.arange(idx.size(1), device=idx.device)[None], [None] * len(windows)
        else:
            positions, caches = cache.advance(*idx.shape), cache.layers  # (B, T)
        for window, layer in dict(zip(windows, caches, strict=True)).items():  # one mask per window
            if window or not (layer is None or layer.first):  # else causal attention, which needs no mask
                q, k = (positions, positions) if layer is None else layer.positions
                masks[window] = window_mask(q[:, None, :, None], k[:, None, None], window, config.sink_tokens)
        rope = rope_angles(positions, self.layers[0].self_attn.rope_width, config)
        for layer, window, layer_cache in zip(self.layers, windows, caches, strict=True):
            x = layer(x, rope, masks.get(window), layer_cache)
        return self.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) -> logits (..., V)."""
        return F.linear(hidden, self.embed_tokens.weight) if self.config.tie_embeddings else self.lm_head(hidden)

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None):
        """Token ids (B, T) -> logits (B, T, V) and, given targets (B, T), their mean cross-entropy in nats,
        else None. Targets of -1 do not count. With a cache, the T tokens follow the tokens in the cache.
        """
        logits = self.head(self.hidden(idx, cache))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)

    def new_cache(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None, spare: int = 0):
        """An empty cache for batch_size rows of max_len tokens. dtype: None is that of the weights. spare: how many
        tokens `rewind` may remove in layers with windows. Raises ValueError if dtype is not a cache format.
        """
        weight = self.embed_tokens.weight
        return KVCache(self.config.kv_layouts(), batch_size, max_len, dtype or weight.dtype, weight.device, spare)
