"""The training loss: mean cross-entropy of a language model, without all logits in memory at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 1 << 24  # elements at a time; 64 MiB in fp32


class LanguageModelLoss(nn.Module):
    """Token ids and targets -> loss. Training, DDP, FSDP and torch.compile wrap this module instead of the model. The
    model needs `hidden(idx) -> (B, T, C)` and `head(hidden) -> (..., V)`.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model

    def forward(self, idx: Tensor, targets: Tensor, spans: tuple[int, ...] = ()) -> Tensor:
        """idx and targets (B, T) -> mean cross-entropy (), in nats, of the targets that are not -1. With `spans`,
        numbers of positions that add up to T: the mean of each span, (len(spans),); nan where all targets are -1.
        """
        hidden = self.model.hidden(idx)  # (B, T, C)
        if not spans:
            return self.cross_entropy(hidden.flatten(0, 1), targets.flatten())
        parts = zip(hidden.split(spans, 1), targets.split(spans, 1), strict=True)
        return torch.stack([self.cross_entropy(h.flatten(0, 1), t.flatten()) for h, t in parts])

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The loss of final hidden states (N, C) and targets (N,). Many logits are computed in chunks, and again in
        the backward pass. At a vocabulary of 50,304, all of them at once would take most of a step's memory.
        """
        rows = max(MAX_LOGITS // self.model.config.vocab_size, 1)
        if len(hidden) <= rows:
            return self.head_loss(hidden, targets, "mean")
        total = hidden.new_zeros((), dtype=torch.float32)
        for chunk in zip(hidden.split(rows), targets.split(rows), strict=True):
            total = total + checkpoint(self.head_loss, *chunk, "sum", use_reentrant=False, preserve_rng_state=False)
        return total / (targets >= 0).sum()

    def head_loss(self, hidden: Tensor, targets: Tensor, reduction: str) -> Tensor:
        logits = self.model.head(hidden).float()
        return F.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)
