"""The Python standard library's source without tests and tables, about 10 MB that every machine has."""

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

if not __package__:
    sys.path.insert(0, f"{sys.path[0]}/../..")

from nanokv.config import cli, parse
from nanokv.dataset_writer import Flags, Piece, prepare, split_of

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}  # not the standard library
SKIPPED_FOLDERS |= {"test", "tests", "idle_test", "encodings", "pydoc_data"}  # tests and tables
SKIPPED_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")  # differ by machine


def documents(val_fraction: float) -> Iterator[Piece]:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    wanted = (name for name in names if SKIPPED_FOLDERS.isdisjoint(name.parts[:-1]))
    for name in sorted(wanted, key=Path.as_posix):
        if not name.name.startswith(SKIPPED_FILES):
            text = (root / name).read_text(encoding="utf-8", errors="replace")
            yield Piece(split_of(name.as_posix().encode(), val_fraction), text)


def main(argv: list[str]) -> None:
    flags = parse(Flags, argv, "python data/stdlib/prepare.py [--key=value ...]")
    prepare(flags, __file__, lambda: documents(flags.val_fraction), python=sys.version.split()[0])


if __name__ == "__main__":
    cli(main)
