"""The depthwise passes, by the CUDA C++ stencils where they can, else by Triton's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import depthwise as kernels
from . import launch, stencils
from .configs import padded
from .expand import expand
from .group import CandidateGroup, image_of, rows_of
from .norms import Moments


def depthwise(group: CandidateGroup, e: Tensor, moments: bool) -> tuple[Tensor, Tensor | Moments | None, int]:
    """d (out pixels, Ch), and if wanted its partial moments with the rows that each is of."""
    if stencils.can_take(e, [k for _, k, _ in group.taps], group.stride):
        d, mean, var = torch.ops.proxyless_fast.depthwise_forward(
            image_of(e, *group.size[:3]), group.all_taps, None, None, group.stride
        )
        return rows_of(d), Moments(mean, var) if moments else None, group.out_pixels
    d = group.empty(group.out_pixels, group.ch)
    cfg = launch.config("depthwise", e, group.ch, BC=group.ch)
    rows, programs = launch.split(group.out_pixels, cfg, -(-group.ch // cfg.tile["BC"]))
    partial = group.empty(programs, 2, group.ch, dtype=torch.float32) if moments else None
    for first, k, taps in group.taps:
        c = taps.shape[0]
        part = None if partial is None else partial[:, :, first : first + c]
        launch.run(
            kernels.depthwise_kernel, (programs, -(-c // cfg.tile["BC"])), cfg, e[:, first : first + c], taps,
            d[:, first : first + c], part, group.out_pixels, rows, *group.size[1:], E_STRIDE=e.shape[1],
            D_STRIDE=group.ch, P_STRIDE=group.ch, C=c, K=k, STRIDE=group.stride,
        )  # fmt: skip
    return d, partial, rows


def expand_depthwise(
    group: CandidateGroup, norm1: Tensor | None, moments: bool
) -> tuple[Tensor, Tensor | Moments | None, int]:
    """`depthwise` of `expand`, in one launch where that pays."""
    if not stencils.can_expand(group):
        return depthwise(group, expand(group, norm1), moments)
    assert group.w1 is not None and norm1 is not None
    x = image_of(group.x, *group.size[:3])
    d, mean, var = torch.ops.proxyless_fast.expand_depthwise_forward(
        x, group.w1, norm1, group.all_taps, group.stride, group.activation
    )
    return rows_of(d), Moments(mean, var) if moments else None, group.out_pixels


def depthwise_backward(
    group: CandidateGroup, dz: Tensor, d: Tensor, affine2: Tensor, e: Tensor | None, training: bool
) -> tuple[Tensor, Tensor | None]:
    """de, and where e is given the gradient of the taps."""
    ((_, k, taps),) = group.taps
    if stencils.can_take(dz, [k], group.stride):
        return _by_stencil(group, dz, d, affine2, e)
    cfg = launch.config("depthwise_backward", dz, group.ch, BC=group.ch)
    columns = -(-group.ch // cfg.tile["BC"])
    de, partial = group.empty(group.pixels, group.ch), None
    rows = cfg.tile["BM"]
    programs = -(-group.pixels // rows)
    if e is not None:
        rows, programs = launch.split(group.pixels, cfg, columns, least=16 * k * k)
        partial = group.empty(programs, k * k, group.ch, dtype=torch.float32)
    launch.run(
        kernels.depthwise_backward_kernel, (programs, columns), cfg, dz, d, affine2, taps, e, de, partial, group.pixels,
        rows, *group.size[1:], C=group.ch, K=k, STRIDE=group.stride, TRAINING=training, BT=padded(k * k),
    )  # fmt: skip
    return de, None if partial is None else partial.sum(0).t()


def _by_stencil(
    group: CandidateGroup, dz: Tensor, d: Tensor, affine2: Tensor, e: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    gradient = _gradient(group, dz, d, affine2)
    if e is None:  # of the input the stencil needs only the shape then
        like = image_of(group.empty(group.pixels, group.ch), *group.size[:3])
        q = torch.ops.proxyless_fast.depthwise_backward_input(
            *gradient, like, None, None, group.all_taps, group.stride, False
        )
        return rows_of(q), None
    q, dtaps = torch.ops.proxyless_fast.depthwise_backward(
        *gradient, image_of(e, *group.size[:3]), None, None, group.all_taps, group.stride, False
    )
    return rows_of(q), dtaps


def expand_depthwise_backward(
    group: CandidateGroup, dz: Tensor, d: Tensor, affine2: Tensor, norm1: Tensor | None
) -> tuple[Tensor, Tensor]:
    """de and the gradient of the taps, e made again in shared memory."""
    assert group.w1 is not None and norm1 is not None
    de, dtaps = torch.ops.proxyless_fast.expand_depthwise_backward(
        *_gradient(group, dz, d, affine2), image_of(group.x, *group.size[:3]), group.w1, norm1, group.all_taps,
        group.stride, group.activation,
    )  # fmt: skip
    return rows_of(de), dtaps


def _gradient(group: CandidateGroup, dz: Tensor, d: Tensor, affine2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dz, d and BN2's backward as the stencils take them."""
    return image_of(dz, *group.out_size), image_of(d, *group.out_size), affine2
