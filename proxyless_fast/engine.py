"""When modules run as fused ops: what stands in the way, in words, and what the ops keep for backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn


class Norm(NamedTuple):
    """How the batch norms of a block run."""

    training: bool
    momentum: float
    eps: float


class Fused(NamedTuple):
    """What a fused op takes of a block, gathered once: a step asks it of a hundred blocks."""

    params: list[Any]
    running: list[Any]
    norms: list[Any]
    norm: Norm


def norm_of(norms: Sequence[Any]) -> tuple[str, Norm | None]:
    """The common setting of some nn.BatchNorm2d: ("", Norm), or (why the fused ops cannot run them, None)."""
    common = None
    for bn in norms:
        if type(bn) is not nn.BatchNorm2d:
            return f"a norm is a {type(bn).__name__}, not an nn.BatchNorm2d", None
        if not bn.affine or bn._buffers["running_mean"] is None or bn.momentum is None:
            return "a batch norm lacks weights, running statistics or a fixed momentum", None
        own = (bn.training, bn.momentum, bn.eps)
        if common is not None and own != common:
            return "the batch norms of the block differ in mode, momentum or eps", None
        common = own
    return ("", Norm(*common)) if common is not None else ("there is no batch norm", None)


def has_hooks(*modules: Any) -> bool:
    """Whether calling one of the modules would run hooks of a user."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)


def parameter(module: nn.Module, name: str) -> Any:
    """module.name, past nn.Module's slow look-up where it is a plain parameter: a step asks for thousands."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


def count_batch(norms: Sequence[Any]) -> None:
    """Count one more batch in each of the norms, as their own forward does in training."""
    with torch.no_grad():
        torch._foreach_add_([bn._buffers["num_batches_tracked"] for bn in norms], 1)
