"""Quantization of the numbers in a cache: codes of 8 or 4 bits, and their scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

INT4: torch.dtype = torch.int4  # pyright: ignore[reportAttributeAccessIssue]
GROUP = {torch.int8: 128, torch.float8_e4m3fn: 128, INT4: 32}  # most numbers of a vector that share a scale
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # code


def grouped(x: Tensor, size: int) -> Tensor:
    """x (..., D) as groups (..., ceil(D / size), size), padded with its last number; if D < size, one group of D."""
    size = min(x.size(-1), size)
    fill = x[..., -1:].expand(*x.shape[:-1], -x.size(-1) % size)
    return torch.cat((x, fill), -1).unflatten(-1, (-1, size))


def quantize(x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """x (..., D) -> its codes, under the name "", and one scale (and offset) per group of numbers (..., D / GROUP).

    int8 and fp8: codes (..., D) in dtype, and a bf16 "_scale" that maps a group's largest magnitude to the
    largest code. int4: codes from 0 to 15, two in each byte of (..., D / 2), with x = (code + offset) * scale.
    The scale is 1/15 of a group's range, the "_offset" an int8.
    """
    groups = grouped(x.float(), GROUP[dtype])
    if dtype in LARGEST:
        largest = LARGEST[dtype]
        scale = (groups.abs().amax(-1, keepdim=True) / largest).clamp(min=1e-30).bfloat16()
        codes = groups / scale.float()
        codes = codes.round() if dtype == torch.int8 else codes  # fp8 rounds as it is cast
        codes = codes.clamp(-largest, largest).to(dtype).flatten(-2)[..., : x.size(-1)]
        return {"": codes, "_scale": scale.squeeze(-1)}
    low, high = groups.aminmax(dim=-1, keepdim=True)
    # if a group is narrow and far from zero, a larger scale keeps the offset within int8
    scale = torch.maximum((high - low) / 15, torch.maximum(low.abs(), high.abs()) / 127)
    scale = scale.clamp(min=1e-30).bfloat16()
    offset = (low / scale.float()).round().clamp(-128, 127)
    codes = ((groups / scale.float()).round() - offset).clamp(0, 15).to(torch.uint8).flatten(-2)
    codes = F.pad(codes[..., : x.size(-1)], (0, x.size(-1) % 2))
    codes = codes[..., ::2] | codes[..., 1::2] << 4
    return {"": codes, "_scale": scale.squeeze(-1), "_offset": offset.to(torch.int8).squeeze(-1)}


def dequantize(parts: dict[str, Tensor], width: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantize`, up to rounding: x (..., width) in dtype."""
    codes = parts[""]
    if "_offset" not in parts:
        return codes.to(dtype).mul_(spread(parts["_scale"], GROUP[codes.dtype], width).to(dtype))
    codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)[..., :width]
    scale, offset = (spread(parts[name], GROUP[INT4], width).to(dtype) for name in ("_scale", "_offset"))
    return codes.to(dtype).add_(offset).mul_(scale)


def spread(x: Tensor, size: int, width: int) -> Tensor:
    """Values of groups (..., groups) repeated for each of their numbers (..., width); unchanged if one group."""
    return x.repeat_interleave(size, -1)[..., :width] if x.size(-1) > 1 else x
