"""The Python standard library's own source, about 10 MB: the default data set, since every machine has it.

Modules are split by a hash of their path. Tests and tables of data are left out.
"""

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nanokv.config import cli, parse
from nanokv.dataset_writer import Flags, Piece, prepare, split_of

SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "__pycache__"),  # not the standard library
    *("test", "tests", "idle_test"),
    *("encodings", "pydoc_data"),  # tables
}
SKIPPED_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")  # differ by machine


def sources(root: Path) -> list[Path]:
    """Relative paths of the modules, sorted."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        found += [
            Path(folder, f).relative_to(root)
            for f in files
            if f.endswith(".py") and not f.startswith(SKIPPED_FILES)
        ]
    return sorted(found, key=Path.as_posix)


def documents(val_fraction: float) -> Iterator[Piece]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sources(root):
        text = (root / path).read_text(encoding="utf-8", errors="replace")
        yield Piece(split_of(path.as_posix().encode(), val_fraction), text)


def main(argv: list[str]) -> None:
    flags = parse(Flags, argv, "python data/stdlib/prepare.py [--key=value ...]")
    prepare(flags, __file__, lambda: documents(flags.val_fraction), python=sys.version.split()[0])


if __name__ == "__main__":
    cli(main)
