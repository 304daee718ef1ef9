"""A space for small images (28x28, 32x32): what `make search` uses."""

from __future__ import annotations

from collections.abc import Sequence

from .chain_net import MBCONVS, ChainNet, supernet


def small(
    num_classes: int = 10,
    in_channels: int = 1,
    resolution: int = 28,
    candidates: Sequence[str] = MBCONVS,
    dropout: float = 0.0,
) -> ChainNet:
    """Seven mixed ops in three stages of 24, 40 and 64 channels, the first two of which halve the image.

    The candidates are those of the ImageNet space; the stem keeps the resolution, which small images need.
    Raises ValueError for wrong arguments.
    """
    return supernet(
        num_classes=num_classes,
        in_channels=in_channels,
        resolution=resolution,
        first=(16, 1),
        first_block=16,
        stages=[(24, 2, 2), (40, 3, 2), (64, 2, 1)],
        last=256,
        candidates=candidates,
        dropout=dropout,
    )
