"""recall.py: what it asks, how it counts, what it shows."""

import pytest
from conftest import knobs

import sample
import train
from model import ATTENTIONS
from nanokv.config import UserError
from nanokv.dataset import open_dataset
from tools import recall, sweep

TINY = ["--n_layer=1", "--n_head=1", "--n_embd=16", "--batch_size=4", "--max_iters=3", "--eval_iters=2"]
TINY += ["--sample_tokens=0", "--device=cpu"]


def test_accuracy_is_the_share_of_right_answers(tmp_path):
    data = recall.data_set(2, tmp_path / "data")
    train.train([*TINY, f"--dataset={data}", "--block_size=8", f"--out_dir={tmp_path / 'run'}"])
    model, _ = sample.load_run(tmp_path / "run", device="cpu", dtype="float32", which="last")
    right = asked = 0
    for x, y in open_dataset(str(data)).val_batches(8, 1):
        for position in range(8):
            if y[0, position] >= 0:
                asked += 1
                right += int(model(x)[0][0, position].argmax() == y[0, position])
    assert asked == 2 * 1000
    assert recall.accuracy(tmp_path / "run") == right / asked
    assert 0 < right < asked


@pytest.mark.slow
def test_one_command_trains_counts_and_shows(tmp_path, monkeypatch, capsys):
    (tmp_path / "list").write_text("mqa-4 --attention=mqa --head_dim=4\n")
    monkeypatch.setattr(recall, "RECIPE", TINY)
    page = tmp_path / "page.md"
    page.write_text("<!-- recall -->\n<!-- /recall -->\n")
    argv = ["--pairs=2", f"--list={tmp_path / 'list'}", f"--out_dir={tmp_path / 'out'}", f"--into={page}"]
    argv += [f"--picture={tmp_path / 'p.png'}"]
    recall.main(argv)
    assert "| mqa-4 | 16 | " in page.read_text()  # 2 numbers of 4 in bf16
    assert (tmp_path / "p.png").stat().st_size > 10_000
    capsys.readouterr()
    recall.main(argv)
    assert "1 of 1 runs are done already" in capsys.readouterr().out


def test_the_models_differ_in_their_attention_alone():
    models = sweep.read_list(sweep.ROOT / "config/recall.txt").values()
    configs = [knobs([*recall.RECIPE, *own]) for own in models]
    models = [train.configure([*recall.RECIPE, *own])[0] for own in models]
    own = {"attention", "n_head", "out_dir", "wandb_run_name"}.union(*(cls.KNOBS for cls in ATTENTIONS.values()))
    for name in configs[0].__dict__.keys() - own:
        assert len({str(getattr(config, name)) for config in configs}) == 1, name
    assert len({config.kv_bytes_per_token() for config in models}) >= 4
    assert {config.attention for config in configs} == {"mha", "gqa", "mqa", "mla"}


def test_table():
    row = {"model": "mqa-4", "attention": "mqa", "cache": 1016, 4: 1.0, 8: 0.5}
    assert recall.table([row], (4, 8)).splitlines() == [
        "| model | cache B/token | 4 pairs | 8 pairs |",
        "| --- | ---: | ---: | ---: |",
        "| mqa-4 | 1,016 | 100.0% | 50.0% |",
    ]


@pytest.mark.parametrize("pairs", ["", "4;8", "0", "17", "four"])
def test_faulty_numbers_of_pairs(pairs):
    with pytest.raises(UserError, match="pairs"):
        recall.main([f"--pairs={pairs}"])
