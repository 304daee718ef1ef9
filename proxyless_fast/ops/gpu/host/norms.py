"""Batch norms: from statistics or partial sums to what the kernels read, and the narrow passes over y."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import norm as kernels
from . import launch
from .configs import Config, padded

SMALL = Config({"BT": 64, "BC": 16}, 4, 1)
NARROW = Config({"BC": 16}, 1, 1)


class Moments(NamedTuple):
    """Mean and variance (C,) of a tensor, finished: what the CUDA C++ stencils give in place of partial moments."""

    mean: Tensor
    var: Tensor


def norm_from(
    mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, eps: float, statistics: Tensor | None = None
) -> Tensor:
    """The norm, float32 (4, C) as the kernels read it (common.py), of these statistics; they are written out too."""
    c = mean.shape[0]
    norm = torch.empty(4, c, dtype=torch.float32, device=mean.device)
    launch.run(
        kernels.norm_from_kernel, (-(-c // 16),), NARROW, mean, var, gamma, beta, statistics, norm, EPS=eps, C=c,
    )  # fmt: skip
    return norm


def norms_of(statistics: Tensor, params: Sequence[Tensor], eps: float) -> tuple[Tensor | None, Tensor, Tensor]:
    """The norms of a block, in order, from its statistics vector: one launch."""
    ch, co = params[-5].numel(), params[-2].numel()
    sizes = [4 * ch] * (len(params) // 3 - 1) + [4 * co]
    memory = torch.empty(sum(sizes), dtype=torch.float32, device=statistics.device)
    norms = [norm.view(4, -1) for norm in memory.split(sizes)]
    first = (params[1], params[2], norms[0]) if len(sizes) == 3 else (None, None, None)
    launch.run(
        kernels.norms_of_block_kernel, (-(-max(ch, co) // 16), 3), NARROW, statistics, *first[:2], *params[-5:-3],
        *params[-2:], first[2], *norms[-2:], EPS=eps, CH=ch, CO=co,
    )  # fmt: skip
    return first[2], norms[-2], norms[-1]


def finish_moments(
    partial: Tensor | Moments | None,
    rows: int,
    pixels: int,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    statistics: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Statistics, float64 (2, C), and norm, float32 (4, C), from partial moments (..., 2, C) of `rows` rows each.

    statistics: where to write them, any shape; else a new tensor.
    """
    assert partial is not None
    c = gamma.numel()
    device = gamma.device
    if statistics is None:
        statistics = torch.empty(2, c, dtype=torch.float64, device=device)
    if isinstance(partial, Moments):
        return statistics, norm_from(*partial, gamma, beta, eps, statistics)
    partial = partial.flatten(0, -3)
    norm = torch.empty(4, c, dtype=torch.float32, device=device)
    launch.run(
        kernels.finish_moments_kernel, (-(-c // 16),), SMALL, partial, gamma, beta, statistics, norm, partial.shape[0],
        pixels, rows, EPS=eps, C=c,
    )  # fmt: skip
    return statistics, norm


def finish_gradient(partial: Tensor, pixels: int, norm: Tensor, training: bool) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """((dgamma, dbeta), affine) of a norm whose partial sums these are (kernels/norm.py)."""
    c = partial.shape[-1]
    dgamma, dbeta = (torch.empty(c, dtype=torch.float32, device=partial.device) for _ in range(2))
    affine = torch.empty(4, c, dtype=torch.float32, device=partial.device)
    launch.run(
        kernels.finish_gradient_kernel, (-(-c // 16),), SMALL, partial, norm, dgamma, dbeta, affine, partial.shape[0],
        pixels, TRAINING=training, C=c,
    )  # fmt: skip
    return (dgamma, dbeta), affine


def normalise(y: Tensor, norm: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """BN(y), plus the shortcut where there is one: rows."""
    pixels, c = y.shape
    out = torch.empty_like(y)
    cfg = launch.config("rows", y, c)
    cfg = cfg._replace(tile=cfg.tile | {"BC": padded(c)})
    grid = (-(-pixels // cfg.tile["BM"]),)
    launch.run(kernels.normalise_kernel, grid, cfg, y, norm, shortcut, out, pixels, C=c)
    return out


def pair_sums(g: Tensor, v: Tensor, mean: Tensor) -> Tensor:
    """Partial sums (programs, 2, C) of g and of g (v - mean) over rows; mean (C,), or more, of which C are read."""
    pixels, c = g.shape
    cfg = launch.config("rows", g, c)
    cfg = cfg._replace(tile=cfg.tile | {"BC": padded(c)})
    rows, programs = launch.split(pixels, cfg)
    partial = torch.empty(programs, 2, c, dtype=torch.float32, device=g.device)
    launch.run(kernels.pair_sums_kernel, (programs,), cfg, g, v, mean, partial, pixels, rows, C=c)
    return partial


def move_running(
    moments: Sequence[Tensor], running: Sequence[Tensor], pixels_in: int, pixels_out: int, momentum: float
) -> None:
    """Mean and variance of one, two or three norms, in order; the first of three has pixels_in pixels."""
    norms = [(*moments[i : i + 2], *running[i : i + 2]) for i in range(0, len(running), 2)]
    missing = [(None,) * 4] * (3 - len(norms))
    widest = max(r.shape[0] for r in running)
    launch.run(
        kernels.update_running_kernel, (-(-widest // 64), 3), Config({"BC": 64}, 2, 1),
        *(t for norm in (*missing, *norms) for t in norm), pixels_in, pixels_out, MOMENTUM=momentum,
        CH=running[-4].shape[0] if len(norms) > 1 else 0, CO=running[-1].shape[0],
    )  # fmt: skip
