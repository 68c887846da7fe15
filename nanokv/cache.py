"""The KV cache of every attention: what a layer holds of a token, in which format, and where.

An attention declares the named parts that it caches (`LayerLayout`). Footprint, formats from fp32 to int8 and
fp8, windows held as rings, rows of different lengths and rewinding follow from that, the same for all.

Each forward pass is planned once, with tensors on the device (`Plan`), so that a decode step has static
shapes and can be compiled or captured. The host keeps a copy of the rows' lengths, to check bounds without
waiting for the device.

Dimensions in comments: B batch, T new tokens, S tokens that attention reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Cache formats. The quantized ones store codes and scales; they are listed with their largest code.
CACHE_FORMATS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
QUANTIZED = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
GROUP = 128  # numbers of one vector that share a scale, at most


@dataclass(frozen=True)
class Part:
    """One vector per head that a layer caches for each token."""

    heads: int
    width: int
    exact: int = 0  # trailing numbers that int8 and fp8 keep in bf16 (MLA's rope key)


@dataclass(frozen=True)
class LayerLayout:
    """What one layer caches: these parts of all tokens, or of the first `sinks` and the last `window`."""

    parts: dict[str, Part]
    window: int = 0  # 0: all tokens
    sinks: int = 0

    def elements(self) -> int:
        """Numbers cached for one token."""
        return sum(part.heads * part.width for part in self.parts.values())

    def buffers(self, dtype: torch.dtype) -> dict[str, tuple[int, int, torch.dtype]]:
        """Heads, width and dtype of each buffer that holds these parts in a format.

        int8 and fp8 have a bf16 scale for each head's vector, and for each 128 numbers of a wider one.
        """
        buffers = {}
        for name, part in self.parts.items():
            coded = part.width - part.exact
            if dtype not in QUANTIZED or not coded:
                buffers[name] = part.heads, part.width, torch.bfloat16 if dtype in QUANTIZED else dtype
                continue
            buffers[name] = part.heads, coded, dtype
            buffers[f"{name}_scale"] = part.heads, math.ceil(coded / GROUP), torch.bfloat16
            if part.exact:
                buffers[f"{name}_exact"] = part.heads, part.exact, torch.bfloat16
        return buffers

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return sum(heads * width * of.itemsize for heads, width, of in self.buffers(dtype).values())

    def slots(self, max_len: int, spare: int = 0) -> int:
        """Tokens that the layer has room for in a cache of max_len tokens."""
        return min(self.sinks + self.window + spare, max_len) if self.window else max_len


def kv_bytes_per_token(layouts: Sequence[LayerLayout], dtype: torch.dtype) -> int:
    """Bytes that all layers together cache for one token, scales included."""
    return sum(layout.bytes_per_token(dtype) for layout in layouts)


def kv_bytes(layouts: Sequence[LayerLayout], max_len: int, dtype: torch.dtype, spare: int = 0) -> int:
    """Bytes of a cache for one row of max_len tokens; a layer with a window holds no more than that."""
    return sum(layout.slots(max_len, spare) * layout.bytes_per_token(dtype) for layout in layouts)


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (..., D) -> codes (..., D) in dtype and bf16 scales (..., ceil(D / GROUP)), x = codes * scales.

    Symmetric: a scale takes the largest magnitude of its group to the largest code.
    """
    width, largest = min(x.size(-1), GROUP), QUANTIZED[dtype]
    groups = F.pad(x.float(), (0, -x.size(-1) % width)).unflatten(-1, (-1, width))
    scale = (groups.abs().amax(-1, keepdim=True) / largest).clamp(min=1e-30).bfloat16()
    codes = groups / scale.float()
    codes = codes.round() if dtype == torch.int8 else codes  # fp8 rounds as it is cast
    codes = codes.clamp(-largest, largest).to(dtype)
    return codes.flatten(-2)[..., : x.size(-1)], scale.squeeze(-1)


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantize`, up to rounding, in dtype."""
    if scale.size(-1) > 1:
        scale = scale.repeat_interleave(GROUP, -1)[..., : codes.size(-1)]
    return codes.to(dtype).mul_(scale.to(dtype))


class Plan:
    """Where the new tokens of one forward pass go in the layers of one window, and what their queries see.

    Such a layer has `slots` slots. Position p is in slot p until the slots are full; from then on the slots
    behind the sinks are a ring, in which p overwrites p - ring. All tensors are on the cache's device.
    """

    def __init__(self, window: int, sinks: int, slots: int):
        self.window, self.sinks, self.slots = window, sinks, slots
        self.ring = max(slots - sinks, 1)
        self.first = True  # all rows were empty: queries see only the new tokens
        self.chunk_in_ring = False  # read old tokens before storing new ones over some that the queries see
        self.end = 0  # number of leading slots to read
        self.queries: Tensor | None = None  # (B, T) positions of the new tokens, for the mask
        self.keys: Tensor | None = None  # (B, S) positions of what is read; -1: an empty slot
        self.slot: Tensor | None = None  # (B, T) where each new token goes
        self.source: Tensor | None = None  # (B, T) which new token goes there; None: token t
        self.kept: Tensor | None = None  # (B, 1) false for rows in which no new token counts

    def slot_of(self, position: Tensor) -> Tensor:
        past = (position - self.sinks).clamp(min=0)
        return torch.where(position < self.slots, position, self.sinks + past % self.ring)

    def positions_held(self, lengths: Tensor, end: int) -> Tensor:
        """Positions (B, end) that the first slots hold in rows of these lengths (B, 1); -1: none."""
        slots, last = torch.arange(end, device=lengths.device), lengths - 1
        latest = last - (last - slots) % self.ring  # the last position that a slot of the ring took
        positions = torch.where((lengths <= self.slots) | (slots < self.sinks), slots, latest)
        return torch.where(positions < lengths, positions, -1)

    def update(self, old: Tensor, counts: Tensor | None, T: int, first: bool, longest: int) -> Tensor:
        """Plan T tokens for rows of old (B,) tokens, of which the first counts (B,) count (None: all).

        longest: the length of the longest row afterwards, or more. Returns the tokens' positions (B, T).
        """
        old, t = old[:, None], torch.arange(T, device=old.device)
        positions = old + t  # (B, T)
        new = old + (T if counts is None else counts[:, None])  # (B, 1)
        self.first, self.chunk_in_ring = first, self.window > 0 and T > 1 and not first
        self.end, self.source, self.kept = min(longest, self.slots), None, None
        if counts is not None or (self.window and self.ring < T):
            stored = (positions < new) & ((positions < self.sinks) | (positions >= new - self.ring))
            # a token that is not stored writes what the row's last one writes, or leaves an idle row as it is
            self.source = torch.where(stored, t, (new - old - 1).clamp(min=0))
            self.kept = new > old
        self.slot = self.slot_of(positions if self.source is None else old + self.source)
        self.queries = positions
        if first:
            self.keys = positions
        elif self.chunk_in_ring:
            self.keys = torch.cat((self.positions_held(old, self.end), positions), 1)
        else:
            # padding looks where its row's last token does: a query without any key would give NaN
            last = new.clamp(min=1)
            self.queries, self.keys = torch.minimum(positions, last - 1), self.positions_held(last, self.end)
        return positions


class LayerCache:
    """One layer's share of a `KVCache`: a buffer (B, heads, slots, width) for each entry of the layout."""

    def __init__(self, plan: Plan, buffers: dict[str, Tensor]):
        self.plan, self.buffers = plan, buffers
        self.joined: dict[str, Tensor] = {}  # of a chunk in a ring: old and new tokens, until they are read

    @property
    def first(self) -> bool:
        """Whether the new tokens are the first of their rows, so that they see nothing but each other."""
        return self.plan.first

    @property
    def positions(self) -> tuple:
        """Positions of the queries (B, T), and of the keys (B, S) that attention reads, -1 for none."""
        return self.plan.queries, self.plan.keys

    def append(self, **new: Tensor) -> list:
        """Store the new tokens of each part, (B, heads, T, width), quantized here and once.

        Returns what attention is to read of each part: the new values themselves in a first chunk, else the
        part's name, by which `read` gives all tokens.
        """
        for name, value in new.items():
            encoded = self.encode(name, value.detach())
            if self.plan.chunk_in_ring:
                tokens = self.held(value, name), self.decode(encoded, name, value)
                self.joined[name] = torch.cat(tokens, -2)
            for key, part in encoded.items():
                self.store(self.buffers[key], part)
        return list(new.values()) if self.first else list(new)

    def read(self, name: str, like: Tensor) -> Tensor:
        """All S tokens of a part that the plan's keys name, (B, heads, S, width) in the dtype of `like`."""
        return self.joined.pop(name) if self.plan.chunk_in_ring else self.held(like, name)

    def held(self, like: Tensor, name: str) -> Tensor:
        """What the buffers hold of a part."""
        read = {key: buffer.narrow(-2, 0, self.plan.end) for key, buffer in self.buffers.items()}
        return self.decode(read, name, like)

    def store(self, buffer: Tensor, part: Tensor) -> None:
        """Put part (B, heads, T, width) into the planned slots of buffer (B, heads, slots, width)."""
        plan, rows = self.plan, torch.arange(len(buffer), device=buffer.device)[:, None]
        if buffer.dtype.itemsize == 1:  # codes: torch has no `where` for fp8
            buffer, part = buffer.view(torch.uint8), part.view(torch.uint8)
        buffer, part = buffer.transpose(1, 2), part.transpose(1, 2)  # (B, slots or T, heads, width)
        if plan.source is not None and plan.kept is not None:
            kept = plan.kept[..., None, None]
            part = torch.where(kept, part[rows, plan.source], buffer[rows, plan.slot])
        buffer[rows, plan.slot] = part

    def encode(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """value (..., width) as what is stored of it, by the names of the buffers."""
        dtype, width = self.buffers[name].dtype, self.buffers[name].size(-1)
        if f"{name}_scale" not in self.buffers:
            return {name: value.to(dtype)}
        codes, scale = quantize(value[..., :width], dtype)
        parts = {name: codes, f"{name}_scale": scale}
        return parts | ({f"{name}_exact": value[..., width:].bfloat16()} if width < value.size(-1) else {})

    def decode(self, parts: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
        """The inverse of `encode`, in the dtype of `like`."""
        if f"{name}_scale" not in parts:
            return parts[name].to(like.dtype)
        value = dequantize(parts[name], parts[f"{name}_scale"], like.dtype)
        exact = parts.get(f"{name}_exact")
        return value if exact is None else torch.cat((value, exact.to(like.dtype)), -1)


class KVCache:
    """Preallocated cache of all layers, laid out as their attention declares.

    Row b of the batch holds its own lengths[b] tokens, so prompts of different lengths share a batch: pad
    them on the right and say with `expect` how many tokens of the next chunk count. Memory is allocated once;
    `nbytes` is what was allocated. A layer with a window holds sinks + window tokens and `spare` more, as far
    back as `rewind` is to reach. `endless`: rows may grow past max_len, because all layers have windows and
    none has sinks, whose distance would exceed any that training has seen.
    """

    def __init__(
        self,
        layouts: Sequence[LayerLayout],
        batch_size: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device | str,
        spare: int = 0,
    ):
        if batch_size < 1:
            raise ValueError(f"a cache needs at least one row, not {batch_size}")
        self.layouts, self.batch_size, self.max_len, self.spare = list(layouts), batch_size, max_len, spare
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)  # (B,) tokens in each row
        self.host_copy: list[int] | None = [0] * batch_size  # of lengths; None: a compiled step changed them
        self.peaks = [0] * batch_size  # the most tokens that each row held before it was rewound
        self.first = True  # no row holds a token
        self.counts: list[int] | None = None  # of the next chunk, see `expect`
        self.plans = {
            (layout.window, layout.sinks): Plan(layout.window, layout.sinks, layout.slots(max_len, spare))
            for layout in layouts
        }
        plans = [self.plans[layout.window, layout.sinks] for layout in layouts]
        self.endless = all(plan.window and not plan.sinks and plan.slots >= plan.window for plan in plans)
        self.layers = []
        for layout, plan in zip(layouts, plans, strict=True):
            buffers = {
                name: torch.zeros(batch_size, heads, plan.slots, width, dtype=part, device=device)
                for name, (heads, width, part) in layout.buffers(dtype).items()
            }
            self.layers.append(LayerCache(plan, buffers))

    @property
    def device(self) -> torch.device:
        return self.lengths.device

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for layer in self.layers for buffer in layer.buffers.values())

    def host_lengths(self) -> list[int]:
        """The lengths as Python integers; waits for the device only after a compiled step."""
        if self.host_copy is None:
            self.host_copy = [int(length) for length in self.lengths.tolist()]
        return self.host_copy

    def expect(self, counts: Sequence[int]) -> None:
        """Of the next chunk only the first counts[b] tokens of row b count; the rest is padding."""
        if len(counts) != self.batch_size or min(counts) < 0:
            raise ValueError(f"{self.batch_size} rows need a count of tokens each, not {list(counts)}")
        self.counts = list(counts)

    def reserve(self, T: int, counts: Sequence[int] | None = None) -> None:
        """The host's part of `advance`: check that T more tokens fit in each row, and count them.

        Whoever runs a compiled or captured step calls this before it. Raises ValueError if they do not fit.
        """
        counts = [T] * self.batch_size if counts is None else counts
        if max(counts) > T:
            raise ValueError(f"rows of {counts} tokens do not fit a chunk of {T}")
        new = [a + b for a, b in zip(self.host_lengths(), counts, strict=True)]
        if max(new) > self.max_len and not self.endless:
            raise ValueError(f"a cache of {self.max_len} tokens is too short for {max(new)} tokens")
        self.host_copy, self.first = new, self.first and T == 0

    def advance(self, batch_size: int, T: int) -> Tensor:
        """Make room for T tokens in every row, and plan where they go; returns their positions (B, T).

        Raises ValueError if they do not fit. In a compiled step lengths are not checked, see `reserve`.
        """
        counts, self.counts, first = self.counts, None, self.first
        if batch_size != self.batch_size:
            raise ValueError(f"a batch of {batch_size} rows does not fit a cache for {self.batch_size}")
        if torch.compiler.is_compiling():
            self.host_copy, self.first, longest = None, False, max(plan.slots for plan in self.plans.values())
        else:
            self.reserve(T, counts)
            longest = max(self.host_lengths())
        new = None if counts is None else torch.tensor(counts, device=self.device)  # (B,)
        for plan in self.plans.values():
            positions = plan.update(self.lengths, new, T, first, longest)
        self.lengths += T if new is None else new
        return positions

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget all but the first lengths[b] tokens of each row b.

        Raises ValueError if a row holds fewer, or if what its next token is to see has left a window.
        """
        held, self.counts = self.host_lengths(), None
        if len(lengths) != self.batch_size or not all(0 <= n <= m for n, m in zip(lengths, held, strict=True)):
            raise ValueError(f"cannot rewind rows of {held} tokens to {list(lengths)}")
        peaks = [max(pair) for pair in zip(self.peaks, held, strict=True)]
        self.peaks = list(peaks)
        for plan in self.plans.values():
            for row, (n, peak) in enumerate(zip(lengths, peaks, strict=True)):
                lost = peak - plan.ring  # behind the sinks, the positions below this are overwritten
                if plan.window and max(n + 1 - plan.window, plan.sinks) < min(n, lost):
                    raise ValueError(
                        f"cannot rewind rows of {held} tokens to {list(lengths)}: their window of "
                        f"{plan.window} moved on; make the cache with more spare"
                    )
                if plan.window:
                    self.peaks[row] = min(self.peaks[row], n + plan.ring)
        self.host_copy, self.first = list(lengths), max(lengths) == 0
        self.lengths.copy_(torch.tensor(self.host_copy))

    def replace_rows(self, rows: Sequence[int], other: KVCache) -> None:
        """Put the rows of `other`, a cache like this one but no longer, in place of `rows`.

        Raises ValueError if their numbers, or `spare`, differ.
        """
        if len(rows) != other.batch_size or self.spare != other.spare:
            raise ValueError(f"{other.batch_size} rows with spare {other.spare} cannot replace rows {rows}")
        for layer, source in zip(self.layers, other.layers, strict=True):
            for name, buffer in source.buffers.items():
                layer.buffers[name].narrow(-2, 0, buffer.size(-2))[rows] = buffer
        mine, theirs = self.host_lengths(), other.host_lengths()
        for row, length, peak in zip(rows, theirs, other.peaks, strict=True):
            mine[row], self.peaks[row] = length, peak
        self.lengths[rows] = other.lengths
        self.first = max(mine) == 0
