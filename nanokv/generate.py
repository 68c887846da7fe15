"""Cached generation: token ids in, token ids out, for batches of prompts of any lengths.

`generate` yields tokens as they are drawn. The text of a row depends only on its prompt, its seed and the
options. It does not depend on the other rows or on a draft.

When a row holds block_size tokens, it keeps the last block_size // 2 of them and continues. If every layer has
a window within the context, and none has sinks, this is not needed: the cache slides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor

from nanokv.cache import KVCache

PREFILL_CHUNK = 2048  # most tokens of a prompt in one pass of the model; bounds the memory for long prompts


@dataclass
class Stats:
    """Time and memory of generation. Seconds exclude the time that the caller takes between two steps."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0  # until the first token of each row
    decode_tokens: int = 0  # all later ones
    decode_seconds: float = 0.0
    cache_bytes: int = 0  # of the largest main cache
    drafted: int = 0
    accepted: int = 0  # drafted tokens that were then drawn

    def timed(self, steps: Iterator[list[int]], started: float) -> Iterator[list[int]]:
        """Yield `steps`, adding the time of each; the first began at `started`."""
        for i, tokens in enumerate(steps):
            seconds = time.perf_counter() - started
            self.prefill_seconds += 0 if i else seconds
            self.decode_seconds += seconds if i else 0
            yield tokens
            started = time.perf_counter()


@torch.inference_mode()
def prefill(model: Any, prompts: Sequence[list[int]], cache: KVCache) -> Tensor:
    """Run prompts of any lengths through an empty cache. Returns fp32 logits (B, V) after each prompt's last token."""
    lengths, weight = [len(prompt) for prompt in prompts], model.embed_tokens.weight
    longest = max(lengths)
    padded = [prompt + [0] * (longest - len(prompt)) for prompt in prompts]
    idx = torch.tensor(padded, dtype=torch.long, device=weight.device)  # (B, T)
    last = weight.new_zeros(len(prompts), model.config.n_embd)
    for start in range(0, longest, PREFILL_CHUNK):
        chunk = idx[:, start : start + PREFILL_CHUNK]
        counts = [min(max(n - start, 0), chunk.size(1)) for n in lengths]
        if min(counts) < chunk.size(1):
            cache.expect(counts)
        hidden = model.hidden(chunk, cache)  # (B, chunk, C)
        rows = [i for i, n in enumerate(lengths) if start < n <= start + PREFILL_CHUNK]
        last[rows] = hidden[rows, [lengths[i] - 1 - start for i in rows]]
    return model.head(last).float()


@torch.inference_mode()
def decode_one_token(model: Any, tokens: Tensor, cache: KVCache) -> Tensor:
    """The next token of each row (B,) -> fp32 logits (B, V) after it."""
    return model.head(model.hidden(tokens[:, None], cache)[:, -1]).float()


def check_sampling(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Raises ValueError, one line, if a value is out of its range."""
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, not {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0, not {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p must be from 0 to 1, not {min_p}")


def sample(
    logits: Tensor, uniform: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Draw a token from each row: logits (B, V) fp32, uniform (B,) in [0, 1) -> ids (B,).

    The steps, in this order: temperature (0: the likeliest token); the top_k likeliest tokens; of these, the
    smallest set of likeliest tokens that reaches top_p (Holtzman et al. 2020); of these, the tokens at least min_p
    times as likely as the first (Nguyen et al. 2024); the token at which the cumulative probability passes
    `uniform`. One number per row keeps rows independent, without a random generator or a kernel for each row.
    """
    if temperature == 0:
        return logits.argmax(-1)
    filtered = top_k > 0 or top_p < 1 or min_p > 0
    if filtered:
        logits, order = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # (B, k), descending
    p = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if filtered:
        keep = (p.cumsum(-1) - p < top_p) & (p >= min_p * p[:, :1])
        p = p * keep
    cumulative = p.cumsum(-1)
    choice = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)  # (B, 1)
    choice = choice.clamp(max=p.size(-1) - 1)  # out of range only if the logits are not finite
    return (order.gather(-1, choice) if filtered else choice)[:, 0]


def uniforms(seed: int, rows: int, device) -> Iterator[Tensor]:
    """Endless vectors (rows,) in [0, 1), made 256 at a time. Row i uses seed + i and is the same on any device."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(rows)]
    while True:
        yield from torch.stack([torch.rand(256, generator=g) for g in generators], 1).to(device)


def make_room(model: Any, cache: KVCache, held: list[list[int]], dtype: torch.dtype | None) -> None:
    """Cut each row that fills the cache to its last block_size // 2 tokens, unless the cache is endless.

    Positions start at 0 again, so the kept tokens are computed again, in a separate cache. The other rows do not
    change.
    """
    full = [i for i, n in enumerate(cache.host_lengths()) if n == cache.max_len]
    if not full or cache.endless:
        return
    keep = cache.max_len // 2
    for i in full:
        held[i] = held[i][len(held[i]) - keep :]
    part = model.new_cache(len(full), keep, dtype, cache.spare)
    prefill(model, [held[i] for i in full], part)
    cache.replace_rows(full, part)


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 1337,
    stop_ids: Collection[int] = (),
    n_vocab: int | None = None,
    cache_dtype: torch.dtype | None = None,
    stats: Stats | None = None,
    draft: PromptLookup | DraftModel | None = None,
) -> Iterator[list[int | None]]:
    """Yield, step by step, the new token of each row; None for a row that has drawn one of `stop_ids`.

    Row i draws with seed + i. Ids from `n_vocab` on, the padding of a vocabulary, are never drawn. A prompt
    longer than block_size is cut to its last tokens. The model should be in eval mode. A `draft`, for one
    row, never changes the text: every token uses the random number it would have used without drafts.
    Raises ValueError if a prompt is empty or an option is out of range.
    """
    options: dict[str, Any] = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    check_sampling(**options)
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, and in each prompt at least one token")
    if draft is not None and len(prompts) > 1:
        raise ValueError("a draft serves one prompt at a time")
    if max_new_tokens < 1:
        return
    clock, stats, block_size = time.perf_counter(), stats or Stats(), model.config.block_size
    held = [list(prompt[-block_size:]) for prompt in prompts]  # the tokens in each row of the cache
    max_len = min(block_size, max(map(len, held)) + max_new_tokens)
    cache = model.new_cache(len(held), max_len, cache_dtype, draft.num_draft_tokens if draft else 0)
    stats.prompt_tokens += sum(map(len, held))
    stats.cache_bytes = max(stats.cache_bytes, cache.nbytes)
    uniform = uniforms(seed, len(held), cache.device)

    def draw(logits: Tensor, numbers: Tensor) -> Tensor:
        return sample(logits[:, :n_vocab], numbers, **options)

    arguments = model, cache, held, uniform, draw, cache_dtype
    steps = speculative_decode(*arguments, draft, stats) if draft else decode(*arguments)
    live = [True] * len(held)
    for made, tokens in enumerate(islice(stats.timed(steps, clock), max_new_tokens)):
        live = [alive and token not in stop_ids for alive, token in zip(live, tokens, strict=True)]
        stats.decode_tokens += sum(live) if made else 0
        if not any(live):
            return
        yield [token if alive else None for token, alive in zip(tokens, live, strict=True)]


def decode(
    model: Any, cache: KVCache, held: list[list[int]], uniform: Iterator[Tensor], draw: Callable, dtype
) -> Iterator[list[int]]:
    """Yield the token that each row draws after each pass of the model. held: the tokens in each row."""
    logits = prefill(model, held, cache)
    while True:
        ids = draw(logits, next(uniform))
        tokens = ids.tolist()  # the only transfer and wait in a step
        yield tokens
        make_room(model, cache, held, dtype)
        logits = decode_one_token(model, ids, cache)
        for row, token in zip(held, tokens, strict=True):
            row.append(token)


def speculative_decode(
    model: Any,
    cache: KVCache,
    held: list[list[int]],
    uniform: Iterator[Tensor],
    draw: Callable,
    dtype: torch.dtype | None,
    draft: PromptLookup | DraftModel,
    stats: Stats,
) -> Iterator[list[int]]:
    """Yield the tokens of a single row, often several after one pass of the model (Leviathan et al. 2023).

    One pass over the last token and some drafted tokens gives the logits after each of them. From these logits,
    tokens are drawn with the random numbers that `decode` would use. Drafted tokens are accepted up to the first
    one that differs from the drawn token; there the drawn token is used. So the text is the same as with `decode`.
    """
    logits, numbers, drafted = prefill(model, held, cache), [], []
    while True:
        numbers += [next(uniform) for _ in range(len(drafted) + 1 - len(numbers))]
        drawn = draw(logits, torch.cat(numbers[: len(drafted) + 1])).tolist()
        accepted = len(commonprefix([drafted, drawn]))
        cache.rewind([cache.host_lengths()[0] - len(drafted) + accepted])
        held[0] += drafted[:accepted]
        del numbers[: accepted + 1]
        stats.drafted, stats.accepted = stats.drafted + len(drafted), stats.accepted + accepted
        yield from ([token] for token in drawn[: accepted + 1])
        make_room(model, cache, held, dtype)
        last, most = drawn[accepted], draft.num_draft_tokens
        if not cache.endless:
            most = min(most, cache.max_len - cache.host_lengths()[0] - 1)
        numbers += [next(uniform) for _ in range(draft.num_draft_tokens - len(numbers))]
        drafted = draft.propose([*held[0], last], most, numbers, draw)
        idx = torch.tensor([[last, *drafted]], device=cache.device)
        logits = model.head(model.hidden(idx, cache)[0]).float()  # (1 + drafted, V)
        held[0].append(last)


class PromptLookup:
    """Proposes what followed the last earlier occurrence of the last three tokens (prompt lookup decoding,
    Saxena 2023).
    """

    num_draft_tokens = 8

    def __init__(self):
        self.places: dict[tuple[int, ...], int] = {}  # three tokens -> the place in the text after them
        self.text: list[int] = []  # the text that `places` covers

    def propose(self, text: list[int], k: int, numbers: list[Tensor], draw: Callable) -> list[int]:
        """Up to k tokens to follow `text`."""
        if text[: len(self.text)] != self.text:  # another text
            self.places, self.text = {}, []
        for end in range(max(len(self.text), 3), len(text)):
            self.places[tuple(text[end - 3 : end])] = end
        self.text = list(text)
        place = self.places.get(tuple(text[-3:]), len(text))
        return text[place : place + k]


class DraftModel:
    """Proposes the tokens that a smaller model with the same tokenizer draws with the same random numbers."""

    num_draft_tokens = 4

    def __init__(self, model: Any):
        self.model, k = model, self.num_draft_tokens
        self.cache = model.new_cache(1, max(model.config.block_size, 4 * k), spare=k)
        self.held: list[int] = []  # tokens in the cache, the drafted ones included
        self.text: list[int] = []  # the last text
        self.start = 0  # index in `text` of the first token in the cache

    def propose(self, text: list[int], k: int, numbers: list[Tensor], draw: Callable) -> list[int]:
        """k tokens to follow `text`, drawn with the first k of `numbers`, (1,) each."""
        if len(text) <= len(self.text) or text[: len(self.text)] != self.text:  # another text
            self.text, self.held, self.start = [], [], 0
        known = len(self.text) - self.start  # number of held tokens that are in the text; drafted ones may be wrong
        known += len(commonprefix([self.held[known:], text[len(self.text) : -1]]))
        if len(text) - self.start + k > self.cache.max_len:  # full
            self.start, known = len(text) - self.cache.max_len // 2, 0
        self.cache.rewind([known])
        self.held = text[self.start :]
        self.text, new = list(text), self.held[known:]
        if known:
            idx = torch.tensor([new], device=self.cache.device)
            logits = self.model.head(self.model.hidden(idx, self.cache)[:, -1]).float()
        else:
            logits = prefill(self.model, [new], self.cache)
        drafted: list[int] = []
        for number in numbers[:k]:
            ids = draw(logits, number)
            drafted += ids.tolist()
            if len(drafted) < k:
                logits = decode_one_token(self.model, ids, self.cache)
        self.held += drafted[:-1]
        return drafted


def generate_lists(model: Any, prompts: Sequence[Sequence[int]], *args, **options) -> list[list[int]]:
    """The new tokens of each row; arguments as for `generate`."""
    rows = [[] for _ in prompts]
    for tokens in generate(model, prompts, *args, **options):
        for row, token in zip(rows, tokens, strict=True):
            row += [] if token is None else [token]
    return rows
