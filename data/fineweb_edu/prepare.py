"""FineWeb-Edu (Penedo et al. 2024): educational web pages, its sample of about 10 B tokens."""

import sys

if not __package__:
    sys.path.insert(0, f"{sys.path[0]}/../..")

from nanokv.config import cli
from nanokv.hub import prepare_streamed


def main(argv: list[str]) -> None:
    prepare_streamed(argv, __file__, repo="HuggingFaceFW/fineweb-edu", subset="sample-10BT")


if __name__ == "__main__":
    cli(main)
