"""RoPE's frequencies for contexts longer than the trained context, as Hugging Face computes them.

`turns` is how often RoPE turns a pair of numbers within the trained context. A pair with few turns did not reach
all angles in training, so it is slowed down. A pair with many turns distinguishes neighbors, so it is unchanged.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

TURNS = {"linear": None, "llama3": (1.0, 4.0), "yarn": (1.0, 32.0)}  # defaults of rope_low and rope_high
KNOBS = ("rope_trained_length", "rope_low", "rope_high", "rope_attention_factor")


def resolve(config: Any) -> None:
    """Replace `rope_*` fields of a GPTConfig that are None by values. Raises ValueError if they do not fit together."""
    kind, given = config.rope_scaling, [knob for knob in KNOBS if getattr(config, knob) is not None]
    given += ["rope_factor"] * (config.rope_factor != 1)
    if kind not in (None, *TURNS):
        why = "; dynamic scaling changes what is cached already" if kind == "dynamic" else ""
        raise ValueError(f"rope_scaling must be one of {', '.join(TURNS)}, not {kind!r}{why}")
    unused = given if kind is None else set(given) & set(KNOBS) if kind == "linear" else ()
    if unused or (kind == "llama3" and config.rope_attention_factor not in (None, 1.0)):
        fault = f"{', '.join(sorted(unused)) or 'rope_attention_factor'} has no use with rope_scaling = {kind}"
        raise ValueError(f"{fault}; remove it, or set --rope_scaling=yarn")
    if not (config.rope_factor >= 1 and config.score_factor > 0):
        raise ValueError("rope_factor must be at least 1, score_factor above 0")
    if kind not in ("llama3", "yarn"):
        return
    low, high = TURNS[kind]
    config.rope_low = low if config.rope_low is None else config.rope_low
    config.rope_high = high if config.rope_high is None else config.rope_high
    if config.rope_trained_length is None:
        config.rope_trained_length = config.block_size
    if config.rope_attention_factor is None:
        config.rope_attention_factor = 0.1 * math.log(config.rope_factor) + 1 if kind == "yarn" else 1.0
    if kind == "yarn" and config.rope_theta <= 1:
        raise ValueError(f"rope_scaling = yarn needs rope_theta above 1, not {config.rope_theta}")
    if not (0 < config.rope_low < config.rope_high and config.rope_trained_length > 0):
        raise ValueError("rope_scaling needs 0 < rope_low < rope_high and rope_trained_length above 0")


def scale(frequency: Tensor, config: Any) -> Tensor:
    """Scale frequency (W / 2,), in radians per token, by config.rope_scaling: linear (Chen et al. 2023, arXiv
    2306.15595), llama3 (arXiv 2407.21783) or yarn (Peng et al. 2023, arXiv 2309.00071).
    """
    if config.rope_scaling in (None, "linear"):
        return frequency / config.rope_factor
    length, low, high = config.rope_trained_length, config.rope_low, config.rope_high
    if config.rope_scaling == "llama3":
        turns = length * frequency / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    else:  # linear between the pairs with `high` and `low` turns
        pairs, per_turns = len(frequency), math.log(config.rope_theta)
        first, last = (pairs * math.log(length / (turns * 2 * math.pi)) / per_turns for turns in (high, low))
        first, last = max(math.floor(first), 0), min(math.ceil(last), 2 * pairs - 1)
        pair = torch.arange(pairs, dtype=torch.float32, device=frequency.device)
        kept = 1 - ((pair - first) / (last - first or 0.001)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / config.rope_factor)
