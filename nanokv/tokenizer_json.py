"""Our tokenizers to `tokenizer.json`, the file that Hugging Face's `tokenizers` reads, and back.

Our byte-pair encoding merges the two neighbors whose joint token has the lowest id. A tokenizer.json lists the
pairs to merge, in order. So `to_json` writes a merge for each way to cut a token into two tokens, and `from_json`
requires that the merges come in the order of the ids that they make.
"""

from nanokv.config import UserError
from nanokv.tokenizer import GPT2_PATTERN, BpeTokenizer, CharTokenizer, IdsTokenizer, Tokenizer

# GPT-2's printable names of bytes: those that are visible in Latin-1 stand for themselves
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [b for b in range(256) if b not in _VISIBLE]
BYTE_NAMES = {b: chr(b) for b in _VISIBLE} | {b: chr(256 + i) for i, b in enumerate(_HIDDEN)}
BYTES_BY_NAME = {name: b for b, name in BYTE_NAMES.items()}
# GPT-2's split with each digit on its own, as Hugging Face's Digits and then ByteLevel make it
DIGITS_PATTERN = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}")
DIGITS_PATTERN = DIGITS_PATTERN.replace(r"|\s+(?!\S)", r"|\s+(?=\p{N})|\s+(?!\S)")


def to_json(tok: Tokenizer) -> dict:
    """The contents of tokenizer.json. It gives the same ids as `tok`, and an error for unknown characters."""
    blank = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": []}
    blank |= {"normalizer": None, "post_processor": None}
    if isinstance(tok, BpeTokenizer):
        # Oniguruma, their regex engine, has (?m: for our (?s:; bytes without merges need no split
        split = {"type": "Split", "pattern": {"Regex": tok.pattern}, "behavior": "Isolated", "invert": False}
        to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        merges, unused = _merges(tok.ranks), ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
        model = {"type": "BPE", **dict.fromkeys(unused), "fuse_unk": False, "byte_fallback": False}
        model |= {"ignore_merges": True, "vocab": {_name(token): i for token, i in tok.ranks.items()}}
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        specials = [{"id": i, "content": token, **plain} for token, i in tok.specials.items()]
        blank |= {"added_tokens": specials, "normalizer": {"type": "NFC"} if tok.nfc else None}
        before = {"type": "Sequence", "pretokenizers": [split, to_bytes]} if merges else to_bytes
        return blank | {"pre_tokenizer": before, "decoder": to_bytes, "model": model | {"merges": merges}}
    if isinstance(tok, CharTokenizer):
        every = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        vocab, decoder = {c: i for i, c in enumerate(tok.chars)}, {"type": "Fuse"}
    else:
        every, vocab, decoder = {"type": "WhitespaceSplit"}, {str(i): i for i in range(tok.n_vocab)}, None
    # <unk> is not in vocab, so an unknown character is an error
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    return blank | {"pre_tokenizer": every, "decoder": decoder, "model": model}


def from_json(content: dict, end_of_text: str | None) -> Tokenizer:
    """Our tokenizer from a tokenizer.json; `end_of_text` is the special token that ends a document. UserError if it is
    neither a byte-level byte-pair encoding (GPT-2, Llama 3, Qwen, ...) nor written by `to_json`.
    """
    model, splitter = content["model"], content["pre_tokenizer"]
    if model["type"] == "WordLevel" and content["added_tokens"] == []:
        words = sorted(model["vocab"], key=model["vocab"].get)
        if splitter["type"] == "Split" and all(len(word) == 1 for word in words):
            return CharTokenizer("".join(words))
        if splitter["type"] == "WhitespaceSplit" and words == [str(i) for i in range(len(words))]:
            return IdsTokenizer(len(words))
    if model["type"] != "BPE" or model.get("byte_fallback") or (content["decoder"] or {}).get("type") != "ByteLevel":
        raise UserError(f"its tokenizer ({model['type']}) is no byte-level byte-pair encoding")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise UserError(f"its tokenizer uses {option}, for which there is nothing here")
    normalizer = (content["normalizer"] or {"type": None})["type"]
    if normalizer not in (None, "NFC"):
        raise UserError(f"its tokenizer normalises text by {normalizer}, only NFC is known")
    specials = {token["content"]: token["id"] for token in content["added_tokens"]}
    ranks = {_bytes(name): i for name, i in model["vocab"].items() if name not in specials}
    if end_of_text is not None and end_of_text not in specials:
        raise UserError(f"its tokenizer does not know {end_of_text!r}, its token for the end of a text")
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    made = [ranks[_bytes("".join(pair))] for pair in pairs]
    if made != sorted(made):
        raise UserError("its tokenizer merges in another order than that of the ids")
    pattern = _pattern(splitter, bool(made))
    try:
        return BpeTokenizer("bpe", pattern, ranks, specials, end_of_text, normalizer == "NFC")
    except ValueError as e:
        raise UserError(f"its tokenizer does not fit: {' '.join(str(e).split())}") from e


def _merges(ranks: dict[bytes, int]) -> list[str]:
    """Every cut of a token into two tokens, ordered by the id of the token, then by the ids of its parts."""
    pairs = []
    for token, rank in ranks.items():
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs += [(rank, ranks[a], ranks[b], a, b) for a, b in cuts if a in ranks and b in ranks]
    return [f"{_name(a)} {_name(b)}" for *_, a, b in sorted(pairs)]


def _pattern(splitter: dict, merges: bool) -> str:
    """The pattern that splits text as this pre-tokenizer does."""
    parts = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    gpt2 = parts[-1].get("use_regex", True)  # whether the last part splits as GPT-2 does
    if parts[-1]["type"] == "ByteLevel" and not parts[-1].get("add_prefix_space"):
        match parts[:-1]:
            case [] if gpt2:
                return GPT2_PATTERN
            case [] if not merges:  # no merges, so no split is needed
                return r"(?s:.+)"
            case [{"type": "Digits", "individual_digits": True}] if gpt2:
                return DIGITS_PATTERN
            case [{"type": "Split", "behavior": "Isolated", "pattern": {"Regex": pattern}}] if not gpt2:
                return pattern
    kinds = " + ".join(part["type"] for part in parts)
    raise UserError(f"its pre-tokenizer ({kinds}) is not known")


def _name(token: bytes) -> str:
    return "".join(BYTE_NAMES[b] for b in token)


def _bytes(name: str) -> bytes:
    """Raises UserError if `name` is not made of the names of bytes."""
    try:
        return bytes(BYTES_BY_NAME[c] for c in name)
    except KeyError as e:
        raise UserError(f"its tokenizer holds {name!r}, which is no sequence of bytes") from e
