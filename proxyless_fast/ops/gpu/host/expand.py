"""The expand passes: e forward; dX, the share of dW1 and the first norm's sums backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import expand as kernels
from . import launch
from .configs import Config, padded
from .first_norm import expand_correction, finish_weight
from .group import CandidateGroup
from .norms import finish_gradient


def expand(group: CandidateGroup, norm1: Tensor | None) -> Tensor:
    """e (pixels, Ch): x itself where there is no expand convolution."""
    if group.w1 is None:
        return group.x
    ci = group.x.shape[1]
    e = group.empty(group.pixels, group.ch)
    cfg = launch.config("expand", e, group.ch, BN=group.ch, BK=ci)
    grid = (-(-group.pixels // cfg.tile["BM"]) * -(-group.ch // cfg.tile["BN"]),)
    launch.run(
        kernels.expand_kernel, grid, cfg, group.x, group.w1, norm1, e, group.pixels, CI=ci, CH=group.ch,
        ACT=group.activation, PRECISION=launch.precision(e.dtype),
    )  # fmt: skip
    return e


def expand_backward(
    group: CandidateGroup,
    de: Tensor,
    norm1: Tensor,
    mean: Tensor | None,
    cov: Tensor | None,
    training: bool,
    input: bool,
    weights: bool,
    shortcut: Tensor | None,
) -> tuple[Tensor | None, list[Tensor]]:
    """dx (rows), with the shortcut's gradient added, if `input`, and [dW1, dgamma1, dbeta1] if `weights`, from de."""
    if training and (mean is None or cov is None):
        raise ValueError("mbconv_backward: mean and cov of x are needed in training, got None")
    centre = torch.zeros(group.x.shape[1], device=group.x.device) if mean is None else mean.float()
    shares, parts, sums = _passes(group, de, norm1, centre, input, weights)
    (dgamma, dbeta), _ = finish_gradient(sums, group.pixels, norm1, training)
    dx = None
    if input and shares is not None:
        correction = expand_correction(group, norm1, dgamma, dbeta) if training else (None, None)
        dx = _finish_input(group, shares, centre, correction, shortcut)
    if parts is None:
        return dx, []
    return dx, [finish_weight(group, parts, cov, norm1, dgamma, training), dgamma, dbeta]


def _passes(
    group: CandidateGroup, de: Tensor, norm1: Tensor, centre: Tensor, input: bool, weights: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Shares of dX (shares, pixels, Ci), parts of A (parts, Ch, Ci), partial sums of q: one pass over de, or two."""
    ci = group.x.shape[1]
    once = launch.config("expand_once", de, ci, BC=group.ch)
    # One pass for everything, unless the shares of dX, one for each group of channels, are more than de itself.
    if input and weights and 2 * ci <= once.tile["BC"]:
        return _weight_pass(group, de, norm1, centre, once, with_input=True, with_sums=True)
    # Without tensor cores a tile of a wide A does not fit into registers: q is left in memory for a library's product.
    library = weights and group.x.dtype == torch.float32 and ci > 64
    dx = sums = None
    if input or library:
        dx, sums = _input_pass(group, de, norm1, keep=library)
    if library:
        parts = (de.t() @ (group.x - centre))[None]
    elif weights:
        cfg = launch.config("expand_weight", de, ci, BC=group.ch)
        _, parts, own = _weight_pass(group, de, norm1, centre, cfg, with_input=False, with_sums=sums is None)
        sums = own if sums is None else sums
    else:
        parts = None
    assert sums is not None
    return dx, parts, sums


def _constants(group: CandidateGroup) -> dict[str, Any]:
    ci = group.x.shape[1]
    precision = launch.precision(group.x.dtype)
    return {"CI": ci, "CH": group.ch, "ACT": group.activation, "PRECISION": precision, "BI": padded(ci)}


def _input_pass(group: CandidateGroup, de: Tensor, norm1: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """dX before the statistics' part, as one share (1, pixels, Ci), and partial sums of q; keep: q takes de's place."""
    ci = group.x.shape[1]
    cfg = launch.config("expand_input", de, ci, BC=group.ch)
    programs = -(-group.pixels // cfg.tile["BM"])
    dx = group.empty(1, group.pixels, ci)
    sums = group.empty(programs, 2, group.ch, dtype=torch.float32)
    launch.run(
        kernels.expand_input_kernel, (programs,), cfg, de, group.x, group.w1, norm1, dx, sums, de if keep else None,
        group.pixels, **_constants(group),
    )  # fmt: skip
    return dx, sums


def _weight_pass(
    group: CandidateGroup,
    de: Tensor,
    norm1: Tensor,
    centre: Tensor,
    cfg: Config,
    with_input: bool,
    with_sums: bool,
) -> tuple[Tensor | None, Tensor, Any]:
    """Shares of dX if `with_input`, one for each group of channels, parts of A, and partial sums if `with_sums`."""
    ci = group.x.shape[1]
    columns = -(-group.ch // cfg.tile["BC"])
    rows, programs = launch.split(group.pixels, cfg, columns, least=4 * ci)
    sums = group.empty(programs, 2, group.ch, dtype=torch.float32) if with_sums else None
    shares = group.empty(columns, group.pixels, ci) if with_input else None
    parts = group.empty(programs, group.ch, ci, dtype=torch.float32)
    launch.run(
        kernels.expand_backward_kernel, (programs * columns,), cfg, de, group.x, centre, group.w1, norm1, shares, sums,
        parts, group.pixels, rows, **_constants(group),
    )  # fmt: skip
    return shares, parts, sums


def _finish_input(
    group: CandidateGroup,
    shares: Tensor,
    centre: Tensor,
    correction: tuple[Tensor, Tensor] | tuple[None, None],
    shortcut: Tensor | None,
) -> Tensor:
    """dX, rows, from its shares, what the first norm's statistics take back, and the shortcut's gradient."""
    x, ci = group.x, group.x.shape[1]
    dx = torch.empty_like(x)
    cfg = launch.config("finish_input", x, ci, BN=ci, BK=ci)
    grid = (-(-group.pixels // cfg.tile["BM"]) * -(-ci // cfg.tile["BN"]),)
    launch.run(
        kernels.finish_input_kernel, grid, cfg, shares, x, centre, *correction, shortcut, dx, group.pixels, CI=ci,
        PARTS=shares.shape[0], PRECISION=launch.precision(x.dtype),
    )  # fmt: skip
    return dx
