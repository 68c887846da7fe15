"""The loader: the stream of samples, layouts of others, and faults."""

import importlib
import json
import os
import pickle
import sysconfig
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from nanokv import dataset as data
from nanokv import dataset_writer as writer
from nanokv import tokenizer
from nanokv.config import UserError
from nanokv.dataset import Dataset, open_dataset, sample_starts
from nanokv.dataset_writer import Piece, Writer

REPO = Path(data.__file__).parents[1]
BYTE = tokenizer.train("byte", [])


def main(name):
    return importlib.import_module(f"data.{name}.prepare").main


def make_set(folder, train, val, shards=1, **meta):
    """A set of ours whose splits are the given ids, train in `shards` files."""
    out = Writer(folder, BYTE)
    out.write("val", np.array(val), [b"v" * len(val)])
    for part in np.array_split(np.array(train), shards):
        out.write("train", part, [part.tobytes()])
        if shards > 1:
            out.next_shard()
    out.finish(**meta)
    return folder


def rewrite_meta(folder, **changes):
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def bins(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def small_stdlib(folder, monkeypatch):
    """Some modules, and files that must be left out, as the standard library."""
    for i in range(120):
        path = folder / f"package{i % 3}" / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"def function{i}():\n    return {i}\n" * 20)
    for left_out in ("test/a.py", "package0/tests/b.py", "site-packages/c.py", "_sysconfigdata_x.py", "d.txt"):
        path = folder / left_out
        path.parent.mkdir(exist_ok=True)
        path.write_text("LEFT OUT")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(folder)})


# the stream


@pytest.mark.parametrize("n", [*range(1, 40), 64, 65, 1000, 4096, 4097, 99_991])
def test_permute_is_a_bijection(n):
    key = np.full(n, 12345, np.uint64)
    image = data.permute(np.arange(n, dtype=np.uint64), n, key)
    assert np.array_equal(np.sort(image), np.arange(n))


def test_permutations_look_uniform():
    draws = 20_000
    keys = data._mix(np.arange(draws, dtype=np.uint64))
    for i in range(10):
        image = data.permute(np.full(draws, i, np.uint64), 10, keys)
        share = np.bincount(image.astype(int), minlength=10) / draws
        assert np.abs(share - 0.1).max() < 0.012  # 5.7 standard deviations


@pytest.mark.parametrize(("n_tokens", "block_size"), [(1000, 7), (1000, 64), (17, 16), (31, 16), (33, 16)])
def test_an_epoch_takes_each_window_once(n_tokens, block_size):
    n = max(1, n_tokens // block_size - 1)
    orders, offsets = set(), set()
    for epoch in range(20):
        starts = sample_starts(epoch * n, n, n_tokens, block_size, seed=1)
        offset = starts.min()
        assert np.array_equal(np.sort(starts), offset + block_size * np.arange(n))
        assert 0 <= offset < block_size
        assert starts.max() + block_size + 1 <= n_tokens
        orders.add(tuple(starts - offset))
        offsets.add(offset)
    if n > 5:
        assert len(orders) == 20
    if n_tokens > block_size + 1:
        assert len(offsets) > 1


def test_seeds_differ_and_repeat():
    a, b, c = (sample_starts(0, 100, 10**9, 64, seed) for seed in (1, 2, 1))
    assert not np.array_equal(a, b)
    assert np.array_equal(a, c)


def test_any_number_of_ranks_sees_the_same_global_batches(tmp_path):
    ds = Dataset(make_set(tmp_path, np.arange(1000) % 256, range(50)))
    whole, _ = ds.train_batch(first=3 * 24, count=24, block_size=16, seed=5)
    for ranks in (2, 3, 4):
        count = 24 // ranks
        parts = [ds.train_batch(3 * 24 + r * count, count, 16, 5)[0] for r in range(ranks)]
        assert torch.equal(torch.cat(parts), whole)


def test_a_resumed_run_needs_only_the_sample_number(tmp_path):
    make_set(tmp_path, np.arange(1000) % 256, range(50))
    one = Dataset(tmp_path)
    through = [one.train_batch(i * 8, 8, 16, 5)[0] for i in range(30)]
    assert torch.equal(Dataset(tmp_path).train_batch(29 * 8, 8, 16, 5)[0], through[29])


def test_y_is_x_one_token_on(tmp_path):
    ds = Dataset(make_set(tmp_path, np.arange(2000) % 251, range(50)))
    x, y = ds.train_batch(0, 40, 32, 0)
    assert x.dtype == y.dtype == torch.int64
    assert x.shape == y.shape == (40, 32)
    assert torch.equal(y, (x + 1) % 251)


def test_shards_read_as_their_concatenation(tmp_path):
    ids = np.random.default_rng(0).integers(0, 256, 1000)
    one = Dataset(make_set(tmp_path / "one", ids, range(120)))
    many = Dataset(make_set(tmp_path / "many", ids, range(120), shards=37))
    assert len(list((tmp_path / "many").glob("train_*.bin"))) >= 37
    assert np.array_equal(many.train.read(0, 2000), ids)
    for block_size in (8, 100):  # windows within a shard, and over several
        assert torch.equal(one.train_batch(0, 99, block_size, 1)[0], many.train_batch(0, 99, block_size, 1)[0])


@pytest.mark.parametrize(("block_size", "batch_size"), [(16, 4), (16, 100), (7, 3), (98, 2)])
def test_val_batches_predict_each_token_once_in_order(tmp_path, block_size, batch_size):
    val = np.random.default_rng(0).integers(0, 256, 99)
    ds = Dataset(make_set(tmp_path, range(200), val))
    batches = list(ds.val_batches(block_size, batch_size))
    y = torch.cat([y.flatten() for _, y in batches])
    assert y[y >= 0].tolist() == val[1:].tolist()
    x = torch.cat([x.flatten() for x, _ in batches])
    assert x[y >= 0].tolist() == val[:-1].tolist()
    assert all(x.shape == y.shape and len(x) <= batch_size for x, y in batches)


def test_some_val_batches_are_spread_over_the_split(tmp_path):
    ds = Dataset(make_set(tmp_path, range(200), np.arange(1601) // 16))
    batches = list(ds.val_batches(16, 5, max_batches=4))
    assert [len(x) for x, _ in batches] == [5] * 4
    assert torch.cat([x[:, 0] for x, _ in batches]).tolist() == list(range(0, 100, 5))
    assert len(list(ds.val_batches(16, 5, max_batches=1000))) == 20


def test_bytes_per_token_is_that_of_the_text(tmp_path):
    out = Writer(tmp_path, BYTE)
    out.add([Piece("train", "abc"), Piece("val", "añb"), Piece("val", "c")])
    out.finish()
    ds = Dataset(tmp_path)
    assert len(ds.val) == 7  # 5 bytes, 2 <|endoftext|>
    assert ds.val_bytes_per_token == 5 / 7


# layouts of others


def write_llmc(path, ids, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.array(ids, "<u2").tobytes())


def test_llmc_shards(tmp_path):
    write_llmc(tmp_path / "fineweb_val_000000.bin", range(100))
    write_llmc(tmp_path / "fineweb_train_000001.bin", range(500))
    write_llmc(tmp_path / "fineweb_train_000002.bin", range(500, 900))
    ds = open_dataset(str(tmp_path))
    assert ds.vocab_size == 50257
    assert ds.meta["tokenizer"] == "gpt2"
    assert ds.train.read(0, 10**6).tolist() == list(range(900))
    x, y = ds.train_batch(0, 50, 10, 0)
    assert torch.equal(x + 1, y)
    assert len(ds.meta["corpus_sha256"]) == 64


def test_llmc_shards_under_another_tokenizer(tmp_path):
    write_llmc(tmp_path / "x_val.bin", [256, 104, 105])
    write_llmc(tmp_path / "x_train.bin", [104, 105])
    ds = open_dataset(str(tmp_path), tokenizer="byte")
    assert ds.vocab_size == 257
    assert ds.tokenizer.decode(ds.train.read(0, 2).tolist()) == "hi"
    assert ds.val_bytes_per_token == 2 / 3


def test_llmc_shards_with_a_tokenizer_put_beside_them(tmp_path):
    write_llmc(tmp_path / "x_val.bin", [0, 1])
    write_llmc(tmp_path / "x_train.bin", [1, 2])
    tokenizer.save(tokenizer.CharTokenizer("abc"), tmp_path)
    ds = open_dataset(str(tmp_path))
    assert (ds.vocab_size, ds.meta["tokenizer"]) == (3, "char")
    assert ds.tokenizer.decode(ds.train.read(0, 2).tolist()) == "bc"


def test_llmc_shards_under_a_tokenizer_that_is_not_there(tmp_path):
    write_llmc(tmp_path / "x_val.bin", [0, 1])
    write_llmc(tmp_path / "x_train.bin", [1, 2])
    with pytest.raises(UserError, match="holds no tokenizer to read it with"):
        open_dataset(str(tmp_path), tokenizer="bpe")


@pytest.mark.parametrize(
    ("fault", "message"), [({"version": 2}, "version 2"), ({"count": 999}, "is damaged")], ids=["version", "count"]
)
def test_llmc_faults(tmp_path, fault, message):
    write_llmc(tmp_path / "x_val_0.bin", range(100))
    write_llmc(tmp_path / "x_train_1.bin", range(100), **fault)
    with pytest.raises(UserError, match=f"x_train_1.bin.*{message}"):
        open_dataset(str(tmp_path))


def write_nanogpt(folder, meta=None):
    np.arange(60, dtype=np.uint16).tofile(folder / "train.bin")
    np.arange(30, dtype=np.uint16).tofile(folder / "val.bin")
    if meta is not None:
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def test_nanogpt_folder_of_characters(tmp_path):
    chars = [chr(200 + i) for i in range(65)]
    stoi = {c: i for i, c in enumerate(chars)}
    write_nanogpt(tmp_path, {"vocab_size": 65, "itos": dict(enumerate(chars)), "stoi": stoi})
    ds = open_dataset(str(tmp_path))
    assert (ds.vocab_size, ds.tokenizer.name) == (65, "char")
    assert ds.tokenizer.encode_ordinary("Éè") == [1, 32]
    assert ds.val_bytes_per_token == 2.0
    tokenizer.save(ds.tokenizer, tmp_path)
    assert tokenizer.load(tmp_path).chars == "".join(chars)


def test_nanogpt_folder_without_meta_is_gpt2(tmp_path):
    write_nanogpt(tmp_path)
    ds = open_dataset(str(tmp_path))
    assert (ds.vocab_size, ds.meta["tokenizer"]) == (50257, "gpt2")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_nanogpt(tmp_path, {"stoi": {"a": 0}, "itos": Bomb()})
    with pytest.raises(UserError, match=r"refused .*meta\.pkl.*mkdir"):
        open_dataset(str(tmp_path))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04", pickle.dumps({"stoi": {"a": 1}}), pickle.dumps([1])])
def test_a_damaged_pickle_is_refused(tmp_path, content):
    write_nanogpt(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(UserError, match=r"refused .*meta\.pkl: it is damaged"):
        open_dataset(str(tmp_path))


# faults


def test_unknown_sets():
    with pytest.raises(UserError, match="unknown data set 'stdlb': did you mean stdlib?"):
        open_dataset("stdlb")
    with pytest.raises(UserError, match="choose one of fineweb_edu, mqar, openwebtext"):
        open_dataset("/no/such/folder")


def test_unknown_tokenizer():
    with pytest.raises(UserError, match="unknown tokenizer 'bite'"):
        open_dataset("stdlib", tokenizer="bite")


def bare_root(tmp_path, monkeypatch, name, before=""):
    """data/ as in a fresh clone, with one set, whose prepare.py first does what `before` says."""
    (tmp_path / name).mkdir()
    lines = ["import sys, sysconfig", f"sys.path.insert(0, {str(REPO)!r})", before]
    lines += ["from nanokv.config import cli", f"from data.{name}.prepare import main", "cli(main)"]
    (tmp_path / name / "prepare.py").write_text("\n".join(lines))
    monkeypatch.setattr(data, "ROOT", tmp_path)


def test_a_missing_set_that_needs_the_network_says_what_to_run(tmp_path, monkeypatch):
    bare_root(tmp_path, monkeypatch, "openwebtext")
    with pytest.raises(UserError, match=r"not prepared: run `python data/openwebtext/prepare\.py`"):
        open_dataset("openwebtext")


def test_a_set_tokenised_otherwise_is_kept_apart(tmp_path, monkeypatch):
    small_stdlib(tmp_path / "lib", monkeypatch)
    library = f"sysconfig.get_paths = lambda: {{'stdlib': {str(tmp_path / 'lib')!r}}}"
    bare_root(tmp_path, monkeypatch, "stdlib", before=library)
    with pytest.raises(UserError, match="not prepared"):
        open_dataset("stdlib", prepare=False)
    assert open_dataset("stdlib", tokenizer="byte").dir == tmp_path / "stdlib" / "byte"
    assert open_dataset("stdlib").meta["tokenizer"] == "bpe"
    assert open_dataset("stdlib", tokenizer="bpe").dir == tmp_path / "stdlib"
    assert open_dataset("stdlib", tokenizer="byte", prepare=False).vocab_size == 257


def test_what_a_prepare_script_says_of_a_fault_comes_through_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as one of several ranks sees it
    bare_root(tmp_path, monkeypatch, "mqar")
    with pytest.raises(UserError) as fault:
        open_dataset("mqar", tokenizer="byte")
    assert str(fault.value) == "command line: unknown key 'tokenizer'; see --help"
    bare_root(tmp_path / "mqar", monkeypatch, "stdlib", before="raise SystemExit(3)")
    with pytest.raises(UserError, match="prepare.py --out_dir=.* failed: exit code 3"):
        open_dataset("stdlib")


def test_the_wrong_tokenizer_for_a_folder(tmp_path):
    make_set(tmp_path, range(100), range(50))
    with pytest.raises(UserError, match="tokenised with byte, not gpt2"):
        open_dataset(str(tmp_path), tokenizer="gpt2")


def test_a_folder_without_a_set(tmp_path):
    with pytest.raises(UserError, match="holds no complete data set"):
        open_dataset(str(tmp_path))


def test_a_split_shorter_than_a_block(tmp_path):
    ds = Dataset(make_set(tmp_path, range(100), range(16)))
    ds.check_block_size(15)
    with pytest.raises(UserError, match="val split .* has 16 tokens, fewer than block_size [+] 1 = 17"):
        next(ds.val_batches(16, 4))
    with pytest.raises(UserError, match="train split .* has 100 tokens"):
        ds.train_batch(0, 1, 100, 0)


@pytest.mark.parametrize("split", ["train", "val"])
def test_ids_beyond_the_vocabulary(tmp_path, split):
    splits = {"train": [0] * 100, "val": [0] * 50} | {split: [0] * 40 + [257] + [0] * 9}
    make_set(tmp_path, **splits)
    with pytest.raises(UserError, match=f"{split} split .* token id 257, beyond its vocabulary of 257"):
        Dataset(tmp_path)


def test_truncated_shards(tmp_path):
    make_set(tmp_path, range(100), range(50))
    path = tmp_path / "train_000000.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"train_000000\.bin is damaged"):
        Dataset(tmp_path)
    path.write_bytes(whole[:-2])
    with pytest.raises(UserError, match="has 99 tokens, meta.json says 100"):
        Dataset(tmp_path)


def test_a_shard_cut_short_under_a_running_job(tmp_path):
    ds = Dataset(make_set(tmp_path, range(100), range(50)))
    os.truncate(tmp_path / "train_000000.bin", 20)
    with pytest.raises(UserError, match="has become shorter"):
        ds.train_batch(0, 10, 16, 0)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"dtype": "O", "vocab_size": 5, "tokenizer": "byte"}', '{"dtype": "uint16"']
)
def test_damaged_meta(tmp_path, content):
    make_set(tmp_path, range(100), range(50))
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(UserError, match=r"meta\.json is damaged"):
        Dataset(tmp_path)


def test_a_tokenizer_that_is_not_that_of_the_tokens(tmp_path):
    ds = Dataset(make_set(tmp_path, range(100), range(50)))
    tokenizer.save(tokenizer.CharTokenizer("ab"), tmp_path)
    with pytest.raises(UserError, match="is not the one of its tokens"):
        _ = ds.tokenizer


def test_an_empty_corpus(tmp_path):
    for pieces, split in ([], "train"), ([Piece("train", "some text")], "val"):
        out = Writer(tmp_path, BYTE)
        out.add(pieces)
        with pytest.raises(UserError, match=f"empty corpus: no text was found for the {split} split"):
            out.finish()
        with pytest.raises(UserError, match="holds no complete data set"):
            Dataset(tmp_path)


def test_an_interrupted_writer_leaves_no_set_or_the_old_one(tmp_path):
    for old in (False, True):
        if old:
            make_set(tmp_path, range(100), range(50), shards=3)
        out = Writer(tmp_path, BYTE)
        out.add([Piece("train", "some text"), Piece("val", "more")])
        out.next_shard()
        with nullcontext() if old else pytest.raises(UserError, match="holds no complete data set"):
            assert len(Dataset(tmp_path).train) == 100
    out.finish()
    assert BYTE.decode(Dataset(tmp_path).train.read(1, 100).tolist()) == "some text"
    assert len(bins(tmp_path)) == 4 and not (tmp_path / writer.UNFINISHED).exists()


def test_an_out_dir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to .*--out_dir"):
        Writer(tmp_path / "file" / "folder", BYTE)


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    out = Writer(tmp_path, tokenizer.IdsTokenizer(100_000))
    out.write("train", np.array([99_999, 1]), [b""])
    out.write("val", np.array([70_000, 2]), [b""])
    out.finish()
    assert Dataset(tmp_path).train.read(0, 2).tolist() == [99_999, 1]
