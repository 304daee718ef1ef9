"""Launching a kernel: device guard, block sizes, and how a reduction is cut into programs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from . import configs
from .configs import Config


def architecture(x: Tensor) -> int:
    """80, 90, ... of x's device; 90 for what is no GPU."""
    return configs.architecture(x.device.index) if x.is_cuda else 90


def config(kernel: str, x: Tensor, width: int, **at_most: int) -> Config:
    """`configs.config` for x's device and dtype."""
    return configs.config(kernel, x.dtype, width, architecture(x), **at_most)


def precision(dtype: torch.dtype) -> str:
    """How a product of float32 operands rounds them: not at all, unless torch was told that tf32 is welcome."""
    # Not `allow_tf32`: reading it is an error once the newer setting was used; this one follows both.
    welcome = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and welcome else "ieee"


def split(pixels: int, config: Config, columns: int = 1, least: int = 1) -> tuple[int, int]:
    """(rows, programs): each program reduces `rows` consecutive pixels, at least `least` of them.

    columns: programs that share the same pixels; all together there are about `config.programs`. A function of shape
    and table alone, and so is the order of summation and every bit of the result.
    """
    block = config.tile["BM"]
    rows = max(-(-pixels * columns // config.programs), min(least, pixels))
    rows = -(-rows // block) * block
    return rows, -(-pixels // rows)


def run(kernel: Any, grid: tuple[int, ...], config: Config, *args: Any, **constants: Any) -> None:
    """Launch on the current stream of the device of the first tensor."""
    device = next(a for a in args if isinstance(a, Tensor)).device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **config.tile, **constants, num_warps=config.warps, num_stages=config.stages)
