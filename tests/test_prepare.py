"""The data sets: what each prepare.py makes, resumes and refuses."""

import hashlib
import importlib
import json
import subprocess
import sys

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from test_dataset import BYTE, REPO, bins, main, small_stdlib

from nanokv import dataset_writer as writer
from nanokv.config import UserError
from nanokv.dataset import Dataset
from nanokv.dataset_writer import Writer


def test_stdlib_is_deterministic_and_leaves_tests_out(tmp_path, monkeypatch):
    small_stdlib(tmp_path / "lib", monkeypatch)
    for name in ("one", "two"):
        main("stdlib")([f"--out_dir={tmp_path / name}", "--vocab_size=400", "--val_fraction=0.2"])
    assert bins(tmp_path / "one") == bins(tmp_path / "two")
    one, two = Dataset(tmp_path / "one"), Dataset(tmp_path / "two")
    assert one.meta == two.meta
    text = "".join(one.tokenizer.decode(split.read(0, 10**6).tolist()) for split in (one.train, one.val))
    documents = text.split("<|endoftext|>")[1:]
    modules = list((tmp_path / "lib").glob("package?/*.py"))
    assert sorted(documents) == sorted(path.read_text() for path in modules)
    assert one.meta["train_bytes"] + one.meta["val_bytes"] == sum(path.stat().st_size for path in modules)


def test_a_corpus_that_differs_has_another_hash(tmp_path, monkeypatch):
    small_stdlib(tmp_path / "lib", monkeypatch)
    hashes = []
    for name, flag in (("a", "bpe"), ("b", "byte"), ("c", "byte")):
        if name == "c":
            (tmp_path / "lib/package0/module0.py").write_text("changed")
        main("stdlib")([f"--out_dir={tmp_path / name}", f"--tokenizer={flag}", "--val_fraction=0.2"])
        hashes.append(Dataset(tmp_path / name).meta["corpus_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_prepare_runs_as_a_command_from_any_folder(tmp_path):
    def run(*argv):
        command = [sys.executable, REPO / "data/mqar/prepare.py", f"--out_dir={tmp_path / 'set'}", *argv]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert run("--n_train=10", "--n_val=5").returncode == 0
    assert len(Dataset(tmp_path / "set").train) == 10 * 65
    failed = run("--seq_len=3")
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr


def test_shakespeare_char_splits_as_nanogpt(tmp_path, monkeypatch):
    text = "To be, or not to be: that is the question.\n" * 100
    module = importlib.import_module("data.shakespeare_char.prepare")
    monkeypatch.setattr(module, "INPUT", tmp_path / "input.txt")
    (tmp_path / "input.txt").write_text(text)
    module.main([f"--out_dir={tmp_path / 'set'}"])
    ds = Dataset(tmp_path / "set")
    chars = sorted(set(text))
    cut = int(len(text) * 0.9)
    assert ds.vocab_size == len(chars)
    assert ds.train.read(0, 10**6).tolist() == [chars.index(c) for c in text[:cut]]
    assert ds.val.read(0, 10**6).tolist() == [chars.index(c) for c in text[cut:]]
    assert ds.val_bytes_per_token == 1.0


def test_shakespeare_char_without_network_or_with_another_file(tmp_path, monkeypatch):
    module = importlib.import_module("data.shakespeare_char.prepare")
    monkeypatch.setattr(module, "INPUT", tmp_path / "input.txt")
    monkeypatch.setattr(module, "URL", (tmp_path / "nowhere").as_uri())
    with pytest.raises(UserError, match=r"cannot download .*put its text at .*input\.txt"):
        module.main([f"--out_dir={tmp_path / 'set'}"])
    (tmp_path / "nowhere").write_text("not Shakespeare")
    with pytest.raises(UserError, match="is not the Tiny Shakespeare"):
        module.main([f"--out_dir={tmp_path / 'set'}"])
    assert not (tmp_path / "input.txt").exists()
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(b"not Shakespeare").hexdigest())
    module.main([f"--out_dir={tmp_path / 'set'}"])
    assert (tmp_path / "input.txt").read_text() == "not Shakespeare"


def write_parquet(path, texts):
    parquet.write_table(pa.table({"text": texts, "url": [""] * len(texts)}), path, row_group_size=16)


def test_text_reads_txt_jsonl_and_parquet(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("alpha " * 100)
    (tmp_path / "in/b.jsonl").write_text("".join(json.dumps({"text": f"bé {i}"}) + "\n" for i in range(60)) + "\n")
    write_parquet(tmp_path / "in/c.parquet", [f"gamma {i}" for i in range(60)])
    (tmp_path / "in/d.png").write_bytes(b"\xff")
    out = tmp_path / "set"
    main("text")([f"--input={tmp_path / 'in'}", "--tokenizer=byte", "--val_fraction=0.25", f"--out_dir={out}"])
    ds = Dataset(out)
    train, val = (BYTE.decode(s.read(0, 10**6).tolist()).split("<|endoftext|>")[1:] for s in (ds.train, ds.val))
    rows = {f"bé {i}" for i in range(60)} | {f"gamma {i}" for i in range(60)}
    assert rows == {t for t in train + val if not t.startswith(("alpha", " alpha"))}
    assert not set(train) & set(val)
    assert 0.1 < (len(val) - 1) / 120 < 0.4
    assert train[0] + val[0] == "alpha " * 100
    assert len(val[0]) == 150


def test_a_large_text_file_is_read_in_pieces(tmp_path, monkeypatch):
    module = importlib.import_module("data.text.prepare")
    monkeypatch.setattr(module, "READ_BYTES", 10)
    path = tmp_path / "a.txt"
    text = "日本語 naïve\n" * 50 + "unbroken" * 20
    path.write_text(text)
    pieces = list(module.text_file(path, None, 0.5))
    assert "".join(p.text for p in pieces) == text
    assert max(len(p.text) for p in pieces) <= 30
    assert [p.starts_document for p in pieces].count(True) == 2
    splits = [p.split for p in pieces]
    assert splits == sorted(splits)
    train_bytes = sum(len(p.text.encode()) for p in pieces if p.split == "train")
    assert abs(train_bytes - len(text.encode()) / 2) <= 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8 text"),
        ("a.jsonl", b'{"text": "x"}\n{"text', "line 2 is no JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1 has no text under 'text': name it by --text_key"),
        ("a.jsonl", b'{"text": 5}\n', "line 1 has no text under 'text'"),
        ("a.txt", b"", "empty corpus"),
        ("a.md/", b"", "names no .txt, .jsonl, .parquet file"),
    ],
)
def test_faults_of_text(tmp_path, name, content, message):
    path = tmp_path / name
    if name.endswith("/"):
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        main("text")([f"--input={path}", "--tokenizer=byte", f"--out_dir={tmp_path / 'set'}"])


def test_text_parquet_names_its_columns(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["x"])
    with pytest.raises(UserError, match="no column 'body': --text_key is one of text, url"):
        main("text")([f"--input={tmp_path / 'a.parquet'}", "--text_key=body", f"--out_dir={tmp_path / 'set'}"])


@pytest.fixture
def parquet_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "BATCH_CHARS", 1000)
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for i in range(3):
        texts = [f"document {i} {j} " + "ab c" * int(rng.integers(1, 40)) for j in range(100)]
        write_parquet(tmp_path / f"in/{i}.parquet", texts)
    return tmp_path / "in"


def stop_after(monkeypatch, calls):
    add = Writer.add

    def stopping(self, pieces):
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise KeyboardInterrupt
        add(self, pieces)

    monkeypatch.setattr(Writer, "add", stopping)


@pytest.mark.parametrize("tok", ["byte", "bpe"])
def test_a_streamed_set_resumed_after_kills_is_the_same(tmp_path, parquet_folder, monkeypatch, tok):
    flags = [f"--input={parquet_folder}", f"--tokenizer={tok}", "--shard_tokens=3000", "--val_fraction=0.1"]
    flags.append("--vocab_size=300")
    main("fineweb_edu")([*flags, f"--out_dir={tmp_path / 'once'}"])
    whole = bins(tmp_path / "once")
    assert len(whole) > 5
    for kills in range(3):
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            stop_after(m, 7)  # so few that only a run that keeps its shards can end
            main("fineweb_edu")([*flags, f"--out_dir={tmp_path / 'killed'}"])
        assert not (tmp_path / "killed/meta.json").exists(), kills
    main("fineweb_edu")([*flags, f"--out_dir={tmp_path / 'killed'}"])
    assert bins(tmp_path / "killed") == whole
    once, killed = Dataset(tmp_path / "once"), Dataset(tmp_path / "killed")
    assert once.meta == killed.meta
    assert not (tmp_path / "killed" / writer.UNFINISHED).exists()
    text = "".join(once.tokenizer.decode(split.read(0, 10**6).tolist()) for split in (once.train, once.val))
    documents = text.split("<|endoftext|>")[1:]
    rows = [t for path in parquet_folder.glob("*") for t in parquet.read_table(path)["text"].to_pylist()]
    assert sorted(documents) == sorted(rows)


def test_a_resumed_set_keeps_its_shards(tmp_path, parquet_folder, monkeypatch):
    flags = [f"--input={parquet_folder}", "--tokenizer=byte", "--shard_tokens=3000", f"--out_dir={tmp_path / 'set'}"]
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        stop_after(m, 10)
        main("tinystories")(flags)
    aside = tmp_path / "set" / writer.UNFINISHED
    kept = json.loads((aside / "progress.json").read_text())["shard"]
    before = {p.name: p.stat().st_mtime_ns for p in aside.glob("train_*.bin")}
    assert kept == len(before) >= 2
    with pytest.raises(UserError, match="was begun with --shard_tokens=3000"):
        main("tinystories")([*flags, "--shard_tokens=4000"])
    main("tinystories")(flags)
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "set").glob("train_*.bin")}
    assert before.items() <= after.items()


def test_max_tokens_stops_a_stream(tmp_path, parquet_folder, capsys):
    flags = [f"--input={parquet_folder}", "--tokenizer=byte", f"--out_dir={tmp_path / 'set'}", "--max_tokens=5000"]
    main("openwebtext")([*flags, "--val_fraction=0.1"])
    assert 5000 <= len(Dataset(tmp_path / "set").train) < 7000
    main("openwebtext")(flags)
    assert "is prepared" in capsys.readouterr().out


def test_a_stream_without_network_fails_at_once(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    with pytest.raises(UserError, match=r"cannot reach HuggingFaceFW/fineweb-edu .*ConnectionError.*--input"):
        main("fineweb_edu")([f"--out_dir={tmp_path / 'set'}"])
    assert not (tmp_path / "set").exists()


def test_a_stream_without_the_text_column(tmp_path, parquet_folder):
    with pytest.raises(UserError, match="no column 'body': --text_key is one of text, url"):
        main("fineweb_edu")([f"--input={parquet_folder}", "--text_key=body", f"--out_dir={tmp_path / 'set'}"])


@pytest.mark.parametrize("flags", [(8, 64, 512), (4, 17, 10), (1, 4, 4)], ids=str)
def test_mqar_marks_the_value_that_was_paired_with_each_key(tmp_path, flags):
    n_pairs, seq_len, vocab_size = flags
    sizes = [f"--n_pairs={n_pairs}", f"--seq_len={seq_len}", f"--vocab_size={vocab_size}"]
    main("mqar")([f"--out_dir={tmp_path}", "--n_train=40", "--n_val=20", *sizes])
    ds = Dataset(tmp_path)
    assert ds.vocab_size == vocab_size
    assert ds.val_bytes_per_token is None
    val = list(ds.val_batches(seq_len, 8))
    assert sum(len(x) for x, _ in val) == 20
    for x, y in [ds.train_batch(0, 40, seq_len, 0), *val]:
        assert x.shape == y.shape == (len(x), seq_len)
        assert x.max() < vocab_size
        for inputs, targets in zip(x.tolist(), y.tolist(), strict=True):
            pairs = dict(zip(inputs[0 : 2 * n_pairs : 2], inputs[1 : 2 * n_pairs : 2], strict=True))
            assert len(pairs) == n_pairs
            assert max(pairs) < vocab_size // 2 <= min(pairs.values())
            asked = {inputs[t]: target for t, target in enumerate(targets) if target >= 0}
            assert asked == pairs
            assert all(target == -1 for target in targets[: 2 * n_pairs - 1])
    with pytest.raises(UserError, match=f"set --block_size={seq_len}"):
        ds.train_batch(0, 1, seq_len + 1, 0)


def test_mqar_pads_ranks_that_have_no_batch_with_rows_without_targets(tmp_path):
    main("mqar")([f"--out_dir={tmp_path}", "--n_train=10", "--n_val=4"])
    ((x, y),) = Dataset(tmp_path).val_batches(64, 4, rank=1, ranks=2)
    assert x.max() == 0 and y.max() == -1


def test_mqar_repeats_by_seed_and_takes_each_example_once(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        main("mqar")([f"--out_dir={tmp_path / name}", "--n_train=30", "--n_val=5", f"--seed={seed}"])
    assert bins(tmp_path / "a") == bins(tmp_path / "b") != bins(tmp_path / "c")
    ds = Dataset(tmp_path / "a")
    x, _ = ds.train_batch(0, 30, 64, 0)
    stored = ds.train.read(0, 10**6).reshape(30, 65)[:, :64] & 0x7FFF
    assert sorted(x.tolist()) == sorted(stored.tolist())
