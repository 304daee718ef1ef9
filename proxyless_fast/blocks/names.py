"""Candidates by their official names."""

from __future__ import annotations

import re

from torch import nn

from ..checks import check_positive
from .conv import DepthConv, ReluConv
from .mbconv import MBConv
from .simple import Identity, Pool, Zero

_NAMES = (
    "{k}x{k}_MBConv{e} (k odd, e at least 1), Zero, Identity, 3x3_AvgPool, 3x3_MaxPool, {k}x{k}_DepthConv, "
    "3x3_DilatedDepthConv, {k}x{k}_Conv"
)
_PATTERN = re.compile(r"(\d+)x(\d+)_(MBConv|AvgPool|MaxPool|DepthConv|DilatedDepthConv|Conv)(\d*)", re.IGNORECASE)


def candidate(name: str, in_channels: int, out_channels: int, stride: int = 1, act: str = "relu6") -> nn.Module:
    """Build a candidate operation by its official name (official search/modules/mix_op.py and layers.py).

    name: "5x5_MBConv6" and the like, "Zero", "Identity", "3x3_AvgPool", "3x3_MaxPool", "3x3_DepthConv" (also 5x5 and
    7x7), "3x3_DilatedDepthConv" (the paper's CIFAR set), "1x1_Conv", "3x3_Conv" (NAS-Bench-201); case does not matter.
    act: of an MBConv; the other operations have none of their own. Raises ValueError for an unknown name, or sizes that
    the operation cannot have.
    """
    check_positive(in_channels=in_channels, out_channels=out_channels, stride=stride)
    if str(name).lower() == "zero":
        return Zero(stride, None if in_channels == out_channels else out_channels)
    if str(name).lower() == "identity":
        if stride != 1 or in_channels != out_channels:
            raise ValueError(
                f"Identity needs stride 1 and equal channels, got stride {stride}, {in_channels} -> {out_channels}"
            )
        return Identity()
    match = _PATTERN.fullmatch(str(name))
    kind = match[3].lower() if match else ""
    if match is None or match[1] != match[2] or (kind == "mbconv") != bool(match[4]):
        raise ValueError(f"candidate {name!r} is unknown; known are {_NAMES}")
    kernel = int(match[1])
    if kind == "mbconv":
        return MBConv(in_channels, out_channels, kernel, stride, int(match[4]), act)
    if kind in ("avgpool", "maxpool"):
        if in_channels != out_channels:
            raise ValueError(f"{name} keeps the channels, got {in_channels} -> {out_channels}")
        return Pool(kind[:3].capitalize(), in_channels, kernel, stride)
    if kind == "conv":
        return ReluConv(in_channels, out_channels, kernel, stride)
    return DepthConv(in_channels, out_channels, kernel, stride, dilation=2 if kind.startswith("dilated") else 1)
