"""When blocks run as fused ops, why not, and what they keep for backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._deprecated import renamed_arguments
from .candidates import defined_with_forward
from .costs import describe_layers
from .reading import Convolution, Norm, Unreadable, common_norm

POLICIES = ("fast", "lean", "auto", "off")


class FusedArguments(NamedTuple):
    """What a fused op takes of a block, read once and kept while the block is as it was."""

    params: list[Tensor]
    running: list[Tensor]
    norms: list[nn.BatchNorm2d]
    norm: Norm
    stride: int
    activation: str
    shapes: list[torch.Size]

    def why_stale(self) -> str:
        """What was done to the weights behind the modules' back (`weight.data = ...`): empty if nothing was.

        Padding and groups were read beside weights of these shapes.
        """
        same = [p.shape for p in self.params] == self.shapes
        return "" if same else "a weight has another shape than when the block was read"


def gather(
    convs: Sequence[Convolution | None], norms: Sequence[nn.BatchNorm2d], stride: int, activation: str
) -> FusedArguments:
    """The tensors of convolutions (None: one that runs by itself) and their norms, in order.

    Raises Unreadable for tensors the kernels cannot take, or norms that differ.
    """
    params: list[Any] = []
    running: list[Any] = []
    for conv, bn in zip(convs, norms, strict=True):
        params += [] if conv is None else [conv.module._parameters["weight"]]
        params += [bn._parameters["weight"], bn._parameters["bias"]]
        running += [bn._buffers["running_mean"], bn._buffers["running_var"]]
    require_tensors([*params, *running])
    shapes = [p.shape for p in params]
    return FusedArguments(params, running, list(norms), common_norm(norms), stride, activation, shapes)


def require_tensors(tensors: Sequence[Any]) -> None:
    """Raises Unreadable where a tensor is of a type of its own, or lies elsewhere than the first of them."""
    for t in tensors:
        if type(t) not in (nn.Parameter, Tensor):
            raise Unreadable(f"a weight is a {type(t).__name__}, not a plain tensor")
        if t.device != tensors[0].device or t.dtype != tensors[0].dtype:
            raise Unreadable(f"its tensors are {tensors[0].dtype} on {tensors[0].device} and {t.dtype} on {t.device}")


def why_not_now(x: Any) -> str:
    """What stands in the way of any fused op at this call, whatever the block: empty if nothing does.

    An exported or traced net must run where this package is not installed: it is made of torch's own ops.
    """
    if not isinstance(x, Tensor):
        return f"x is a {type(x).__name__}, not a tensor"
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "the net is being exported, and a file of it must run without this package"
    return ""


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

    def fused(self, x: Tensor) -> tuple[bool, str]:
        """Whether the block's fused op takes x: (True, ""), or (False, why not, in words)."""
        if "forward" in self.__dict__ or not defined_with_forward(type(self), "_plan"):
            return False, "the block has a forward of its own"
        reason, _ = self._plan(x)
        return not reason, reason

    def _plan(self, x: Tensor) -> tuple[str, Any]:
        """("", what the op takes of the block), or (why it does not take x, None)."""
        raise NotImplementedError

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
