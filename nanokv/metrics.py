"""What is counted and measured of a model: parameters, FLOPs, the cache's footprint."""

from __future__ import annotations

import torch
from torch import nn

from nanokv.cache import kv_bytes, kv_bytes_per_token


def n_params(model: nn.Module, embedding: bool = True) -> int:
    """Number of parameters; without `embedding`, less the token embedding and the output head."""
    names = () if embedding else ("embed_tokens.weight", "lm_head.weight")
    return sum(p.numel() for name, p in model.named_parameters() if name not in names)


def flops_per_token(model: nn.Module, context: int) -> int:
    """Floating-point operations to train on one token, forward and backward, at a context length.

    PaLM's convention (arXiv 2204.02311, appendix B): 6 a parameter that multiplies, and 6 for each
    multiply-add with each position of the context, the causal half not deducted.
    """
    config = model.config
    matmul = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    if not config.tie_embeddings:
        matmul -= model.embed_tokens.weight.numel()  # a look-up
    layers = zip(model.layers, config.kv_layouts(), strict=True)
    scores = sum(layer.self_attn.score_width * layout.slots(context) for layer, layout in layers)
    return 6 * (matmul + scores)


def kv_elements_per_token_layer(config) -> int:
    """Numbers that one layer caches for one token."""
    return config.kv_layouts()[0].elements()


def kv_ratio_to_mha(config) -> float:
    """Cache of a full context relative to that of multi-head attention of this width without windows, which
    holds 2 n_embd a token a layer.
    """
    layouts, context, dtype = config.kv_layouts(), config.block_size, torch.bfloat16
    held = kv_bytes(layouts, context, dtype) / (kv_bytes_per_token(layouts, dtype) * context)
    return held * kv_elements_per_token_layer(config) / (2 * config.n_embd)
