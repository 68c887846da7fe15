"""FineWeb-Edu (Penedo et al. 2024): educational web pages, its sample of about 10 B tokens."""

import sys
from functools import partial

if not __package__:
    sys.path.insert(0, f"{sys.path[0]}/../..")

from nanokv.config import cli
from nanokv.hub import prepare_streamed

main = partial(prepare_streamed, here=__file__, repo="HuggingFaceFW/fineweb-edu", subset="sample-10BT")

if __name__ == "__main__":
    cli(main)
