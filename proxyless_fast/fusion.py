"""When blocks run as fused ops, why not, and what they keep for backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ._deprecated import renamed_arguments
from .costs import describe_layers

POLICIES = ("fast", "lean", "auto", "off")


class Norm(NamedTuple):
    """How the batch norms of a block run."""

    training: bool
    momentum: float
    eps: float


class FusedArguments(NamedTuple):
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


def parameter(module: nn.Module, name: str) -> Any:
    """module.name, past nn.Module's slow look-up where it is a plain parameter: a step asks for thousands."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


def count_batch(norms: Sequence[Any]) -> None:
    """Count one more batch in each of the norms, as their own forward does in training."""
    with torch.no_grad():
        torch._foreach_add_([bn._buffers["num_batches_tracked"] for bn in norms], 1)


class Fusible:
    """What a block is that can run as one op: a policy, and what it trades.

    policies: those that the block knows, the first of them its own. policy: what holds.
    """

    policies: tuple[str, ...] = ("fast", "off")
    policy = "fast"

    def recomputed(self) -> tuple[int, int] | None:
        """What "lean" trades per pixel of the output: (multiply-accumulates that compute one kept value again, kept
        values); None where there is nothing to trade."""
        return None


@renamed_arguments({"budget": "budget_bytes"})
def set_policy(net: nn.Module, policy: str, *, budget_bytes: int | None = None, batch_size: int | None = None) -> None:
    """Choose for every fused block of a net what it keeps between forward and backward.

    "fast" (the default) keeps the depthwise output d beside the block's input and output; "lean" computes d again in
    backward; "off" runs module by module, as plain torch would. "auto" keeps d where that saves most work for its
    bytes, until the d of one sampled path may take `budget_bytes` at `batch_size` images: it needs both, and a net of
    `proxyless_fast.spaces`. Blocks built later start with "fast".
    Raises ValueError for another policy, or a budget that is missing or not wanted.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    if (policy == "auto") != (budget_bytes is not None and batch_size is not None):
        raise ValueError(
            f"budget_bytes and batch_size belong to policy 'auto', both; got {budget_bytes!r} and {batch_size!r}"
        )
    wanted = "lean" if policy == "auto" else policy
    for module in net.modules():
        if isinstance(module, Fusible):
            module.policy = wanted if wanted in module.policies else module.policies[0]
    if budget_bytes is not None and batch_size is not None:
        _spend(net, budget_bytes, batch_size)


def _spend(net: nn.Module, budget_bytes: int, batch_size: int) -> None:
    """Give "fast" to whole layers, those first whose d costs most multiply-accumulates a byte to compute again."""
    offers = []
    for layer in describe_layers(net):
        trades = [(m, trade) for m in layer.modules if isinstance(m, Fusible) and (trade := m.recomputed()) is not None]
        if not trades or layer.output is None:
            continue
        pixels = batch_size * layer.output[0] * layer.output[1]
        bytes_ = max(kept * next(m.parameters()).element_size() for m, (_, kept) in trades) * pixels
        offers.append((max(macs for _, (macs, _) in trades), bytes_, [m for m, _ in trades]))
    for _, bytes_, blocks in sorted(offers, key=lambda offer: -offer[0]):
        if bytes_ <= budget_bytes:
            budget_bytes -= bytes_
            for block in blocks:
                block.policy = "fast"
