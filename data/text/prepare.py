"""Your own text: `python data/text/prepare.py --input=notes,books/*.txt,chats.jsonl`.

Files, folders and globs of .txt, .jsonl (a document a line) and .parquet (a document a row), streamed.
Documents are split by a hash of their text; where there are few .txt files, each gives its end to validation.
"""

import codecs
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    sys.path.insert(0, f"{sys.path[0]}/../..")

from nanokv.config import UserError, cli, parse
from nanokv.dataset_writer import Flags, Piece, find_files, prepare, split_of

READ_BYTES = 1 << 20
FEW_FILES = 50  # up to so many .txt files are cut in two; more are split file by file


@dataclass
class TextFlags(Flags):
    input: str = ""  # files, folders or globs, separated by commas
    text_key: str = "text"  # key (jsonl) or column (parquet) that holds the text


def text_file(path: Path, split: str | None, val_fraction: float) -> Iterator[Piece]:
    """The file in pieces that end at white space. split None: its last val_fraction is val, else train."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    size = os.path.getsize(path)
    cut = int(size * (1 - val_fraction)) if split is None else size
    with open(path, "rb") as f:
        for part, end in ((split or "train", cut), ("val", size)):
            starts, rest = True, ""
            while f.tell() < end:
                data = f.read(min(READ_BYTES, end - f.tell()))
                try:
                    text = rest + decoder.decode(data, final=f.tell() >= size)
                except UnicodeDecodeError as e:
                    raise UserError(f"{path} is not UTF-8 text: convert it or leave it out") from e
                keep = len(text)
                if f.tell() < end:  # the next piece begins at white space, where tokenizers split anyway
                    keep = max(text.rfind(" "), text.rfind("\n"), 0) or len(text)
                text, rest = text[:keep], text[keep:]
                if text:
                    yield Piece(part, text, starts)
                    starts = False


def jsonl_rows(path: Path, key: str) -> Iterator[str]:
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if line.isspace():
                continue
            try:
                text = json.loads(line)[key].encode("utf-8", "replace").decode()
            except ValueError as e:
                raise UserError(f"{path} line {number} is no JSON in UTF-8: correct it") from e
            except (LookupError, TypeError, AttributeError) as e:
                raise UserError(f"{path} line {number} has no text under {key!r}: name it by --text_key") from e
            yield text


def parquet_rows(path: Path, key: str) -> Iterator[str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError("parquet files are read by pyarrow: `pip install pyarrow`") from None
    try:
        opened = parquet.ParquetFile(path)
    except (OSError, ValueError) as e:  # what pyarrow raises is one of these
        raise UserError(f"{path} is no parquet file: {e}") from None
    with opened as file:
        columns = file.schema_arrow.names
        if key not in columns:
            raise UserError(f"{path} has no column {key!r}: --text_key is one of {', '.join(columns)}")
        for batch in file.iter_batches(batch_size=1024, columns=[key]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)


def documents(flags: TextFlags) -> Iterator[Piece]:
    paths = find_files(flags.input, (".txt", ".jsonl", ".parquet"))
    rows = {".jsonl": jsonl_rows, ".parquet": parquet_rows}
    cut_files = sum(path.suffix not in rows for path in paths) <= FEW_FILES
    for path in paths:
        if path.suffix in rows:
            for text in rows[path.suffix](path, flags.text_key):
                yield Piece(split_of(text.encode(), flags.val_fraction), text)
        else:
            split = None if cut_files else split_of(path.read_bytes(), flags.val_fraction)
            yield from text_file(path, split, flags.val_fraction)


def main(argv: list[str]) -> None:
    flags = parse(TextFlags, argv, "python data/text/prepare.py --input=PATH[,PATH ...] [--key=value ...]")
    if not flags.input:
        raise UserError("no text given: add --input=PATH[,PATH ...], files, folders or globs")
    prepare(flags, __file__, lambda: documents(flags))


if __name__ == "__main__":
    cli(main)
