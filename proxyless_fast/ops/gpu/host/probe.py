"""Gate gradients: of all candidates of a layer side by side, and of the active path from its own y."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import probe as kernels
from . import launch, stencils
from .configs import Config, padded
from .depthwise import expand_depthwise
from .first_norm import expand_moments, gram_rows
from .group import CandidateGroup, make_group, rows_of
from .norms import finish_moments, move_running, norm_from, pair_sums
from .project import project

# A layer's candidates are probed together as long as their wide tensors fit into what one of them may need anyway, so
# that memory does not grow with their number; below this many bytes they always are.
WORKSPACE = 64 << 20


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
    for chosen in probe_groups(x, own, stride):
        group = make_group(x, [own[j] for j in chosen], stride, activation)
        mine, theirs = [own[j] for j in chosen], [buffers[j] for j in chosen] if buffers else []
        to = gates[len(order) : len(order) + len(chosen)]
        statistics = _probe(group, g, mine, theirs, mean, cov, training, eps, to)
        order += chosen
        if training and buffers:
            for moments, moved in zip(statistics, theirs, strict=True):
                move_running(moments, moved, group.pixels, group.out_pixels, momentum)
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
    apart = any(stencils.can_take(x, [k], stride) for k in sizes)
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
    group: CandidateGroup,
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
    n, co, ch = len(params), group.wp.shape[0], group.ch
    widths = [p[-6].shape[0] for p in params]
    gamma1, beta1, gamma2, beta2, gamma3, beta3 = _side_by_side(params)
    statistics = group.empty(3, 2, ch, dtype=torch.float64)
    third = group.empty(n, 2, co, dtype=torch.float64)
    norm1 = None
    if not training:
        moved = [torch.cat([r[i] for r in running]) for i in range(len(running[0]) - 2)]
        norm2 = norm_from(moved[-2], moved[-1], gamma2, beta2, eps)
        if group.w1 is not None:
            norm1 = norm_from(moved[0], moved[1], gamma1, beta1, eps)
        third.copy_(torch.cat([r[i] for r in running for i in (-2, -1)]).view(n, 2, co))
    elif group.w1 is not None:
        norm1 = expand_moments(group.w1, mean, cov, gamma1, beta1, eps, statistics[0])
    d, partial, rows = expand_depthwise(group, norm1, moments=training)
    if training:
        _, norm2 = finish_moments(partial, rows, group.out_pixels, gamma2, beta2, eps, statistics[1])
    _, partial, rows = project(group, d, norm2, "probe", grad=g)
    assert partial is not None
    small = Config({"BT": 16, "BC": padded(co)}, 4, 1)
    launch.run(
        kernels.finish_probe_kernel, (n,), small, partial, gamma3, beta3, third, gates, partial.shape[1],
        group.out_pixels, rows, EPS=eps, TRAINING=training, C=co,
    )  # fmt: skip
    wide = statistics[1 - (group.w1 is not None) : 2].flatten(0, 1)
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


def norm_dot(grad: Tensor, y: Tensor, statistics: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """proxyless_fast::norm_dot: <grad, BN(y)> in one pass over both."""
    g, rows = rows_of(grad.to(y.dtype)), rows_of(y)
    co = g.shape[1]
    mean, var = statistics[-2 * co : -co], statistics[-co:]
    gate = torch.empty((), dtype=torch.promote_types(y.dtype, torch.float32), device=y.device)
    partial = pair_sums(g, rows, mean)
    small = Config({"BT": 16, "BC": padded(co)}, 4, 1)
    launch.run(
        kernels.finish_gate_kernel, (1,), small, partial, mean, var, gamma, beta, gate, partial.shape[0], EPS=eps, C=co,
    )  # fmt: skip
    return gate
