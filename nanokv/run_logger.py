"""The outputs of a run: metrics.jsonl, summary.json, lines on the terminal, and W&B if asked for."""

import json
import math
import os
import secrets
import sys
from datetime import timedelta
from pathlib import Path

from nanokv import checkpoint


class RunLogger:
    """The log of a run. The summary begins with `facts`. Ranks other than the first have no run folder, and keep only
    the summary.
    """

    def __init__(self, run_dir: Path | None, facts: dict, resume_step=None, wandb: dict | None = None):
        """resume_step: the step at which a run is resumed. wandb: arguments of wandb.init, to log to W&B too."""
        self.run_dir, self.summary, self.bar = run_dir, dict(facts), sys.stdout.isatty()
        self.wandb = start_wandb(run_dir, **wandb) if run_dir and wandb else None
        if run_dir is None:
            return
        path = run_dir / "metrics.jsonl"
        if resume_step is not None and path.exists():  # lines past the checkpoint will be written again
            lines = path.read_text(errors="replace").splitlines()
            kept = [line for line in lines if _step_of(line) <= resume_step]
            aside = path.with_suffix(".new")
            with checkpoint.writing(path):
                aside.write_text("".join(line + "\n" for line in kept))
                aside.replace(path)
            for line in kept:
                values = json.loads(line).items()
                self.summary |= {k: v for k, v in values if not k.startswith(("final/", "decode/"))}
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)

    def __call__(self, metrics: dict) -> None:
        infinite = [k for k, v in metrics.items() if isinstance(v, float) and not math.isfinite(v)]
        metrics = metrics | dict.fromkeys(infinite)  # JSON has no nan
        self.summary |= metrics
        if self.run_dir is not None:
            with checkpoint.writing(self.run_dir / "metrics.jsonl"):
                self.file.write((json.dumps(metrics) + "\n").encode())
            if self.wandb:
                self.wandb.log({k: v for k, v in metrics.items() if v is not None})

    def sample(self, text: str) -> None:
        """Log generated text to W&B: a table with the step."""
        if self.wandb and text:
            import wandb

            self.wandb.log({"samples": wandb.Table(["step", "text"], [[self.summary["step"], text]])})

    def say(self, line: str, end: str = "\n") -> None:
        if self.run_dir is not None:
            print("\r\033[K" + line if self.bar else line, end=end, flush=True)

    def progress(self, step: int, last: int, metrics: dict, tokens_per_step: int) -> None:
        rate = metrics["train/tokens_per_s"]
        left = timedelta(seconds=round((last - step) * tokens_per_step / rate))
        mfu = "" if metrics["train/mfu"] is None else f", mfu {metrics['train/mfu']:.1%}"
        line = f"step {step}/{last}: loss {metrics['train/loss']:.4f}, {rate:,.0f} tokens/s{mfu}, {left} left"
        filled = 20 * step // last
        self.say(f"[{'#' * filled:.<20}] {line}", end="") if self.bar else self.say(line)

    def write_summary(self) -> None:
        if self.run_dir is not None:
            checkpoint.write_json(self.run_dir / "summary.json", self.summary)

    def close(self) -> None:
        if self.run_dir is not None:
            self.file.close()
        if self.wandb:
            self.wandb.summary.update({k: v for k, v in self.summary.items() if v is not None})
            self.wandb.finish()


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite if the line is damaged, or cut short by a kill."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
        return math.inf


def start_wandb(run_dir: Path, **options):
    """A W&B run, the same one after a resume; offline if there is no key or no network; None without W&B."""
    try:
        import wandb.errors
    except ImportError:
        print("wandb is not installed: metrics.jsonl only (pip install wandb)", file=sys.stderr)
        return None
    id_file = run_dir / "wandb_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
    options |= dict(id=id_file.read_text(), resume="allow")
    try:
        online = "WANDB_MODE" in os.environ or wandb.login(prompt=False)
        mode, fault = (None, None) if online else ("offline", "no API key")
        run = wandb.init(**options, mode=mode, settings=wandb.Settings(init_timeout=30))
    except (wandb.errors.UsageError, wandb.errors.CommError) as e:
        run, fault = wandb.init(**options, mode="offline"), " ".join(str(e).split())
    if fault:
        print(f"wandb: logging offline ({fault}); `wandb sync` uploads the run later", file=sys.stderr)
    run.define_metric("*", step_metric="tokens")
    return run


def quality(metrics: dict) -> str:
    bits = "" if metrics["val/bpb"] is None else f", {metrics['val/bpb']:.4f} bits per byte"
    return f"val loss {metrics['val/loss']:.4f}{bits}"


def table(summary: dict) -> str:
    """The result of a run in two lines: quality and cache side by side."""
    columns = {"attention": summary["attention"], "parameters": f"{summary['params/total']:,}"}
    columns["val loss"] = f"{summary['final/val_loss']:.4f}"
    if summary["final/val_bpb"] is not None:  # the data are text
        columns["val bits/byte"] = f"{summary['final/val_bpb']:.4f}"
        columns["best bits/byte"] = f"{summary['best/val_bpb']:.4f}"
    columns["cache bytes/token (bf16)"] = f"{summary['kv_cache/bytes_per_token']:,}"
    columns["of MHA"] = f"{summary['kv_cache/ratio_to_mha']:.1%}"
    columns["decode tokens/s"] = f"{summary['decode/tokens_per_s']:,.0f}"
    widths = [max(len(name), len(value)) for name, value in columns.items()]
    rows = (columns.keys(), ["-" * width for width in widths], columns.values())
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
