"""A GPT whose attention is one flag: mha, mqa, gqa or mla.

The model is in this file; its cache is in cache.py, and what machines rather compute in another way than one
writes it, in kernels.py and, for CPUs, in native.c, which native.py and tape.py call.

- pre-norm blocks: RMSNorm, attention, RMSNorm, SwiGLU; no biases; embeddings tied or not
- rotary position embedding (RoPE), full or partial, computed from positions: no table, no length limit
- GroupedQueryAttention: multi-head, grouped-query and multi-query attention, optional QK-norm
- MultiHeadLatentAttention: DeepSeek-V2's latent attention with decoupled RoPE, expanded for training
  and absorbed for decoding
- KVCache (cache.py): preallocated, laid out by what each attention class declares that it caches

Parameter names are those of the Hugging Face classes that compute the same function (`LlamaForCausalLM`,
`Qwen3ForCausalLM`, `DeepseekV3ForCausalLM` with dense layers), less their leading `model.`.

Dimensions in comments: B batch, T new tokens, S tokens held by the cache, C n_embd, H n_head, G n_kv_head,
D head width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backends import cpu as native
from backends import tape
from nanokv.cache import CACHE_FORMATS, CacheStep, KVCache, LayerCache, cache_layout, visible
from nanokv.loss import (
    Linear,
    LinearCrossEntropy,
    NativeCausalAttention,
    NativeRotation,
    RMSNorm,
    linear,
    swiglu,
)


@dataclass
class GPTConfig:
    """Shape of a model. A field left None is resolved by the attention it belongs to.

    Raises ValueError, one line that names the fault and the remedy, if the fields do not fit together.
    """

    # model
    attention: str = "mha"  # which attention: mha, mqa, gqa or mla
    block_size: int = 256  # context length that the model is trained on, in tokens
    vocab_size: int = 0  # number of token ids; 0 takes it from the data set
    n_layer: int = 6  # number of blocks
    n_head: int = 6  # query heads in a layer
    n_embd: int = 384  # width of the residual stream
    intermediate_size: int | None = None  # width of the MLP; None: 8/3 n_embd, down to a multiple of 64
    dropout: float = 0.0  # on attention weights, on each residual branch and on the embedding
    rope_theta: float = 10000.0  # base of RoPE's frequencies
    norm_eps: float = 1e-6  # added to the mean square in every RMSNorm
    tie_embeddings: bool = False  # one matrix for the token embedding and the output head
    # sliding window
    window: int = 0  # last tokens that a layer marked S sees, the current one included; 0: all layers see all
    window_pattern: str = "S"  # the layers, repeated: S sees `window` tokens, L all; SSSL: every fourth all
    sink_tokens: int = 0  # first tokens that an S layer sees besides its window (attention sinks)
    # mha, mqa, gqa
    n_kv_head: int | None = None  # key and value heads, a divisor of n_head; mha: n_head, mqa: 1
    head_dim: int | None = None  # width of a head; None: n_embd / n_head
    rotary_dim: int | None = None  # leading dimensions of a head that RoPE rotates; None: all of them
    qk_norm: bool | None = None  # RMSNorm on each head's query and key before RoPE; None: True
    # mla
    kv_lora_rank: int | None = None  # width r of the cached latent; None: n_embd / 4
    qk_rope_head_dim: int | None = None  # width of the rotated part of a key, shared by all heads; None: D/2
    qk_nope_head_dim: int | None = None  # width of a head's unrotated query and key; None: the rest of D
    v_head_dim: int | None = None  # width of a head's value; None: that of its key, D
    q_lora_rank: int | None = None  # width of the query's latent; None: a full-rank query projection
    qk_rope_repeat: int | None = None  # how often each RoPE frequency occurs in that rotated part; None: 1

    def __post_init__(self):
        if self.attention not in ATTENTIONS:
            raise ValueError(f"unknown attention {self.attention!r}; choose one of {', '.join(ATTENTIONS)}")
        for name in ("block_size", "n_layer", "n_head", "n_embd", "intermediate_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.vocab_size < 0:
            raise ValueError(f"vocab_size must be at least 0, not {self.vocab_size}")
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta must be above 0, not {self.rope_theta}")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps must be above 0, not {self.norm_eps}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if self.window < 0 or self.sink_tokens < 0:
            raise ValueError("window and sink_tokens count tokens; neither can be below 0")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(f"window_pattern is made of S and L, as in SSSL, not {self.window_pattern!r}")
        if self.window == 0 and self.sink_tokens:
            raise ValueError("sink_tokens come besides a window; set window, or remove sink_tokens")
        attention = ATTENTIONS[self.attention]
        for other in ATTENTIONS.values():
            for knob in other.KNOBS:
                if knob not in attention.KNOBS and getattr(self, knob) is not None:
                    users = "/".join(name for name, cls in ATTENTIONS.items() if knob in cls.KNOBS)
                    raise ValueError(f"{knob} is a knob of {users}, not of {self.attention}; remove it")
        attention.resolve(self)
        if self.intermediate_size is None:
            self.intermediate_size = max(8 * self.n_embd // 3 // 64, 1) * 64

    def kv_elements_per_token_layer(self) -> int:
        """Numbers that one layer caches for one token."""
        return sum(math.prod(shape) for shape in ATTENTIONS[self.attention].cache_spec(self).values())

    def cache_layout(self, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """What one layer holds of one token in this format: a shape and a dtype for each buffer."""
        attention = ATTENTIONS[self.attention]
        exact = attention.unquantised_width(self) if hasattr(attention, "unquantised_width") else 0
        return cache_layout(attention.cache_spec(self), exact, dtype)

    def layer_windows(self) -> list[int]:
        """The window of each layer, in tokens; 0 where it sees all."""
        pattern = self.window_pattern
        return [self.window if pattern[i % len(pattern)] == "S" else 0 for i in range(self.n_layer)]

    def kv_slots(self, window: int, max_len: int, spare: int = 0) -> int:
        """Tokens that a layer of this window has room for in a cache for max_len tokens."""
        return min(self.sink_tokens + window + spare, max_len) if window else max_len

    def kv_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that all layers together cache for one token, the scales of int8 and fp8 included."""
        layout = self.cache_layout(dtype).values()
        return self.n_layer * sum(math.prod(shape) * part.itemsize for shape, part in layout)

    def kv_bytes(self, max_len: int, dtype: torch.dtype = torch.bfloat16, spare: int = 0) -> int:
        """Bytes of a cache for one row of max_len tokens: a layer with a window holds no more than that."""
        slots = sum(self.kv_slots(window, max_len, spare) for window in self.layer_windows())
        return slots * self.kv_bytes_per_token(dtype) // self.n_layer

    def kv_ratio_to_mha(self) -> float:
        """Cache of a full context relative to that of multi-head attention of this width without windows,
        which holds 2 n_embd a token a layer.
        """
        held = self.kv_bytes(self.block_size) / (self.kv_bytes_per_token() * self.block_size)
        return held * self.kv_elements_per_token_layer() / (2 * self.n_embd)


def rope_angles(positions: Tensor, width: int, theta: float, repeat: int = 1) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, 1, T, width) of RoPE (Su et al. 2021) at `positions` (B, T), in fp32.

    The first half of the sines carries the sign of the rotation, see `rotate`. `repeat` RoPEs, each of
    width / repeat, lie side by side.
    """
    width //= repeat
    exponent = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / -max(width, 1)
    frequency = (theta**exponent).repeat(repeat)
    angle = positions[:, None, :, None] * frequency  # (B, 1, T, width/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor], lead: int = 0) -> Tensor:
    """Rotate dimensions of x (B, H, T, D), from `lead` on as many as `rope` is wide, in halves as Llama does.

    [x1 cos - x2 sin, x2 cos + x1 sin] for the halves x1, x2: the roll swaps them, the signs are in the sines.
    """
    cos, sin = rope
    width = cos.size(-1)
    if width == 0:
        return x
    if native.handles(x, cos):
        return NativeRotation.apply(x, cos, sin, lead)
    if width < x.size(-1):
        before, x, after = x.split_with_sizes((lead, width, x.size(-1) - lead - width), -1)
        return torch.cat((before, rotate(x, rope), after), -1)
    return torch.addcmul(x * cos, x.roll(width // 2, -1), sin).type_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None, scale: float, dropout=0.0) -> Tensor:
    """softmax(scale q k^T) v: q (B, H, T, D), k (B, G, S, D), v (B, G, S, Dv) -> (B, H, T, Dv).

    Causal over a first chunk; with a window or over a cache, as its mask says. torch's `is_causal` aligns the
    mask top-left, so it is right only where queries and keys start together.
    """
    (B, H, T, D), G, Dv = q.shape, k.size(1), v.size(-1)
    mask = None if cache is None else cache.step.mask
    causal = mask is None and (cache is None or cache.step.first)
    if causal and not dropout and NativeCausalAttention.takes(q, k, v):
        return NativeCausalAttention.apply(q, k, v, scale)
    if Dv != D:  # the fused kernels want values as wide as keys
        width = max(D, Dv)
        q, k, v = (F.pad(t, (0, width - t.size(-1))) for t in (q, k, v))
    if causal:
        y = F.scaled_dot_product_attention(
            q, k, v, None, dropout, is_causal=True, scale=scale, enable_gqa=G < H
        )
    else:  # fold the H/G query heads that share a key head into the query axis instead of repeating the keys
        mask = None if mask is None else mask.repeat(1, 1, H // G, 1)
        q = q.reshape(B, G, H // G * T, -1)
        if mask is None and native.takes(q, k, v):
            y = native.attend(q, k, v, scale)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
        y = y.view(B, H, T, -1)
    return y if Dv == D else y[..., :Dv]


class GroupedQueryAttention(nn.Module):
    """Attention in which H / G query heads share each of the G key and value heads.

    G = H is multi-head attention (Vaswani et al. 2017), G = 1 multi-query (Shazeer 2019), between them
    grouped-query (Ainslie et al. 2023). Caches 2 G D numbers a token.
    """

    KNOBS = ("n_kv_head", "head_dim", "rotary_dim", "qk_norm")

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.rotary_dim = config.rotary_dim
        self.dropout = config.dropout
        self.q_proj = Linear(config.n_embd, self.n_head * self.head_dim)
        self.k_proj = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.v_proj = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.o_proj = Linear(self.n_head * self.head_dim, config.n_embd)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.norm_eps)

    @staticmethod
    def resolve(config: GPTConfig) -> None:
        """Fill in the knobs that were left None; ValueError if they do not fit."""
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
        if config.head_dim < 1 or not 0 <= config.rotary_dim <= config.head_dim:
            raise ValueError(f"rotary_dim = {config.rotary_dim} must be in 0..head_dim = {config.head_dim}")
        if config.rotary_dim % 2:
            raise ValueError(f"RoPE turns pairs, so rotary_dim must be even, not {config.rotary_dim}")

    @staticmethod
    def cache_spec(config: GPTConfig) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what is cached for one token."""
        return {name: (config.n_kv_head, config.head_dim) for name in ("k", "v")}

    @staticmethod
    def rope_width(config: GPTConfig) -> int:
        return config.rotary_dim

    @staticmethod
    def score_width(config: GPTConfig) -> int:
        """Multiply-adds that one query spends on one key, over all heads."""
        return config.n_head * 2 * config.head_dim

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: LayerCache | None = None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q.transpose(1, 2), rope)  # (B, H, T, D)
        k, v = rotate(k.transpose(1, 2), rope), v.transpose(1, 2)  # (B, G, T, D)
        if cache is not None:
            k, v = cache.append(k=k, v=v)  # (B, G, S, D)
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, cache, self.head_dim**-0.5, dropout)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))

    decode = native.grouped_query  # x + forward(norm(x)) of one token a row, in C
    record = tape.grouped_query  # x + forward(h) as operators of a tape, for training in C


class MultiHeadLatentAttention(nn.Module):
    """DeepSeek-V2's multi-head latent attention (arXiv 2405.04434, section 2.1).

    Keys and values of all heads are linear in one normalised latent c of width r; position enters through one
    rotated key of width dr that the heads share. Only [c | k_rope] is cached: r + dr numbers a token.

        score_h = (q_nope_h . W_uk_h c + q_rope_h . k_rope) / sqrt(dn + dr)        out_h = sum p W_uv_h c

    Expanded form: compute W_uk_h c and W_uv_h c of every token, then ordinary attention. Absorbed form: move
    W_uk_h to the query and W_uv_h behind the sum, so that the heads attend to the cached latents themselves.
    """

    KNOBS = (
        *("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "q_lora_rank"),
        "qk_rope_repeat",
    )

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.rank, self.q_rank = config.kv_lora_rank, config.q_lora_rank
        self.dn, self.dr, self.dv = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.scale = (self.dn + self.dr) ** -0.5  # in the absorbed form too, whose keys are wider
        q_width = self.n_head * (self.dn + self.dr)
        if config.q_lora_rank is None:
            self.q_proj = Linear(config.n_embd, q_width)
        else:
            self.q_a_proj = Linear(config.n_embd, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.norm_eps)
            self.q_b_proj = Linear(config.q_lora_rank, q_width)
        self.kv_a_proj_with_mqa = Linear(config.n_embd, self.rank + self.dr, parts=(self.rank, self.dr))
        self.kv_a_layernorm = RMSNorm(self.rank, config.norm_eps)
        self.kv_b_proj = Linear(self.rank, self.n_head * (self.dn + self.dv), parts=(self.dn, self.dv))
        self.o_proj = Linear(self.n_head * self.dv, config.n_embd)

    @staticmethod
    def resolve(config: GPTConfig) -> None:
        """Fill in the knobs that were left None; ValueError if they do not fit."""
        if config.kv_lora_rank is None:
            config.kv_lora_rank = max(config.n_embd // 4, 1)
        if config.qk_rope_head_dim is None:
            config.qk_rope_head_dim = head_width(config) // 4 * 2
        if config.qk_nope_head_dim is None:
            config.qk_nope_head_dim = head_width(config) - config.qk_rope_head_dim
        if config.v_head_dim is None:
            config.v_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        for name in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "q_lora_rank"):
            if getattr(config, name) is not None and getattr(config, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(config, name)}")
        if config.qk_rope_head_dim < 0 or config.qk_rope_head_dim % 2:
            raise ValueError(
                f"RoPE turns pairs: qk_rope_head_dim must be even, not {config.qk_rope_head_dim}"
            )
        config.qk_rope_repeat = 1 if config.qk_rope_repeat is None else config.qk_rope_repeat
        if config.qk_rope_repeat < 1 or config.qk_rope_head_dim % (2 * config.qk_rope_repeat):
            raise ValueError(
                f"qk_rope_head_dim = {config.qk_rope_head_dim} is no multiple of twice qk_rope_repeat = "
                f"{config.qk_rope_repeat}"
            )

    @staticmethod
    def cache_spec(config: GPTConfig) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what is cached for one token."""
        return {"latent": (config.kv_lora_rank + config.qk_rope_head_dim,)}

    @staticmethod
    def unquantised_width(config: GPTConfig) -> int:
        """Last numbers of a cached vector that int8 and fp8 leave as they are: the rope key."""
        return config.qk_rope_head_dim

    @staticmethod
    def rope_width(config: GPTConfig) -> int:
        return config.qk_rope_head_dim

    @staticmethod
    def score_width(config: GPTConfig) -> int:
        """Multiply-adds that one query spends on one key, over all heads, in the expanded form."""
        return config.n_head * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)

    def prefers_absorbed(self, n: int) -> bool:
        """Whether n new tokens over a long cache cost fewer multiply-adds absorbed than expanded.

        Per head and cached token: n (2 r + dr) absorbed; n (dn + dr + dv) and, once, r (dn + dv) expanded.
        """
        return n * (2 * self.rank - self.dn - self.dv) < self.rank * (self.dn + self.dv)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: LayerCache | None = None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x) if self.q_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.view(B, T, self.n_head, self.dn + self.dr).transpose(1, 2)
        q = rotate(q, rope, self.dn)  # (B, H, T, dn + dr)
        c, k_rope = self.kv_a_proj_with_mqa(x).split_with_sizes((self.rank, self.dr), -1)
        c = self.kv_a_layernorm(c)  # (B, T, r)
        k_rope = rotate(k_rope.unsqueeze(1), rope).squeeze(1)  # (B, T, dr)
        if cache is not None:
            (latent,) = cache.append(latent=torch.cat((c, k_rope), -1))  # (B, S, r + dr)
            c, k_rope = latent.split_with_sizes((self.rank, self.dr), -1)
        if cache is not None and not cache.step.first and self.prefers_absorbed(T):
            y = self.absorbed(q, latent, cache)
        else:
            y = self.expanded(q, c, k_rope, cache)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))

    def expanded(self, q: Tensor, c: Tensor, k_rope: Tensor, cache: LayerCache | None) -> Tensor:
        """Attention over each head's own keys and values, made from the latents -> (B, H, T, dv)."""
        kv = self.kv_b_proj(c).unflatten(-1, (self.n_head, self.dn + self.dv)).transpose(1, 2)
        k_nope, v = kv.split((self.dn, self.dv), -1)  # (B, H, S, dn), (B, H, S, dv)
        k = torch.cat((k_nope, k_rope[:, None].expand(-1, self.n_head, -1, -1)), -1)
        return attend(q, k, v, cache, self.scale, self.dropout if self.training else 0.0)

    def absorbed(self, q: Tensor, latent: Tensor, cache: LayerCache) -> Tensor:
        """The same attention over the latents themselves, as multi-query attention: the heads share one key
        [c | k_rope], and one value, of which the first r columns, c, count. One read serves both.
        """
        (B, H, T, _), latent = q.shape, latent.unsqueeze(1)
        q_nope, q_rope = q.split_with_sizes((self.dn, self.dr), -1)
        w_uk, w_uv = self.kv_b_proj.weight.view(H, -1, self.rank).split((self.dn, self.dv), 1)
        q = torch.bmm(q_nope.transpose(0, 1).flatten(1, 2), w_uk).view(H, B, T, -1).transpose(0, 1)
        y = attend(torch.cat((q, q_rope), -1), latent, latent, cache, self.scale)  # (B, H, T, r + dr)
        y = y[..., : self.rank].transpose(0, 1).flatten(1, 2)  # (H, B T, r)
        return torch.bmm(y, w_uv.mT).view(H, B, T, -1).transpose(0, 1)

    decode = native.multi_head_latent  # x + forward(norm(x)) of one token a row, in C
    record = tape.multi_head_latent  # x + forward(h) as operators of a tape, for training in C


# A new attention is a class with the same members, and an entry here.
ATTENTIONS = {
    "mha": GroupedQueryAttention,
    "mqa": GroupedQueryAttention,
    "gqa": GroupedQueryAttention,
    "mla": MultiHeadLatentAttention,
}


def head_width(config: GPTConfig) -> int:
    """n_embd / n_head, the usual width of a head; ValueError if it is not whole."""
    if config.n_embd % config.n_head:
        raise ValueError(
            f"n_embd = {config.n_embd} is not divisible by n_head = {config.n_head}; change one, or set the "
            "widths of a head yourself"
        )
    return config.n_embd // config.n_head


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x) (Shazeer 2020)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_proj = Linear(config.n_embd, config.intermediate_size)
        self.up_proj = Linear(config.n_embd, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

    decode = native.mlp  # x + forward(norm(x)) of one token a row, in C
    record = tape.mlp  # x + forward(h) as operators of a tape, for training in C


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = ATTENTIONS[config.attention](config)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: LayerCache | None = None) -> Tensor:
        one_token = cache is not None and x.size(1) == 1 and not self.training
        if one_token and native.takes(x, self.input_layernorm.weight):
            return self.decode(x, rope, cache)
        x = x + self.drop(self.self_attn(self.input_layernorm(x), rope, cache))
        return x + self.drop(self.mlp(self.post_attention_layernorm(x)))

    def decode(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: LayerCache) -> Tensor:
        """`forward` by native.c, so far as it has the attention, the cache's format and the MLP."""
        attention, norm = self.self_attn, self.input_layernorm
        if cache.is_plain() and has_own_decode(attention):
            x = attention.decode(x, norm, rope, cache)
        else:
            x = x + attention(norm(x), rope, cache)
        mlp, norm = self.mlp, self.post_attention_layernorm
        return mlp.decode(x, norm) if has_own_decode(mlp) else x + mlp(norm(x))

    record = tape.block  # forward as operators of a tape, for training in C

    def drop(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout, self.training) if self.dropout else branch


def has_own_decode(module: nn.Module) -> bool:
    """Whether its class defines `decode`: an inherited one would not know what the subclass changed."""
    return "decode" in vars(type(module))


class GPT(nn.Module):
    """The language model: token embedding, blocks, final norm, output head."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError("a model needs a vocab_size of at least 1")
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.n_embd, config.vocab_size)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Each block starts as the identity: matrices that write to the residual stream are zero.

        The others keep the variance of what they read (std 1/sqrt(fan-in)), the low-rank factors of MLA
        included: each reads a normalised vector, so no factor needs a scale of its own. A head that is the
        embedding would see in every token that token itself, so the last norm starts it at a whisper.
        """
        tied, std = self.config.tie_embeddings, 0.02
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                nn.init.zeros_(p)
            elif name == "embed_tokens.weight":
                nn.init.normal_(p, std=std if tied else 1.0)
            elif p.ndim == 2:
                nn.init.normal_(p, std=p.size(1) ** -0.5)
        if tied:  # a token's own logit starts at std * C * norm = 0.5
            nn.init.constant_(self.norm.weight, 0.5 / (std * self.config.n_embd))

    def hidden(self, idx: Tensor, cache: KVCache | None = None, lengths: list[int] | None = None) -> Tensor:
        """Token ids (B, T) -> final hidden states (B, T, C), appending to `cache` if one is given.

        Only the first lengths[b] tokens of row b are appended; the rest is padding. None: all.
        """
        config = self.config
        if cache is None:
            positions = torch.arange(idx.size(1), device=idx.device)[None]
            layers = {0: None}  # plain causal attention
            if config.window:
                mask = visible(positions.mT, positions, config.window, config.sink_tokens)[None, None]
                layers[config.window] = LayerCache(CacheStep(mask=mask), {})
            layers = [layers[window] for window in config.layer_windows()]
        elif len(idx) != cache.batch_size:
            raise ValueError(f"a batch of {len(idx)} rows does not fit a cache for {cache.batch_size}")
        else:
            positions, layers = cache.advance(idx.size(1), lengths), cache.layers
        width, repeat = ATTENTIONS[config.attention].rope_width(config), config.qk_rope_repeat or 1
        rope = rope_angles(positions, width, config.rope_theta, repeat)
        x = F.dropout(self.embed_tokens(idx), config.dropout, self.training)  # (B, T, C)
        in_c = None if any(layers) else tape.tape_of(self, x, rope)
        if in_c is not None:
            return in_c.run(x, rope)
        for layer, layer_cache in zip(self.layers, layers, strict=True):
            x = layer(x, rope, layer_cache)
        return self.norm(x)

    @property
    def head_weight(self) -> Tensor:
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) -> logits (..., V)."""
        return linear(hidden, self.head_weight)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        lengths: list[int] | None = None,
        want_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Token ids (B, T) -> logits (B, T, V) and, given targets (B, T), their mean cross-entropy in nats.

        Targets of -1 do not count. want_logits=False: None instead, where the loss is cheaper without. With
        a cache, the T tokens follow those which it holds; with `lengths`, row b's tokens from lengths[b] on
        are padding, which the cache leaves out.
        """
        hidden = self.hidden(idx, cache, lengths)
        if not want_logits and LinearCrossEntropy.takes(hidden, self.head_weight):
            weight = self.head_weight if torch.is_grad_enabled() else self.head_weight.detach()
            return None, LinearCrossEntropy.apply(hidden.flatten(0, 1), weight, targets.flatten())
        logits = self.head(hidden)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)

    def new_cache(
        self, batch_size: int, max_len: int, dtype: torch.dtype | None = None, spare: int = 0
    ) -> KVCache:
        """An empty cache for batch_size rows of up to max_len tokens; dtype: that of the model's weights.

        spare: how many tokens a `rewind` may go back in a layer whose window is full. Raises ValueError for a
        dtype that is no format of a cache.
        """
        weight = self.embed_tokens.weight
        dtype = dtype or weight.dtype
        if dtype not in (*CACHE_FORMATS.values(), torch.float64):
            raise ValueError(f"a cache holds {', '.join(CACHE_FORMATS)} (e4m3) numbers, not {dtype}")
        return KVCache(self.config, batch_size, max_len, dtype, weight.device, spare)

    def n_params(self, embedding: bool = True) -> int:
        """Number of parameters; without `embedding`, less the token embedding and the output head."""
        names = () if embedding else ("embed_tokens.weight", "lm_head.weight")
        return sum(p.numel() for name, p in self.named_parameters() if name not in names)

    def flops_per_token(self, context: int) -> int:
        """Floating-point operations to train on one token, forward and backward, at a context length.

        PaLM's convention (arXiv 2204.02311, appendix B): 6 a parameter that multiplies, and 6 for each
        multiply-add with each position of the context, the causal half not deducted.
        """
        config = self.config
        matmul = sum(p.numel() for p in self.parameters() if p.ndim == 2)
        if not config.tie_embeddings:
            matmul -= self.embed_tokens.weight.numel()  # a look-up
        seen = sum(config.kv_slots(window, context) for window in config.layer_windows())
        scores = ATTENTIONS[config.attention].score_width(config) * seen
        return 6 * (matmul + scores)
