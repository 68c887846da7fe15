"""The token loader. A data set is a folder of token ids; a batch depends only on (seed, sample number).

It reads three layouts: our own (meta.json, train*.bin, val*.bin); llm.c's and modded-nanogpt's shards
(*train*.bin, *val*.bin, each with a header); nanoGPT's (train.bin, val.bin and, for characters, meta.pkl).
"""

import difflib
import hashlib
import io
import json
import math
import os
import pickle
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanokv import tokenizer as tokenizers
from nanokv.config import UserError, run_python

ROOT = Path(__file__).resolve().parents[1] / "data"
LLMC_MAGIC, LLMC_VERSION, LLMC_HEADER_BYTES = 20240520, 1, 256 * 4
PREPARED_ON_FIRST_USE = ("mqar", "shakespeare_char", "stdlib")  # they are small
CHUNK = 1 << 20  # tokens read at a time, to check or count them
CHECK_ALL_BELOW = 100_000_000  # of a longer split, about this many tokens are checked, spread evenly


def open_dataset(name: str, tokenizer: str | None = None, prepare: bool = True) -> "Dataset":
    """Opens a set by its folder or by its name in data/; a missing small set is prepared. `tokenizer`: a kind, or a
    folder that has one. For a named set it replaces the set's own (kept in data/NAME/TOKENIZER); for a folder that
    has none it names the one that was used. UserError if set or tokenizer is unknown, missing or damaged.
    """
    key, value, kind = "tokenizer", tokenizer, tokenizer
    if tokenizer not in (None, *tokenizers.KINDS):
        tok = tokenizers.train(tokenizer, [])  # that of a folder
        key, value, kind = "tokenizer_sha256", tokenizers.sha256(tok), tok.name
    ours = sorted(path.parent.name for path in ROOT.glob("*/prepare.py"))
    if name in ours:
        folder = ROOT / name
        if tokenizer is not None and (_read_meta(folder) or {}).get(key) != value:
            folder = folder / str(value)[:16]
        if _read_meta(folder) is None:
            flags = [f"--out_dir={folder}", f"--tokenizer={tokenizer}"] if tokenizer else []
            if not (prepare and name in PREPARED_ON_FIRST_USE):
                command = " ".join([f"python data/{name}/prepare.py", *flags])
                raise UserError(f"data set {name!r} is not prepared: run `{command}` (--help lists its flags)")
            print(f"preparing the data set {name}", flush=True)
            run_python([str(ROOT / name / "prepare.py"), *(flags or [f"--out_dir={folder}"])])
        return Dataset(folder, kind)
    for folder in (Path(name), ROOT / name):
        if folder.is_dir():
            return Dataset(folder, kind)
    close = difflib.get_close_matches(name, ours, 1)
    hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(ours)}, or give a folder"
    raise UserError(f"unknown data set {name!r}: {hint}")


class Dataset:
    """Two splits of token ids (train, val: Shards) and what is known about them (meta: dict)."""

    def __init__(self, folder: Path, tokenizer: str | None = None):
        self.dir, meta = folder, _read_meta(folder)
        if meta is None:
            fault = f"{folder} holds no complete data set"
            raise UserError(f"{fault}: no meta.json, no train.bin and val.bin, no llm.c shards")
        self.meta, kind = meta, meta.setdefault("tokenizer", tokenizer or "gpt2")
        if tokenizer not in (None, kind):
            raise UserError(f"{folder} was tokenised with {kind}, not {tokenizer}: prepare it so or omit --tokenizer")
        if kind == "gpt2":  # known without loading the tokenizer, which may need the network
            self.meta.setdefault("vocab_size", tokenizers.GPT2_N_VOCAB)
        self.vocab_size = self.meta.get("vocab_size") or self.tokenizer.n_vocab
        self._answer_bit = self.meta.get("answer_bit")
        self.train, self.val = self._open_split("train"), self._open_split("val")
        if "corpus_sha256" not in self.meta:
            self.meta["corpus_sha256"] = hashlib.sha256(self.train.sample() + self.val.sample()).hexdigest()

    def train_batch(self, first: int, count: int, block_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Samples first .. first + count - 1 of the endless stream of `seed`: x, y (count, T) int64. y is x shifted
        by one token, -1 where a token is not a target. Each epoch takes each window once, in a new order and from a
        new offset. There is no state: a rank or a resumed run asks for the samples that it needs.
        """
        self.check_block_size(block_size)
        starts = sample_starts(first, count, len(self.train), block_size, seed, "example_len" in self.meta)
        return self._inputs_and_targets(self.train.windows(starts, block_size + 1))

    def val_batches(self, block_size: int, batch_size: int, max_batches=0, rank=0, ranks=1) -> Iterator:
        """Yields x, y (B, T) int64. Each token of the val split except the first is a target once, in order. The last
        window is padded with y = -1 and the last batch may have fewer rows, so weight losses by their targets.
        max_batches are spread evenly over the split; 0: all. All ranks get equally many batches; some may be padding.
        """
        self.check_block_size(block_size)
        stride = self.meta.get("example_len", block_size)
        n = -(-(len(self.val) - 1) // stride)
        wanted = min(n, max_batches * batch_size or n)
        starts = np.arange(wanted) * n // wanted * stride
        for i in range(0, wanted, ranks * batch_size):
            mine = starts[i + rank * batch_size :][:batch_size]
            mine = mine if len(mine) else np.array([len(self.val)])  # beyond the end: padding
            yield self._inputs_and_targets(self.val.windows(mine, block_size + 1))

    def check_block_size(self, block_size: int) -> None:
        """Raises UserError if windows of `block_size` do not fit this set."""
        fit = self.meta.get("example_len", block_size + 1) - 1
        if fit != block_size:
            raise UserError(f"the examples of {self.dir} are {fit} tokens long: set --block_size={fit}")
        for split, shards in (("train", self.train), ("val", self.val)):
            if len(shards) < block_size + 1:
                fault = f"has {len(shards)} tokens, fewer than block_size + 1 = {block_size + 1}"
                raise UserError(f"the {split} split of {self.dir} {fault}: lower --block_size or prepare a larger set")

    def fit(self, block_size: int, vocab_size: int) -> int:
        """The vocabulary of a model: `vocab_size`, or this set's if it is 0. Raises UserError if that does not fit."""
        self.check_block_size(block_size)
        if 0 < vocab_size < self.vocab_size:
            ids = f"the {self.vocab_size} token ids of {self.dir}"
            raise UserError(f"vocab_size = {vocab_size} is less than {ids}; remove it or raise it")
        return vocab_size or self.vocab_size

    @cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """Raises UserError if it is damaged, lost, or cannot be downloaded."""
        if "chars" in self.meta:
            return tokenizers.CharTokenizer(self.meta["chars"])
        if "tokenizer_sha256" in self.meta:
            tok = tokenizers.load(self.dir)
            if tokenizers.sha256(tok) != self.meta["tokenizer_sha256"]:
                raise UserError(f"the tokenizer in {self.dir} is not the one of its tokens: prepare it again")
            return tok
        if self.meta["tokenizer"] not in ("byte", "gpt2"):
            raise UserError(f"{self.dir} holds no tokenizer to read it with: give --tokenizer=byte or gpt2")
        return tokenizers.train(self.meta["tokenizer"], [])

    @cached_property
    def val_bytes_per_token(self) -> float | None:
        """Bits per byte = loss in nats / ln 2 / this. None for a set that is not text."""
        if self.meta["tokenizer"] == "ids":
            return None
        if "val_bytes" in self.meta:
            return self.meta["val_bytes"] / len(self.val)
        lengths = tokenizers.byte_lengths(self.tokenizer)
        return sum(int(lengths[ids].sum()) for ids in self.val.chunks(len(self.val))) / len(self.val)

    def _open_split(self, split: str) -> "Shards":
        ours = "dtype" in self.meta
        paths = sorted(self.dir.glob(f"{split}*.bin" if ours else f"*{split}*.bin"))
        shards = Shards(paths, np.dtype(self.meta.get("dtype", "uint16")))
        again = f"prepare {self.dir} again"
        expected = self.meta.get(f"{split}_tokens", len(shards))
        if len(shards) != expected:
            raise UserError(f"the {split} split has {len(shards)} tokens, meta.json says {expected}: {again}")
        if not len(shards):
            raise UserError(f"empty corpus: the {split} split of {self.dir} has no tokens; {again}")
        largest = max(int(self._ids(raw).max()) for raw in shards.chunks(CHECK_ALL_BELOW))
        if largest >= self.vocab_size:
            fault = f"token id {largest}, beyond its vocabulary of {self.vocab_size}"
            raise UserError(f"the {split} split holds {fault}: {again}, or name the right --tokenizer")
        return shards

    def _inputs_and_targets(self, raw: np.ndarray) -> tuple[Tensor, Tensor]:
        """(B, T + 1), -1 beyond the end -> x, y (B, T)."""
        x, y = np.maximum(self._ids(raw[:, :-1]), 0), self._ids(raw[:, 1:])
        if self._answer_bit:
            y = np.where(raw[:, 1:] >> self._answer_bit > 0, y, -1)
        return torch.from_numpy(x), torch.from_numpy(np.ascontiguousarray(y))

    def _ids(self, raw: np.ndarray) -> np.ndarray:
        """Stored tokens without the bit that marks answers; -1 stays -1."""
        return np.where(raw < 0, raw, raw & (1 << self._answer_bit) - 1) if self._answer_bit else raw


class Shards:
    """Token files as one array, read by pread, not mapped: a file cut short gives a clear error, not a bus error."""

    def __init__(self, paths: list[Path], dtype: np.dtype):
        """Raises UserError for a file whose size does not fit its header or `dtype`."""
        self.dtype = dtype
        self.files = [open(path, "rb", buffering=0) for path in paths]  # noqa: SIM115 (they stay open)
        self.data_starts, self.ends = [], []  # of each file: byte of its first token, tokens up to its end
        for file in self.files:
            header = np.frombuffer(file.read(12).ljust(12, b"\0"), "<i4")  # magic, version, tokens
            size = os.fstat(file.fileno()).st_size
            start = LLMC_HEADER_BYTES if header[0] == LLMC_MAGIC else 0
            count, rest = divmod(size - start, dtype.itemsize)
            if start and header[1] != LLMC_VERSION:
                raise UserError(f"{file.name} has shard version {header[1]}, only {LLMC_VERSION} is known")
            if rest or count < 0 or start and header[2] != count:
                raise UserError(f"{file.name} is damaged ({size} bytes): copy it or prepare the set again")
            self.data_starts.append(start)
            self.ends.append(count + len(self))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1, fewer at the end: (<= count,)."""
        i = bisect_right(self.ends, start)
        if i == len(self.ends):
            return np.empty(0, self.dtype)
        take = min(count, self.ends[i] - start)
        skip = start - (self.ends[i - 1] if i else 0)
        size = self.dtype.itemsize
        data = os.pread(self.files[i].fileno(), take * size, self.data_starts[i] + skip * size)
        if len(data) < take * size:
            raise UserError(f"{self.files[i].name} has become shorter while in use: restore it and resume")
        ids = np.frombuffer(data, self.dtype)
        return ids if take == count else np.concatenate([ids, self.read(start + take, count - take)])

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(len(starts), length) int64, -1 beyond the end."""
        out = np.full((len(starts), length), -1, np.int64)
        for row, start in zip(out, starts.tolist(), strict=True):
            row[: max(len(self) - start, 0)] = self.read(start, length)
        return out

    def chunks(self, limit: int) -> Iterator[np.ndarray]:
        """All tokens, or about `limit` of them in chunks spread evenly."""
        n = -(-len(self) // CHUNK)
        wanted = min(n, max(1, limit // CHUNK + 1))
        for i in range(wanted):
            yield self.read(i * n // wanted * CHUNK, CHUNK)

    def sample(self) -> bytes:
        """Length and first tokens of each file: distinguishes one corpus from another without reading all of it."""
        heads = [os.pread(file.fileno(), 1 << 16, 0) for file in self.files]
        return repr(self.ends).encode() + b"".join(heads)


def sample_starts(first: int, count: int, n_tokens: int, block_size: int, seed: int, aligned=False) -> np.ndarray:
    """(count,): where samples first .. first + count - 1 begin. An epoch puts windows of block_size side by side, from
    a random offset below block_size (targets reach one token further), and takes them in random order. aligned: the
    data are examples of block_size + 1 tokens, so there is no offset.
    """
    stride = block_size + 1 if aligned else block_size
    n = n_tokens // stride if aligned else max(1, n_tokens // stride - 1)
    room = 1 if aligned else min(stride, n_tokens - n * stride)
    index = np.arange(first, first + count, dtype=np.uint64)
    key = _mix(_mix(np.array([seed % 2**64], np.uint64)) + index // np.uint64(n))
    window = permute(index % np.uint64(n), n, key)
    return (window * np.uint64(stride) + _mix(~key) % np.uint64(room)).astype(np.int64)


def permute(index: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """The image of each `index` under the permutation of 0 .. n-1 that `key` selects; all (B,) uint64, without memory
    of size n. A Feistel network permutes a x b pairs, with a b just above n. A result of n or more is permuted again
    (Black and Rogaway 2002).
    """
    a, one, half = np.uint64(math.isqrt(n - 1) + 1), np.uint64(1), np.uint64(32)
    b = np.uint64(-(-n // int(a)))
    round_keys = _mix(key + np.arange(1, 7, dtype=np.uint64)[:, None])  # (6, B)
    out, outside = index.copy(), np.arange(len(index))
    while len(outside):
        left, right = np.divmod(out[outside], b)
        for k in round_keys[:, outside].reshape(3, 2, -1):
            left = (left + ((right + k[0]) * (k[0] | one) >> half)) % a
            right = (right + ((left + k[1]) * (k[1] | one) >> half)) % b
        out[outside] = left * b + right
        outside = outside[out[outside] >= n]
    return out


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64: a bijection of uint64 that looks random."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def _read_meta(folder: Path) -> dict | None:
    """What is known about the set in a folder; None if there is no set. Raises UserError if meta is damaged."""
    path = folder / "meta.json"
    if path.exists():
        with suppress(ValueError, LookupError, TypeError):
            meta = json.loads(path.read_text(encoding="utf-8"))
            if meta["dtype"] in ("uint16", "uint32") and meta["vocab_size"] > 0 and meta["tokenizer"]:
                return meta
        raise UserError(f"{path} is damaged: prepare the set again")
    nanogpt = (folder / "train.bin").exists() and (folder / "val.bin").exists()
    headers = [np.fromfile(p, "<i4", 1) for split in ("train", "val") for p in folder.glob(f"*{split}*.bin")]
    llmc = headers and all(header.tolist() == [LLMC_MAGIC] for header in headers)
    if not (nanogpt or llmc):  # shards of ours without their meta.json have neither name nor header
        return None
    if (folder / "meta.pkl").exists():
        chars = _read_nanogpt_chars(folder / "meta.pkl")
        return {"tokenizer": "char", "vocab_size": len(chars), "chars": chars}
    if (folder / "tokenizer_spec.json").exists():  # put there by the user
        tok = tokenizers.load(folder)
        return {"tokenizer": tok.name, "vocab_size": tok.n_vocab, "tokenizer_sha256": tokenizers.sha256(tok)}
    return {}


class _PlainUnpickler(pickle.Unpickler):
    """Refuses every class. nanoGPT's meta.pkl needs none: it holds dicts of strings and numbers."""

    def find_class(self, module, name):
        raise UserError(f"it asks for {module}.{name}, which could run code")


def _read_nanogpt_chars(path: Path) -> str:
    try:
        stoi = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()["stoi"]
        chars = "".join(sorted(stoi, key=stoi.get))
        if [stoi[c] for c in chars] != list(range(len(chars))):
            raise ValueError("ids must be 0, 1, ...")
        return chars
    except Exception as e:  # a damaged pickle can raise almost anything
        reason = e if isinstance(e, UserError) else "it is damaged"
        raise UserError(f"refused {path}: {reason}; replace it by the one nanoGPT wrote") from None
