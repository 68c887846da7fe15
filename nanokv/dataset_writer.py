"""Shared by all prepare.py files: their flags, and a writer of documents as token shards.

A set is `train_NNNNNN.bin`, `val_NNNNNN.bin`, the tokenizer and `meta.json`. It is written to the folder
`unfinished/` and moved into place when complete, meta.json last. If a writer fails, an older set stays.
"""

import glob
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanokv import tokenizer
from nanokv.config import UserError, check_range, replace_json

SPLITS = ("train", "val")
SHARD_TOKENS = 100_000_000
UNFINISHED = "unfinished"
BATCH_CHARS = 1 << 20  # text tokenized at a time


@dataclass
class Flags:
    tokenizer: str = "bpe"  # byte, char, bpe (trained on this corpus) or gpt2
    vocab_size: int = 2048  # ids of the bpe tokenizer, <|endoftext|> included
    val_fraction: float = 0.05  # share of the documents held out for validation
    out_dir: str = ""  # folder to write; empty: the one that holds this prepare.py

    def __post_init__(self):
        check_range(self, "val_fraction", above=0, below=1)


class Piece(NamedTuple):
    """A document, or the next part of one that is too large for one piece."""

    split: str
    text: str
    starts_document: bool = True


class Writer:
    """Appends tokens to shards and counts them. After a kill, another writer continues from `state`."""

    def __init__(self, out_dir: Path, tok: tokenizer.Tokenizer, dtype=None, state: dict[str, Any] | None = None):
        """Without `state` it starts over and deletes what an earlier writer left unfinished in `out_dir`."""
        self.out_dir, self.aside, self.tok = out_dir, out_dir / UNFINISHED, tok
        self.dtype = np.dtype(dtype or (np.uint16 if tok.n_vocab <= 1 << 16 else np.uint32))
        counts = {what: dict.fromkeys(SPLITS, 0) for what in ("tokens", "bytes")}
        self.state = state or {"shard": 0, "corpus_sha256": ""} | counts
        self.last_print = self.started = time.monotonic()
        if state is None:
            shutil.rmtree(self.aside, ignore_errors=True)
            try:
                self.aside.mkdir(parents=True)
            except OSError as e:
                raise UserError(f"cannot write to {out_dir} ({e.strerror}): give another --out_dir") from e
            tokenizer.save(tok, self.aside)
        self._open_shard()

    def add_all(self, pieces: Iterable[Piece], shard_tokens=SHARD_TOKENS, max_tokens=0, state: Any = dict) -> None:
        """Appends pieces, in batches and shards, until there are max_tokens train tokens (0: all). It never reads
        ahead of what it writes, so state(), which is saved with each shard, gives the position in `pieces`.
        """
        batch, size = [], 0
        for piece in pieces:
            batch.append(piece)
            size += len(piece.text)
            if size >= BATCH_CHARS:
                self.add(batch)
                batch, size = [], 0
                if self.state["tokens"]["train"] - self.shard_start >= shard_tokens:
                    self.next_shard(**state())
                if 0 < max_tokens <= self.state["tokens"]["train"]:
                    return
        self.add(batch)

    def add(self, pieces: list[Piece]) -> None:
        rows = self.tok.encode_ordinary_batch([p.text for p in pieces], num_threads=os.cpu_count() or 1)
        ids, contents = ({split: [] for split in SPLITS} for _ in range(2))
        for piece, row in zip(pieces, rows, strict=True):
            if piece.starts_document and self.tok.eot_token is not None:
                ids[piece.split].append(self.tok.eot_token)
            ids[piece.split] += row
            contents[piece.split].append(piece.text.encode("utf-8", "replace"))
        for split in SPLITS:
            self.write(split, np.array(ids[split], self.dtype), contents[split])

    def write(self, split: str, ids: np.ndarray, contents: list[bytes]) -> None:
        """Appends `ids` (n,), the tokens of `contents`."""
        ids.astype(self.dtype, copy=False).tofile(self.files[split])
        self.state["tokens"][split] += len(ids)
        for content in contents:
            self.state["bytes"][split] += len(content)
            link = f"{self.state['corpus_sha256']} {split} ".encode() + content
            self.state["corpus_sha256"] = hashlib.sha256(link).hexdigest()
        if time.monotonic() - self.last_print > 2:
            self._print_progress()

    def next_shard(self, **more_state) -> None:
        """Ends the open shards and records how to go on after them."""
        self._close_shard()
        self.state |= more_state
        replace_json(self.aside / "progress.json", self.state)
        self._open_shard()

    def finish(self, **more_meta) -> None:
        """Moves the set into place. Raises UserError if a split is empty."""
        for split, count in self.state["tokens"].items():
            if not count:
                fault = f"empty corpus: no text was found for the {split} split"
                raise UserError(f"{fault}; give more text, or another --val_fraction")
        self._close_shard()
        self._print_progress()
        meta = {"dtype": self.dtype.name, "vocab_size": self.tok.n_vocab, "tokenizer": self.tok.name}
        meta |= {f"{split}_{what}": self.state[what][split] for what in ("tokens", "bytes") for split in SPLITS}
        meta |= {"tokenizer_sha256": tokenizer.sha256(self.tok), "corpus_sha256": self.state["corpus_sha256"]}
        shards = [path for split in SPLITS for path in self.out_dir.glob(f"{split}_[0-9]*.bin")]
        for path in (self.out_dir / "meta.json", self.aside / "progress.json", *shards):
            path.unlink(missing_ok=True)
        for path in self.aside.iterdir():
            path.replace(self.out_dir / path.name)
        replace_json(self.out_dir / "meta.json", meta | more_meta)
        self.aside.rmdir()
        print(f"wrote {self.out_dir}")

    def _open_shard(self) -> None:
        self.shard_start = self.state["tokens"]["train"]
        paths = {split: self.aside / f"{split}_{self.state['shard']:06d}.bin.tmp" for split in SPLITS}
        self.files = {split: path.open("wb") for split, path in paths.items()}

    def _close_shard(self) -> None:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(file.name, file.name.removesuffix(".tmp"))
        self.state["shard"] += 1

    def _print_progress(self) -> None:
        self.last_print = time.monotonic()
        megabytes, seconds = sum(self.state["bytes"].values()) / 1e6, self.last_print - self.started
        tokens = ", ".join(f"{split} {count:,} tokens" for split, count in self.state["tokens"].items())
        print(f"{megabytes:,.1f} MB: {tokens}, {seconds:.0f} s", flush=True)


def prepare(flags: Flags, here: str, documents: Callable[[], Iterable[Piece]], **more_meta) -> None:
    """Writes the set of the prepare.py `here`. Calls `documents()` twice: first to train the tokenizer."""
    texts = (p.text for p in documents() if p.split == "train" or flags.tokenizer == "char")
    tok = tokenizer.train(flags.tokenizer, texts, flags.vocab_size)
    writer = Writer(Path(flags.out_dir or Path(here).parent), tok)
    writer.add_all(documents())
    writer.finish(**more_meta)


def split_of(key: bytes, val_fraction: float) -> str:
    """The split of the document named `key`. It depends only on the key, not on the order of documents."""
    draw = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64
    return "val" if draw < val_fraction else "train"


def find_files(patterns: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Files named by `a,b,...`: files, folders (searched for `suffixes`) and globs; sorted, each once."""
    found = set()
    for pattern in patterns.split(","):
        for path in map(Path, [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)):
            inside = (p for p in path.rglob("*") if p.suffix in suffixes and p.is_file())
            found.update(inside if path.is_dir() else [path])
    if not found:
        raise UserError(f"--input={patterns} names no {', '.join(suffixes)} file: give files, folders or globs")
    return sorted(found)
