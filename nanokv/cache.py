"""The KV cache of every attention: what is stored of each token, in which format, and where.

An attention declares what it caches (`cache_spec`); formats from fp32 to int8 and fp8, windows held as rings,
rows of different lengths and rewinding follow from that, the same for all.

Dimensions in comments: B batch, T new tokens, S tokens held by the cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# The formats of a cache. Some hold a number as a code times a scale; these with their largest code.
CACHE_FORMATS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
QUANTISED = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
GROUP = 128  # numbers of one vector that share a scale, at most


def cache_layout(
    spec: dict[str, tuple[int, ...]], exact: int, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What one layer holds of one token that `spec` declares: a shape and a dtype for each buffer.

    int8 and fp8 have a bf16 scale for each head's vector, and for each 128 numbers of a wider one. The last
    `exact` numbers of a vector stay in bf16.
    """
    layout = {}
    for name, (*heads, width) in spec.items():
        if dtype not in QUANTISED:
            layout[name] = (*heads, width), dtype
            continue
        layout[name] = (*heads, width - exact), dtype
        layout[f"{name}_scale"] = (*heads, math.ceil((width - exact) / GROUP)), torch.bfloat16
        if exact:
            layout[f"{name}_exact"] = (*heads, exact), torch.bfloat16
    return layout


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (..., D) -> codes (..., D) in dtype and bf16 scales (..., ceil(D / GROUP)), x = codes * scales.

    Symmetric: a scale takes the largest magnitude of its group to the largest code.
    """
    width, largest = min(x.size(-1), GROUP), QUANTISED[dtype]
    groups = F.pad(x.float(), (0, -x.size(-1) % width)).unflatten(-1, (-1, width))
    scale = (groups.abs().amax(-1, keepdim=True) / largest).clamp(min=1e-30).bfloat16()
    codes = groups / scale.float()
    codes = codes.round() if dtype == torch.int8 else codes  # fp8 rounds as it is cast
    codes = codes.clamp(-largest, largest).to(dtype)
    return codes.flatten(-2)[..., : x.size(-1)], scale.squeeze(-1)


def dequantise(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantise`, up to rounding, in dtype."""
    if scale.size(-1) > 1:
        scale = scale.repeat_interleave(GROUP, -1)[..., : codes.size(-1)]
    return codes.to(dtype).mul_(scale.to(dtype))


def visible(q: Tensor, k: Tensor, window: int, sinks: int) -> Tensor:
    """Whether a query at position q sees a key at position k: the one mask, of training and of every cache.

    Shapes broadcast. Negative positions hold no key.
    """
    seen = (k >= 0) & (k <= q)
    return seen & ((k > q - window) | (k < sinks)) if window else seen


@dataclass
class CacheStep:
    """Where the T tokens of one forward pass go in the layers of one window; worked out once for all of them.

    Such a layer holds `slots` tokens: position p is in slot p up to the last slot, from which on the slots
    behind the sinks are a ring, in which p overwrites p - ring.
    """

    window: int = 0  # 0: none, and slots for all tokens
    sinks: int = 0
    slots: int = 0
    # of one forward pass
    positions: Tensor | None = None  # (B or 1, T)
    first: bool = True  # all rows were empty: attention is over the new tokens alone
    uniform: bool = True  # all rows are equally long
    start: int | None = 0  # slot of the first new token where all go side by side, else:
    at: tuple[Tensor, ...] = ()  # (row, new token, slot) of each one to be stored, (n,) each
    joined: bool = False  # a chunk in a ring: read before storing, which overwrites what its first tokens see
    end: int = 0  # slots to read
    mask: Tensor | None = None  # (B or 1, 1, T, S), true where a query may look; None: everywhere, but
    # causally if first

    @property
    def ring(self) -> int:
        return max(self.slots - self.sinks, 1)

    def slot(self, p: int | Tensor) -> int | Tensor:
        """The slot of position p: itself, less the rounds that it has gone on the ring."""
        return p - (p >= self.sinks) * ((p - self.sinks) // self.ring * self.ring)

    def held(self, lengths: Tensor) -> Tensor:
        """Positions (B, slots) that the slots hold in rows of these lengths (B, 1); -1: none."""
        slots, last = torch.arange(self.slots, device=lengths.device), lengths - 1
        wrapped = last - (last - slots) % self.ring  # the latest position in each slot of the ring
        positions = torch.where((lengths <= self.slots) | (slots < self.sinks), slots, wrapped)
        return torch.where(positions < lengths, positions, -1)

    def plan(self, old: list[int], counts: list[int], n: int, device) -> None:
        """Plan n tokens on top of rows of old[b] tokens, of which the first counts[b] are to be stored."""
        new = [a + b for a, b in zip(old, counts, strict=True)]
        begin, end = max(old), max(new)
        self.first, self.uniform = begin == 0, min(old) == begin
        rows = old[:1] if self.uniform else old
        self.positions = torch.tensor(rows, device=device)[:, None] + torch.arange(n, device=device)
        self.joined = self.window > 0 and n > 1 and not self.first
        self.end, self.start, self.mask = min(end, self.slots), None, None
        if self.uniform and (begin + n <= self.slots or n == 1 == min(counts)):
            self.start = self.slot(begin)
        else:
            t, lengths = torch.arange(n), torch.tensor(new)[:, None]
            p = torch.tensor(old)[:, None] + t  # (B, n)
            stored = (p < lengths) & ((p < self.sinks) | (p >= lengths - self.ring))
            row, column = stored.nonzero(as_tuple=True)
            self.at = tuple(index.to(device) for index in (row, column, self.slot(p)[row, column]))
        q = self.positions[:, None, :, None]  # (B or 1, 1, n, 1)
        if self.first:
            if self.window:
                self.mask = visible(q, q.mT, self.window, self.sinks)
        elif self.joined:
            held = self.held(torch.tensor(rows, device=device)[:, None])
            keys = torch.cat((held.expand(len(rows), -1), self.positions), 1)
            self.mask = visible(q, keys[:, None, None], self.window, self.sinks)
        elif not self.uniform or n > 1 or (self.window and end > self.sinks + self.window < self.slots):
            distinct = new if not self.uniform or min(new) < max(new) else new[:1]
            lengths = torch.tensor([max(length, 1) for length in distinct], device=device)[:, None]
            keys = self.held(lengths)[:, None, None, : self.end]  # (B or 1, 1, 1, S)
            # padding looks where its row's last token does: a query without any key would give NaN
            self.mask = visible(torch.minimum(q, lengths[..., None, None] - 1), keys, self.window, self.sinks)


class LayerCache:
    """One layer's share of a `KVCache`: a buffer (B, *heads, slots, width) for each part of `cache_layout`.

    Without buffers it stores nothing, and is the mask of a pass without a cache.
    """

    def __init__(self, step: CacheStep, buffers: dict[str, Tensor]):
        self.step, self.buffers = step, buffers
        self.quantised = any(buffer.dtype in QUANTISED for buffer in buffers.values())

    def is_plain(self) -> bool:
        """Whether the rows' new tokens go in one slot, in fp32, and see all slots up to the end."""
        step, buffers = self.step, self.buffers.values()
        return (
            bool(buffers)
            and step.start is not None
            and step.mask is None
            and all(buffer.dtype == torch.float32 for buffer in buffers)
        )

    def append(self, **new: Tensor) -> list[Tensor]:
        """Store T new tokens of each row, (B, *heads, T, width), and return what attention is to read.

        That is the new values themselves in the first chunk, else what is stored of all S tokens; of these a
        row may see the ones that `step.mask` allows. Each token is quantised here, once.
        """
        step, values = self.step, list(new.values())
        if not self.buffers:
            return values
        parts = {}
        for name, value in new.items():
            parts |= self.encode(name, value.detach())
        if step.joined:
            old = [self.decode(self.buffers, name, value) for name, value in new.items()]
            now = [self.decode(parts, name, value) for name, value in new.items()]
            values = [torch.cat(pair, -2) for pair in zip(old, now, strict=True)]
        for name, part in parts.items():
            if step.start is not None:
                self.buffers[name].narrow(-2, step.start, part.size(-2)).copy_(part)
            else:
                row, column, slot = step.at
                buffer = self.buffers[name].movedim(-2, 1)  # (B, slots, *heads, width)
                buffer[row, slot] = part.movedim(-2, 1)[row, column].to(buffer.dtype)
        if step.first or step.joined:
            return values
        held = {name: buffer.narrow(-2, 0, step.end) for name, buffer in self.buffers.items()}
        return [self.decode(held, name, value) for name, value in new.items()]

    def encode(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """value (..., width) as the parts that are stored of it."""
        if not self.quantised:
            return {name: value}
        dtype, width = self.buffers[name].dtype, self.buffers[name].size(-1)
        codes, scale = quantise(value[..., :width], dtype)
        parts = {name: codes, f"{name}_scale": scale}
        return parts | ({f"{name}_exact": value[..., width:]} if width < value.size(-1) else {})

    def decode(self, parts: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
        """The inverse of `encode`, in the dtype of `like`."""
        if not self.quantised:
            return parts[name].to(like.dtype)
        value = dequantise(parts[name], parts[f"{name}_scale"], like.dtype)
        exact = parts.get(f"{name}_exact")
        return value if exact is None else torch.cat((value, exact.to(like.dtype)), -1)


class KVCache:
    """Preallocated cache of all layers, laid out as their attention class declares in `cache_spec`.

    Each row b of the batch holds its own `lengths[b]` tokens, so prompts of different lengths share a batch:
    pad them on the right and say how many tokens count. Memory is allocated once; `nbytes` is what was
    allocated. A layer with a window holds sink_tokens + window tokens and `spare` more, as far back as
    `rewind` is to reach. `endless`: rows may grow past max_len, as every layer has a window, and no sink at a
    distance for which training has no example. `config` is the model's GPTConfig.
    """

    def __init__(self, config, batch_size: int, max_len: int, dtype: torch.dtype, device, spare: int = 0):
        self.batch_size, self.max_len, self.device, self.spare = batch_size, max_len, device, spare
        self.lengths = [0] * batch_size
        self.lost = [0] * batch_size  # behind the sinks, the positions below this are overwritten
        windows, sinks, layout = config.layer_windows(), config.sink_tokens, config.cache_layout(dtype)
        self.steps = {w: CacheStep(w, sinks, config.kv_slots(w, max_len, spare)) for w in windows}
        self.endless = sinks == 0 and all(w and step.slots >= w for w, step in self.steps.items())
        self.layers = []
        for window in windows:
            step, buffers = self.steps[window], {}
            for name, ((*heads, width), part) in layout.items():
                shape = (batch_size, *heads, step.slots, width)
                buffers[name] = torch.zeros(shape, dtype=part, device=device)
            self.layers.append(LayerCache(step, buffers))

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for layer in self.layers for buffer in layer.buffers.values())

    def advance(self, n: int, counts: list[int] | None = None) -> Tensor:
        """Make room for n tokens in every row; returns their positions (B or 1, n).

        counts[b] of them are stored and the rest is padding; None: all. Raises ValueError if they do not fit.
        """
        old, counts = self.lengths, [n] * self.batch_size if counts is None else counts
        if len(counts) != self.batch_size or not all(0 <= count <= n for count in counts):
            raise ValueError(f"of {n} tokens in each of {self.batch_size} rows, {counts} cannot be stored")
        new = [a + b for a, b in zip(old, counts, strict=True)]
        if max(new) > self.max_len and not self.endless:
            raise ValueError(f"cache of {self.max_len} tokens is too short for {max(old)} + {n} tokens")
        for step in self.steps.values():
            step.plan(old, counts, n, self.device)
            self.lost = [max(lost, length - step.ring) for lost, length in zip(self.lost, new, strict=True)]
        self.lengths = new
        return step.positions

    def rewind(self, lengths: list[int]) -> None:
        """Forget all but the first lengths[b] tokens of each row b.

        Raises ValueError if a row holds fewer, or if what its next token is to see has left a window.
        """
        if len(lengths) != self.batch_size or any(
            not 0 <= n <= held for n, held in zip(lengths, self.lengths, strict=True)
        ):
            raise ValueError(f"cannot rewind rows of {self.lengths} tokens to {lengths}")
        for window, step in self.steps.items():
            for n, lost in zip(lengths, self.lost, strict=True):
                if window and max(n + 1 - window, step.sinks) < min(n, lost):
                    raise ValueError(
                        f"cannot rewind rows of {self.lengths} tokens to {lengths}: their window of {window} "
                        "moved on; make the cache with more spare, or pass padded rows with their lengths"
                    )
        self.lengths = list(lengths)
        self.lost = [min(lost, n) for lost, n in zip(self.lost, lengths, strict=True)]

    def replace_rows(self, rows: list[int], other: KVCache) -> None:
        """Put the rows of `other`, a cache like this one but no longer, in place of `rows`."""
        for layer, source in zip(self.layers, other.layers, strict=True):
            for name, buffer in source.buffers.items():
                layer.buffers[name].narrow(-2, 0, buffer.size(-2))[rows] = buffer
        for row, length, lost in zip(rows, other.lengths, other.lost, strict=True):
            self.lengths[row], self.lost[row] = length, lost
