"""The project passes: y and the sums of its norm forward; dz, dWp and BN2's sums backward."""

from __future__ import annotations

from functools import lru_cache
from math import gcd

import torch
from torch import Tensor

from ..kernels import project as kernels
from ..kernels.partial import merge_partials_kernel
from . import launch
from .configs import padded
from .group import CandidateGroup
from .norms import SMALL, finish_gradient

# Partial moments up to this many are left to the last stage; more are merged first, in groups.
MOST_TILES = 1024
# Output channels whose share of dWp fits into a program's registers beside dz; with more, dWp has launches of its own.
MOST_OUTPUTS = 256


@lru_cache(maxsize=4096)
def _offsets(values: tuple[int, ...], device: torch.device) -> Tensor:
    # Kept, because a copy from the host would make every step wait for it.
    return torch.tensor(values, dtype=torch.int32, device=device)


def project(
    group: CandidateGroup,
    d: Tensor,
    norm2: Tensor,
    mode: str,
    grad: Tensor | None = None,
    norm3: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, int]:
    """(y, partial, rows) of one pass over d: mode "train", "probe" or "eval" (kernels/project.py)."""
    co, ch = group.wp.shape
    bounds = (*(first for first, _, _ in group.taps), ch)
    cfg = launch.config("project", d, co, BN=co, BK=ch)
    rows = cfg.tile["BM"]
    tiles, candidates = -(-group.out_pixels // rows), len(group.taps)
    y = None if mode == "probe" else group.empty(group.out_pixels, co)
    parts = {"train": 2, "probe": 4, "eval": 0}[mode]
    partial = group.empty(candidates, tiles, parts, co, dtype=torch.float32) if parts else None
    launch.run(
        kernels.project_kernel, (tiles * -(-co // cfg.tile["BN"]), candidates), cfg, d, norm2, group.wp,
        _offsets(bounds, d.device), y, grad, norm3, partial, group.out_pixels, tiles, CH=ch, CO=co,
        ACT=group.activation, MODE=mode, PRECISION=launch.precision(d.dtype), ALIGN=gcd(16, *bounds),
    )  # fmt: skip
    if partial is not None and tiles > MOST_TILES:
        partial, rows = _merge(partial, group.out_pixels, rows)
    return y, partial, rows


def _merge(partial: Tensor, pixels: int, rows: int) -> tuple[Tensor, int]:
    """Partial sums (candidates, tiles, parts, C) of `rows` rows each in fewer tiles, and the rows of each of those."""
    candidates, tiles, parts, c = partial.shape
    together = -(-tiles // MOST_TILES) * 8
    fewer = -(-tiles // together)
    merged = torch.empty(candidates, fewer, parts, c, dtype=torch.float32, device=partial.device)
    launch.run(
        merge_partials_kernel, (fewer, -(-c // 16), candidates), SMALL, partial, merged, tiles, pixels, rows, together,
        fewer, PARTS=parts, C=c,
    )  # fmt: skip
    return merged, rows * together


def project_backward(
    group: CandidateGroup,
    d: Tensor,
    g: Tensor,
    y: Tensor,
    norm2: Tensor,
    affine3: Tensor,
    training: bool,
    weights: bool,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor], Tensor]:
    """dz, dWp if `weights`, BN2's (dgamma, dbeta) and its backward as an affine: one pass over d."""
    co, ch = group.wp.shape
    dz = torch.empty_like(d)

    def run(with_dz: bool, with_weights: bool, first: int, channels: int) -> tuple[Tensor | None, Tensor | None]:
        cfg = launch.config("project_backward", d, channels, BC=ch)
        columns = -(-ch // cfg.tile["BC"])
        rows, programs = launch.split(group.out_pixels, cfg, columns, least=4 * co if with_weights else 1)
        partial = group.empty(programs, 2, ch, dtype=torch.float32) if with_dz else None
        parts = group.empty(programs, channels, ch, dtype=torch.float32) if with_weights else None
        launch.run(
            kernels.project_backward_kernel, (programs * columns,), cfg, d, norm2, g, y, affine3, group.wp,
            dz if with_dz else None, partial, parts, group.out_pixels, rows, CH=ch, CO=co, ACT=group.activation,
            TRAINING=training, FIRST=first, PRECISION=launch.precision(d.dtype), BN=padded(channels),
        )  # fmt: skip
        return partial, None if parts is None else parts.sum(0)

    together = weights and co <= MOST_OUTPUTS
    partial, dwp = run(True, together, 0, co)
    if weights and not together:
        firsts = range(0, co, MOST_OUTPUTS)
        shares = [run(False, True, first, min(MOST_OUTPUTS, co - first))[1] for first in firsts]
        dwp = torch.cat([share for share in shares if share is not None])
    assert partial is not None
    second, affine2 = finish_gradient(partial, group.out_pixels, norm2, training)
    return dz, dwp, second, affine2
