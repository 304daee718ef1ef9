"""The engine on GPUs. The kernels, and Triton itself, are imported when the first tensor on a GPU asks for them."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from ..activation import ACTIVATIONS

OPS = ("gram", "mbconv", "mbconv_backward", "mbconv_probe", "norm_dot", "update_running")
WIDEST = 512  # channels of x and of y: a program holds all of them
WIDEST_OUTPUT = 256  # of y, on GPUs with the 99 KiB of shared memory of compute capability 8.6, 8.9 and 12.0


def has_little_shared_memory(device: torch.device | int) -> bool:
    """Whether a thread block has less than the 163 KiB of an A100 there."""
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack the field
    return properties.shared_memory_per_block_optin < 163 << 10


def can_run(x: Tensor, in_channels: int, out_channels: int, activation: str) -> tuple[bool, str]:
    """Whether the kernels take a block of these channels on x's device: (True, "") or (False, why not, in words)."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False, f"x is {x.dtype}, and the GPU kernels take float32, float16 and bfloat16"
    if activation not in ACTIVATIONS:
        return False, f"the activation is {activation!r}, and the GPU kernels know {', '.join(ACTIVATIONS)}"
    widest = max(in_channels, out_channels)
    if widest > WIDEST:
        return False, f"the block has {widest} channels at an end, and the GPU kernels hold at most {WIDEST}"
    if x.device.type != "cuda":
        return False, f"x is on {x.device.type}, no GPU"
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed"
    if torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] < 8:
        return False, f"{torch.cuda.get_device_name(x.device)} is older than compute capability 8.0"
    if out_channels > WIDEST_OUTPUT and has_little_shared_memory(x.device):
        return False, f"the block has {out_channels} outputs, and this GPU's shared memory has room for {WIDEST_OUTPUT}"
    return True, ""


def _late(name: str):
    def call(*args):
        from .host import ops

        with torch.autocast("cuda", enabled=False):  # the op has its own idea of what may be rounded
            return getattr(ops, name)(*args)

    return call


_library = torch.library.Library("proxyless_fast", "IMPL")
for _name in OPS:
    _library.impl(_name, _late(_name), "CUDA")
