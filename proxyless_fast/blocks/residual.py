"""The block around an operation: with or without a shortcut."""

from __future__ import annotations

from torch import Tensor, nn

from ..candidates import offered


class ResidualBlock(nn.Module):
    """One operation or a mixed op, with or without a shortcut (official MobileInvertedResidualBlock).

    With a shortcut, a Zero inside makes the block an identity that costs nothing.
    """

    def __init__(self, mobile_inverted_conv: nn.Module, shortcut: bool):
        super().__init__()
        self.mobile_inverted_conv = mobile_inverted_conv
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        op = self.mobile_inverted_conv
        if not self.shortcut:
            return op(x)
        run = offered(op, "with_shortcut")
        return op(x) + x if run is None else run(x)
