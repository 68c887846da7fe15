"""OpenWebText: pages that Reddit linked to, an open copy of the corpus of GPT-2, 40 GB, about 9 B tokens."""

import sys
from functools import partial

if not __package__:
    sys.path.insert(0, f"{sys.path[0]}/../..")

from nanokv.config import cli
from nanokv.hub import prepare_streamed

main = partial(prepare_streamed, here=__file__, repo="Skylion007/openwebtext", revision="refs/convert/parquet")

if __name__ == "__main__":
    cli(main)
