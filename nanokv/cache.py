"""The KV cache of every attention: what a layer stores for each token, in which format, and where.

An attention declares the named parts that it caches (`LayerLayout`). The rest is the same for all attentions: size
in bytes, formats from fp32 to int4, windows as ring buffers, rows of different lengths, and rewinding.

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
from torch import Tensor

from nanokv.quantization import GROUP, INT4, dequantize, quantize

# Cache formats. int8, fp8 and int4 store codes, and a scale for each group of numbers in a vector.
CACHE_FORMATS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "int4": INT4,
}


@dataclass(frozen=True)
class Part:
    """One vector per head that a layer caches for each token."""

    heads: int
    width: int
    exact: int = 0  # trailing numbers that int8, fp8 and int4 keep in bf16 (MLA's rope key)
    last: int = 0  # kept for this many last tokens only, never quantized, see `LayerCache.previous`; 0: for all


@dataclass(frozen=True)
class LayerLayout:
    """What one layer caches: these parts of all tokens, or of the first `sinks` and the last `window`."""

    parts: dict[str, Part]
    window: int = 0  # 0: all tokens
    sinks: int = 0

    def elements(self) -> int:
        """Numbers cached for one token."""
        return sum(part.heads * part.width for part in self.parts.values() if not part.last)

    def buffers(self, dtype: torch.dtype, last: bool = False) -> dict[str, tuple[int, int, torch.dtype]]:
        """Heads, width and dtype of each buffer that holds these parts in a format. last: True for the parts
        with `Part.last`, False for the others.

        int8 and fp8 have a bf16 scale for each vector, or for each 128 numbers of a wider vector. int4 has two
        codes in a byte and, for each 32 numbers, a bf16 scale and an offset of one byte.
        """
        buffers = {}
        for name, part in self.parts.items():
            coded, plain = part.width - part.exact, torch.bfloat16 if dtype in GROUP else dtype
            if bool(part.last) != last:
                continue
            if dtype not in GROUP or part.last or not coded:
                buffers[name] = part.heads, part.width, plain
                continue
            groups = math.ceil(coded / GROUP[dtype])
            buffers[name] = part.heads, coded, dtype
            if dtype == INT4:
                buffers[name] = part.heads, (coded + 1) // 2, torch.uint8
                buffers[f"{name}_offset"] = part.heads, groups, torch.int8
            buffers[f"{name}_scale"] = part.heads, groups, plain
            if part.exact:
                buffers[f"{name}_exact"] = part.heads, part.exact, plain
        return buffers

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return sum(heads * width * of.itemsize for heads, width, of in self.buffers(dtype).values())

    def last(self) -> int:
        """How many last tokens the parts with `Part.last` keep, the same number for all of them; 0 without any."""
        return max((part.last for part in self.parts.values()), default=0)

    def fixed_bytes(self, dtype: torch.dtype, spare: int = 0) -> int:
        """Bytes in a row for the parts with `Part.last`, which do not grow with its length."""
        buffers = self.buffers(dtype, last=True).values()
        return (self.last() + spare) * sum(heads * width * of.itemsize for heads, width, of in buffers)

    def slots(self, max_len: int, spare: int = 0) -> int:
        """Tokens that the layer has room for in a cache of max_len tokens, or of an endless one."""
        held = self.sinks + self.window
        return held + spare if self.window and held <= max_len else max_len


def kv_bytes_per_token(layouts: Sequence[LayerLayout], dtype: torch.dtype) -> int:
    """Bytes that all layers together cache for one token, scales included."""
    return sum(layout.bytes_per_token(dtype) for layout in layouts)


def kv_bytes(layouts: Sequence[LayerLayout], max_len: int, dtype: torch.dtype, spare: int = 0) -> int:
    """Bytes of a cache for one row of max_len tokens. A layer with a window has only the slots that it needs."""
    growing = sum(layout.slots(max_len, spare) * layout.bytes_per_token(dtype) for layout in layouts)
    return growing + sum(layout.fixed_bytes(dtype, spare) for layout in layouts)


class Plan:
    """Where the layers with one window store the new tokens of a forward pass, and what their queries see.

    Each of these layers has `slots` slots. Position p goes to slot p until the slots are full. Then the slots
    after the sinks are a ring buffer: position p overwrites position p - ring. All tensors are on the device.

    last: above 0 in the plan for parts with `Part.last`. Their old tokens are read before new ones are stored,
    so `last` slots are enough for a window of last + 1 tokens.
    """

    def __init__(self, window: int, sinks: int, slots: int, last: int = 0):
        self.window, self.sinks, self.slots, self.last = window, sinks, slots, last
        self.ring = max(slots - sinks, 1)
        self.first = True  # all rows were empty: queries see only the new tokens
        self.chunk_in_ring = False  # read old tokens first: new ones overwrite some that the queries see
        self.end = 0  # number of leading slots to read
        self.queries: Tensor | None = None  # (B, T) positions of the new tokens, for the mask
        self.keys: Tensor | None = None  # (B, S) positions of what is read; -1: an empty slot
        self.slot: Tensor | None = None  # (B, T) where each new token goes
        self.source: Tensor | None = None  # (B, T) index of the new token that goes there; None: t
        self.kept: Tensor | None = None  # (B, 1) false for rows without a new token
        self.previous: Tensor | None = None  # (B, last) positions before the new tokens, below 0 for none

    def slot_of(self, position: Tensor) -> Tensor:
        past = (position - self.sinks).clamp(min=0)
        return torch.where(position < self.slots, position, self.sinks + past % self.ring)

    def positions_held(self, lengths: Tensor, end: int) -> Tensor:
        """Positions (B, end) that the first slots hold in rows of these lengths (B, 1); -1: none."""
        slots, last = torch.arange(end, device=lengths.device), lengths - 1
        latest = last - (last - slots) % self.ring  # the newest position in each slot of the ring
        positions = torch.where((lengths <= self.slots) | (slots < self.sinks), slots, latest)
        return torch.where(positions < lengths, positions, -1)

    def update(self, old: Tensor, counts: Tensor | None, T: int, first: bool, longest: int) -> Tensor:
        """Plan T new tokens for rows that hold old (B,) tokens. In each row the first counts (B,) of the new tokens
        are real, the rest is padding (None: all are real). longest: the length of the longest row afterwards, or
        more. Returns the positions (B, T) of the new tokens.
        """
        old, t = old[:, None], torch.arange(T, device=old.device)
        positions = old + t  # (B, T)
        new = old + (T if counts is None else counts[:, None])  # (B, 1)
        self.first, self.chunk_in_ring = first, self.window > 0 and T > 1 and not first
        self.end, self.source, self.kept = min(longest, self.slots), None, None
        if counts is not None or (self.window and self.ring < T):
            stored = (positions < new) & ((positions < self.sinks) | (positions >= new - self.ring))
            # a token that is not stored repeats the row's last one; a row without new tokens keeps its buffer
            self.source = torch.where(stored, t, (new - old - 1).clamp(min=0))
            self.kept = new > old
        self.slot = self.slot_of(positions if self.source is None else old + self.source)
        self.queries = positions
        if self.last:
            self.previous = old - self.last + torch.arange(self.last, device=old.device)
            return positions
        if first:
            self.keys = positions
        elif self.chunk_in_ring:
            self.keys = torch.cat((self.positions_held(old, self.end), positions), 1)
        else:
            # padding sees what its row's last token sees: a query that sees no key would give NaN
            last = new.clamp(min=1)
            self.queries, self.keys = torch.minimum(positions, last - 1), self.positions_held(last, self.end)
        return positions


ENDINGS = ("_scale", "_offset", "_exact")  # of the names of the extra buffers of a quantized part


class LayerCache:
    """One layer's share of a `KVCache`: a buffer (B, heads, slots, width) for each entry of the layout."""

    def __init__(self, layout: LayerLayout, plan: Plan, plan_of_last: Plan | None, buffers: dict[str, Tensor]):
        self.layout, self.plan, self.plan_of_last, self.buffers = layout, plan, plan_of_last, buffers
        self.joined: dict[str, Tensor] = {}  # old and new tokens of a chunk in a ring, until they are read

    @property
    def first(self) -> bool:
        """Whether the new tokens are the first of their rows, so that they see nothing but each other."""
        return self.plan.first

    @property
    def positions(self) -> tuple:
        """Positions of the queries (B, T), and of the keys (B, S) that attention reads, -1 for none."""
        return self.plan.queries, self.plan.keys

    def append(self, **new: Tensor) -> list:
        """Store the new tokens of each part, (B, heads, T, width). A token is quantized here, once.

        Returns for each part what attention should read: in the first chunk the new values themselves, later the
        name of the part, for `read`.
        """
        for name, value in new.items():
            encoded = self.encode(name, value.detach())
            if self.plan.chunk_in_ring:
                tokens = self.held(value, name), self.decode(encoded, name, value)
                self.joined[name] = torch.cat(tokens, -2)
            for key, part in encoded.items():
                self.store(self.buffers[key], part, self.plan)
        return list(new.values()) if self.first else list(new)

    def read(self, name: str, like: Tensor) -> Tensor:
        """All S tokens of a part, (B, heads, S, width) in the dtype of `like`. The plan has their positions."""
        return self.joined.pop(name) if self.plan.chunk_in_ring else self.held(like, name)

    def held(self, like: Tensor, name: str) -> Tensor:
        """What the buffers hold of a part."""
        keys = [key for key in (name, *(name + end for end in ENDINGS)) if key in self.buffers]
        return self.decode({key: self.buffers[key].narrow(-2, 0, self.plan.end) for key in keys}, name, like)

    def previous(self, name: str, new: Tensor) -> Tensor:
        """For a part with `Part.last`: the `last` tokens before the new ones, (B, heads, last, width) in the dtype of
        `new`, zero where there are none. Then stores the tokens `new` (B, heads, T, width).
        """
        plan, buffer = self.plan_of_last, self.buffers[name]
        assert plan is not None and plan.previous is not None
        rows = torch.arange(len(buffer), device=buffer.device)[:, None]
        previous = plan.previous[:, plan.last - self.layout.parts[name].last :]  # (B, last)
        held = buffer.transpose(1, 2)[rows, plan.slot_of(previous.clamp(min=0))]  # (B, last, heads, width)
        held = held.masked_fill((previous < 0)[..., None, None], 0).transpose(1, 2)
        self.store(buffer, new.detach().to(buffer.dtype), plan)
        return held.to(new.dtype)

    def store(self, buffer: Tensor, part: Tensor, plan: Plan) -> None:
        """Put part (B, heads, T, width) into the planned slots of buffer (B, heads, slots, width)."""
        rows = torch.arange(len(buffer), device=buffer.device)[:, None]
        if buffer.dtype.itemsize == 1:  # codes: torch has no `where` for fp8
            buffer, part = buffer.view(torch.uint8), part.view(torch.uint8)
        buffer, part = buffer.transpose(1, 2), part.transpose(1, 2)  # (B, slots or T, heads, width)
        if plan.source is not None and plan.kept is not None:
            kept = plan.kept[..., None, None]
            part = torch.where(kept, part[rows, plan.source], buffer[rows, plan.slot])
        buffer[rows, plan.slot] = part

    def encode(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """value (..., width) in the format that is stored: a tensor for each buffer, by name."""
        dtype, coded = self.buffers[name].dtype, self.coded(name)
        if f"{name}_scale" not in self.buffers:
            return {name: value.to(dtype)}
        of = INT4 if f"{name}_offset" in self.buffers else dtype
        parts = {name + end: part for end, part in quantize(value[..., :coded], of).items()}
        return parts | ({f"{name}_exact": value[..., coded:].bfloat16()} if coded < value.size(-1) else {})

    def decode(self, parts: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
        """The inverse of `encode`, in the dtype of `like`."""
        if f"{name}_scale" not in parts:
            return parts[name].to(like.dtype)
        codes = {key.removeprefix(name): part for key, part in parts.items()}
        value = dequantize(codes, self.coded(name), like.dtype)
        exact = parts.get(f"{name}_exact")
        return value if exact is None else torch.cat((value, exact.to(like.dtype)), -1)

    def coded(self, name: str) -> int:
        """How many numbers of a part's vector int8, fp8 and int4 quantize."""
        return self.layout.parts[name].width - self.layout.parts[name].exact


class KVCache:
    """The preallocated cache of all layers, with the layouts that their attention declares.

    Row b holds lengths[b] tokens, so prompts of different lengths can share a batch: pad them on the right, and
    tell `expect` how many tokens of the next chunk are real. Memory is allocated once; `nbytes` is its size. A
    layer with a window has room for sinks + window + `spare` tokens, so that `rewind` can remove up to `spare`
    tokens. The parts with `Part.last` have `spare` more tokens too. `endless`: rows may grow past max_len. For
    that, all layers need windows and none may have sinks: the distance to a sink would exceed the trained ones.
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
        if dtype not in (*CACHE_FORMATS.values(), torch.float64):
            raise ValueError(f"a cache holds {', '.join(CACHE_FORMATS)} (e4m3) numbers, not {dtype}")
        self.layouts, self.batch_size, self.max_len, self.spare = list(layouts), batch_size, max_len, spare
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)  # (B,) tokens in each row
        self.host_copy: list[int] | None = [0] * batch_size  # of lengths; None: outdated by a compiled step
        self.peaks = [0] * batch_size  # the most tokens that each row held before it was rewound
        self.first = True  # no row holds a token
        self.counts: list[int] | None = None  # of the next chunk, see `expect`
        self.plans: dict[tuple, Plan] = {}  # layers with the same key share one
        self.layers = []
        for layout in layouts:
            keys = [(layout.window, layout.sinks, layout.slots(max_len, spare))]
            keys += [(last + 1, 0, last + spare, last)] if (last := layout.last()) else []
            plans = [self.plans.setdefault(key, Plan(*key)) for key in keys]
            buffers = {
                name: torch.zeros(batch_size, heads, plan.slots, width, dtype=part, device=device)
                for plan in plans
                for name, (heads, width, part) in layout.buffers(dtype, last=plan.last > 0).items()
            }
            self.layers.append(LayerCache(layout, plans[0], plans[1] if last else None, buffers))
        endless = [layer.plan for layer in self.layers]
        self.endless = all(plan.window and not plan.sinks and plan.slots >= plan.window for plan in endless)

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
        """In the next chunk, only the first counts[b] tokens of row b are real; the rest is padding."""
        if len(counts) != self.batch_size or min(counts) < 0:
            raise ValueError(f"{self.batch_size} rows need a count of tokens each, not {list(counts)}")
        self.counts = list(counts)

    def reserve(self, T: int, counts: Sequence[int] | None = None) -> None:
        """The host's part of `advance`: check that T more tokens fit in each row, and count them.

        Call it before each compiled or captured step. Raises ValueError if the tokens do not fit.
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

        Raises ValueError if they do not fit. A compiled step does not check lengths; call `reserve` before it.
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

        Raises ValueError if a row holds fewer, or if tokens that its next token should see are overwritten.
        """
        held, self.counts = self.host_lengths(), None
        if len(lengths) != self.batch_size or not all(0 <= n <= m for n, m in zip(lengths, held, strict=True)):
            raise ValueError(f"cannot rewind rows of {held} tokens to {list(lengths)}")
        peaks = [max(pair) for pair in zip(self.peaks, held, strict=True)]
        self.peaks = list(peaks)
        for plan in self.plans.values():
            for row, (n, peak) in enumerate(zip(lengths, peaks, strict=True)):
                lost = peak - plan.ring  # positions below this, except sinks, are overwritten
                if plan.window and max(n + 1 - plan.window, plan.sinks) < min(n, lost):
                    fault = "what a next token sees is overwritten; make the cache with more spare"
                    raise ValueError(f"cannot rewind rows of {held} tokens to {list(lengths)}: {fault}")
                if plan.window:
                    self.peaks[row] = min(self.peaks[row], n + plan.ring)
        self.host_copy, self.first = list(lengths), max(lengths) == 0
        self.lengths.copy_(torch.tensor(self.host_copy))

    def replace_rows(self, rows: Sequence[int], other: KVCache) -> None:
        """Replace `rows` by the rows of `other`, a cache with the same layouts that is at most as long as this one.

        Raises ValueError if the numbers of rows differ, or `spare` does.
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
