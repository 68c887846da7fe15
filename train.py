"""Train a GPT: `python train.py config/mla.py --batch_size=32`. `--help` lists every knob.

On many GPUs or machines: `torchrun --standalone --nproc_per_node=8 train.py config/124m/mla.py`.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path

import torch

from model import GPT, GPTConfig
from nanokv import checkpoint
from nanokv import distributed as parallel
from nanokv import tokenizer as tokenizers
from nanokv.checkpoint import Checkpoint
from nanokv.config import Config, UserError, cli, load, pick_device, pick_dtype
from nanokv.dataset import Dataset, open_dataset
from nanokv.optim import load_state_tensors, make_optimizers, state_tensors
from nanokv.run_logger import Log
from nanokv.watchdogs import LossSpikes, SkippedSteps, Stalls
from sample import decode_probe, generate_text, inference_model

# Dense peak in FLOP/s in 16 bits, by a word of the device's name (vendors' data sheets, without sparsity).
PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "4090": 165e12,
    "3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


def main(argv: list[str]) -> None:
    with parallel.joined():
        restarted = parallel.restarted()
        with parallel.together():
            config = configure(argv, restarted)
        train(config)


def configure(argv: list[str], restarted: bool = False) -> Config:
    """The run that a command line asks for; if it is `restarted`, to go on from its own last checkpoint."""
    config = load(argv)
    if restarted and checkpoint.launched_by(Path(config.out_dir)) == parallel.launch():
        config.init_from = "resume"
        argv = [*argv, "--init_from=resume"]
    if config.init_from == "resume":  # what the run was started with is the default of what it goes on with
        base = asdict(checkpoint.read_config(Path(config.out_dir)))
        if base["lr_decay_iters"] == base["max_iters"]:
            del base["lr_decay_iters"]  # follows max_iters, which may grow now
        if base["min_lr"] == base["learning_rate"] / 10:
            del base["min_lr"]  # follows learning_rate
        config = load(argv, base)
    elif config.init_from != "scratch":  # the model is by default that of the run that it starts from
        source = checkpoint.read_config(Path(config.init_from))
        config = load(argv, {field.name: getattr(source, field.name) for field in fields(GPTConfig)})
    return config


def train(config: Config) -> dict:
    """Train as `config` says; returns the run's summary.

    Raises UserError for whatever is wrong with the configuration, the data or the run folder, before anything
    in the folder is changed; later, with the last checkpoint in place, for faults of disk and data, and
    for training that has come apart. Raises SystemExit (128 + signal) after a checkpoint if SIGINT, SIGTERM
    or SIGUSR1 ends the run. As one of several ranks it trains on its share of each step; only the first
    writes and prints.
    """
    # ---- on what, and where
    run_dir, resume, first_rank = Path(config.out_dir), config.init_from == "resume", parallel.rank() == 0
    with parallel.together():
        if parallel.size() > 1 and parallel.local_rank() == 0:
            open_dataset(config.dataset, config.tokenizer)  # prepares one that is missing, once a node
    with parallel.together():
        device = parallel.own_device(pick_device(config.device))
        dtype = pick_dtype(config.dtype, device)
        micro_steps, rows = parallel.share(config.gradient_accumulation_steps, config.batch_size)
        if parallel.size() > 1 and config.parallel == "fsdp" and dtype == torch.float16:
            raise UserError("float16 needs gradients scaled, which fsdp does not do; use --dtype=bfloat16")
        dataset = open_dataset(config.dataset, config.tokenizer)
        dataset.check_block_size(config.block_size)
        fit_vocabulary(config, dataset)
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)

    # ---- model and optimizers, new or as an earlier run left them
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, where a matrix product is left in fp32
    with torch.device(device):
        model = GPT(config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    facts = describe(config, model, dataset)
    state = {"step": 0, "samples": 0, "time": 0.0, "evaluated": None, "best": {}, "skipped_steps": 0}
    optimizer_state = {}
    with parallel.together():
        if resume:
            check_fits(config, dataset, run_dir, resume)
            saved = checkpoint.load_newest(run_dir)
            state |= saved.state
            if state["corpus_sha256"] != facts["corpus_sha256"]:
                raise UserError(
                    f"{run_dir} cannot resume: {config.dataset} is other data than it was trained on"
                )
            if state["step"] >= config.max_iters and checkpoint.is_finished(run_dir):
                raise UserError(f"{run_dir} is complete at step {state['step']}; raise --max_iters to go on")
            load_weights(model, saved.model, run_dir)
            optimizer_state = saved.optimizer
            scaler.load_state_dict(state["scaler"])
            del saved
        elif config.init_from != "scratch":
            source = Path(config.init_from)
            if not source.is_dir():
                raise UserError(f"init_from is scratch, resume or a run folder, not {config.init_from}")
            check_fits(config, dataset, source, resume)
            load_weights(model, checkpoint.load_weights(source, checkpoint.best_or_last(source)), source)
    newest = parallel.highest(state["step"])
    with parallel.together():
        if state["step"] != newest:
            raise UserError(f"{run_dir} is not the same on all nodes: it must be on storage that they share")
    compile = use_compile(config, device)
    wrapped = parallel.wrap(model, config, device, dtype, compile)
    params = list(model.parameters())  # as the ranks hold them
    optimizers = make_optimizers(model, config)
    load_state_tensors(model, optimizers, optimizer_state)
    del optimizer_state
    if config.eval_only:
        metrics = evaluate(wrapped, dataset, config, autocast)
        if first_rank:
            print(quality(metrics))
        return metrics
    with parallel.together():
        if first_rank:
            checkpoint.claim(run_dir, resume, config.overwrite, parallel.launch())
            checkpoint.write_config(run_dir, config)
            with checkpoint.writing(run_dir):
                tokenizers.save(dataset.tokenizer, run_dir)
    log = Log(run_dir if first_rank else None, config, facts, state["step"] if resume else None)
    on = f"{parallel.size()} ranks of {device.type}" if parallel.size() > 1 else device.type
    log.say(
        f"{config.attention}: {facts['params/total']:,} parameters, "
        f"{facts['kv_cache/bytes_per_token']:,} bytes of cache a token (bf16); "
        f"{config.dataset}: {len(dataset.train):,} tokens; "
        f"{on}, {str(dtype).removeprefix('torch.')}; run folder {run_dir}"
    )
    stop = StopSignal()
    if compile:
        log.say("compiling: the first step and the first evaluation take a minute or so")

    # ---- the loop
    samples_per_step = config.gradient_accumulation_steps * config.batch_size  # on all ranks
    tokens_per_step = samples_per_step * config.block_size
    flops_per_token = model.flops_per_token(config.block_size)
    peak_flops = peak_flops_of(device, dtype) if first_rank else None
    saver = checkpoint.Saver(run_dir)
    skipped = SkippedSteps(config.max_skipped_steps, state["skipped_steps"], log.say)
    spikes, stalls = LossSpikes(log.say), Stalls(config.data_timeout, log.say)
    step, samples, losses = state["step"], state["samples"], []
    started = time.perf_counter() - state["time"]
    lap_time, lap_step = time.perf_counter(), step

    def record(metrics: dict) -> None:
        tokens = samples * config.block_size
        seconds = time.perf_counter() - started
        log({"step": step, "tokens": tokens, "time": seconds, "flops": tokens * flops_per_token} | metrics)

    def save(*names: str) -> None:
        state.update(step=step, samples=samples, time=time.perf_counter() - started)
        state.update(corpus_sha256=facts["corpus_sha256"], scaler=scaler.state_dict())
        state.update(skipped_steps=skipped.total)
        weights = parallel.whole(model.state_dict())
        optimizer = parallel.whole(state_tensors(model, optimizers))
        with parallel.together():
            if first_rank:
                saver.save(names, Checkpoint(weights, optimizer, state))

    while True:
        with parallel.together():
            saver.check()
        evaluated = improved = False
        at_end = step >= config.max_iters
        if (at_end or step % config.eval_interval == 0) and state["evaluated"] != step:
            metrics = evaluate(wrapped, dataset, config, autocast, stop)
            evaluated = not stop.agreed()
            if evaluated:
                state |= {"evaluated": step} | metrics
                improved = metrics["val/loss"] < state["best"].get("best/val_loss", math.inf)
                if improved:
                    state["best"] = {"best/val_loss": metrics["val/loss"], "best/val_bpb": metrics["val/bpb"]}
                record(metrics | state["best"])
                log.write_summary()
                log.say(f"step {step}: {quality(metrics)}")
            lap_time, lap_step = time.perf_counter(), step
        due = evaluated and (at_end or config.always_save_checkpoint)
        if config.save_interval and step % config.save_interval == 0 and step != state["step"]:
            due = True  # and not what was saved last, or resumed from
        if improved or due:
            save(*["best"] * improved, *["last"] * due)
        stopped = stop.agreed()
        if at_end or stopped:
            break

        factor = learning_rate(step, config)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        for micro_step in range(micro_steps):
            first = samples + (micro_step * parallel.size() + parallel.rank()) * rows
            with stalls:
                x, y = dataset.train_batch(first, rows, config.block_size, config.seed)
            torch.manual_seed((config.seed * 0x9E3779B1 + first) % 2**63)  # for dropout: no state to keep
            parallel.sync_gradients(wrapped, micro_step == micro_steps - 1)
            with autocast:
                loss = wrapped(x.to(device), y.to(device), want_logits=False)[1]
            loss = loss * (1 + 0 * loss.detach())  # one that is not finite makes its gradient so
            scaler.scale(loss / micro_steps).backward()
            losses.append(loss.detach())
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        max_norm = config.grad_clip if config.grad_clip > 0 else math.inf
        grad_norm = parallel.clip_grad_norm(params, max_norm)
        sound = skipped.step(step + 1, grad_norm.item())  # waits for the device, as the decision is the CPU's
        for optimizer in optimizers:
            if sound:
                scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        if not sound:
            del losses[-micro_steps:]
        step, samples, stop.at_once = step + 1, samples + samples_per_step, False

        if step % config.log_interval == 0 or step == config.max_iters:
            train_loss = torch.stack(losses).mean().item() if losses else math.nan
            train_loss = parallel.total(train_loss)[0] / parallel.size()
            spikes.see(step, train_loss)
            now = time.perf_counter()
            rate = (step - lap_step) * tokens_per_step / (now - lap_time)
            lap_time, lap_step, losses = now, step, []
            metrics = {
                "train/loss": train_loss,
                "train/grad_norm": grad_norm.item(),
                "train/skipped_steps": skipped.total,
                "lr": config.learning_rate * factor,
                "train/tokens_per_s": rate,
                "train/mfu": rate * flops_per_token / (parallel.size() * peak_flops) if peak_flops else None,
                "memory/peak_bytes": peak_memory(device),
            }
            record(metrics)
            log.progress(step, config.max_iters, metrics, tokens_per_step)

    stalls.close()
    if stopped:
        save("last")
        with parallel.together():
            saver.wait()
        log.write_summary()
        log.close()
        log.say(f"{stop.signal.name}: stopped at step {step}, saved; --init_from=resume goes on from here")
        sys.exit(128 + stop.signal)
    with parallel.together():
        saver.wait()
    stop.restore()

    # ---- what came of it: a decode probe, a sample, quality and cache side by side
    weights = parallel.whole(model.state_dict())
    if first_rank:
        final = inference_model(config, weights).to(device)
        metrics = {"final/val_loss": state["val/loss"], "final/val_bpb": state["val/bpb"]}
        record(metrics | decode_probe(final, min(config.block_size, 1024) // 2, dtype=dtype))
        log.write_summary()
        log.close()
        print(generate_text(final, dataset.tokenizer, config.sample_tokens, seed=config.seed))
        print(table(log.summary))
    return log.summary


def fit_vocabulary(config: Config, dataset: Dataset) -> None:
    """Take the vocabulary's size from the data, unless the config asks for a larger (padded) one."""
    config.vocab_size = config.vocab_size or dataset.vocab_size
    if config.vocab_size < dataset.vocab_size:
        raise UserError(
            f"vocab_size = {config.vocab_size} is less than the {dataset.vocab_size} token ids of "
            f"{config.dataset}; remove it or raise it"
        )


def check_fits(config: Config, dataset: Dataset, run_dir: Path, resume: bool) -> None:
    """Raises UserError if a run's weights do not fit the model of `config` or the tokens of `dataset`."""
    saved = checkpoint.read_config(run_dir)
    knobs = {field.name for field in fields(GPTConfig)} - {"dropout"} | {"optimizer"}
    free = {"block_size", "optimizer", "window", "window_pattern", "sink_tokens"}  # for what starts from it
    for knob in sorted(knobs if resume else knobs - free):
        ours, theirs = getattr(config, knob), getattr(saved, knob)
        if ours != theirs:
            raise UserError(
                f"{knob} = {ours} does not fit the checkpoint in {run_dir}, which has {knob} = {theirs}; "
                "remove it, or train from scratch in another --out_dir"
            )
    if tokenizers.sha256(tokenizers.load(run_dir)) != tokenizers.sha256(dataset.tokenizer):
        raise UserError(f"{run_dir} was trained with another tokenizer than that of {config.dataset}")


def load_weights(model: GPT, weights: dict[str, torch.Tensor], run_dir: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        raise UserError(f"the weights in {run_dir} do not fit its config.json; one of them is damaged") from e


def keep_freed_memory() -> None:
    """Have glibc keep what is freed instead of returning it to the kernel, to be faulted in again every step.

    Without it a step on a CPU is some 5 to 10 % slower. Does nothing where there is no glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, 2**31 - 1)


def use_compile(config: Config, device: torch.device) -> bool:
    """`auto` compiles on GPUs; on a CPU compiling takes longer than it saves in a run of minutes."""
    return device.type == "cuda" if config.compile == "auto" else config.compile


def learning_rate(step: int, config: Config) -> float:
    """The factor on every learning rate at `step`: linear warm-up, then cosine decay, or stable and a linear
    decay over the last `cooldown` share of the steps (warm-up/stable/decay); down to min_lr / learning_rate.
    """
    last = config.lr_decay_iters
    floor = config.min_lr / config.learning_rate if config.learning_rate else 0.0
    if step < config.warmup_iters:
        return (step + 1) / (config.warmup_iters + 1)
    if not config.decay_lr:
        return 1.0
    if config.schedule == "wsd":
        begin = last - config.cooldown * last
        ratio = min(max(step - begin, 0) / max(last - begin, 1), 1)
        return floor + (1 - floor) * (1 - ratio)
    ratio = min((step - config.warmup_iters) / max(last - config.warmup_iters, 1), 1)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * ratio))


@torch.no_grad()
def evaluate(model, dataset: Dataset, config: Config, autocast, stop: StopSignal | None = None) -> dict:
    """Mean loss in nats a token and bits per byte, over the same validation tokens whoever asks.

    The ranks share the batches, and have the same result. Draws nothing from any random state. Ends early,
    with what it has, when a signal came.
    """
    device = next(model.parameters()).device
    model.eval()
    loss, count = torch.zeros((), device=device), 0
    for x, y in dataset.val_batches(
        config.block_size, config.batch_size, config.eval_iters, parallel.rank(), parallel.size()
    ):
        n = int((y >= 0).sum())
        with autocast:
            mean = model(x.to(device), y.to(device), want_logits=False)[1]
        if n:  # the mean over none is not a number
            loss += mean * n
            count += n
        if stop is not None and stop.agreed():
            break
    model.train()
    loss, count = parallel.total(loss.item(), count)
    loss /= count
    bytes_per_token = dataset.val_bytes_per_token
    return {"val/loss": loss, "val/bpb": loss / math.log(2) / bytes_per_token if bytes_per_token else None}


def quality(metrics: dict) -> str:
    bits = "" if metrics["val/bpb"] is None else f", {metrics['val/bpb']:.4f} bits per byte"
    return f"val loss {metrics['val/loss']:.4f}{bits}"


class StopSignal:
    """Remembers the first SIGINT, SIGTERM or SIGUSR1 on any rank, so that all end the loop at a whole step.

    A second one kills, but not under torchrun, which passes on what has reached the workers already. Until
    the first step is taken there is nothing to save, and the first signal ends the run `at_once`: that step
    may be minutes of compiling.
    """

    def __init__(self):
        self.at_once = True
        self.signal: signal.Signals | None = None
        caught = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self.before = {number: signal.signal(number, self.catch) for number in caught}

    def catch(self, number, frame) -> None:
        self.signal = self.signal or signal.Signals(number)
        if parallel.launch() is None:
            self.restore()
        if self.at_once:
            print(f"{self.signal.name}: stopped before the first step, nothing to save", flush=True)
            (os._exit if parallel.size() > 1 else sys.exit)(128 + number)  # without a word to waiting ranks

    def agreed(self) -> bool:
        """Whether a rank was told to stop. All of them must ask, at the same place."""
        number = parallel.highest(self.signal or 0)
        if number:
            self.signal = signal.Signals(number)
        return number > 0

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def describe(config: Config, model: GPT, dataset: Dataset) -> dict:
    """What is true of the whole run: which model on which data, and what its cache takes."""
    return {
        "attention": config.attention,
        "dataset": config.dataset,
        "seed": config.seed,
        "git_sha": git_sha(),
        "corpus_sha256": dataset.meta["corpus_sha256"],
        "tokenizer_sha256": tokenizers.sha256(dataset.tokenizer),
        "params/total": model.n_params(),
        "params/non_embedding": model.n_params(embedding=False),
        "kv_cache/elements_per_token_layer": config.kv_elements_per_token_layer(),
        "kv_cache/bytes_per_token": config.kv_bytes(config.block_size, torch.bfloat16) // config.block_size,
        "kv_cache/ratio_to_mha": config.kv_ratio_to_mha(),
    }


def git_sha() -> str | None:
    """The commit of this code, with a + if files differ from it; None outside a git checkout."""
    describe = ["describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    command = ["git", "-C", str(Path(__file__).parent), *describe]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_flops_of(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s: of a GPU from its data sheet (None if unknown), of a CPU by timing a matrix product."""
    if device.type == "cuda":
        words = torch.cuda.get_device_name(device).replace("-", " ").split()
        peak = next((flops for model, flops in PEAK_FLOPS.items() if model in words), None)
        if peak and dtype == torch.float32:  # as TF32, which Ampere brought
            peak = peak / 2 if torch.cuda.get_device_capability(device) >= (8, 0) else None
        return peak
    if device.type != "cpu":
        return None
    a = torch.ones(1024, 1024, dtype=dtype)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - begin)
    return 2 * 1024**3 / min(seconds)


def peak_memory(device: torch.device) -> int:
    """Most bytes held at once so far: on a GPU by torch's allocator, elsewhere by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def table(summary: dict) -> str:
    """Quality and cache side by side, a run's result in two lines."""
    bits = {"val bits/byte": "final/val_bpb", "best bits/byte": "best/val_bpb"}  # None where data is no text
    columns = {
        "attention": summary["attention"],
        "parameters": f"{summary['params/total']:,}",
        "val loss": f"{summary['final/val_loss']:.4f}",
        **{name: f"{summary[key]:.4f}" for name, key in bits.items() if summary[key] is not None},
        "cache bytes/token (bf16)": f"{summary['kv_cache/bytes_per_token']:,}",
        "of MHA": f"{summary['kv_cache/ratio_to_mha']:.1%}",
        "decode tokens/s": f"{summary['decode/tokens_per_s']:,.0f}",
    }
    widths = [max(len(name), len(value)) for name, value in columns.items()]
    rows = (columns.keys(), ["-" * width for width in widths], columns.values())
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


if __name__ == "__main__":
    cli(main, ranks=True)
