"""The layers of a net, with their shapes, as the latency code asks for them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..shapes import Layer


def layers_of(net: nn.Module) -> Sequence[Layer]:
    """`net.layers()`; ValueError for a net that cannot tell its layers."""
    layers = getattr(net, "layers", None)
    if not callable(layers):
        raise ValueError(f"net must be one of proxyless_fast.spaces or derived from one, got {type(net).__name__}")
    return layers()
