"""When modules run as fused ops: what stands in the way, in words, and what the ops keep for backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn


class Norm(NamedTuple):
    """How the batch norms of a block run."""

    training: bool
    momentum: float
    eps: float


def norm_of(norms: Sequence[Any]) -> tuple[str, Norm | None]:
    """The common setting of some nn.BatchNorm2d: ("", Norm), or (why the fused ops cannot run them, None)."""
    settings = set()
    for bn in norms:
        if type(bn) is not nn.BatchNorm2d:
            return f"a norm is a {type(bn).__name__}, not an nn.BatchNorm2d", None
        if bn.weight is None or bn.bias is None or bn.running_mean is None or bn.momentum is None:
            return "a batch norm lacks weights, running statistics or a fixed momentum", None
        settings.add(Norm(bn.training, bn.momentum, bn.eps))
    if len(settings) != 1:
        return "the batch norms of the block differ in mode, momentum or eps", None
    return "", settings.pop()


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module would run hooks of a user."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
