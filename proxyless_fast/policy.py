"""What the fused blocks of a net keep for backward."""

from __future__ import annotations

from torch import nn

from .blocks import ConvLayer, MBConv
from .shapes import layers

POLICIES = ("fast", "lean", "auto", "off")


def set_policy(net: nn.Module, policy: str, *, budget: int | None = None, batch_size: int | None = None) -> None:
    """Choose for every fused block of a net what it keeps between forward and backward.

    "fast" (the default) keeps the depthwise output d beside the block's input and output; "lean" computes d again in
    backward; "off" runs module by module, as plain torch would. "auto" keeps d where that saves most work for its
    bytes, until the d of one sampled path may take `budget` bytes at `batch_size` images: it needs both, and a net of
    `proxyless_fast.spaces`. Blocks built later start with "fast".
    Raises ValueError for another policy, or a budget that is missing or not wanted.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    if (policy == "auto") != (budget is not None and batch_size is not None):
        raise ValueError(f"budget and batch_size belong to policy 'auto', both; got {budget!r} and {batch_size!r}")
    for module in net.modules():
        if isinstance(module, MBConv):
            module.policy = "lean" if policy == "auto" else policy
        elif isinstance(module, ConvLayer):
            module.policy = "off" if policy == "off" else "fast"
    if budget is not None and batch_size is not None:
        _spend(net, budget, batch_size)


def _spend(net: nn.Module, budget: int, batch_size: int) -> None:
    """Give "fast" to whole layers, those first whose d costs most multiply-accumulates a byte to compute again."""
    offers = []
    for layer in layers(net):
        blocks = [m for m in layer.modules if isinstance(m, MBConv)]
        shape = next((s for s in layer.choices if s is not None), None)
        if not blocks or shape is None:
            continue
        pixels = batch_size * shape.output[0] * shape.output[1]
        size = max(b.in_channels * b.expand_ratio * next(b.parameters()).element_size() for b in blocks) * pixels
        first = blocks[0]
        work = first.in_channels * first.stride**2 + max(b.kernel_size for b in blocks) ** 2  # for each value of d
        offers.append((work, size, blocks))
    for _, size, blocks in sorted(offers, key=lambda offer: -offer[0]):
        if size <= budget:
            budget -= size
            for block in blocks:
                block.policy = "fast"
