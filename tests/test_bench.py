"""bench.py: what it measures, on sizes that take seconds."""

import json
import math

import pytest
import torch
from conftest import split_knobs
from equivalence import small_model

from nanokv import checkpoint
from nanokv import tokenizer as tokenizers
from nanokv.config import UserError
from nanokv.dataset import open_dataset
from tools import bench, bench_cache


def test_both_sides_of_the_race_read_the_same_text(tmp_path):
    text = "To be, or not to be: that is the question.\n" * 50
    (tmp_path / "book.txt").write_text(text)
    folder = bench.nanogpt_folder(tmp_path / "book.txt", tmp_path / "set")
    dataset = open_dataset(str(folder))
    held = [dataset.tokenizer.decode(split.read(0, len(split)).tolist()) for split in (dataset.train, dataset.val)]
    assert "".join(held) == text
    assert len(held[0]) == int(0.9 * len(text))
    with pytest.raises(UserError, match="no text at"):
        bench.nanogpt_folder(tmp_path / "nowhere.txt", tmp_path / "set")


@pytest.mark.slow
def test_speedrun_times_a_whole_process_and_measures_the_loss_twice(tmp_path, capsys):
    (tmp_path / "book.txt").write_text("".join(chr(97 + i * i % 7) for i in range(4000)))
    knobs = dict(n_layer=1, n_head=1, n_embd=16, block_size=16, max_iters=3, batch_size=2, sample_tokens=0)
    (tmp_path / "tiny.py").write_text("".join(f"{name} = {value}\n" for name, value in knobs.items()))
    bench.main(
        [
            "speedrun",
            "--pairs=1",
            f"--text={tmp_path / 'book.txt'}",
            f"--config={tmp_path / 'tiny.py'}",
            f"--out_dir={tmp_path / 'out'}",
        ]
    )
    result = json.loads((tmp_path / "out/speedrun.json").read_text())
    (run,) = result["runs"]["ours"]
    reported = json.loads((tmp_path / "out/speedrun/summary.json").read_text())["final/val_loss"]
    assert run["full_pass"] == pytest.approx(reported, abs=1e-5)
    assert run["nanogpt_estimate"] == pytest.approx(run["full_pass"], abs=0.2)
    assert run["seconds"] > 0 and (tmp_path / "out/speedrun.png").stat().st_size > 1000
    assert "ours: median" in capsys.readouterr().out


@pytest.mark.slow
def test_train_measures_each_attention_in_its_own_process(tmp_path):
    small = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--vocab_size=64", "--tokens=128", "--steps=2"]
    bench.main(["train", *small, "--block_sizes=32,64", "--attentions=gqa,mla", f"--out_dir={tmp_path}"])
    rows = json.loads((tmp_path / "train.json").read_text())["rows"]
    assert [(row["side"], row["context"]) for row in rows] == [("gqa", 32), ("mla", 32), ("gqa", 64), ("mla", 64)]
    assert all(row["tokens_per_s"] > 0 and math.isfinite(row["flops_per_s"]) for row in rows)
    assert max(row["params"] for row in rows) < 1.01 * min(row["params"] for row in rows)
    assert (tmp_path / "train.png").stat().st_size > 1000


@pytest.mark.slow
def test_cache_measures_quality_through_every_format_and_window(tmp_path, capsys):
    (tmp_path / "book.txt").write_text("To be, or not to be: that is the question.\n" * 50)
    dataset = open_dataset(str(bench.nanogpt_folder(tmp_path / "book.txt", tmp_path / "set")))
    knobs = dict(attention="mla", n_head=2, n_embd=16, block_size=32, vocab_size=dataset.vocab_size)
    model, run = small_model(n_layer=2, **knobs), tmp_path / "run"
    run.mkdir()
    checkpoint.write_config(run, *split_knobs(n_layer=2, dataset=str(tmp_path / "set"), **knobs))
    checkpoint.save(run, "last", checkpoint.Checkpoint(model.state_dict(), {}, {}))
    tokenizers.save(dataset.tokenizer, run)
    ((x, y),) = dataset.val_batches(32, 100)
    loss = model(x, y)[1].item()
    options = ["--dtype=float32", "--windows=8", "--sinks=2", "--chunk=4", "--batch_size=3"]
    bench.main(["cache", f"--out_dir={run}", *options])
    rows = json.loads((run / "cache.json").read_text())["rows"]
    assert [row["format"] for row in rows] == ["fp32", "bf16", "fp16", "int8", "fp8", "int4"] * 2
    assert (run / "cache.png").stat().st_size > 1000
    assert rows[0]["val/loss"] == pytest.approx(loss, abs=1e-5)
    assert abs(rows[0]["worse"]) < 1e-6 and rows[0]["kl"] < 1e-9 and rows[0]["top1"] == 1
    for row in rows:
        r, dr, layers, held = 4, 4, 2, (8 + 2) / 32 if row["window"] else 1
        numbers = {"fp32": 4 * (r + dr), "bf16": 2 * (r + dr), "fp16": 2 * (r + dr)}
        numbers["int4"] = r / 2 + 3 + 2 * dr  # and a scale and an offset
        assert row["bytes_per_token"] == layers * held * numbers.get(row["format"], r + 2 + 2 * dr)
        assert row["val/bpb"] == pytest.approx(row["val/loss"] / math.log(2))  # characters of a byte
        assert (row["kl"] > 1e-3) == (row["window"] > 0 or row["format"] == "int4") and row["decode/tokens_per_s"] > 0
    kl = {row["format"]: row["kl"] for row in rows if row["window"] == 0}
    assert kl["fp32"] < kl["fp16"] < kl["bf16"] < kl["fp8"] < kl["int4"] and kl["fp16"] < kl["int8"] < kl["fp8"]
    with pytest.raises(UserError, match="formats are fp32, bf16, fp16, int8, fp8, int4, not 'int2'"):
        bench.main(["cache", f"--out_dir={run}", "--formats=int2"])


@pytest.mark.slow
def test_decode_measures_every_context_and_batch_beside_transformers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tools.bench_cache.read_bandwidth", lambda device: 1e9)
    small = ["--n_layer=2", "--n_embd=96", "--vocab_size=64", "--n=2", "--contexts=8,40", "--batches=1,2"]
    bench.main(["decode", "--hf", "--dtype=float32", *small, "--prefill=40", "--attentions=gqa,mla", "--generate=24"])
    result = json.loads((tmp_path / "out/bench/decode.json").read_text())
    rows, out = result["rows"], capsys.readouterr().out
    points = [(row["model"], row["batch"], row["context"]) for row in rows]
    assert points == [(m, b, c) for m in ("gqa", "mla") for b in (1, 2) for c in (8, 40)]
    for row in rows:
        assert row["decode/tokens_per_s"] > 0
        assert row["share_of_bandwidth"] == row["bytes_per_token"] * row["decode/tokens_per_s"] / 1e9
        computed = row["batch"] * row["context"] <= 40  # the other caches are filled
        assert computed == ("prefill/tokens_per_s" in row) == ("ratio" in row)
        if computed:
            assert row["same_tokens"] is True
    per_token = {"gqa": 2 * 2 * 2 * 16, "mla": 2 * (32 + 8)}  # numbers cached
    for a, b in zip(rows[::2], rows[1::2], strict=True):
        assert b["bytes_per_token"] - a["bytes_per_token"] == 32 * 4 * per_token[a["model"]]
    assert [row["n"] for row in result["generate"]] == [3, 6, 12, 24] * 2
    assert (tmp_path / "out/bench/decode.png").stat().st_size > 1000
    assert len(out.splitlines()) == 2 + 2 * (4 + 1) + 1


def test_decode_measures_configs_and_runs(tmp_path):
    (tmp_path / "tiny.py").write_text("n_layer = 1\nn_head = 2\nn_embd = 32\nvocab_size = 64\nattention = 'mqa'\n")
    options = bench_cache.DecodeOptions(config=(str(tmp_path / "tiny.py"),), contexts=(100,))
    ((name, model),) = bench_cache.decode_models(options, torch.device("cpu"))
    assert (name, model.config.attention, model.config.n_embd) == ("tiny", "mqa", 32)
    assert model.config.block_size >= 100 + 6 * options.n
    assert model(torch.arange(9)[None])[0].std() > 0.1
    with pytest.raises(UserError, match="contexts should be a list of int .*not '64;128'"):
        bench.main(["decode", "--contexts=64;128"])


def test_unknown_measurement():
    with pytest.raises(UserError, match="speedrun"):
        bench.main(["sped"])
