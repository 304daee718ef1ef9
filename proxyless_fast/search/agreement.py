"""What a search needs before it starts: one process, and net, latency and data that speak of the same images."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed
from torch import Tensor, nn

from ..checks import told, unwrapped

FIELDS = ("in_channels", "resolution", "num_classes")


def require_one_process() -> None:
    """Raises ValueError in one of several processes of a launcher: each would search, or train, by itself."""
    size = os.environ.get("WORLD_SIZE", "1")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        size = str(torch.distributed.get_world_size())
    if size != "1":
        raise ValueError(
            f"WORLD_SIZE: got {size} processes, expected one; each would search by itself and overwrite the others"
        )


def require_agreement(net: nn.Module, loader: Any, name: str) -> None:
    """Raises ValueError where a loader says of its images or classes what the net says otherwise.

    net and loader are asked for in_channels, resolution and num_classes; what either does not tell cannot differ.
    """
    for field in FIELDS:
        ours, theirs = told(unwrapped(net), field), told(loader, field)
        if ours is not None and theirs is not None and ours != theirs:
            raise ValueError(f"{name}: the loader's {field} is {theirs}, expected the net's, {ours}")


def require_images(net: nn.Module, inputs: Any, name: str) -> None:
    """Raises ValueError where a batch of images is of other channels or another size than the net says."""
    channels, side = (told(unwrapped(net), field) for field in FIELDS[:2])
    if channels is None or side is None or not isinstance(inputs, Tensor) or inputs.dim() != 4:
        return
    if tuple(inputs.shape[1:]) != (channels, side, side):
        raise ValueError(
            f"{name}: the images have shape {tuple(inputs.shape[1:])}, expected {(channels, side, side)}, of which the "
            "net's latency is"
        )
