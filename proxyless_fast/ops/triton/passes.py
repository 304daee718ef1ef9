"""The forward passes of one MBConv, or of several candidates side by side, over rows of pixels x channels.

The oracle's names (DESIGN section 4) are kept: u, e, d, z, h, y, and m, i, g, b of the three norms. Wide tensors, e
(after its activation) and d (depthwise output), are written once and read as rarely as possible (docs/gpu.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from . import depthwise as dw
from . import expand as ex
from . import gram as gm
from . import launch
from . import norm as nm
from . import project as pj
from .configs import Config, padded

SMALL = Config({"BT": 64, "BC": 16}, 4, 1)
NARROW = Config({"BC": 16}, 1, 1)


def rows_of(t: Tensor) -> Tensor:
    """(B, C, H, W) as (pixels, C); a copy only where t is not channels-last."""
    return t.permute(0, 2, 3, 1).contiguous().view(-1, t.shape[1])


def image_of(rows: Tensor, batch: int, height: int, width: int) -> Tensor:
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Block:
    """One MBConv, or several that share x: side by side, their channels following each other in wide tensors."""

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
    expands = [p[0].flatten(1) for p in params if len(p) == 9]
    projects = [p[-3].flatten(1) for p in params]
    if len(params) == 1:
        *first_weight, wp = _rounded([*expands, *projects], x.dtype)
        w1 = first_weight[0] if first_weight else None
    else:
        w1 = torch.cat(expands).to(x.dtype) if expands else None
        wp = torch.cat(projects, 1).to(x.dtype)
    taps, first = [], 0
    for p in params:
        taps.append((first, p[-6].shape[-1], p[-6].contiguous()))
        first += p[-6].shape[0]
    return Block(rows_of(x), (batch, height, width, ho, wo), w1, taps, wp, first, stride, activation)


def _rounded(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The weights in `dtype`, contiguous: themselves, or copies by one launch."""
    if all(w.dtype == dtype for w in weights):
        return [w.contiguous() for w in weights]
    rounded = [torch.empty(w.shape, dtype=dtype, device=w.device) for w in weights]
    torch._foreach_copy_(rounded, list(weights))
    return rounded


# --- batch norms ------------------------------------------------------------------------------------------------------


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
        nm.norm_from, (-(-c // 16),), NARROW, mean, var, gamma, beta, statistics, norm, EPS=eps, C=c,
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
        nm.norms_of_block, (-(-max(ch, co) // 16), 3), NARROW, statistics, *first[:2], *params[-5:-3], *params[-2:],
        first[2], *norms[-2:], EPS=eps, CH=ch, CO=co,
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
        nm.finish_moments, (-(-c // 16),), SMALL, partial, gamma, beta, statistics, norm, partial.shape[0], pixels,
        rows, EPS=eps, C=c,
    )  # fmt: skip
    return statistics, norm


def finish_gradient(partial: Tensor, pixels: int, norm: Tensor, training: bool) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """((dgamma, dbeta), affine) of a norm whose partial sums these are (norm.py)."""
    c = partial.shape[-1]
    dgamma, dbeta = (torch.empty(c, dtype=torch.float32, device=partial.device) for _ in range(2))
    affine = torch.empty(4, c, dtype=torch.float32, device=partial.device)
    launch.run(
        nm.finish_gradient, (-(-c // 16),), SMALL, partial, norm, dgamma, dbeta, affine, partial.shape[0],
        pixels, TRAINING=training, C=c,
    )  # fmt: skip
    return (dgamma, dbeta), affine


def gram_rows(x: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Mean (C,) and covariance (C, C) of rows x, computed in float64 and stored in `dtype`."""
    pixels, c = x.shape
    cfg = launch.config("gram", x, c, BC=c)
    block = cfg.tile["BC"]
    tiles = -(-c // block)
    rows, programs = launch.split(pixels, cfg, tiles * tiles, least=8 * c)
    sums = torch.empty(programs, c, dtype=torch.float32, device=x.device)
    seconds = torch.empty(programs, c, c, dtype=torch.float32, device=x.device)
    mean = torch.empty(c, dtype=dtype, device=x.device)
    cov = torch.empty(c, c, dtype=dtype, device=x.device)
    launch.run(
        gm.gram_partial, (programs, tiles, tiles), cfg, x, sums, seconds, pixels, rows, C=c,
        PRECISION=launch.precision(x.dtype),
    )  # fmt: skip
    small = Config({"BT": 64, "BC": min(64, padded(c))}, 4, 1)
    launch.run(
        gm.gram_finish, (c, -(-c // small.tile["BC"])), small, x, sums, seconds, mean, cov, programs, pixels, C=c,
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
        gm.expand_moments, (-(-ch // cfg.tile["BC"]),), cfg, w1, mean, cov, gamma, beta, statistics, norm, EPS=eps,
        CI=ci, CH=ch, WIDE=w1.dtype == torch.float32,
    )  # fmt: skip
    return norm


# --- passes -----------------------------------------------------------------------------------------------------------


def expand(block: Block, norm1: Tensor | None) -> Tensor:
    """e (pixels, Ch): x itself where there is no expand convolution."""
    if block.w1 is None:
        return block.x
    ci = block.x.shape[1]
    e = block.empty(block.pixels, block.ch)
    cfg = launch.config("expand", e, block.ch, BN=block.ch, BK=ci)
    grid = (-(-block.pixels // cfg.tile["BM"]) * -(-block.ch // cfg.tile["BN"]),)
    launch.run(
        ex.expand, grid, cfg, block.x, block.w1, norm1, e, block.pixels, CI=ci, CH=block.ch, ACT=block.activation,
        PRECISION=launch.precision(e.dtype),
    )  # fmt: skip
    return e


@lru_cache(maxsize=1)
def stencils_built() -> bool:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    ops = ("depthwise_forward", "depthwise_backward", "expand_depthwise_forward", "expand_depthwise_backward")
    return all(has(f"proxyless_fast::{op}", "CUDA") for op in ops)


def stencils(x: Tensor, kernels: Sequence[int], stride: int) -> bool:
    """Whether the CUDA C++ stencils run the depthwise convolutions: built, on a GPU, of one size that they have."""
    return x.is_cuda and len(set(kernels)) == 1 and kernels[0] in (3, 5, 7) and stride in (1, 2) and stencils_built()


# Float32 operations in the time of one byte of memory, by the data sheets: A100 (and, below what they have, every card
# older than an H100), H100.
RIDGE = {80: 9.6, 90: 20.0}
WIDEST_EXPANDED = 96


def expansion_pays(ci: int, kernel: int, stride: int, arch: int) -> bool:
    """Whether expand and depthwise should be one launch, by the roofline of docs/gpu-cuda.md; half precision only.

    It saves writing and reading e and costs the halo's products and each element's norm and activation once more. That
    is time gained where the stencil waits for memory, which is where its 2 k^2 operations for each output are fewer
    than the ridge allows for the stride^2 values read and the one written, 2 bytes each. Beyond, it is level at best.
    And the chunks of 32 channels each read x again, from the second-level cache: with wide x that is as much as was
    saved.
    """
    ridge = RIDGE[90 if arch >= 90 else 80]
    return ci <= WIDEST_EXPANDED and 2 * kernel**2 <= ridge * 2 * (stride**2 + 1)


def in_one(block: Block) -> bool:
    """Whether e of this block is made where it is used (`expand_depthwise_*`) and never stored."""
    kernels = [k for _, k, _ in block.taps]
    if block.w1 is None or block.x.dtype.itemsize != 2 or not stencils(block.x, kernels, block.stride):
        return False
    return expansion_pays(block.x.shape[1], kernels[0], block.stride, launch.architecture(block.x))


def taps_of(block: Block) -> Tensor:
    """All taps of a block whose candidates have one kernel size: float32 (Ch, 1, k, k)."""
    taps = [t.float() for _, _, t in block.taps]
    return taps[0] if len(taps) == 1 else torch.cat(taps)


def depthwise(block: Block, e: Tensor, moments: bool) -> tuple[Tensor, Tensor | Moments | None, int]:
    """d (out pixels, Ch), and if wanted its partial moments with the rows that each is of."""
    if stencils(e, [k for _, k, _ in block.taps], block.stride):
        d, mean, var = torch.ops.proxyless_fast.depthwise_forward(
            image_of(e, *block.size[:3]), taps_of(block), None, None, block.stride
        )
        return rows_of(d), Moments(mean, var) if moments else None, block.out_pixels
    d = block.empty(block.out_pixels, block.ch)
    cfg = launch.config("depthwise", e, block.ch, BC=block.ch)
    rows, programs = launch.split(block.out_pixels, cfg, -(-block.ch // cfg.tile["BC"]))
    partial = block.empty(programs, 2, block.ch, dtype=torch.float32) if moments else None
    for first, k, taps in block.taps:
        c = taps.shape[0]
        part = None if partial is None else partial[:, :, first : first + c]
        launch.run(
            dw.depthwise, (programs, -(-c // cfg.tile["BC"])), cfg, e[:, first : first + c], taps,
            d[:, first : first + c], part, block.out_pixels, rows, *block.size[1:], E_STRIDE=e.shape[1],
            D_STRIDE=block.ch, P_STRIDE=block.ch, C=c, K=k, STRIDE=block.stride,
        )  # fmt: skip
    return d, partial, rows


def expand_depthwise(block: Block, norm1: Tensor | None, moments: bool) -> tuple[Tensor, Tensor | Moments | None, int]:
    """`depthwise` of `expand`, in one launch where that pays."""
    if not in_one(block):
        return depthwise(block, expand(block, norm1), moments)
    assert block.w1 is not None and norm1 is not None
    x = image_of(block.x, *block.size[:3])
    d, mean, var = torch.ops.proxyless_fast.expand_depthwise_forward(
        x, block.w1, norm1, taps_of(block), block.stride, block.activation
    )
    return rows_of(d), Moments(mean, var) if moments else None, block.out_pixels


@lru_cache(maxsize=4096)
def _offsets(values: tuple[int, ...], device: torch.device) -> Tensor:
    # Kept, because a copy from the host would make every step wait for it.
    return torch.tensor(values, dtype=torch.int32, device=device)


# Partial moments up to this many are left to the last stage; more are merged first, in groups.
MOST_TILES = 1024


def project(
    block: Block, d: Tensor, norm2: Tensor, mode: str, grad: Tensor | None = None, norm3: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, int]:
    """(y, partial, rows) of one pass over d: mode "train", "probe" or "eval" (project.py)."""
    co, ch = block.wp.shape
    bounds = (*(first for first, _, _ in block.taps), ch)
    cfg = launch.config("project", d, co, BN=co, BK=ch)
    rows = cfg.tile["BM"]
    tiles, candidates = -(-block.out_pixels // rows), len(block.taps)
    y = None if mode == "probe" else block.empty(block.out_pixels, co)
    parts = {"train": 2, "probe": 4, "eval": 0}[mode]
    partial = block.empty(candidates, tiles, parts, co, dtype=torch.float32) if parts else None
    launch.run(
        pj.project, (tiles * -(-co // cfg.tile["BN"]), candidates), cfg, d, norm2, block.wp, _offsets(bounds, d.device),
        y, grad, norm3, partial, block.out_pixels, tiles, CH=ch, CO=co, ACT=block.activation, MODE=mode,
        PRECISION=launch.precision(d.dtype), ALIGN=gcd(16, *bounds),
    )  # fmt: skip
    if partial is not None and tiles > MOST_TILES:
        group = -(-tiles // MOST_TILES) * 8
        groups = -(-tiles // group)
        merged = block.empty(candidates, groups, parts, co, dtype=torch.float32)
        launch.run(
            nm.merge_partials, (groups, -(-co // 16), candidates), SMALL, partial, merged, tiles, block.out_pixels,
            rows, group, groups, PARTS=parts, C=co,
        )  # fmt: skip
        partial, rows = merged, rows * group
    return y, partial, rows


def normalise(y: Tensor, norm: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """BN(y), plus the shortcut where there is one: rows."""
    pixels, c = y.shape
    out = torch.empty_like(y)
    cfg = launch.config("rows", y, c)
    cfg = cfg._replace(tile=cfg.tile | {"BC": padded(c)})
    launch.run(nm.normalise, (-(-pixels // cfg.tile["BM"]),), cfg, y, norm, shortcut, out, pixels, C=c)
    return out


def pair_sums(g: Tensor, v: Tensor, mean: Tensor) -> Tensor:
    """Partial sums (programs, 2, C) of g and of g (v - mean) over rows; mean (C,), or more, of which C are read."""
    pixels, c = g.shape
    cfg = launch.config("rows", g, c)
    cfg = cfg._replace(tile=cfg.tile | {"BC": padded(c)})
    rows, programs = launch.split(pixels, cfg)
    partial = torch.empty(programs, 2, c, dtype=torch.float32, device=g.device)
    launch.run(nm.pair_sums, (programs,), cfg, g, v, mean, partial, pixels, rows, C=c)
    return partial
