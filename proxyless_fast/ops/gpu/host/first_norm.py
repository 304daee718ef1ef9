"""The first norm, known before anything is expanded: statistics of x, and the small algebra with W1 that follows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import first_norm as kernels
from ..kernels import gram
from . import launch
from .configs import Config, padded
from .group import CandidateGroup

CORRECTION = Config({"BI": 32, "BC": 32}, 4, 2)


def gram_rows(x: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Mean (C,) and covariance (C, C) of rows x, computed in float64 and stored in `dtype`."""
    pixels, c = x.shape
    cfg = launch.config("gram", x, c, BC=c)
    size = cfg.tile["BC"]
    tiles = -(-c // size)
    rows, programs = launch.split(pixels, cfg, tiles * tiles, least=8 * c)
    sums = torch.empty(programs, c, dtype=torch.float32, device=x.device)
    seconds = torch.empty(programs, c, c, dtype=torch.float32, device=x.device)
    mean = torch.empty(c, dtype=dtype, device=x.device)
    cov = torch.empty(c, c, dtype=dtype, device=x.device)
    launch.run(
        gram.gram_partial_kernel, (programs, tiles, tiles), cfg, x, sums, seconds, pixels, rows, C=c,
        PRECISION=launch.precision(x.dtype),
    )  # fmt: skip
    small = Config({"BT": 64, "BC": min(64, padded(c))}, 4, 1)
    launch.run(
        gram.gram_finish_kernel, (c, -(-c // small.tile["BC"])), small, x, sums, seconds, mean, cov, programs, pixels,
        C=c,
    )  # fmt: skip
    return mean, cov


def inputs_config(ci: int) -> Config:
    """Of the small products with all inputs of some expanded channels at hand."""
    return Config({"BI": padded(ci), "BC": 16 if ci <= 64 else 8}, 4, 1)


def expand_moments(
    w1: Tensor, mean: Tensor | None, cov: Tensor | None, gamma: Tensor, beta: Tensor, eps: float, statistics: Tensor
) -> Tensor:
    """BN1 as the kernels read it, from mean and covariance of x; `statistics`, float64 (2 Ch,), gets its own."""
    assert mean is not None and cov is not None
    ch, ci = w1.shape
    norm = torch.empty(4, ch, dtype=torch.float32, device=w1.device)
    cfg = inputs_config(ci)
    launch.run(
        kernels.expand_moments_kernel, (-(-ch // cfg.tile["BC"]),), cfg, w1, mean, cov, gamma, beta, statistics, norm,
        EPS=eps, CI=ci, CH=ch, WIDE=w1.dtype == torch.float32,
    )  # fmt: skip
    return norm


def expand_correction(group: CandidateGroup, norm1: Tensor, dgamma: Tensor, dbeta: Tensor) -> tuple[Tensor, Tensor]:
    """What BN1's statistics take back from dX: a matrix (Ci, Ci), in x's dtype, and float32 (Ci,)."""
    assert group.w1 is not None
    ch, ci = group.w1.shape
    correction = group.empty(ci, ci)
    constant = group.empty(ci, dtype=torch.float32)
    tiles = -(-ci // CORRECTION.tile["BI"])
    launch.run(
        kernels.expand_correction_kernel, (tiles, tiles), CORRECTION, group.w1, norm1, dgamma, dbeta, correction,
        constant, group.pixels, CI=ci, CH=ch,
    )  # fmt: skip
    return correction, constant


def finish_weight(
    group: CandidateGroup, parts: Tensor, cov: Tensor | None, norm1: Tensor, dgamma: Tensor, training: bool
) -> Tensor:
    """dW1, float32 (Ch, Ci), from parts (any number, Ch, Ci) of A = q^T (x - mean)."""
    assert group.w1 is not None
    ch, ci = group.w1.shape
    wide = group.x.dtype == torch.float32
    total = parts.sum(0, dtype=torch.float64 if wide else torch.float32)
    dweight = group.empty(ch, ci, dtype=torch.float32)
    cfg = inputs_config(ci)
    launch.run(
        kernels.finish_weight_kernel, (-(-ch // cfg.tile["BC"]),), cfg, total, group.w1, cov, norm1, dgamma, dweight,
        CI=ci, CH=ch, TRAINING=training, WIDE=wide,
    )  # fmt: skip
    return dweight
