"""A whole MBConv: forward, and backward with all gradients or the input's alone (an arch step: frozen weights).

Saving "fast" keeps x, y and d, "lean" x and y. What each pass reads and writes is in docs/gpu.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import stencils
from .depthwise import depthwise, depthwise_backward, expand_depthwise, expand_depthwise_backward
from .expand import expand, expand_backward
from .first_norm import expand_moments, gram_rows
from .group import image_of, make_group, rows_of
from .norms import finish_gradient, finish_moments, normalise, norms_of, pair_sums
from .project import project, project_backward


def mbconv(
    x: Tensor,
    params: Sequence[Tensor],
    running: Sequence[Tensor],
    mean: Tensor | None,
    cov: Tensor | None,
    stride: int,
    activation: str,
    training: bool,
    eps: float,
    keep: int,
    shortcut: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """proxyless_fast::mbconv: out, y (keep >= 1), d (keep == 2), and the statistics of every norm."""
    group = make_group(x, [params], stride, activation)
    sizes = [2 * p.numel() for p in params[1::3]]
    statistics = group.empty(sum(sizes), dtype=torch.float64)
    *first, second, third = statistics.split(sizes)
    norm1 = norm2 = norm3 = None
    if not training:
        statistics.copy_(torch.cat(list(running)))
        norm1, norm2, norm3 = norms_of(statistics, params, eps)
    elif group.w1 is not None:
        if mean is None or cov is None:
            mean, cov = gram_rows(group.x)
        norm1 = expand_moments(group.w1, mean, cov, params[1], params[2], eps, first[0])
    d, partial, rows = expand_depthwise(group, norm1, moments=training)
    if training:
        _, norm2 = finish_moments(partial, rows, group.out_pixels, params[-5], params[-4], eps, second)
    assert norm2 is not None
    y, partial, rows = project(group, d, norm2, "train" if training or keep else "eval", norm3=norm3)
    if training:
        _, norm3 = finish_moments(partial, rows, group.out_pixels, params[-2], params[-1], eps, third)
    assert y is not None and norm3 is not None
    added = group.x if shortcut else None
    out = y
    if training or keep:
        out = normalise(y, norm3, added)
    elif added is not None:
        out = y.add_(added)
    size, none = group.out_size, group.empty(0)
    return (
        image_of(out, *size),
        image_of(y, *size) if keep >= 1 else none,
        image_of(d, *size) if keep == 2 else none,
        statistics,
    )


def mbconv_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    d: Tensor,
    statistics: Tensor,
    params: Sequence[Tensor],
    mean: Tensor | None,
    cov: Tensor | None,
    stride: int,
    activation: str,
    training: bool,
    eps: float,
    input: bool,
    weights: bool,
    shortcut: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """proxyless_fast::mbconv_backward: dx if `input`, and if `weights` the gradients of params in their order."""
    group = make_group(x, [params], stride, activation)
    g, y_rows = rows_of(grad.to(x.dtype)), rows_of(y)
    norm1, norm2, norm3 = norms_of(statistics, params, eps)
    lean, fused = d.numel() == 0, stencils.can_expand(group)
    e = expand(group, norm1) if (weights or lean) and not fused else None
    if not lean:
        d_rows = rows_of(d)
    elif e is not None:
        d_rows = depthwise(group, e, moments=False)[0]
    else:
        d_rows = expand_depthwise(group, norm1, moments=False)[0]

    third, affine3 = finish_gradient(pair_sums(g, y_rows, norm3), group.out_pixels, norm3, training)
    dz, dwp, second, affine2 = project_backward(group, d_rows, g, y_rows, norm2, affine3, training, weights)
    dtaps: Tensor | None
    if fused and weights:
        de, dtaps = expand_depthwise_backward(group, dz, d_rows, affine2, norm1)
    else:
        de, dtaps = depthwise_backward(group, dz, d_rows, affine2, e if weights else None, training)
    del dz, e
    first: list[Tensor] = []
    dx = de if input else None
    if norm1 is not None:
        dx, first = expand_backward(group, de, norm1, mean, cov, training, input, weights, g if shortcut else None)
    elif shortcut and dx is not None:
        dx = dx.add_(g)
    result = group.empty(0) if dx is None else image_of(dx, *group.size[:3])
    if dtaps is None or dwp is None:
        return result, []
    found = [*first, dtaps, *second, dwp, *third]
    return result, [t.reshape(p.shape).to(p.dtype) for t, p in zip(found, params, strict=True)]
