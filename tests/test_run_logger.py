"""What a run gives to W&B, by a stand-in that keeps it. test_train.py logs to the real one, offline."""

import sys
import types

import pytest

import train

TINY = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=32", "--batch_size=2", "--max_iters=2"]
TINY += ["--device=cpu", "--eval_iters=1", "--wandb_log"]


@pytest.fixture
def wandb_run(corpus, tmp_path, monkeypatch, capsys):
    """wandb_run("--key=value", ...): trains; returns the arguments of wandb.init, what was logged, and the output."""
    inits, logged = [], []

    class Run:
        summary = {}

        def define_metric(self, *names, **options): ...

        def finish(self):
            logged.append("finished")

        log = staticmethod(logged.append)

    wandb = types.ModuleType("wandb")
    wandb.errors = types.ModuleType("wandb.errors")
    wandb.errors.UsageError = wandb.errors.CommError = OSError
    wandb.login, wandb.Settings = lambda **options: True, dict
    wandb.init = lambda **options: inits.append(options) or Run()
    wandb.Table = lambda columns, data: ("table", columns, data)
    for module in (wandb, wandb.errors):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def run(*knobs: str):
        train.train([*TINY, f"--dataset={corpus}", f"--out_dir={tmp_path / 'run'}", "--overwrite", *knobs])
        (arguments,) = inits
        return arguments, logged, capsys.readouterr().out

    return run


def test_knobs_that_are_not_set_are_not_passed(wandb_run):
    arguments, logged, _ = wandb_run("--sample_tokens=0")
    assert not {"entity", "group", "tags"} & arguments.keys()
    assert (arguments["project"], arguments["name"]) == ("nanokv", "run")
    assert not [event for event in logged if "samples" in event] and logged[-1] == "finished"


def test_entity_group_tags_and_the_generated_text(wandb_run):
    knobs = ["--wandb_entity=team", "--wandb_group=seeds", "--wandb_tags=mla,7", "--sample_tokens=20"]
    arguments, logged, out = wandb_run(*knobs)
    assert {"entity": "team", "group": "seeds", "tags": ("mla", "7")}.items() <= arguments.items()
    (samples,) = [event["samples"] for event in logged if "samples" in event]
    kind, columns, ((step, text),) = samples
    assert (kind, columns, step) == ("table", ["step", "text"], 2)
    assert text and f"{text}\n" in out
    assert logged[-1] == "finished"  # after the text
