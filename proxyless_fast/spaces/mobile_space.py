"""The paper's ImageNet space."""

from __future__ import annotations

from collections.abc import Sequence

from .chain_net import MBCONVS, ChainNet, make_divisible, supernet

WIDTHS = (24, 40, 80, 96, 192, 320)
BLOCKS = (4, 4, 4, 4, 4, 1)
STRIDES = (2, 2, 2, 1, 2, 1)


def mobile(
    num_classes: int = 1000,
    width: float = 1.0,
    resolution: int = 224,
    in_channels: int = 3,
    candidates: Sequence[str] = MBCONVS,
    dropout: float = 0.0,
) -> ChainNet:
    """The paper's ImageNet supernet: 21 mixed ops over MBConvs 3, 5, 7 with expansion 3, 6, and Zero at shortcuts.

    width: multiplies every width, rounded to multiples of 8. resolution: side of the images, for costs and latencies.
    Source: paper section 4.2, official search/imagenet_arch_search.py and super_proxyless.py.
    Raises ValueError for wrong arguments.
    """
    if not width > 0:
        raise ValueError(f"width must be positive, got {width!r}")
    return supernet(
        num_classes=num_classes,
        in_channels=in_channels,
        resolution=resolution,
        first=(make_divisible(32 * width), 2),
        first_block=make_divisible(16 * width),
        stages=[(make_divisible(w * width), n, s) for w, n, s in zip(WIDTHS, BLOCKS, STRIDES, strict=True)],
        last=make_divisible(1280 * width) if width > 1 else 1280,
        candidates=candidates,
        dropout=dropout,
    )
