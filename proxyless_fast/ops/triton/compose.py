"""A whole MBConv from the kernels: forward, backward and probe, in the arguments of the ops in csrc/schema.cpp.

Rows are pixels x channels (channels-last memory). Wide tensors: e (expanded, after its activation) and d (depthwise
output), and in backward dz and de; each is written once and read as few times as the algebra allows (docs/gpu.md).
The oracle's names (DESIGN section 4) are kept: u, e, d, z, h, y; m, i, g, b of the three norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd

import torch
from torch import Tensor

from . import backward as b
from . import depthwise as dw
from . import expand as ex
from . import gram as gm
from . import norm as nm
from . import probe as pb
from . import project as pj
from .configs import Config, padded
from .launch import config, precision, run, split

# A layer's candidates are probed together as long as their wide tensors fit into what one of them may need anyway, so
# that memory does not grow with their number; below this many bytes they always are.
WORKSPACE = 64 << 20

_SMALL = Config({"BT": 64, "BC": 16}, 4, 1)


def rows_of(t: Tensor) -> Tensor:
    """(B, C, H, W) as (pixels, C); a copy only where t is not channels-last."""
    return t.permute(0, 2, 3, 1).contiguous().view(-1, t.shape[1])


def image_of(rows: Tensor, batch: int, height: int, width: int) -> Tensor:
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Block:
    """One MBConv, or several side by side that share x: their expanded channels follow each other in every wide tensor."""

    x: Tensor  # rows
    size: tuple[int, int, int, int, int]  # batch, height, width, and height and width of the output
    w1: Tensor | None  # (Ch, Ci), x's dtype
    taps: Sequence[tuple[int, int, Tensor]]  # first expanded channel, kernel size, (channels, 1, k, k)
    wp: Tensor  # (Co, Ch), x's dtype
    ch: int
    stride: int
    activation: str

    @property
    def pixels(self) -> int:
        return self.x.shape[0]

    @property
    def out_pixels(self) -> int:
        return self.size[0] * self.size[3] * self.size[4]

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.x.dtype, device=self.x.device)


def make_block(x: Tensor, params: Sequence[Sequence[Tensor]], stride: int, activation: str) -> Block:
    batch, _, height, width = x.shape
    ho, wo = (height - 1) // stride + 1, (width - 1) // stride + 1
    dtype = x.dtype
    has_expand = len(params[0]) == 9
    side_by_side = (lambda ts, dim: ts[0]) if len(params) == 1 else torch.cat
    w1 = side_by_side([p[0].flatten(1).to(dtype) for p in params], 0) if has_expand else None
    wp = side_by_side([p[-3].flatten(1).to(dtype) for p in params], 1)
    taps, first = [], 0
    for p in params:
        taps.append((first, p[-6].shape[-1], p[-6]))
        first += p[-6].shape[0]
    return Block(rows_of(x), (batch, height, width, ho, wo), w1, taps, wp, first, stride, activation)


# --- batch norms ------------------------------------------------------------------------------------------------------


def norm_of(mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """float32 (4, C) as the kernels read it (common.py)."""
    inverse = (var.double() + eps).rsqrt()
    return torch.stack([mean.double(), inverse, gamma.double() * inverse, beta.double()]).float()


def _finish_moments(partial: Tensor, rows: int, pixels: int, gamma: Tensor, beta: Tensor, eps: float):
    c = partial.shape[-1]
    statistics = torch.empty(2, c, dtype=torch.float64, device=partial.device)
    norm = torch.empty(4, c, dtype=torch.float32, device=partial.device)
    run(
        nm.finish_moments, (-(-c // 16),), _SMALL, partial, gamma, beta, statistics, norm, partial.shape[0], pixels, rows,
        EPS=eps, C=c,
    )  # fmt: skip
    return statistics, norm


def _finish_gradient(partial: Tensor, pixels: int, norm: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    c = partial.shape[-1]
    gradients = torch.empty(2, c, dtype=torch.float32, device=partial.device)
    affine = torch.empty(3, c, dtype=torch.float32, device=partial.device)
    run(
        nm.finish_gradient, (-(-c // 16),), _SMALL, partial, norm, gradients, affine, partial.shape[0], pixels,
        TRAINING=training, C=c,
    )  # fmt: skip
    return gradients, affine


def gram_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (C,) and covariance (C, C), float64, of rows x."""
    pixels, c = x.shape
    pivot = x[:: max(1, pixels // 64)][:64].float().mean(0)
    cfg = config("gram", x, c, BC=c)
    block = cfg.tile["BC"]
    tiles = -(-c // block)
    rows, programs = split(pixels, cfg, tiles * tiles, least=8 * c)
    sums = torch.empty(programs, c, dtype=torch.float32, device=x.device)
    seconds = torch.empty(programs, c, c, dtype=torch.float32, device=x.device)
    mean = torch.empty(c, dtype=torch.float64, device=x.device)
    cov = torch.empty(c, c, dtype=torch.float64, device=x.device)
    run(
        gm.gram_partial, (programs, tiles, tiles), cfg, x, pivot, sums, seconds, pixels, rows, C=c,
        PRECISION=precision(x.dtype),
    )  # fmt: skip
    small = Config({"BT": 64, "BC": min(64, padded(c))}, 4, 1)
    run(
        gm.gram_finish, (c, -(-c // small.tile["BC"])), small, pivot, sums, seconds, mean, cov, programs, pixels, C=c,
    )  # fmt: skip
    return mean, cov


def expand_moments(w1: Tensor, mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of x W1^T from those of x, float64."""
    w = w1.double()
    return w @ mean.double(), ((w @ cov.double()) * w).sum(1).clamp_min(0)


# --- passes -----------------------------------------------------------------------------------------------------------


def expand(block: Block, norm1: Tensor | None) -> Tensor:
    """e (pixels, Ch): x itself where there is no expand convolution."""
    if block.w1 is None:
        return block.x
    ci = block.x.shape[1]
    e = block.empty(block.pixels, block.ch)
    cfg = config("expand", e, block.ch, BN=block.ch, BK=ci)
    grid = (-(-block.pixels // cfg.tile["BM"]) * -(-block.ch // cfg.tile["BN"]),)
    run(
        ex.expand, grid, cfg, block.x, block.w1, norm1, e, block.pixels, CI=ci, CH=block.ch, ACT=block.activation,
        PRECISION=precision(e.dtype),
    )  # fmt: skip
    return e


@lru_cache(maxsize=1)
def _stencils_built() -> bool:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return all(has(f"proxyless_fast::{op}", "CUDA") for op in ("depthwise_forward", "depthwise_backward"))


def stencils(x: Tensor, kernels: Sequence[int], stride: int) -> bool:
    """Whether the CUDA C++ stencils run the depthwise convolutions: built, on a GPU, of one size that they have."""
    return x.is_cuda and len(set(kernels)) == 1 and kernels[0] in (3, 5, 7) and stride in (1, 2) and _stencils_built()


def _taps(block: Block) -> Tensor:
    """All taps of a block whose candidates have one kernel size: float32 (Ch, 1, k, k)."""
    taps = [t.float() for _, _, t in block.taps]
    return taps[0] if len(taps) == 1 else torch.cat(taps)


def depthwise(block: Block, e: Tensor, moments: bool) -> tuple[Tensor, Tensor | None, int]:
    """d (out pixels, Ch), and if wanted its partial moments with the rows that each is of."""
    if stencils(e, [k for _, k, _ in block.taps], block.stride):
        d, mean, var = torch.ops.proxyless_fast.depthwise_forward(
            image_of(e, *block.size[:3]), _taps(block), None, None, block.stride
        )
        partial = torch.stack([mean, var * block.out_pixels])[None] if moments else None
        return rows_of(d), partial, block.out_pixels
    d = block.empty(block.out_pixels, block.ch)
    cfg = config("depthwise", e, block.ch, BC=block.ch)
    rows, programs = split(block.out_pixels, cfg, -(-block.ch // cfg.tile["BC"]))
    partial = block.empty(programs, 2, block.ch, dtype=torch.float32) if moments else None
    for first, k, taps in block.taps:
        c = taps.shape[0]
        part = None if partial is None else partial[:, :, first : first + c]
        run(
            dw.depthwise, (programs, -(-c // cfg.tile["BC"])), cfg, e[:, first : first + c], taps,
            d[:, first : first + c], part, block.out_pixels, rows, *block.size[1:], E_STRIDE=e.shape[1],
            D_STRIDE=block.ch, P_STRIDE=block.ch, C=c, K=k, STRIDE=block.stride,
        )  # fmt: skip
    return d, partial, rows


@lru_cache(maxsize=4096)
def _offsets(values: tuple[int, ...], device: torch.device) -> Tensor:
    # Kept, because a copy from the host would make every step wait for it.
    return torch.tensor(values, dtype=torch.int32, device=device)


# Partial moments up to this many are left to the last stage; more are merged first, in groups.
MOST_TILES = 1024


def project(block: Block, d: Tensor, norm2: Tensor, mode: str, grad: Tensor | None = None, norm3: Tensor | None = None):
    """(y, partial, rows) of one pass over d: mode "train", "probe" or "eval" (project.py)."""
    co, ch = block.wp.shape
    bounds = (*(first for first, _, _ in block.taps), ch)
    cfg = config("project", d, co, BN=co, BK=ch)
    rows = cfg.tile["BM"]
    tiles, candidates = -(-block.out_pixels // rows), len(block.taps)
    y = None if mode == "probe" else block.empty(block.out_pixels, co)
    parts = {"train": 2, "probe": 4, "eval": 0}[mode]
    partial = block.empty(candidates, tiles, parts, co, dtype=torch.float32) if parts else None
    run(
        pj.project, (tiles * -(-co // cfg.tile["BN"]), candidates), cfg, d, norm2, block.wp, _offsets(bounds, d.device),
        y, grad, norm3, partial, block.out_pixels, tiles, CH=ch, CO=co, ACT=block.activation, MODE=mode,
        PRECISION=precision(d.dtype), ALIGN=gcd(16, *bounds),
    )  # fmt: skip
    if partial is not None and tiles > MOST_TILES:
        group = -(-tiles // MOST_TILES) * 8
        groups = -(-tiles // group)
        merged = block.empty(candidates, groups, parts, co, dtype=torch.float32)
        run(
            nm.merge_partials, (groups, -(-co // 16), candidates), _SMALL, partial, merged, tiles, block.out_pixels,
            rows, group, groups, PARTS=parts, C=co,
        )  # fmt: skip
        partial, rows = merged, rows * group
    return y, partial, rows


def normalise(y: Tensor, norm: Tensor) -> Tensor:
    pixels, c = y.shape
    out = torch.empty_like(y)
    cfg = config("rows", y, c)
    cfg = cfg._replace(tile=cfg.tile | {"BC": padded(c)})
    run(nm.normalise, (-(-pixels // cfg.tile["BM"]),), cfg, y, norm, out, pixels, C=c)
    return out


# --- the ops ----------------------------------------------------------------------------------------------------------


def gram(x: Tensor) -> tuple[Tensor, Tensor]:
    """proxyless_fast::gram, in float32: a covariance in half precision would be of no use."""
    mean, cov = gram_rows(rows_of(x))
    return mean.float(), cov.float()


def _running(running: Sequence[Tensor], i: int) -> tuple[Tensor, Tensor]:
    return running[2 * i], running[2 * i + 1]


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """proxyless_fast::mbconv: out, y (keep >= 1), d (keep == 2), and the statistics of every norm."""
    block = make_block(x, [params], stride, activation)
    size = (block.size[0], *block.size[3:])
    statistics = []
    norm1 = None
    if block.w1 is not None:
        if training:
            if mean is None or cov is None:
                mean, cov = gram_rows(block.x)
            first = expand_moments(block.w1, mean, cov)
        else:
            first = _running(running, 0)
        statistics += first
        norm1 = norm_of(*first, *params[1:3], eps)
    d, partial, rows = depthwise(block, expand(block, norm1), moments=training)
    if training:
        second, norm2 = _finish_moments(partial, rows, block.out_pixels, *params[-5:-3], eps)
    else:
        second = _running(running, len(running) // 2 - 2)
        norm2 = norm_of(*second, *params[-5:-3], eps)
    statistics += second
    if training:
        y, partial, rows = project(block, d, norm2, "train")
        third, norm3 = _finish_moments(partial[0], rows, block.out_pixels, *params[-2:], eps)
    else:
        third = _running(running, len(running) // 2 - 1)
        norm3 = norm_of(*third, *params[-2:], eps)
        y, _, _ = project(block, d, norm2, "train" if keep else "eval", norm3=norm3)
    statistics += third
    out = y if not training and not keep else normalise(y, norm3)
    none = block.empty(0)
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
        statistics, block_gates = _probe(block, g, [own[j] for j in group], [buffers[j] for j in group] if buffers else [],
                                         mean, cov, training, eps)  # fmt: skip
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
    apart = any(stencils(x, [k], stride) for k in sizes)
    if apart:
        order.sort(key=lambda j: sizes[j])
    batch, ci, height, width = x.shape
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


def _probe(block, g, params, running, mean, cov, training, eps):
    """(statistics of each candidate in the order of its norms, gates)."""
    n, co = len(params), block.wp.shape[0]
    widths = [p[-6].shape[0] for p in params]

    def every(i: int) -> Tensor:
        return params[0][i] if n == 1 else torch.cat([p[i] for p in params])

    def given(i: int) -> tuple[Tensor, Tensor]:
        if n == 1:
            return running[0][i], running[0][i + 1]
        return torch.cat([r[i] for r in running]), torch.cat([r[i + 1] for r in running])

    first = norm1 = None
    if block.w1 is not None:
        first = expand_moments(block.w1, mean, cov) if training else given(0)
        norm1 = norm_of(*first, every(1), every(2), eps)
    d, partial, rows = depthwise(block, expand(block, norm1), moments=training)
    if training:
        second, norm2 = _finish_moments(partial, rows, block.out_pixels, every(-5), every(-4), eps)
    else:
        second = given(-4)
        norm2 = norm_of(*second, every(-5), every(-4), eps)
    _, partial, rows = project(block, d, norm2, "probe", grad=g)
    if training:
        third = torch.empty(n, 2, co, dtype=torch.float64, device=g.device)
    else:
        third = torch.stack([torch.stack(r[-2:]).double() for r in running])
    gates = torch.empty(n, dtype=torch.float64, device=g.device)
    small = Config({"BT": 16, "BC": padded(co)}, 4, 1)
    run(
        pb.finish_probe, (n,), small, partial, every(-2), every(-1), third, gates, partial.shape[1], block.out_pixels,
        rows, EPS=eps, TRAINING=training, C=co,
    )  # fmt: skip
    columns = [] if first is None else [first[0].split(widths), first[1].split(widths)]
    columns += [second[0].split(widths), second[1].split(widths), third[:, 0].unbind(), third[:, 1].unbind()]
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
) -> tuple[Tensor, list[Tensor]]:
    """proxyless_fast::mbconv_backward: dx if `input`, and if `weights` the gradients of params in their order."""
    block = make_block(x, [params], stride, activation)
    co, ch = block.wp.shape
    ci, dtype = block.x.shape[1], block.x.dtype
    g, y_rows = rows_of(grad.to(dtype)), rows_of(y)
    stats = statistics.split([t.shape[0] for i in range(len(params) // 3) for t in [params[3 * i + 1]] * 2])
    norm1 = norm_of(*stats[:2], *params[1:3], eps) if block.w1 is not None else None
    norm2 = norm_of(*stats[-4:-2], *params[-5:-3], eps)
    norm3 = norm_of(*stats[-2:], *params[-2:], eps)

    e = expand(block, norm1) if weights or d.numel() == 0 else None
    d_rows = depthwise(block, e, moments=False)[0] if d.numel() == 0 else rows_of(d)

    # BN3's sums are narrow; dz, dWp and BN2's sums are one pass over d.
    cfg = config("rows", g, co)
    cfg = cfg._replace(tile=cfg.tile | {"BC": padded(co)})
    rows, programs = split(block.out_pixels, cfg)
    partial = block.empty(programs, 2, co, dtype=torch.float32)
    run(nm.pair_sums, (programs,), cfg, g, y_rows, norm3, partial, block.out_pixels, rows, C=co)
    third, affine3 = _finish_gradient(partial, block.out_pixels, norm3, training)

    cfg = config("project_backward", d_rows, co, BC=ch)
    columns = -(-ch // cfg.tile["BC"])
    rows, programs = split(block.out_pixels, cfg, columns, least=4 * co if weights else 1)
    dz = torch.empty_like(d_rows)
    partial = block.empty(programs, 2, ch, dtype=torch.float32)
    dwp = block.empty(programs, co, ch, dtype=torch.float32) if weights else None
    run(
        b.project_backward, (programs * columns,), cfg, d_rows, norm2, g, y_rows, affine3, norm3,
        block.wp, dz, partial, dwp, block.out_pixels, rows, CH=ch, CO=co, ACT=activation, TRAINING=training,
        PRECISION=precision(dtype), BN=padded(co),
    )  # fmt: skip
    second, affine2 = _finish_gradient(partial, block.out_pixels, norm2, training)

    de, dtaps = _depthwise_backward(block, dz, d_rows, affine2, norm2, e, training)
    del dz, e
    dx = block.empty(0)
    first: list[Tensor] = []
    if block.w1 is None:
        dx = image_of(de, *block.size[:3]) if input else dx
    else:
        dx_rows, first = _expand_backward(block, de, norm1, mean, cov, training, input, weights)
        dx = image_of(dx_rows, *block.size[:3]) if dx_rows is not None else dx
    if not weights:
        return dx, []
    found = [*first, dtaps, second[0], second[1], dwp.sum(0), third[0], third[1]]
    return dx, [t.reshape(p.shape).to(p.dtype) for t, p in zip(found, params, strict=True)]


def _depthwise_backward(block: Block, dz, d, affine2, norm2, e, training: bool) -> tuple[Tensor, Tensor | None]:
    """(de, and where e is given the gradient of the taps)."""
    ((_, k, taps),) = block.taps
    if stencils(dz, [k], block.stride):
        return _depthwise_backward_stencil(block, dz, d, affine2, norm2, e)
    cfg = config("depthwise_backward", dz, block.ch, BC=block.ch)
    columns = -(-block.ch // cfg.tile["BC"])
    de, partial = block.empty(block.pixels, block.ch), None
    if e is None:
        rows, programs = cfg.tile["BM"], -(-block.pixels // cfg.tile["BM"])
    else:
        rows, programs = split(block.pixels, cfg, columns, least=16 * k * k)
        partial = block.empty(programs, k * k, block.ch, dtype=torch.float32)
    run(
        dw.depthwise_backward, (programs, columns), cfg, dz, d, affine2, norm2, taps, e if e is not None else dz, de,
        partial, block.pixels, rows, *block.size[1:], C=block.ch, K=k, STRIDE=block.stride, TRAINING=training,
        BT=padded(k * k),
    )  # fmt: skip
    return de, None if partial is None else partial.sum(0).t()


def _depthwise_backward_stencil(block: Block, dz, d, affine2, norm2, e) -> tuple[Tensor, Tensor | None]:
    out = (block.size[0], *block.size[3:])
    affine = torch.stack([affine2[0], affine2[1], norm2[0], affine2[2]])
    gradient = (image_of(dz, *out), image_of(d, *out), affine)
    if e is None:  # of the input the stencil needs only the shape then
        like = block.empty(block.pixels, block.ch)
        arguments = (image_of(like, *block.size[:3]), None, None, _taps(block), block.stride, False)
        return rows_of(torch.ops.proxyless_fast.depthwise_backward_input(*gradient, *arguments)), None
    arguments = (image_of(e, *block.size[:3]), None, None, _taps(block), block.stride, False)
    de, dtaps = torch.ops.proxyless_fast.depthwise_backward(*gradient, *arguments)
    return rows_of(de), dtaps


def _expand_backward(block: Block, de, norm1, mean, cov, training: bool, input: bool, weights: bool):
    """(dx rows or None, [dW1, dgamma1, dbeta1] or []) from de: the passes, and BN1's corrections (Ci x Ci)."""
    assert block.w1 is not None
    ch, ci = block.w1.shape
    pixels, dtype = block.pixels, block.x.dtype
    centre = mean.float() if training else block.empty(ci, dtype=torch.float32).zero_()
    shared = {"CI": ci, "CH": ch, "ACT": block.activation, "PRECISION": precision(dtype), "BI": padded(ci)}
    a = partial = None
    cfg = config("expand_once", de, ci, BC=ch)
    columns = -(-ch // cfg.tile["BC"])
    # One pass over de for everything, unless the shares of dX, one for each group of channels, are more than de itself.
    once = input and weights and 2 * ci <= cfg.tile["BC"]
    # Without tensor cores a tile of a wide A does not fit into registers; a library's product over q, left in memory, does.
    library = weights and not once and dtype == torch.float32 and ci > 64
    dx = block.empty(columns if once else 1, pixels, ci) if input or library else None
    if (input or library) and not once:
        cfg = config("expand_input", de, ci, BC=ch)
        programs = -(-pixels // cfg.tile["BM"])
        partial = block.empty(programs, 2, ch, dtype=torch.float32)
        run(
            b.expand_input, (programs,), cfg, de, block.x, block.w1, norm1, dx, partial, de if library else None,
            pixels, **shared,
        )  # fmt: skip
    if library:
        a = (de.t() @ (block.x - centre))[None]
    elif weights:
        if not once:
            cfg = config("expand_weight", de, ci, BC=ch)
        columns = -(-ch // cfg.tile["BC"])
        rows, programs = split(pixels, cfg, columns, least=4 * ci)
        sums = None
        if partial is None:
            sums = partial = block.empty(programs, 2, ch, dtype=torch.float32)
        a = block.empty(programs, ch, ci, dtype=torch.float32)
        run(
            b.expand_backward, (programs * columns,), cfg, de, block.x, centre, block.w1, norm1,
            dx if once else None, sums, a, pixels, rows, **shared,
        )  # fmt: skip
    assert partial is not None
    gradients, _ = _finish_gradient(partial, pixels, norm1, training)

    w, scale, inverse = block.w1.double(), norm1[2].double(), norm1[1].double()
    dg, db = gradients.double().unbind(0)
    out = dx
    if input:
        if training:
            r = scale * inverse * dg / pixels
            correction = ((w * r[:, None]).t() @ w).to(dtype)
            constant = ((scale * db / pixels) @ w).float()
        else:
            correction, constant = block.empty(ci, ci).zero_(), block.empty(ci, dtype=torch.float32).zero_()
        out = block.empty(pixels, ci)
        cfg = config("finish_input", out, ci, BN=ci, BK=ci)
        grid = (-(-pixels // cfg.tile["BM"]) * -(-ci // cfg.tile["BN"]),)
        run(
            b.finish_input, grid, cfg, dx, block.x, centre, correction, constant, out, pixels, CI=ci,
            PARTS=dx.shape[0], PRECISION=precision(dtype),
        )  # fmt: skip
    if not weights:
        return out, []
    total = a.sum(0, dtype=torch.float64)
    if training:
        total -= (dg * inverse)[:, None] * (w @ cov.double())
    return out, [scale[:, None] * total, gradients[0], gradients[1]]
