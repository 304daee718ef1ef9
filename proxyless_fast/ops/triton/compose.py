"""The ops of csrc/schema.cpp for a GPU, in their arguments: a whole MBConv forward, its backward, and probes.

Saving "fast" keeps x, y and d, "lean" x and y. What each pass reads and writes is in docs/gpu.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import launch, passes
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
    norm_of,
    normalise,
    project,
    rows_of,
)

__all__ = ["gram", "mbconv", "mbconv_backward", "mbconv_probe", "update_running"]

# A layer's candidates are probed together as long as their wide tensors fit into what one of them may need anyway, so
# that memory does not grow with their number; below this many bytes they always are.
WORKSPACE = 64 << 20


def gram(x: Tensor) -> tuple[Tensor, Tensor]:
    """proxyless_fast::gram, in float32: a covariance in half precision would be of no use."""
    mean, cov = gram_rows(rows_of(x))
    return mean.float(), cov.float()


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
    statistics: list[Tensor] = []
    norm1 = None
    if block.w1 is not None:
        if training and (mean is None or cov is None):
            mean, cov = gram_rows(block.x)
        first = expand_moments(block.w1, mean, cov) if training else running[:2]
        statistics += first
        norm1 = norm_of(first[0], first[1], params[1], params[2], eps)
    d, partial, rows = expand_depthwise(block, norm1, moments=training)
    if training:
        second, norm2 = finish_moments(partial, rows, block.out_pixels, params[-5], params[-4], eps)
        y, partial, rows = project(block, d, norm2, "train")
        third, norm3 = finish_moments(partial, rows, block.out_pixels, params[-2], params[-1], eps)
        statistics += [*second, *third]
    else:
        statistics += running[-4:]
        norm2 = norm_of(running[-4], running[-3], params[-5], params[-4], eps)
        norm3 = norm_of(running[-2], running[-1], params[-2], params[-1], eps)
        y, _, _ = project(block, d, norm2, "train" if keep else "eval", norm3=norm3)
    assert y is not None
    out = y if not training and not keep else normalise(y, norm3)
    if shortcut:
        out = out.add_(block.x) if out is not y else out + block.x
    size, none = (block.size[0], *block.size[3:]), block.empty(0)
    return (
        image_of(out, *size),
        image_of(y, *size) if keep >= 1 else none,
        image_of(d, *size) if keep == 2 else none,
        torch.cat([s.double() for s in statistics]),
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
    found: list[tuple[int, Tensor]] = []
    for group in probe_groups(x, own, stride):
        block = make_block(x, [own[j] for j in group], stride, activation)
        mine, theirs = [own[j] for j in group], [buffers[j] for j in group] if buffers else []
        statistics, block_gates = _probe(block, g, mine, theirs, mean, cov, training, eps)
        found += zip(group, block_gates.unbind(), strict=True)
        if training and buffers:
            for j, s in zip(group, statistics, strict=True):
                update_running(s, buffers[j], block.pixels, block.out_pixels, momentum)
    gates = torch.stack([gate for _, gate in sorted(found, key=lambda pair: pair[0])])
    return gates.to(x.dtype if x.dtype.itemsize >= 4 else torch.float32)


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
) -> tuple[list[Tensor], Tensor]:
    """(statistics of each candidate in the order of its norms, gates)."""
    n, co = len(params), block.wp.shape[0]
    widths = [p[-6].shape[0] for p in params]

    def every(i: int, of: Sequence[Sequence[Tensor]] = params) -> Tensor:
        return of[0][i] if n == 1 else torch.cat([p[i] for p in of])

    norms: list[tuple[Tensor, Tensor]] = []
    norm1 = None
    if block.w1 is not None:
        norms.append(expand_moments(block.w1, mean, cov) if training else (every(0, running), every(1, running)))
        norm1 = norm_of(*norms[0], every(1), every(2), eps)
    d, partial, rows = expand_depthwise(block, norm1, moments=training)
    if training:
        (m2, v2), norm2 = finish_moments(partial, rows, block.out_pixels, every(-5), every(-4), eps)
    else:
        m2, v2 = every(-4, running), every(-3, running)
        norm2 = norm_of(m2, v2, every(-5), every(-4), eps)
    norms.append((m2, v2))
    _, partial, rows = project(block, d, norm2, "probe", grad=g)
    assert partial is not None
    if training:
        third = torch.empty(n, 2, co, dtype=torch.float64, device=g.device)
    else:
        third = torch.stack([torch.stack(list(r[-2:])).double() for r in running])
    gates = torch.empty(n, dtype=torch.float64, device=g.device)
    small = Config({"BT": 16, "BC": padded(co)}, 4, 1)
    launch.run(
        pb.finish_probe, (n,), small, partial, every(-2), every(-1), third, gates, partial.shape[1], block.out_pixels,
        rows, EPS=eps, TRAINING=training, C=co,
    )  # fmt: skip
    columns = [t.split(widths) for pair in norms for t in pair] + [third[:, 0].unbind(), third[:, 1].unbind()]
    return [torch.cat([c.double() for c in candidate]) for candidate in zip(*columns, strict=True)], gates


def update_running(
    statistics: Tensor, running: Sequence[Tensor], pixels_in: int, pixels_out: int, momentum: float
) -> None:
    """proxyless_fast::update_running: as torch's batch norm does, the variance unbiased."""
    parts = statistics.split([r.shape[0] for r in running])
    counts = [pixels_out] * len(running)
    if len(running) == 6:
        counts[:2] = [pixels_in] * 2
    unbiased = [n / max(n - 1, 1) if i % 2 else 1.0 for i, n in enumerate(counts)]
    new = torch._foreach_mul(list(parts), unbiased)
    torch._foreach_lerp_(list(running), [t.to(r.dtype) for t, r in zip(new, running, strict=True)], momentum)
