"""The ops of csrc/schema.cpp for a GPU, in their arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .first_norm import gram_rows
from .group import rows_of
from .mbconv import mbconv, mbconv_backward
from .norms import move_running
from .probe import mbconv_probe, norm_dot

__all__ = ["gram", "mbconv", "mbconv_backward", "mbconv_probe", "norm_dot", "update_running"]


def gram(x: Tensor) -> tuple[Tensor, Tensor]:
    """proxyless_fast::gram, in float32: a covariance in half precision would be of no use."""
    return gram_rows(rows_of(x), torch.float32)


def update_running(
    statistics: Tensor, running: Sequence[Tensor], pixels_in: int, pixels_out: int, momentum: float
) -> None:
    """proxyless_fast::update_running: as torch's batch norm does, the variance unbiased."""
    move_running(statistics.split([r.shape[0] for r in running]), running, pixels_in, pixels_out, momentum)
