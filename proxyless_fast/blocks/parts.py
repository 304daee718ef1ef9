"""What the blocks are built of: checks of their sizes, convolutions, norms and activations by name."""

from __future__ import annotations

from torch import nn

from ..checks import check_positive
from ..ops.activation import ACTIVATIONS

BN_EPS, BN_MOMENTUM = 1e-3, 0.1  # the official set_bn_param defaults

_MODULES = {"relu6": nn.ReLU6, "relu": nn.ReLU, "silu": nn.SiLU, "hardswish": nn.Hardswish}


def activation(name: str) -> nn.Module:
    """The activation module called `name`: relu6, relu, silu, hardswish or identity. Raises ValueError for another."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return _MODULES[name](inplace=True) if name in _MODULES else nn.Identity()


def check_odd(kernel_size: int) -> None:
    """Raises ValueError where kernel_size is no positive odd integer."""
    check_positive(kernel_size=kernel_size)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")


def conv2d(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A "same"-padded convolution without bias."""
    padding = dilation * (kernel // 2)
    return nn.Conv2d(cin, cout, kernel, stride, padding, dilation=dilation, groups=groups, bias=False)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """A batch norm with the official momentum and eps."""
    return nn.BatchNorm2d(channels, eps=BN_EPS, momentum=BN_MOMENTUM)
