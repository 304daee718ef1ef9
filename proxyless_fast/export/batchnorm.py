"""Momentum and eps of a net's batch norms, which architectures record beside the operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn


def _norms(net: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def settings(net: nn.Module) -> list[dict[str, Any]]:
    """Momentum and eps of every batch norm, in order of registration; one entry alone where all agree."""
    found = [{"momentum": norm.momentum, "eps": norm.eps} for norm in _norms(net)]
    return found[:1] if all(entry == found[0] for entry in found) else found


def apply(net: nn.Module, entries: Sequence[Mapping[str, Any]]) -> None:
    """Undo `settings`; ValueError where there are neither one entry nor as many as the net has batch norms."""
    norms = _norms(net)
    if len(entries) not in (1, len(norms)):
        raise ValueError(f"bn must have one entry or {len(norms)}, got {len(entries)}")
    for i, norm in enumerate(norms):
        entry = entries[i % len(entries)]
        norm.momentum, norm.eps = entry["momentum"], entry["eps"]


def common(net: nn.Module) -> dict[str, Any]:
    """The settings that all batch norms of the net share; ValueError where they differ."""
    found = settings(net)
    if len(found) > 1:
        raise ValueError("net must have one momentum and one eps in all batch norms, got several")
    return found[0]
