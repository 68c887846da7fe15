"""The machine: the device and dtype that a run computes with, and a setting of its memory."""

import ctypes
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch

from nanokv import distributed as parallel
from nanokv.config import UserError
from nanokv.torch_private import private


def check_device_name(name: str) -> None:
    """Raises UserError if `name` is not a value for a `device` knob."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,2})?", name):
        raise UserError(f"unknown device {name!r}; it is auto, cpu, cuda, cuda:N or mps")


def pick_device(name: str) -> torch.device:
    """The device that a `device` knob names. Raises UserError if this machine has no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    check_device_name(name)
    device = torch.device(name)
    there = {"cpu": 1, "mps": torch.backends.mps.is_available(), "cuda": torch.cuda.device_count()}
    if (device.index or 0) >= there[device.type]:
        raise UserError(f"this machine or this build of PyTorch has no device {name}; use --device=auto")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that a `dtype` knob names; auto: bfloat16 where the hardware computes in it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # AVX512-BF16 or AMX; without them bfloat16 is emulated, slower than float32
        fast = private("cpu._is_avx512_bf16_supported")() or private("cpu._is_amx_tile_supported")()
    return torch.bfloat16 if fast and device.type != "mps" else torch.float32


class Hardware(NamedTuple):
    """What this rank computes on."""

    device: torch.device
    dtype: torch.dtype  # of activations
    compile: bool

    def autocast(self) -> AbstractContextManager:
        exact = self.dtype == torch.float32
        return nullcontext() if exact else torch.autocast(self.device.type, self.dtype)


def pick_hardware(device: str, dtype: str, compile: bool | Literal["auto"]) -> Hardware:
    """What the knobs `device`, `dtype` and `compile` stand for on this rank of this machine."""
    own = parallel.own_device(pick_device(device))
    # on a CPU compiling takes longer than it saves in a run of minutes
    return Hardware(own, pick_dtype(dtype, own), own.type == "cuda" if compile == "auto" else compile)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the kernel. A step on a CPU is then 5 to 10 % faster."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, 2**31 - 1)
