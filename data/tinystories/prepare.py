"""TinyStories (Eldan and Li 2023): short stories in simple English, 2 GB, about 0.5 B tokens."""

import sys
from functools import partial

if not __package__:
    sys.path.insert(0, f"{sys.path[0]}/../..")

from nanokv.config import cli
from nanokv.hub import prepare_streamed

main = partial(prepare_streamed, here=__file__, repo="roneneldan/TinyStories")

if __name__ == "__main__":
    cli(main)
