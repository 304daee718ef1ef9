"""The batch norms of a net as one pair of settings, which the official configs and ours record."""

from __future__ import annotations

from typing import Any

from torch import nn


def get_bn(net: nn.Module) -> dict[str, Any] | None:
    """Momentum and eps of the net's batch norms, taken from the first; None for a net without any."""
    first = next((module for module in net.modules() if isinstance(module, nn.BatchNorm2d)), None)
    return None if first is None else {"momentum": first.momentum, "eps": first.eps}


def set_bn(net: nn.Module, momentum: float, eps: float) -> None:
    """Set momentum and eps of every batch norm in the net."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum, module.eps = momentum, eps
