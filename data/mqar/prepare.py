"""Multi-query associative recall (Zoology, Arora et al. 2023): the quickest probe of what a cache forgets.

An example is n_pairs pairs `key value`, then each key once more, in random order and at random distances that
are small more often than large, followed by its value: only these values are targets. Filler is 0, keys are
ids in 1 .. vocab_size / 2 - 1, values the ids above.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

if not __package__:
    sys.path.insert(0, f"{sys.path[0]}/../..")

from nanokv.config import check_range, cli, parse
from nanokv.dataset_writer import Writer
from nanokv.tokenizer import IdsTokenizer

ANSWER_BIT = 15
BATCH = 1000  # examples made at a time
POWER = 0.01  # of the distribution of distances; Zoology's


@dataclass
class MqarFlags:
    n_pairs: int = 8  # pairs to remember in an example
    seq_len: int = 64  # length of an example; the block_size to train with
    vocab_size: int = 512  # ids: half keys, half values
    n_train: int = 100_000  # examples to train on
    n_val: int = 2_000  # examples to validate on
    seed: int = 0  # of the examples
    out_dir: str = ""  # folder to write; empty: the one that holds this prepare.py

    def __post_init__(self):
        check_range(self, "seed", at_least=0)
        check_range(self, "n_pairs n_train n_val", at_least=1)
        check_range(self, "seq_len", at_least=4 * self.n_pairs)  # the pairs and their queries
        check_range(self, "vocab_size", at_least=2 * self.n_pairs + 2, at_most=1 << ANSWER_BIT)


def examples(flags: MqarFlags, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, seq_len + 1) uint16, answers marked by their top bit."""
    n, half = flags.n_pairs, flags.vocab_size // 2
    slots = (flags.seq_len + 1 - 2 * n) // 2  # places for a query and its answer
    p = np.arange(1, slots + 1) ** (POWER - 1.0)

    def draw(scores: np.ndarray) -> np.ndarray:  # (count, choices) -> (count, n): least scores, in any order
        return rng.permuted(np.argpartition(scores, n - 1, axis=1)[:, :n], axis=1)

    # draws without replacement by weight: Efraimidis and Spirakis 2006
    place = draw(rng.exponential(size=(count, slots)) / p)
    keys = 1 + draw(rng.random((count, half - 1)))
    values = half + draw(rng.random((count, flags.vocab_size - half)))
    out = np.zeros((count, flags.seq_len + 1), np.uint16)
    out[:, 0 : 2 * n : 2], out[:, 1 : 2 * n : 2] = keys, values
    rows = np.arange(count)[:, None]
    out[rows, 2 * n + 2 * place] = keys
    out[rows, 2 * n + 2 * place + 1] = values | 1 << ANSWER_BIT
    return out


def main(argv: list[str]) -> None:
    flags = parse(MqarFlags, argv, "python data/mqar/prepare.py [--key=value ...]")
    writer = Writer(Path(flags.out_dir or Path(__file__).parent), IdsTokenizer(flags.vocab_size), np.uint16)
    rng = np.random.default_rng(flags.seed)
    for split, total in (("val", flags.n_val), ("train", flags.n_train)):
        for done in range(0, total, BATCH):
            tokens = examples(flags, min(BATCH, total - done), rng)
            writer.write(split, tokens.ravel(), [tokens.tobytes()])
    writer.finish(answer_bit=ANSWER_BIT, example_len=flags.seq_len + 1, n_pairs=flags.n_pairs, seed=flags.seed)


if __name__ == "__main__":
    cli(main)
