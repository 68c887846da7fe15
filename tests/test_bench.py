"""bench.py: what it measures, on sizes that take seconds."""

import json
import math

import pytest

import bench
from config import UserError
from data import open_dataset


def test_both_sides_of_the_race_read_the_same_text(tmp_path):
    text = "To be, or not to be: that is the question.\n" * 50
    (tmp_path / "book.txt").write_text(text)
    folder = bench.nanogpt_folder(tmp_path / "book.txt", tmp_path / "set")
    dataset = open_dataset(str(folder))
    held = [
        dataset.tokenizer.decode(split.read(0, len(split)).tolist()) for split in (dataset.train, dataset.val)
    ]
    assert "".join(held) == text
    assert len(held[0]) == int(0.9 * len(text))
    with pytest.raises(UserError, match="no text at"):
        bench.nanogpt_folder(tmp_path / "nowhere.txt", tmp_path / "set")


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


def test_train_measures_each_attention_in_its_own_process(tmp_path):
    small = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--vocab_size=64", "--tokens=128", "--steps=2"]
    bench.main(["train", *small, "--block_sizes=32,64", "--attentions=gqa,mla", f"--out_dir={tmp_path}"])
    rows = json.loads((tmp_path / "train.json").read_text())["rows"]
    assert [(row["side"], row["context"]) for row in rows] == [
        ("gqa", 32),
        ("mla", 32),
        ("gqa", 64),
        ("mla", 64),
    ]
    assert all(row["tokens_per_s"] > 0 and math.isfinite(row["flops_per_s"]) for row in rows)
    assert (tmp_path / "train.png").stat().st_size > 1000


def test_unknown_measurement():
    with pytest.raises(UserError, match="speedrun"):
        bench.main(["sped"])
