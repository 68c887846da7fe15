"""Figures of a run: parameters, FLOPs, size of the cache, memory, speed, code version. Imports no model."""

import hashlib
import math
import resource
import statistics
import subprocess
import sys
import time
import timeit
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate, count, pairwise, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanokv import distributed as parallel
from nanokv.checkpoint import on_meta
from nanokv.config import UserError
from nanokv.dataset import Dataset
from nanokv.generate import decode_one_token, prefill

ROOT = Path(__file__).resolve().parents[1]
CODE = ("nanokv", "backends", "tools")  # folders of code, besides the root
NOT_CODE = ("tests", "data", "config")  # for these, a run has corpus_sha256 and config.json
# Dense peak in TFLOP/s in 16 bits, by a word of the device's name (vendors' data sheets, without sparsity).
PEAK_TFLOPS = {"B200": 2250, "GH200": 989, "H200": 989, "H100": 989, "A100": 312, "V100": 125, "T4": 65}
PEAK_TFLOPS |= {"L40S": 362, "L4": 121, "A10G": 70, "4090": 165, "3090": 71}


def n_params(model: nn.Module, embedding: bool = True) -> int:
    """Number of parameters; if not `embedding`, without the token embedding and the output head."""
    names = () if embedding else ("embed_tokens.weight", "lm_head.weight")
    return sum(p.numel() for name, p in model.named_parameters() if name not in names)


def match_params(make: Callable[[Any], nn.Module], config: Any, like: Any) -> tuple[int, int]:
    """Set config.intermediate_size so that make(config) has as many parameters as make(like), within 1 %. Takes a
    multiple of 8 if one is close enough. Returns both numbers. Raises UserError if no width is close enough.
    """

    def size(config: Any, **changes: int) -> int:
        return n_params(on_meta(partial(make, replace(config, **changes))))

    target, smallest = size(like), size(config, intermediate_size=1)
    exact = 1 + (target - smallest) / (size(config, intermediate_size=2) - smallest)
    nearest = max(round(exact), 1)
    for width in (8 * round(exact / 8), nearest):
        if width > 0 and abs((own := size(config, intermediate_size=width)) - target) <= 0.01 * target:
            config.intermediate_size = width
            return own, target
    fault = f"no intermediate_size gives {target:,} parameters within 1 %; the nearest, {nearest}"
    raise UserError(f"{fault}, gives {size(config, intermediate_size=nearest):,}; change n_embd or n_layer")


def flops_per_token(model: Any, context: int) -> int:
    """FLOPs to train on one token at a context length, forward and backward, as in PaLM (arXiv 2204.02311,
    appendix B): 6 per parameter of a matrix product, and 6 per multiply-add of attention, masked positions included.
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


def kv_bytes_in_context(config, dtype: torch.dtype = torch.bfloat16) -> float:
    """Bytes of cache per token of a full context, all layers together. Windows make it smaller. Does not include
    `kv_fixed_bytes`.
    """
    layouts, T = config.kv_layouts(), config.block_size
    return sum(layout.slots(T) * layout.bytes_per_token(dtype) for layout in layouts) / T


def kv_fixed_bytes(config, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of cache per row that do not grow with the length of the text, all layers together."""
    return sum(layout.fixed_bytes(dtype) for layout in config.kv_layouts())


def kv_ratio_to_mha(config) -> float:
    """Cache of a full context relative to that of multi-head attention without windows."""
    held = kv_bytes_in_context(config) / config.kv_bytes_per_token()
    return held * kv_elements_per_token_layer(config) / (2 * config.n_embd)


def describe_model(model: Any) -> dict[str, int | float]:
    """The size of a model and of its cache, under the keys of metrics.jsonl."""
    config = model.config
    cache = {"elements_per_token_layer": kv_elements_per_token_layer(config)}
    cache |= {"bytes_per_token": int(kv_bytes_in_context(config)), "ratio_to_mha": kv_ratio_to_mha(config)}
    cache["fixed_bytes"] = kv_fixed_bytes(config)
    params = {"params/total": n_params(model), "params/non_embedding": n_params(model, embedding=False)}
    return params | {f"kv_cache/{key}": value for key, value in cache.items()}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s: of a GPU from its data sheet (None if unknown), of a CPU by timing a matrix product."""
    if device.type == "cuda":
        words = torch.cuda.get_device_name(device).replace("-", " ").split()
        peak = next((tflops * 1e12 for model, tflops in PEAK_TFLOPS.items() if model in words), None)
        if peak and dtype == torch.float32:  # TF32, from Ampere on
            peak = peak / 2 if torch.cuda.get_device_capability(device) >= (8, 0) else None
        return peak
    if device.type != "cpu":
        return None
    a = torch.ones(1024, 1024, dtype=dtype)
    return 2 * 1024**3 / min(timeit.repeat(lambda: a @ a, number=1, repeat=5))


def mfu(flops_per_s: float, peak: float | None) -> float | None:
    """Model FLOPs utilization; None if the peak is unknown or training exceeds it. That can happen on a CPU: its peak
    is too low if other processes run while it is timed, and masked positions count although a kernel skips them.
    """
    return flops_per_s / peak if peak and flops_per_s <= peak else None


def peak_memory(device: torch.device) -> int:
    """Peak memory so far in bytes: on a GPU of torch's allocator, elsewhere of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def git(*command: str) -> str | None:
    """The output of a git command in the root of this code; None if it fails, as outside a git checkout."""
    try:
        return subprocess.check_output(["git", *command], cwd=ROOT, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def git_sha() -> str | None:
    """The commit of this code, with a + if files differ from it; None outside a git checkout."""
    return git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+")


def code_sha256() -> str:
    """One hash over the names and contents of this code's .py, .c and .h files on disk: those that git tracks, except
    in NOT_CODE. Without git, or in a repository that does not track model.py, those in the root and in CODE.
    """
    names = [name for name in (git("ls-files", "-z", "*.py", "*.c", "*.h") or "").split("\0") if name]
    found = (path for folder in CODE for path in (ROOT / folder).rglob("*"))
    paths = [ROOT / name for name in names] if "model.py" in names else [*ROOT.iterdir(), *found]
    files = {p.relative_to(ROOT).as_posix(): p for p in paths if p.suffix in (".py", ".c", ".h") and p.is_file()}
    total = hashlib.sha256()
    for name in sorted(name for name in files if name.partition("/")[0] not in NOT_CODE):
        total.update(f"{name} {hashlib.sha256(files[name].read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def position_spans(block_size: int) -> list[int]:
    """Numbers of positions in the spans 0-15, 16-31, 32-63, 64-127 ... of a context; the last one ends with it."""
    ends = [*takewhile(lambda end: end < block_size, (16 << i for i in count())), block_size]
    return [end - start for start, end in pairwise([0, *ends])]


@torch.no_grad()
def evaluate(loss_model: Any, dataset: Dataset, windows: tuple[int, int, int], autocast, until=lambda: False) -> dict:
    """Mean loss in nats per token, and bits per byte. The validation tokens are the same on any number of ranks. Also
    the loss of each of `position_spans`, under the number of tokens before the last target of the span. windows:
    block_size, batch_size, and the number of batches of all ranks together, evenly spaced (0: the whole split).
    Uses no random state. Stops early, with a partial result, when `until()` is true.
    """
    device, spans = next(loss_model.parameters()).device, position_spans(windows[0])
    loss_model.eval()
    sums, counts = (torch.zeros(len(spans), dtype=dtype, device=device) for dtype in (torch.float32, torch.int64))
    for x, y in dataset.val_batches(*windows, parallel.rank(), parallel.size()):
        n = torch.stack([(part >= 0).sum() for part in y.split(spans, 1)]).to(device)
        with autocast:
            means = loss_model(x.to(device), y.to(device), tuple(spans))
        sums += torch.where(n > 0, means * n, 0)  # the mean of no targets is nan
        counts += n
        if until():
            break
    loss_model.train()
    totals = parallel.all_reduce_sum(*sums.tolist(), *counts.tolist())
    sums, counts = totals[: len(spans)], totals[len(spans) :]
    loss, bytes_per_token = sum(sums) / sum(counts), dataset.val_bytes_per_token
    metrics = {"val/loss": loss, "val/bpb": loss / math.log(2) / bytes_per_token if bytes_per_token else None}
    by_position = zip(accumulate(spans), sums, counts, strict=True)
    return metrics | {f"val/loss_at/{end}": total / n for end, total, n in by_position if n}


def decode_probe(model: Any, context: int, n=32, repeats=5, cache_dtype: torch.dtype | None = None) -> dict[str, float]:
    """Median speed of `repeats` decodings of n tokens, batch 1, after `context` random ones; keys of metrics.jsonl."""
    random = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (context,), generator=random).tolist()
    cache = model.new_cache(1, context + n, cache_dtype)
    seconds = []
    for _ in range(1 + repeats):  # the first one warms up
        cache.rewind([0])
        ids = prefill(model, [prompt], cache).argmax(-1)
        ids.tolist()  # waits for the device
        clock = time.perf_counter()
        for _ in range(n):
            ids = decode_one_token(model, ids, cache).argmax(-1)
            ids.tolist()
        seconds.append(time.perf_counter() - clock)
    figures = {"decode/tokens_per_s": n / statistics.median(seconds[1:]), "decode/context": context}
    return figures | {"kv_cache/allocated_bytes": cache.nbytes}
