"""Tokenizers, all with tiktoken's interface. `byte`, `bpe`, `gpt2` and tokenizers that convert.py reads from a
tokenizer.json are tiktoken encodings. `char` and `ids` are small classes with the same methods.

Users' text goes through `encode_ordinary`, which treats the characters `<|endoftext|>` as ordinary text.
"""

import base64
import hashlib
import json
import threading
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from nanokv.config import UserError, replace_json

KINDS = ("byte", "char", "bpe", "gpt2")
END_OF_TEXT = "<|endoftext|>"
BPE_SAMPLE_CHARS = 100_000_000  # bpe is trained on this much text from the start of the corpus
# Qwen2's split, known to transformers, vLLM and llama.cpp ("qwen2"). A saved tokenizer keeps the pattern it has
BPE_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
BPE_PATTERN += r"|\s+(?!\S)|\s+"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_N_VOCAB = 50257
DOWNLOAD_SECONDS = 60


class _PlainTokenizer:
    """The methods of tiktoken's interface that follow from `encode_ordinary` and `decode_single_token_bytes`."""

    eot_token = None

    def encode(self: Any, text: str) -> list[int]:
        return self.encode_ordinary(text)

    def encode_ordinary_batch(self: Any, texts: list[str], num_threads: int = 1) -> list[list[int]]:
        return [self.encode_ordinary(text) for text in texts]

    def decode_bytes(self: Any, ids: Iterable[int]) -> bytes:
        return b"".join(self.decode_single_token_bytes(i) for i in ids)

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        return self.decode_bytes(ids).decode("utf-8", errors)


class CharTokenizer(_PlainTokenizer):
    """One id for each character of a known alphabet, in the order given."""

    name = "char"

    def __init__(self, chars: str):
        self.chars, self.n_vocab = chars, len(chars)
        self._ids = {c: i for i, c in enumerate(chars)}

    def encode_ordinary(self, text: str) -> list[int]:
        """Raises UserError if `text` holds a character that the alphabet lacks."""
        try:
            return [self._ids[c] for c in text]
        except KeyError as e:
            fault = f"the char tokenizer does not know the character {e.args[0]!r}"
            raise UserError(f"{fault}: leave it out, or train with another tokenizer (byte or bpe)") from e

    def decode_single_token_bytes(self, token: int) -> bytes:
        return self.chars[token].encode()


class IdsTokenizer(_PlainTokenizer):
    """For data that is not text: reads and prints ids as numbers separated by spaces."""

    name = "ids"

    def __init__(self, n_vocab: int):
        self.n_vocab = n_vocab

    def encode_ordinary(self, text: str) -> list[int]:
        """Raises UserError if `text` is anything but ids below n_vocab."""
        for word in text.split():
            if not (word.isascii() and word.isdigit() and int(word) < self.n_vocab):
                raise UserError(f"{word!r} is no token id: give numbers below {self.n_vocab}, between spaces")
        return [int(word) for word in text.split()]

    def decode_single_token_bytes(self, token: int) -> bytes:
        return b"%d " % token


class BpeTokenizer(tiktoken.Encoding):
    """tiktoken's byte-pair encoding, with any name for the token that ends a document, or none."""

    def __init__(self, name: str, pattern: str, ranks, specials, end_of_text: str | None = END_OF_TEXT, nfc=False):
        """ranks: dict from token (bytes) to id, which is also its priority in merging. specials: dict from special
        token (str) to id. end_of_text: the special token that ends a document, or None. nfc: convert text to Unicode
        normal form C first. Raises ValueError if the ids are not 0, 1, ... or a byte has no id.
        """
        super().__init__(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
        if sorted([*ranks.values(), *specials.values()]) != list(range(self.n_vocab)):
            raise ValueError("ids must be distinct and begin at 0, without gaps")
        if not all(bytes([b]) in ranks for b in range(256)):
            raise ValueError("each single byte must be a token")
        self.pattern, self.ranks, self.specials = pattern, ranks, specials
        self.end_of_text, self.nfc = end_of_text, nfc

    @property
    def eot_token(self) -> int | None:
        return None if self.end_of_text is None else self.specials[self.end_of_text]

    def encode_ordinary(self, text: str) -> list[int]:
        return super().encode_ordinary(unicodedata.normalize("NFC", text) if self.nfc else text)


Tokenizer = BpeTokenizer | CharTokenizer | IdsTokenizer


def train(kind: str, texts: Iterable[str], vocab_size: int = 0) -> Tokenizer:
    """The tokenizer `kind`, or the one in the folder `kind`; `char` and `bpe` are made from `texts`.
    Raises UserError: unknown kind, no text, vocab_size too small, rustbpe missing, gpt2 without network.
    """
    if (Path(kind) / "tokenizer_spec.json").exists():
        return load(kind)
    if kind == "byte":
        return _encoding("byte", r"(?s:.+)", [bytes([b]) for b in range(256)])
    if kind == "gpt2":
        return _gpt2()
    if kind == "bpe":
        return _train_bpe(texts, vocab_size)
    if kind != "char":
        raise UserError(f"unknown tokenizer {kind!r}: choose one of {', '.join(KINDS)}, or a run folder")
    chars = "".join(sorted(set().union(*texts)))
    if not chars:
        raise UserError("empty corpus: there is no text to make a char tokenizer from")
    return CharTokenizer(chars)


def save(tok: Tokenizer, folder: str | Path) -> None:
    """Writes what `load` needs: tokenizer_spec.json, and tokenizer.tiktoken if the tokenizer has ranks."""
    spec, ranks = _describe(tok)
    if ranks:
        (Path(folder) / "tokenizer.tiktoken").write_bytes(ranks)
    replace_json(Path(folder) / "tokenizer_spec.json", spec | {"sha256": sha256(tok)})


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer that `save` wrote. Raises UserError if there is none or it is damaged."""
    try:
        spec = json.loads((Path(folder) / "tokenizer_spec.json").read_text(encoding="utf-8"))
        if spec["kind"] == "char":
            tok = CharTokenizer(spec["chars"])
        elif spec["kind"] == "ids":
            tok = IdsTokenizer(spec["n_vocab"])
        else:
            lines = (Path(folder) / "tokenizer.tiktoken").read_bytes().splitlines()
            ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
            more = {name: spec[name] for name in ("end_of_text", "nfc") if name in spec}
            specials = spec.get("special_tokens", {END_OF_TEXT: len(ranks)})
            if len({*ranks.values(), *specials.values()}) < len(ranks) + len(specials):
                raise ValueError("two tokens share an id")  # tiktoken would panic
            tok = BpeTokenizer(spec["kind"], spec["pattern"], ranks, specials, **more)
        if sha256(tok) != spec["sha256"]:
            raise ValueError("it is another one than was saved")
        return tok
    except FileNotFoundError as e:
        raise UserError(f"{folder} holds no tokenizer: {Path(e.filename).name} is missing") from e
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise UserError(f"the tokenizer in {folder} is damaged: copy its data set's or prepare again") from e


def sha256(tok: Tokenizer) -> str:
    """A hash that identifies the tokenizer: equal if two are built to encode every text in the same way."""
    spec, ranks = _describe(tok)
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode() + ranks).hexdigest()


def byte_lengths(tok: Tokenizer) -> np.ndarray:
    """(n_vocab,) int64: the bytes of text that each token stands for; 0 for <|endoftext|>."""
    lengths = np.array([len(tok.decode_single_token_bytes(i)) for i in range(tok.n_vocab)])
    if tok.eot_token is not None:
        lengths[tok.eot_token] = 0
    return lengths


def _encoding(name: str, pattern: str, tokens: list[bytes]) -> BpeTokenizer:
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return BpeTokenizer(name, pattern, ranks, {END_OF_TEXT: len(tokens)})


def _describe(tok: Tokenizer) -> tuple[dict, bytes]:
    """The full description of a tokenizer: a dict for JSON, and its ranks as a .tiktoken file."""
    if isinstance(tok, CharTokenizer):
        return {"kind": tok.name, "chars": tok.chars}, b""
    if isinstance(tok, IdsTokenizer):
        return {"kind": tok.name, "n_vocab": tok.n_vocab}, b""
    spec = {"kind": tok.name, "pattern": tok.pattern}
    if tok.specials != {END_OF_TEXT: len(tok.ranks)} or tok.nfc:
        spec |= {"special_tokens": tok.specials, "end_of_text": tok.end_of_text, "nfc": tok.nfc}
    in_order = sorted(tok.ranks.items(), key=lambda item: item[1])
    return spec, b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in in_order)


def _train_bpe(texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
    if vocab_size < 257:
        raise UserError(f"--vocab_size must be at least 257 (256 bytes and {END_OF_TEXT}) for bpe, not {vocab_size}")
    try:
        import rustbpe
    except ImportError as e:
        raise UserError("rustbpe trains bpe: `pip install rustbpe`, or use --tokenizer=byte") from e

    seen = 0

    def sample():
        nonlocal seen
        for text in texts:
            if seen >= BPE_SAMPLE_CHARS:
                return
            seen += len(text)
            yield text

    trainer = rustbpe.Tokenizer()  # pyright: ignore[reportAttributeAccessIssue] (it has no types)
    trainer.train_from_iterator(sample(), vocab_size - 1, pattern=BPE_PATTERN)
    if not seen:
        raise UserError("empty corpus: there is no text to train a bpe tokenizer on")
    tok = _encoding("bpe", BPE_PATTERN, [bytes(token) for token, _ in trainer.get_mergeable_ranks()])
    if tok.n_vocab < vocab_size:
        print(f"bpe: the corpus is too small for {vocab_size} tokens, the vocabulary has {tok.n_vocab}")
    return tok


def _gpt2() -> BpeTokenizer:
    """GPT-2's tokenizer. tiktoken downloads it without a timeout, so a thread bounds the wait."""
    outcome: list[Any] = [f"no answer in {DOWNLOAD_SECONDS} s"]

    def fetch():
        try:
            outcome[0] = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as e:  # no network, or a damaged download
            outcome[0] = type(e).__name__

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_SECONDS)
    if isinstance(outcome[0], str):
        fault = f"cannot download the gpt2 tokenizer ({outcome[0]})"
        raise UserError(f"{fault}: connect to the network, or set TIKTOKEN_CACHE_DIR to a folder that holds it")
    tokens = [outcome[0].decode_single_token_bytes(i) for i in range(GPT2_N_VOCAB - 1)]
    return _encoding("gpt2", GPT2_PATTERN, tokens)  # tiktoken's wording of the pattern varies by version
