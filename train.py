"""Train a GPT: `python train.py config/mla.py --batch_size=32`. `--help` lists every knob.

On many GPUs or machines: `torchrun --standalone --nproc_per_node=8 train.py config/124m/mla.py`.
"""

import math
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from backends import accelerate, describe
from model import GPT, GPTConfig
from nanokv import checkpoint
from nanokv import distributed as parallel
from nanokv import metrics as measure
from nanokv import tokenizer as tokenizers
from nanokv.config import UserError, as_text, check_range, cli, from_dict, load
from nanokv.dataset import Dataset, open_dataset
from nanokv.device import Hardware, check_device_name, keep_freed_memory, pick_hardware
from nanokv.loss import LanguageModelLoss
from nanokv.optim import load_state_tensors, make_optimizers, state_tensors
from nanokv.run_logger import RunLogger, quality, table
from nanokv.text import generate_text
from nanokv.watchdogs import LossSpikes, SkippedSteps, StallWatchdog, StopSignal

USAGE = "python train.py [config.py] [--key=value ...]"


@dataclass
class TrainConfig:
    """The knobs of a run, besides those of its model. Raises ValueError if they do not fit together."""

    # the run
    out_dir: str | None = None  # run folder; None: out/<config file's name>, or out/<attention>
    overwrite: bool = False  # replace the run that out_dir already holds; that run is deleted
    init_from: str = "scratch"  # 'scratch', 'resume' (continue the run in out_dir), or a run folder to start from
    eval_interval: int = 250  # steps between evaluations
    eval_iters: int = 0  # val batches an evaluation, evenly spaced; 0: the whole val split
    eval_only: bool = False  # evaluate once and exit
    log_interval: int = 10  # steps between log lines
    always_save_checkpoint: bool = True  # write last/ at every evaluation, not only when the run ends
    save_interval: int = 0  # also write last/ every this many steps; 0: only at evaluations
    match_params: str | None = None  # run folder or config file; sets intermediate_size to get as many parameters
    seed: int = 1337  # of the initial weights, dropout and the order of the data
    # Weights & Biases
    wandb_log: bool = False  # also log to W&B; falls back to offline without a key or a network
    wandb_project: str = "nanokv"  # the W&B project
    wandb_run_name: str | None = None  # name of the run in W&B; None: the name of out_dir
    wandb_entity: str | None = None  # the W&B user or team; None: your default
    wandb_group: str | None = None  # a name that the runs of one W&B group share
    wandb_tags: tuple[str, ...] = ()  # W&B tags, with commas between
    # data
    dataset: str = "stdlib"  # a folder in data/, or the path of a prepared folder
    tokenizer: str | None = None  # byte, char, bpe, gpt2, or a run folder; None: the data set's own
    gradient_accumulation_steps: int = 1  # micro-batches a step, on all ranks together
    batch_size: int = 16  # sequences in a micro-batch; ranks split it if there are more ranks than micro-batches
    data_timeout: float = 30.0  # seconds after which a line reports that a micro-batch is slow to read
    # optimizer
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: Muon for the blocks' matrices, AdamW for the rest
    learning_rate: float = 1e-3  # AdamW's peak learning rate; an untied embedding has ten times this rate
    muon_lr: float = 0.02  # Muon's peak learning rate; it follows the same schedule
    muon_momentum: float = 0.95  # Muon's momentum; 0.9 suits runs of a few hundred steps
    max_iters: int = 2000  # steps to train
    weight_decay: float = 0.1  # decoupled weight decay, on matrices only
    beta1: float = 0.9  # AdamW's decay of the mean of gradients
    beta2: float = 0.95  # AdamW's decay of the mean of squared gradients
    grad_clip: float = 1.0  # largest global gradient norm; 0: no clipping
    max_skipped_steps: int = 20  # end the run after this many steps in a row without a finite gradient
    # learning rate schedule
    decay_lr: bool = True  # False: constant after the warm-up
    schedule: Literal["cosine", "wsd"] = "wsd"  # wsd: warm up, stay constant, decay linearly
    warmup_iters: int = 100  # steps of linear warm-up
    lr_decay_iters: int | None = None  # the step at which min_lr is reached; None: max_iters
    min_lr: float | None = None  # AdamW's final learning rate, Muon's in proportion; None: learning_rate / 10
    cooldown: float = 0.4  # wsd: the share of lr_decay_iters, at its end, in which the rate decays
    # machine
    device: str = "auto"  # cpu, cuda, cuda:N, mps; auto: the best available
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of activations; weights stay float32
    compile: bool | Literal["auto"] = "auto"  # torch.compile the model; auto: where it saves time
    parallel: Literal["ddp", "fsdp"] = "ddp"  # ddp: each rank holds the whole model; fsdp: a share of it
    activation_checkpointing: bool = False  # compute blocks again in the backward pass, to save memory
    # after the last step
    sample_tokens: int = 200  # tokens of the sample to print; 0: no sample

    def __post_init__(self):
        self.lr_decay_iters = self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters
        self.min_lr = self.learning_rate / 10 if self.min_lr is None else self.min_lr
        check_range(self, "eval_iters seed learning_rate muon_lr min_lr weight_decay grad_clip", at_least=0)
        check_range(self, "warmup_iters save_interval sample_tokens", at_least=0)
        check_range(self, "eval_interval log_interval max_iters lr_decay_iters max_skipped_steps", at_least=1)
        check_range(self, "gradient_accumulation_steps batch_size", at_least=1)
        check_range(self, "beta1 beta2 muon_momentum", at_least=0, below=1)
        check_range(self, "cooldown", at_least=0, at_most=1)
        check_range(self, "data_timeout", above=0)
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}; lower it")
        check_device_name(self.device)
        if empty := [name for name, value in vars(self).items() if value == ""]:
            raise ValueError(f"{empty[0]} must not be empty")
        if not all(0 < len(tag) <= 64 for tag in self.wandb_tags):
            raise ValueError("wandb_tags must each have 1 to 64 characters")


def main(argv: list[str]) -> None:
    with parallel.process_group():
        train(argv or ["config/mla.py"])


def train(argv: list[str]) -> dict:
    """Train as the command line says; returns the run's summary. Raises UserError for faults of knobs, data or run
    folder, before it changes anything in the folder. During training it raises UserError for faults of disk or data and
    for non-finite gradients or weights; the last checkpoint stays. After a signal it saves and raises SystemExit.
    """
    restarted = parallel.restarted()
    with parallel.collective_errors():
        model_config, config = configure(argv, restarted)
        if parallel.size() > 1 and parallel.local_rank() == 0:
            open_dataset(config.dataset, config.tokenizer)  # prepares a missing data set, once per node
    with parallel.collective_errors():
        hardware = pick_hardware(config.device, config.dtype, config.compile)
        share = parallel.share(config.gradient_accumulation_steps, config.batch_size)
        dataset = open_dataset(config.dataset, config.tokenizer)
        model_config.vocab_size = dataset.fit(model_config.block_size, model_config.vocab_size)
        if config.match_params and config.init_from != "resume":  # a resumed run keeps its width
            match_parameters(model_config, config.match_params)
        model = new_model(model_config, config.seed, hardware.device)
        state, optimizer_state = load_start(config, model, dataset)
        loss_model = accelerate(LanguageModelLoss(model), hardware.dtype)
    backend = describe(loss_model)
    loss_model = parallel.parallelize(loss_model, *hardware, config.parallel, config.activation_checkpointing)
    rates = config.learning_rate, config.muon_lr, config.muon_momentum, config.weight_decay
    optimizers = make_optimizers(model, config.optimizer, *rates, betas=(config.beta1, config.beta2))
    load_state_tensors(model, optimizers, optimizer_state)
    if config.eval_only:
        windows = model_config.block_size, config.batch_size, config.eval_iters
        metrics = measure.evaluate(loss_model, dataset, windows, hardware.autocast())
        if parallel.rank() == 0:
            print(quality(metrics))
        return metrics
    claim(config, model_config, dataset, state["step"])
    stop, log = StopSignal(), start_log(config, model, dataset, hardware, backend, state["step"])
    run = Run(config, dataset, model, loss_model, optimizers, hardware, share, log, stop, state)
    return report(run, training_loop(run))


def configure(argv: list[str], restarted: bool = False) -> tuple[GPTConfig, TrainConfig]:
    """The knobs that are given; others from the run that init_from names, or their defaults. A resumed run takes only
    those on the command line, not those in the config file. restarted: torchrun may have restarted this launch.
    """
    files = [Path(arg).stem for arg in argv if not arg.startswith("-")]

    def fill_in(in_file: dict[str, Any], on_line: dict[str, Any]) -> dict[str, Any]:
        given = in_file | on_line
        name = files[0] if files else given.get("attention", GPTConfig.attention)
        out_dir = given.get("out_dir")
        values = given | {"out_dir": f"out/{name}" if out_dir is None else out_dir}
        if restarted and checkpoint.launched_by(Path(values["out_dir"])) == parallel.launch():
            values["init_from"] = "resume"
        source = values.get("init_from", "scratch")
        if source == "scratch":
            if values.get("match_params") and on_line.get("intermediate_size"):
                raise UserError("match_params chooses intermediate_size; remove one of them")
            return values
        if source != "resume":
            return asdict(read_knobs(Path(source))[0]) | values
        before = all_knobs(*read_knobs(Path(values["out_dir"])))
        if before["lr_decay_iters"] == before["max_iters"]:
            del before["lr_decay_iters"]  # it follows max_iters, which may have changed
        if before["min_lr"] == before["learning_rate"] / 10:
            del before["min_lr"]  # it follows learning_rate
        return before | on_line | {"out_dir": values["out_dir"], "init_from": "resume"}

    model_config, config = load(argv, GPTConfig, TrainConfig, usage=USAGE, fill_in=fill_in)
    if parallel.size() > 1 and config.parallel == "fsdp" and config.dtype == "float16":
        raise UserError("float16 needs gradients scaled, which fsdp does not do; use --dtype=bfloat16")
    if config.match_params and config.init_from not in ("scratch", "resume"):
        raise UserError("match_params is for a new model, init_from for the weights of another; remove one of them")
    config.wandb_run_name = config.wandb_run_name or Path(config.out_dir).name
    return model_config, config


def read_knobs(run_dir: Path) -> tuple[GPTConfig, TrainConfig]:
    """The knobs of a run. Raises UserError if the folder is not a run, or its config is damaged."""
    return from_dict(checkpoint.read_config(run_dir), str(run_dir / "config.json"), GPTConfig, TrainConfig)


def all_knobs(*configs) -> dict[str, Any]:
    return {knob: value for config in configs for knob, value in asdict(config).items()}


def match_parameters(model: GPTConfig, source: str) -> None:
    """Set intermediate_size so that the model has as many parameters as `source` (a run folder or a config file),
    within 1 %, and print it. Raises UserError.
    """
    is_file = Path(source).suffix == ".py"
    other, knobs = load([source], GPTConfig, TrainConfig) if is_file else read_knobs(Path(source))
    if is_file and knobs.match_params:
        raise UserError(f"{source} has match_params of its own; match {knobs.match_params}, which it names")
    if other.vocab_size not in (0, model.vocab_size):  # 0: that of the data set, the same for both
        fault = f"cannot match parameters of {source}: it has a vocabulary of {other.vocab_size:,}"
        raise UserError(f"{fault}, not {model.vocab_size:,}; train both on one data set, with one vocab_size")
    other.vocab_size = model.vocab_size
    size, target = measure.match_params(GPT, model, other)
    if parallel.rank() == 0:
        print(f"intermediate_size = {model.intermediate_size}: {size:,} parameters, to match {target:,} of {source}")


def new_model(model_config: GPTConfig, seed: int, device: torch.device) -> GPT:
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")  # fp32 matrix products use TF32 on GPUs
    with torch.device(device):
        return GPT(model_config)


def load_start(config: TrainConfig, model: GPT, dataset: Dataset) -> tuple[dict, dict[str, Tensor]]:
    """Load the weights that init_from asks for into `model`; returns the states of the run and of its optimizers."""
    state: dict[str, Any] = dict(step=0, samples=0, time=0.0, evaluated=None, best={}, skipped_steps=0, scaler={})
    if config.init_from == "scratch":
        return state, {}
    resume = config.init_from == "resume"
    source = Path(str(config.out_dir) if resume else config.init_from)
    check_fits(config, model.config, dataset, source)
    if resume:
        saved = checkpoint.load_newest(source)
        weights, optimizer_state, state = saved.model, saved.optimizer, state | saved.state
        if state["corpus_sha256"] != dataset.meta["corpus_sha256"]:
            raise UserError(f"{source} cannot resume: {config.dataset} is other data than it was trained on")
        if state["step"] >= config.max_iters and checkpoint.is_finished(source):
            raise UserError(f"{source} is complete at step {state['step']}; raise --max_iters to go on")
        print_changes(source, all_knobs(model.config, config))
    else:
        weights, optimizer_state = checkpoint.load_weights(*checkpoint.find(source)), {}
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        raise UserError(f"the weights in {source} do not fit its config.json; one of them is damaged") from e
    return state, optimizer_state


def print_changes(run_dir: Path, knobs: dict[str, Any]) -> None:
    """Print a line for each knob whose value is not that of the run to resume."""
    before = all_knobs(*read_knobs(run_dir))
    for knob, value in knobs.items():
        if parallel.rank() == 0 and value != before[knob] and knob != "init_from":
            print(f"{knob}: {as_text(before[knob])} -> {as_text(value)}", flush=True)


def check_fits(config: TrainConfig, model_config: GPTConfig, dataset: Dataset, source: Path) -> None:
    """Raises UserError if a run's weights do not fit this model or the tokens of `dataset`."""
    saved = all_knobs(*read_knobs(source))
    knobs = asdict(model_config) | {"optimizer": config.optimizer, "match_params": config.match_params}
    free = {"dropout"}
    if config.init_from != "resume":  # a new run that starts from these weights may change these
        free |= {"block_size", "optimizer", "match_params", "window", "window_pattern", "sink_tokens"}
    for knob in sorted(knobs.keys() - free):
        if knobs[knob] != saved[knob]:
            fault = f"does not fit the checkpoint in {source}, which has {knob} = {saved[knob]}"
            raise UserError(f"{knob} = {knobs[knob]} {fault}; remove it, or train from scratch in another --out_dir")
    if tokenizers.sha256(tokenizers.load(source)) != tokenizers.sha256(dataset.tokenizer):
        fault = f"{source} was trained with another tokenizer than that of {config.dataset}"
        raise UserError(f"{fault}: add --tokenizer={source}, here or to its prepare.py")


def claim(config: TrainConfig, model_config: GPTConfig, dataset: Dataset, step: int) -> None:
    """Create the run folder or take it over, and write config and tokenizer. Raises UserError."""
    run_dir, newest = Path(str(config.out_dir)), parallel.all_reduce_max(step)
    with parallel.collective_errors():
        if step != newest:
            raise UserError(f"{run_dir} is not the same on all nodes: it must be on storage that they share")
        tokenizer = dataset.tokenizer  # raises if it is missing, before the folder is changed
        if parallel.rank() == 0:
            checkpoint.claim(run_dir, config.init_from == "resume", config.overwrite, parallel.launch())
            began = read_knobs(run_dir)[1] if config.init_from == "resume" else config
            checkpoint.write_config(run_dir, model_config, replace(config, init_from=began.init_from))
            with checkpoint.writing(run_dir):
                tokenizers.save(tokenizer, run_dir)


def start_log(config: TrainConfig, model: GPT, data: Dataset, hardware: Hardware, backend: str, step: int) -> RunLogger:
    """Start the run's log, with the facts that hold for the whole run: model, data, code and machine."""
    facts = {"attention": model.config.attention, "dataset": config.dataset, "seed": config.seed}
    facts |= {"git_sha": measure.git_sha(), "corpus_sha256": data.meta["corpus_sha256"]}
    facts |= {"tokenizer_sha256": tokenizers.sha256(data.tokenizer), "code_sha256": measure.code_sha256()}
    dtype = str(hardware.dtype).removeprefix("torch.")
    kernels = re.sub(r"^backend | \(\d+ threads?\)", "", backend)
    facts |= {"resolved/device": hardware.device.type, "resolved/dtype": dtype, "resolved/backend": kernels}
    facts |= measure.describe_model(model)
    knobs = asdict(model.config) | asdict(config) | facts
    wandb = {"project": config.wandb_project, "name": config.wandb_run_name, "config": knobs}
    wandb |= {name: value for name in ("entity", "group", "tags") if (value := knobs[f"wandb_{name}"])}
    folder = Path(str(config.out_dir)) if parallel.rank() == 0 else None
    resumed_at = step if config.init_from == "resume" else None
    log = RunLogger(folder, facts, resumed_at, wandb if config.wandb_log else None)
    ranks = f"{parallel.size()} ranks of " if parallel.size() > 1 else ""
    machine = f"{ranks}{hardware.device.type}, {dtype}"
    parameters, cache = facts["params/total"], facts["kv_cache/bytes_per_token"]
    log.say(f"{facts['attention']}: {parameters:,} parameters, {cache:,} bytes of cache a token (bf16)")
    log.say(f"{config.dataset}: {len(data.train):,} tokens; {machine}; run folder {config.out_dir}")
    log.say(backend)
    if hardware.compile:
        log.say("compiling: the first step and the first evaluation take a minute or so")
    return log


class Run:
    """A run in progress: what `train` has set up for the loop, and the progress of the loop."""

    def __init__(self, config, dataset, model, loss_model, optimizers, hardware, share, log, stop, state):
        self.config, self.dataset, self.model = config, dataset, model
        self.loss_model = loss_model  # LanguageModelLoss(model), parallelized and compiled
        self.optimizers, self.autocast = optimizers, hardware.autocast()
        self.device, self.dtype = hardware.device, hardware.dtype
        self.micro_steps, self.rows = share  # of this rank: micro-batches a step, sequences in each of them
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.log, self.stop, self.state = log, stop, state  # state: that of the last checkpoint
        self.step, self.samples = state["step"], state["samples"]  # steps taken; sequences trained on by all ranks
        self.started = time.perf_counter() - state["time"]
        self.block_size = model.config.block_size
        self.windows = self.block_size, config.batch_size, config.eval_iters  # of an evaluation
        self.samples_per_step = config.gradient_accumulation_steps * config.batch_size  # of all ranks
        self.flops_per_token = measure.flops_per_token(model, self.block_size)
        peak = measure.peak_flops(self.device, self.dtype) if parallel.rank() == 0 else None
        self.peak_flops = peak and parallel.size() * peak
        self.clock = self.step, time.perf_counter()  # the speed is measured from here
        self.saver = checkpoint.Saver(Path(config.out_dir))
        self.skipped = SkippedSteps(config.max_skipped_steps, state["skipped_steps"], log.say)
        self.spikes, self.watchdog = LossSpikes(log.say), StallWatchdog(config.data_timeout, log.say)


def training_loop(run: Run) -> bool:
    """Train to the last step or until a signal. Returns whether a signal ended it."""
    config, losses = run.config, []  # of the micro-batches since the last line of the log
    while True:
        with parallel.collective_errors():
            run.saver.check()
        at_end, evaluated, improved = run.step >= config.max_iters, False, False
        if (at_end or run.step % config.eval_interval == 0) and run.state["evaluated"] != run.step:
            evaluated, improved = evaluate_and_log(run)
        due = evaluated and (at_end or config.always_save_checkpoint)
        if config.save_interval and run.step % config.save_interval == 0 and run.step != run.state["step"]:
            due = True  # this step is not yet saved
        if improved or due:
            save(run, *["best"] * improved, *["last"] * due)
        stopped = run.stop.agreed()
        if at_end or stopped:
            return stopped

        factor = learning_rate(run.step, config)
        for micro_step in range(run.micro_steps):
            x, y = batch(run, micro_step)  # (rows, block_size) each
            parallel.sync_gradients(run.loss_model, micro_step == run.micro_steps - 1)
            with run.autocast:
                loss = run.loss_model(x, y)
            loss = loss * (1 + 0 * loss.detach())  # if it is not finite, neither is its gradient
            run.scaler.scale(loss / run.micro_steps).backward()
            losses.append(loss.detach())
        grad_norm, finite = optimizer_step(run, factor)
        if not finite:
            del losses[-run.micro_steps :]
        run.step, run.samples, run.stop.at_once = run.step + 1, run.samples + run.samples_per_step, False
        if run.step % config.log_interval == 0 or run.step == config.max_iters:
            log_progress(run, losses, grad_norm, config.learning_rate * factor)
            losses.clear()


def batch(run: Run, micro_step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (rows, block_size) of this rank. Seeds dropout by the number of the first sample."""
    first, seed = run.samples + (micro_step * parallel.size() + parallel.rank()) * run.rows, run.config.seed
    with run.watchdog:
        x, y = run.dataset.train_batch(first, run.rows, run.block_size, seed)
    torch.manual_seed((seed * 0x9E3779B1 + first) % 2**63)  # so that a checkpoint needs no random state
    return x.to(run.device), y.to(run.device)


def optimizer_step(run: Run, factor: float) -> tuple[Tensor, bool]:
    """If the gradient is finite, step with all learning rates times `factor`. Returns the norm () of the gradient
    before clipping, and whether it is finite.
    """
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    max_norm = run.config.grad_clip if run.config.grad_clip > 0 else math.inf
    grad_norm = parallel.clip_grad_norm(list(run.model.parameters()), max_norm)
    finite = run.skipped.step(run.step + 1, grad_norm.item())  # waits for the device, since the CPU decides
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        if finite:
            run.scaler.step(optimizer)
        optimizer.zero_grad()
    run.scaler.update()
    return grad_norm, finite


def learning_rate(step: int, config: TrainConfig) -> float:
    """The factor of every learning rate at `step`: linear warm-up, then cosine decay (`cosine`), or constant and then
    linear decay in the last `cooldown` share of lr_decay_iters (`wsd`). Both decay to min_lr / learning_rate.
    """
    last, linear = config.lr_decay_iters or config.max_iters, config.schedule == "wsd"
    floor = (config.min_lr or 0.0) / config.learning_rate if config.learning_rate else 0.0
    if step < config.warmup_iters:
        return (step + 1) / (config.warmup_iters + 1)
    if not config.decay_lr:
        return 1.0
    begin = last - config.cooldown * last if linear else config.warmup_iters
    ratio = min(max(step - begin, 0) / max(last - begin, 1), 1)
    return floor + (1 - floor) * (1 - ratio if linear else 0.5 * (1 + math.cos(math.pi * ratio)))


def evaluate_and_log(run: Run) -> tuple[bool, bool]:
    """Returns whether the evaluation finished (a signal stops it), and whether the model is the best so far."""
    metrics = measure.evaluate(run.loss_model, run.dataset, run.windows, run.autocast, run.stop.agreed)
    if run.stop.agreed():
        return False, False
    improved = metrics["val/loss"] < run.state["best"].get("best/val_loss", math.inf)
    run.state |= {"evaluated": run.step} | metrics
    if improved:
        run.state["best"] = {"best/val_loss": metrics["val/loss"], "best/val_bpb": metrics["val/bpb"]}
    record(run, metrics | run.state["best"])
    run.log.write_summary()
    run.log.say(f"step {run.step}: {quality(metrics)}")
    run.clock = run.step, time.perf_counter()
    return True, improved


def record(run: Run, metrics: dict) -> None:
    """Log metrics together with step, tokens, time and FLOPs, the x axes of plots."""
    tokens, seconds = run.samples * run.block_size, time.perf_counter() - run.started
    run.log({"step": run.step, "tokens": tokens, "time": seconds, "flops": tokens * run.flops_per_token} | metrics)


def log_progress(run: Run, losses: list[Tensor], grad_norm: Tensor, lr: float) -> None:
    """Log the mean of `losses` and the speed since the last line of the log or the last evaluation."""
    train_loss = torch.stack(losses).mean().item() if losses else math.nan
    train_loss = parallel.all_reduce_sum(train_loss)[0] / parallel.size()
    run.spikes.see(run.step, train_loss)
    (first, since), tokens_per_step = run.clock, run.samples_per_step * run.block_size
    rate = (run.step - first) * tokens_per_step / (time.perf_counter() - since)
    mfu = measure.mfu(rate * run.flops_per_token, run.peak_flops)
    metrics = {"train/loss": train_loss, "train/grad_norm": grad_norm.item(), "lr": lr}
    metrics |= {"train/skipped_steps": run.skipped.total, "train/tokens_per_s": rate, "train/mfu": mfu}
    metrics["memory/peak_bytes"] = measure.peak_memory(run.device)
    run.clock = run.step, time.perf_counter()
    record(run, metrics)
    run.log.progress(run.step, run.config.max_iters, metrics, tokens_per_step)


def save(run: Run, *names: str) -> None:
    """Write checkpoints under these names, in the background."""
    run.state |= dict(step=run.step, samples=run.samples, time=time.perf_counter() - run.started)
    run.state |= dict(skipped_steps=run.skipped.total, scaler=run.scaler.state_dict())
    run.state["corpus_sha256"] = run.dataset.meta["corpus_sha256"]
    weights = parallel.full_state_dict(run.model.state_dict())
    optimizer = parallel.full_state_dict(state_tensors(run.model, run.optimizers))
    with parallel.collective_errors():
        if parallel.rank() == 0:
            run.saver.save(names, checkpoint.Checkpoint(weights, optimizer, run.state))


def report(run: Run, stopped: bool) -> dict:
    """End the run. If a signal stopped it, save and exit. Else print a sample, then quality and cache side by side."""
    if stopped:
        save(run, "last")
    with parallel.collective_errors():
        run.saver.wait()
    config, log, signal = run.config, run.log, run.stop.signal
    if stopped:
        log.write_summary()
        log.close()
        log.say(f"{signal.name}: stopped at step {run.step}, saved; --init_from=resume goes on from here")
        sys.exit(128 + signal)
    run.stop.restore()
    weights = parallel.full_state_dict(run.model.state_dict())
    if parallel.rank() == 0:
        build = partial(checkpoint.build, partial(GPT, run.model.config), weights)
        final, probed = (accelerate(build().to(run.device, dtype)) for dtype in (None, run.dtype))
        metrics = {"final/val_loss": run.state["val/loss"], "final/val_bpb": run.state["val/bpb"]}
        record(run, metrics | measure.decode_probe(probed, min(run.block_size, 1024) // 2))
        log.write_summary()
        text = generate_text(final, run.dataset.tokenizer, config.sample_tokens, seed=config.seed)
        log.sample(text)
        log.close()
        print(text)
        print(table(log.summary))
    return log.summary


if __name__ == "__main__":
    cli(main, ranks=True)
