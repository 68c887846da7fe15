"""Tiny Shakespeare by characters, split in order as in nanoGPT: from the input.txt here, else downloaded."""

import hashlib
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    sys.path.insert(0, f"{sys.path[0]}/../..")

from nanokv.config import UserError, cli, parse
from nanokv.dataset_writer import Flags, Piece, prepare

INPUT = Path(__file__).with_name("input.txt")
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass
class ShakespeareFlags(Flags):
    tokenizer: str = "char"  # byte, char, bpe (trained on this corpus) or gpt2
    val_fraction: float = 0.1  # share of the text, at its end, held out for validation


def download(path: Path) -> None:
    """Raises UserError if there is no network, or something else is at the address."""
    remedy = f"put its text at {path} and run again"
    try:
        with urllib.request.urlopen(URL, timeout=20) as response:
            content = response.read()
    except OSError as e:
        raise UserError(f"cannot download Tiny Shakespeare ({getattr(e, 'reason', e)}): {remedy}") from None
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(f"{URL} is not the Tiny Shakespeare that is known: {remedy}")
    path.write_bytes(content)


def main(argv: list[str]) -> None:
    flags = parse(ShakespeareFlags, argv, "python data/shakespeare_char/prepare.py [--key=value ...]")
    if not INPUT.exists():
        download(INPUT)
    text = INPUT.read_text(encoding="utf-8")
    print(f"length of dataset in characters: {len(text):,}")
    cut = int(len(text) * (1 - flags.val_fraction))
    prepare(flags, __file__, lambda: [Piece("train", text[:cut]), Piece("val", text[cut:])])


if __name__ == "__main__":
    cli(main)
