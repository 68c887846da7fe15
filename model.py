"""A GPT with a choice of attention: mha, mqa, gqa or mla. Only the maths, in torch, as in the papers.

Pre-norm blocks of RMSNorm, attention, RMSNorm and SwiGLU, without biases; rotary position embedding, full or
partial, computed from positions, without a length limit. The KV cache is in nanokv/cache.py; each attention
class declares what it caches. Parameter names are those of the Hugging Face classes that compute the same
function (`LlamaForCausalLM`, `Qwen3ForCausalLM`, dense `DeepseekV3ForCausalLM`), less their leading `model.`.

Dimensions in comments: B batch, T new tokens, S tokens that attention reads, C n_embd, H n_head, G n_kv_head,
D head width, V vocabulary.
"""

# pyright: reportOptionalOperand=false, reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanokv.cache import CACHE_FORMATS, KVCache, LayerCache, LayerLayout, Part, kv_bytes_per_token

Rope = tuple[Tensor, Tensor]  # cosines and sines, see `rope_angles`
Mask = Tensor | None  # (B or 1, 1, T, S), true where a query may look; None: causal, T = S
Cache = LayerCache | None


@dataclass
class GPTConfig:
    """Shape of a model. The attention class fills in its fields that are None. Raises ValueError, one line
    that names the fault and the remedy, if the fields do not fit together.
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
    window: int = 0  # last tokens that a layer marked S sees, the current one included; 0: full attention
    window_pattern: str = "S"  # repeated over the layers: S sliding window, L full; SSSL: every fourth is full
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
    qk_rope_repeat: int | None = None  # times that each RoPE frequency occurs in qk_rope_head_dim; None: 1

    def __post_init__(self):
        if self.attention not in ATTENTIONS:
            raise ValueError(f"unknown attention {self.attention!r}; choose one of {', '.join(ATTENTIONS)}")
        at_least(self, 1, "block_size", "n_layer", "n_head", "n_embd", "intermediate_size")
        at_least(self, 0, "vocab_size", "window", "sink_tokens")
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
        if self.intermediate_size is None:
            self.intermediate_size = max(8 * self.n_embd // 3 // 64, 1) * 64

    def layer_windows(self) -> list[int]:
        """The window of each layer, in tokens; 0: full attention."""
        pattern = self.window_pattern
        return [self.window if pattern[i % len(pattern)] == "S" else 0 for i in range(self.n_layer)]

    def kv_layouts(self) -> list[LayerLayout]:
        parts = ATTENTIONS[self.attention].cached_parts(self)
        return [LayerLayout(parts, w, self.sink_tokens if w else 0) for w in self.layer_windows()]

    def kv_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that all layers together cache for one token, the scales of int8 and fp8 included."""
        return kv_bytes_per_token(self.kv_layouts(), dtype)


def rope_angles(positions: Tensor, width: int, theta: float, repeat: int = 1) -> Rope:
    """Cosines and sines, (B, 1, T, width / 2) each, of RoPE (Su et al. 2021) at `positions` (B, T), in fp32.

    Pair j turns by position * theta^(-2j / width). With `repeat`, the frequencies of width / repeat, that often.
    """
    width //= repeat
    exponent = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / -max(width, 1)
    angle = positions[:, None, :, None] * (theta**exponent).repeat(repeat)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: Rope, start: int = 0) -> Tensor:
    """Apply RoPE to x (B, H, T, D) from dimension `start` on. Pairs are (j, half + j), as in Llama."""
    (cos, sin), half = rope, rope[0].size(-1)
    before, x1, x2, after = x.split((start, half, half, x.size(-1) - start - 2 * half), -1)
    return torch.cat((before, x1 * cos - x2 * sin, x2 * cos + x1 * sin, after), -1).type_as(x)


def visible(q: Tensor, k: Tensor, window: int, sinks: int) -> Tensor:
    """The attention mask: whether a query at position q sees a key at position k (-1: no key there).

    Causal; with a window, only the last `window` keys and the first `sinks`. Shapes broadcast.
    """
    seen = (k >= 0) & (k <= q)
    return seen & ((k > q - window) | (k < sinks)) if window else seen


class Linear(nn.Linear):
    """nn.Linear without bias. row_groups: of a fused matrix, the rows of each kind in turn, such as (16, 48)
    for each head's key and value. Muon orthogonalizes each kind separately.
    """

    def __init__(self, width: int, out: int, row_groups: tuple[int, ...] = ()):
        super().__init__(width, out, bias=False)
        self.row_groups = row_groups


def is_plain(linear: nn.Module) -> bool:
    """Whether it computes x weight^T and nothing else: no subclass, adapter, bias, hook or patch."""
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


class Attend(nn.Module):
    """The inner attention, softmax(scale q k^T) v, without parameters.

    It takes the layer's cache rather than its contents, so that a kernel in its place can read the codes.
    """

    def __init__(self, scale: float, dropout: float = 0.0):
        super().__init__()
        self.scale, self.dropout = scale, dropout

    def forward(self, q: Tensor, k, v, mask: Mask = None, cache: Cache = None, key_factor=None) -> Tensor:
        """q (B, H, T, D), k (B, G, S, D), v (B, G, S, Dv) -> (B, H, T, Dv); H / G heads share a key head.

        k, v: tensors, or names of the cache's parts. key_factor (B, H, S) multiplies the scores of each key.
        """
        if cache is not None and not isinstance(k, Tensor):
            same, k = k == v, cache.read(k, like=q)
            v = k if same else cache.read(v, like=q)
        (B, H, T, D), G = q.shape, k.size(1)
        dropout = self.dropout if self.training else 0.0
        if key_factor is not None:
            if mask is None:  # aligned top-left: queries and keys start together
                mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()[None, None]
            k, v = (t.repeat_interleave(H // G, 1) for t in (k, v))
            scores = self.scale * key_factor[:, :, None] * (q @ k.mT)  # (B, H, T, S)
            weights = scores.masked_fill(~mask, -torch.inf).float().softmax(-1).type_as(v)
            return F.dropout(weights, dropout) @ v
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v, None, dropout, True, scale=self.scale, enable_gqa=G < H)
        # the heads that share a key become more queries of it, so that no key is repeated in memory
        q, mask = q.reshape(B, G, H // G * T, D), mask.repeat(1, 1, H // G, 1)
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scale)
        return y.reshape(B, H, T, -1)


class GroupedQueryAttention(nn.Module):
    """Attention in which H / G query heads share each of the G key and value heads.

    G = H is multi-head attention (Vaswani et al. 2017), G = 1 multi-query (Shazeer 2019), between them
    grouped-query (Ainslie et al. 2023). Caches 2 G D numbers a token.
    """

    KNOBS = ("n_kv_head", "head_dim", "rotary_dim", "qk_norm")

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.head_dim, self.qk_norm, self.rope_width = config.head_dim, config.qk_norm, config.rotary_dim
        self.score_width = 2 * config.n_head * config.head_dim  # multiply-adds per query-key pair
        self.q_proj = Linear(config.n_embd, config.n_head * config.head_dim)
        self.k_proj = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.v_proj = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.o_proj = Linear(config.n_head * config.head_dim, config.n_embd)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.attend = Attend(config.head_dim**-0.5, config.dropout)

    @staticmethod
    def resolve(config: GPTConfig) -> None:  # fill in the knobs that were left None
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
        if not 0 <= config.rotary_dim <= config.head_dim or config.rotary_dim % 2:
            fault = f"rotary_dim = {config.rotary_dim} must be even (RoPE turns pairs)"
            raise ValueError(f"{fault} and in 0..head_dim = {config.head_dim}")

    @staticmethod
    def cached_parts(config: GPTConfig) -> dict[str, Part]:
        return {name: Part(config.n_kv_head, config.head_dim) for name in ("k", "v")}

    def forward(self, x: Tensor, rope: Rope, mask: Mask = None, cache: Cache = None) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
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
    Absorbed form, for decoding: q . (W_uk c) = (W_uk^T q) . c, so W_uk_h moves to the query, and likewise
    W_uv_h behind the sum; the heads attend to the cached latents themselves.

    RoPE is applied to a separate key, k_rope, since it would keep W_uk from moving: in q^T R_(t-s) W_uk c the
    rotation R depends on the distance, so W_uk^T R^T q would be another vector for every cached token. One
    rope key of width dr is shared by all heads. The latent is normed before it is cached, so that both
    up-projections read a vector of fixed size, however the residual stream grows during training.
    """

    KNOBS = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "q_lora_rank")
    KNOBS += ("qk_rope_repeat",)

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
        # the scale is that of the expanded keys in the absorbed form too, whose keys are wider
        self.attend = Attend((self.dn + self.dr) ** -0.5, config.dropout)

    @staticmethod
    def resolve(config: GPTConfig) -> None:
        if config.kv_lora_rank is None:
            config.kv_lora_rank = max(config.n_embd // 4, 1)
        if config.qk_rope_head_dim is None:
            config.qk_rope_head_dim = head_width(config) // 4 * 2
        if config.qk_nope_head_dim is None:
            config.qk_nope_head_dim = head_width(config) - config.qk_rope_head_dim
        if config.v_head_dim is None:
            config.v_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        at_least(config, 1, "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "q_lora_rank")
        dr, repeat = config.qk_rope_head_dim, 1 if config.qk_rope_repeat is None else config.qk_rope_repeat
        config.qk_rope_repeat = repeat
        if dr < 0 or repeat < 1 or dr % (2 * repeat):
            fault = f"qk_rope_head_dim = {dr} must be even (RoPE turns pairs)"
            raise ValueError(f"{fault} and a multiple of twice qk_rope_repeat = {repeat}")

    @staticmethod
    def cached_parts(config: GPTConfig) -> dict[str, Part]:
        width = config.kv_lora_rank + config.qk_rope_head_dim
        return {"latent": Part(1, width, exact=config.qk_rope_head_dim)}

    def prefers_absorbed(self, T: int) -> bool:
        """Whether T new tokens cost fewer multiply-adds absorbed than expanded. Per head and cached token:
        T (2 r + dr) absorbed; T (dn + dr + dv) and, once, r (dn + dv) expanded.
        """
        if not is_plain(self.kv_b_proj):  # an adapter or a hook: its weight alone is not enough
            return False
        return T * (2 * self.rank - self.dn - self.dv) < self.rank * (self.dn + self.dv)

    def forward(self, x: Tensor, rope: Rope, mask: Mask = None, cache: Cache = None) -> Tensor:
        q = self.q_proj(x) if self.q_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = rotate(q.unflatten(-1, (self.n_head, -1)).transpose(1, 2), rope, start=self.dn)  # (B, H, T, dn + dr)
        c, k_rope = self.kv_a_proj_with_mqa(x)[:, None].split((self.rank, self.dr), -1)
        c, k_rope = self.kv_a_layernorm(c), rotate(k_rope, rope)  # (B, 1, T, r), (B, 1, T, dr)
        if cache is not None:
            (latent,) = cache.append(latent=torch.cat((c, k_rope), -1))
            if not cache.first:
                if self.prefers_absorbed(x.size(1)):
                    return self.absorbed(q, latent, mask, cache)
                c, k_rope = cache.read(latent, like=x).split((self.rank, self.dr), -1)  # (B, 1, S, ...)
        return self.expanded(q, c, k_rope, mask)

    def expanded(self, q: Tensor, c: Tensor, k_rope: Tensor, mask: Mask) -> Tensor:
        """Attention over each head's own keys and values, made from the latents -> (B, T, C)."""
        kv = self.kv_b_proj(c[:, 0]).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        k_nope, v = kv.split((self.dn, self.dv), -1)  # (B, H, S, dn), (B, H, S, dv)
        k = torch.cat((k_nope, k_rope.expand(-1, self.n_head, -1, -1)), -1)
        y = self.attend(q, k, v, mask)  # (B, H, T, dv)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def absorbed(self, q: Tensor, latent: str, mask: Mask, cache: LayerCache) -> Tensor:
        """The same as multi-query attention over the latents -> (B, T, C). One read serves as the key
        [c | k_rope] and as the value, of which the first r columns, c, count.
        """
        q_nope, q_rope = q.split((self.dn, self.dr), -1)
        w_uk, w_uv = self.kv_b_proj.weight.unflatten(0, (self.n_head, -1)).split((self.dn, self.dv), 1)
        q_latent = torch.einsum("bhtn,hnr->bhtr", q_nope, w_uk)
        y = self.attend(torch.cat((q_latent, q_rope), -1), latent, latent, mask, cache)  # (B, H, T, r + dr)
        return self.o_proj(torch.einsum("bhtr,hvr->bthv", y[..., : self.rank], w_uv).flatten(2))


# A new attention is a class with the same members, and an entry here: see docs/add_an_attention.md.
ATTENTIONS: dict[str, Any] = dict.fromkeys(("mha", "mqa", "gqa"), GroupedQueryAttention)
ATTENTIONS["mla"] = MultiHeadLatentAttention


def at_least(config: GPTConfig, low: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) is not None and getattr(config, name) < low:
            raise ValueError(f"{name} must be at least {low}, not {getattr(config, name)}")


def head_width(config: GPTConfig) -> int:
    if config.n_embd % config.n_head:
        fault = f"n_embd = {config.n_embd} is not divisible by n_head = {config.n_head}"
        raise ValueError(f"{fault}; change one, or set the widths of a head yourself")
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

    def forward(self, x: Tensor, rope: Rope, mask: Mask = None, cache: Cache = None) -> Tensor:
        y = self.self_attn(self.input_layernorm(x), rope, mask, cache)
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.mlp(self.post_attention_layernorm(x))
        return x + F.dropout(y, self.dropout, self.training)


class GPT(nn.Module):
    """The language model: token embedding, blocks, final norm, output head."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError("a model needs a vocab_size of at least 1")
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers: Any = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.n_embd, config.vocab_size)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Each block starts as the identity: matrices that write to the residual stream are zero. The others
        keep the variance of what they read (std 1/sqrt(fan-in)), the low-rank factors of MLA included.
        """
        tied, std = self.config.tie_embeddings, 0.02
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                nn.init.zeros_(p)
            elif name == "embed_tokens.weight":
                nn.init.normal_(p, std=std if tied else 1.0)
            elif p.ndim == 2:
                nn.init.normal_(p, std=p.size(1) ** -0.5)
        if tied:  # else each token would predict itself: its own logit starts at std * C * norm
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
            if window or not (layer is None or layer.first):  # else plain causal attention, without a mask
                q, k = (positions, positions) if layer is None else layer.positions
                masks[window] = visible(q[:, None, :, None], k[:, None, None], window, config.sink_tokens)
        width, repeat = self.layers[0].self_attn.rope_width, config.qk_rope_repeat or 1
        rope = rope_angles(positions, width, config.rope_theta, repeat)
        for layer, window, layer_cache in zip(self.layers, windows, caches, strict=True):
            x = layer(x, rope, masks.get(window), layer_cache)
        return self.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) -> logits (..., V)."""
        tied = self.config.tie_embeddings
        return F.linear(hidden, self.embed_tokens.weight) if tied else self.lm_head(hidden)

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None):
        """Token ids (B, T) -> logits (B, T, V) and, given targets (B, T), their mean cross-entropy in nats,
        else None. Targets of -1 do not count. With a cache, the T tokens follow those that it holds.
        """
        logits = self.head(self.hidden(idx, cache))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)

    def new_cache(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None, spare: int = 0):
        """An empty cache for batch_size rows of up to max_len tokens; dtype: None is that of the weights.
        spare: extra slots of windowed layers, for `rewind` to go back. ValueError if dtype is no cache format.
        """
        weight = self.embed_tokens.weight
        dtype = dtype or weight.dtype
        if dtype not in (*CACHE_FORMATS.values(), torch.float64):
            raise ValueError(f"a cache holds {', '.join(CACHE_FORMATS)} (e4m3) numbers, not {dtype}")
        return KVCache(self.config.kv_layouts(), batch_size, max_len, dtype, weight.device, spare)
