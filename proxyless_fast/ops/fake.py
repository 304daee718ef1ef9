"""Fake kernels: shapes without values, for meta tensors and torch.compile, held to one device as the real ones are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

IMAGES = ("x", "y", "grad", "dz")  # arguments of shape (batch, channels, height, width)


def fake(op: str) -> Callable[[Callable], Callable]:
    """Registers what follows as the fake kernel of proxyless_fast::op. The parameters are named as in the schema."""

    def register(function: Callable) -> Callable:
        signature = inspect.signature(function)

        def checked(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            _require_one_device(op, given)
            for name in IMAGES:
                if isinstance(given.get(name), Tensor) and given[name].dim() != 4:
                    shape = tuple(given[name].shape)
                    raise ValueError(f"{op}: {name} must have shape (batch, channels, height, width), got {shape}")
            if given.get("stride", 1) < 1:
                raise ValueError(f"{op}: stride must be positive, got {given['stride']}")
            return function(*args, **kwargs)

        torch.library.register_fake(f"proxyless_fast::{op}")(checked)
        return function

    return register


def _require_one_device(op: str, given: dict[str, Any]) -> None:
    """A meta tensor beside others would be computed with all the same: into one without values, or with any."""
    first: tuple[str, torch.device] | None = None
    for name, value in given.items():
        for tensor in pytree.tree_leaves(value):
            if not isinstance(tensor, Tensor):
                continue
            if first is not None and tensor.device != first[1]:
                raise ValueError(f"{op}: {name} must be on {first[1]}, as {first[0]} is, got one on {tensor.device}")
            first = first or (name, tensor.device)
