"""The ops of csrc/schema.cpp for a GPU, in their arguments: a whole MBConv forward, its backward, and probes.

Saving "fast" keeps x, y and d, "lean" x and y. What each pass reads and writes is in docs/gpu.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import launch, passes
from . import norm as nm
from . import probe as pb
from .configs import Config, padded
from .gradients import mbconv_backward
from .passes import (
    Block,
    expand_depthwise,
    expand_moments,
    finish_moments,
    gram_rows,
    image_of,
    make_block,
    norm_from,
    normalise,
    norms_of,
    pair_sums,
    project,
    rows_of,
)

__all__ = ["gram", "mbconv", "mbconv_backward", "mbconv_probe", "norm_dot", "update_running"]

# A layer's candidates are probed together as long as their wide tensors fit into what one of them may need anyway, so
# that memory does not grow with their number; below this many bytes they always are.
WORKSPACE = 64 << 20


def gram(x: Tensor) -> tuple[Tensor, Tensor]:
    """proxyless_fast::gram, in float32: a covariance in half precision would be of no use."""
    return gram_rows(rows_of(x), torch.float32)


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
    block = make_block(x, [params], stride, activation)
    sizes = [2 * p.numel() for p in params[1::3]]
    statistics = block.empty(sum(sizes), dtype=torch.float64)
    *first, second, third = statistics.split(sizes)
    norm1 = norm2 = norm3 = None
    if not training:
        statistics.copy_(torch.cat(list(running)))
        norm1, norm2, norm3 = norms_of(statistics, params, eps)
    elif block.w1 is not None:
        if mean is None or cov is None:
            mean, cov = gram_rows(block.x)
        norm1 = expand_moments(block.w1, mean, cov, params[1], params[2], eps, first[0])
    d, partial, rows = expand_depthwise(block, norm1, moments=training)
    if training:
        _, norm2 = finish_moments(partial, rows, block.out_pixels, params[-5], params[-4], eps, second)
    assert norm2 is not None
    y, partial, rows = project(block, d, norm2, "train" if training or keep else "eval", norm3=norm3)
    if training:
        _, norm3 = finish_moments(partial, rows, block.out_pixels, params[-2], params[-1], eps, third)
    assert y is not None and norm3 is not None
    added = block.x if shortcut else None
    out = y
    if training or keep:
        out = normalise(y, norm3, added)
    elif added is not None:
        out = y.add_(added)
    size, none = (block.size[0], *block.size[3:]), block.empty(0)
    return (
        image_of(out, *size),
        image_of(y, *size) if keep >= 1 else none,
        image_of(d, *size) if keep == 2 else none,
        statistics,
    )


def mbconv_probe(
    x: Tensor,
    grad: Tensor,
    params: Sequence[Tensor],
    running: Sequence[Tensor],
    sizes: Sequence[int],
    mean: Tensor | None,
    cov: Tensor | None,
    stride: int,
    activation: str,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """proxyless_fast::mbconv_probe: <grad, o_j(x)> of every candidate, in x's dtype; their running statistics move."""
    own, ends = [], 0
    for size in sizes:
        own.append(list(params[ends : ends + size]))
        ends += size
    counts = [2 * size // 3 for size in sizes]
    buffers = [list(running[sum(counts[:j]) : sum(counts[: j + 1])]) for j in range(len(sizes))] if running else []
    rows, g = rows_of(x), rows_of(grad.to(x.dtype))
    if training and (mean is None or cov is None) and any(size == 9 for size in sizes):
        mean, cov = gram_rows(rows)
    order: list[int] = []
    gates = torch.empty(len(own), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for group in probe_groups(x, own, stride):
        block = make_block(x, [own[j] for j in group], stride, activation)
        mine, theirs = [own[j] for j in group], [buffers[j] for j in group] if buffers else []
        to = gates[len(order) : len(order) + len(group)]
        statistics = _probe(block, g, mine, theirs, mean, cov, training, eps, to)
        order += group
        if training and buffers:
            for moments, moved in zip(statistics, theirs, strict=True):
                _move_running(moments, moved, block.pixels, block.out_pixels, momentum)
    if order == sorted(order):
        return gates
    places = sorted(range(len(order)), key=order.__getitem__)
    return torch.stack([gates[i] for i in places])


def probe_groups(x: Tensor, params: Sequence[Sequence[Tensor]], stride: int) -> list[list[int]]:
    """Candidates that are probed in the same launches: as many as WORKSPACE allows, all with an expand convolution.

    The CUDA C++ stencils want whole tensors, so with them the candidates of a group have one kernel size.
    """
    sizes = [p[-6].shape[-1] for p in params]
    order = list(range(len(params)))
    apart = any(passes.stencils(x, [k], stride) for k in sizes)
    if apart:
        order.sort(key=lambda j: sizes[j])
    batch, _, height, width = x.shape
    pixels = batch * height * width + batch * ((height - 1) // stride + 1) * ((width - 1) // stride + 1)
    need = [pixels * p[-6].shape[0] * x.element_size() for p in params]
    budget = max(WORKSPACE, *need)
    groups: list[list[int]] = []
    used = 0
    for j in order:
        last = groups[-1][0] if groups else j
        fits = used + need[j] <= budget and len(params[j]) == len(params[last]) == 9
        if not groups or not fits or (apart and sizes[j] != sizes[last]):
            groups.append([])
            used = 0
        groups[-1].append(j)
        used += need[j]
    return groups


def _probe(
    block: Block,
    g: Tensor,
    params: Sequence[Sequence[Tensor]],
    running: Sequence[Sequence[Tensor]],
    mean: Tensor | None,
    cov: Tensor | None,
    training: bool,
    eps: float,
    gates: Tensor,
) -> list[list[Tensor]]:
    """Writes gates (candidates,); returns mean and variance of each norm of each candidate, in order."""
    n, co, ch = len(params), block.wp.shape[0], block.ch
    widths = [p[-6].shape[0] for p in params]
    gamma1, beta1, gamma2, beta2, gamma3, beta3 = _side_by_side(params)
    statistics = block.empty(3, 2, ch, dtype=torch.float64)
    third = block.empty(n, 2, co, dtype=torch.float64)
    norm1 = None
    if not training:
        moved = [torch.cat([r[i] for r in running]) for i in range(len(running[0]) - 2)]
        norm2 = norm_from(moved[-2], moved[-1], gamma2, beta2, eps)
        if block.w1 is not None:
            norm1 = norm_from(moved[0], moved[1], gamma1, beta1, eps)
        third.copy_(torch.cat([r[i] for r in running for i in (-2, -1)]).view(n, 2, co))
    elif block.w1 is not None:
        norm1 = expand_moments(block.w1, mean, cov, gamma1, beta1, eps, statistics[0])
    d, partial, rows = expand_depthwise(block, norm1, moments=training)
    if training:
        _, norm2 = finish_moments(partial, rows, block.out_pixels, gamma2, beta2, eps, statistics[1])
    _, partial, rows = project(block, d, norm2, "probe", grad=g)
    assert partial is not None
    small = Config({"BT": 16, "BC": padded(co)}, 4, 1)
    launch.run(
        pb.finish_probe, (n,), small, partial, gamma3, beta3, third, gates, partial.shape[1], block.out_pixels,
        rows, EPS=eps, TRAINING=training, C=co,
    )  # fmt: skip
    wide = statistics[1 - (block.w1 is not None) : 2].flatten(0, 1)
    columns = [row.split(widths) for row in wide.unbind()] + [third[:, 0].unbind(), third[:, 1].unbind()]
    return [list(candidate) for candidate in zip(*columns, strict=True)]


def _side_by_side(params: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """gamma and beta of each norm, those of all candidates one after the other; BN1's are empty without expand."""
    each = [[p[i] for p in params] if -i <= len(params[0]) else [] for i in (-8, -7, -5, -4, -2, -1)]
    if len(params) == 1:
        empty = params[0][-1].new_empty(0)
        return [vectors[0] if vectors else empty for vectors in each]
    # One launch for all, each vector on its own 16 bytes' boundary, as the compiled kernels expect.
    sizes = [sum(v.numel() for v in vectors) for vectors in each]
    gaps = [-size % 8 for size in sizes]
    pads = [each[-1][0].new_empty(gap) for gap in gaps]
    joined = torch.cat([v for vectors, pad in zip(each, pads, strict=True) for v in (*vectors, pad)])
    pieces = joined.split([length for pair in zip(sizes, gaps, strict=True) for length in pair])
    return list(pieces[::2])


def update_running(
    statistics: Tensor, running: Sequence[Tensor], pixels_in: int, pixels_out: int, momentum: float
) -> None:
    """proxyless_fast::update_running: as torch's batch norm does, the variance unbiased."""
    _move_running(statistics.split([r.shape[0] for r in running]), running, pixels_in, pixels_out, momentum)


def _move_running(
    moments: Sequence[Tensor], running: Sequence[Tensor], pixels_in: int, pixels_out: int, momentum: float
) -> None:
    """Mean and variance of one, two or three norms, in order; the first of three has pixels_in pixels."""
    norms = [(*moments[i : i + 2], *running[i : i + 2]) for i in range(0, len(running), 2)]
    missing = [(None,) * 4] * (3 - len(norms))
    widest = max(r.shape[0] for r in running)
    launch.run(
        nm.update_running, (-(-widest // 64), 3), Config({"BC": 64}, 2, 1),
        *(t for norm in (*missing, *norms) for t in norm), pixels_in, pixels_out, MOMENTUM=momentum,
        CH=running[-4].shape[0] if len(norms) > 1 else 0, CO=running[-1].shape[0],
    )  # fmt: skip


def norm_dot(grad: Tensor, y: Tensor, statistics: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """proxyless_fast::norm_dot: <grad, BN(y)> in one pass over both."""
    g, rows = rows_of(grad.to(y.dtype)), rows_of(y)
    co = g.shape[1]
    mean, var = statistics[-2 * co : -co], statistics[-co:]
    gate = torch.empty((), dtype=torch.promote_types(y.dtype, torch.float32), device=y.device)
    partial = pair_sums(g, rows, mean)
    small = Config({"BT": 16, "BC": padded(co)}, 4, 1)
    launch.run(
        pb.finish_gate, (1,), small, partial, mean, var, gamma, beta, gate, partial.shape[0], EPS=eps, C=co,
    )  # fmt: skip
    return gate
