"""The forward passes of one MBConv, or of several candidates side by side, over rows of pixels x channels.

The oracle's names (DESIGN section 4) are kept: u, e, d, z, h, y, and m, i, g, b of the three norms. Wide tensors, e
(after its activation) and d (depthwise output), are written once and read as rarely as possible (docs/gpu.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd

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
    dtype = x.dtype
    has_expand = len(params[0]) == 9
    side_by_side = (lambda ts, dim: ts[0]) if len(params) == 1 else torch.cat
    w1 = side_by_side([p[0].flatten(1).to(dtype) for p in params], 0).contiguous() if has_expand else None
    wp = side_by_side([p[-3].flatten(1).to(dtype) for p in params], 1).contiguous()
    taps, first = [], 0
    for p in params:
        taps.append((first, p[-6].shape[-1], p[-6].contiguous()))
        first += p[-6].shape[0]
    return Block(rows_of(x), (batch, height, width, ho, wo), w1, taps, wp, first, stride, activation)


# --- batch norms ------------------------------------------------------------------------------------------------------


def norm_of(mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """float32 (4, C) as the kernels read it (common.py)."""
    inverse = (var.double() + eps).rsqrt()
    return torch.stack([mean.double(), inverse, gamma.double() * inverse, beta.double()]).float()


def finish_moments(
    partial: Tensor | None, rows: int, pixels: int, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Statistics, float64 (2, C), and norm, float32 (4, C), from partial moments (..., 2, C) of `rows` rows each."""
    assert partial is not None
    partial = partial.flatten(0, -3)
    c = partial.shape[-1]
    statistics = torch.empty(2, c, dtype=torch.float64, device=partial.device)
    norm = torch.empty(4, c, dtype=torch.float32, device=partial.device)
    launch.run(
        nm.finish_moments, (-(-c // 16),), SMALL, partial, gamma, beta, statistics, norm, partial.shape[0], pixels,
        rows, EPS=eps, C=c,
    )  # fmt: skip
    return statistics, norm


def finish_gradient(partial: Tensor, pixels: int, norm: Tensor, training: bool) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """((dgamma, dbeta), affine) of a norm whose partial sums these are (norm.py)."""
    c = partial.shape[-1]
    dgamma, dbeta = (torch.empty(c, dtype=torch.float32, device=partial.device) for _ in range(2))
    affine = torch.empty(3, c, dtype=torch.float32, device=partial.device)
    launch.run(
        nm.finish_gradient, (-(-c // 16),), SMALL, partial, norm, dgamma, dbeta, affine, partial.shape[0],
        pixels, TRAINING=training, C=c,
    )  # fmt: skip
    return (dgamma, dbeta), affine


def gram_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (C,) and covariance (C, C), float64, of rows x."""
    pixels, c = x.shape
    pivot = x[:: max(1, pixels // 64)][:64].float().mean(0)
    cfg = launch.config("gram", x, c, BC=c)
    block = cfg.tile["BC"]
    tiles = -(-c // block)
    rows, programs = launch.split(pixels, cfg, tiles * tiles, least=8 * c)
    sums = torch.empty(programs, c, dtype=torch.float32, device=x.device)
    seconds = torch.empty(programs, c, c, dtype=torch.float32, device=x.device)
    mean = torch.empty(c, dtype=torch.float64, device=x.device)
    cov = torch.empty(c, c, dtype=torch.float64, device=x.device)
    launch.run(
        gm.gram_partial, (programs, tiles, tiles), cfg, x, pivot, sums, seconds, pixels, rows, C=c,
        PRECISION=launch.precision(x.dtype),
    )  # fmt: skip
    small = Config({"BT": 64, "BC": min(64, padded(c))}, 4, 1)
    launch.run(
        gm.gram_finish, (c, -(-c // small.tile["BC"])), small, pivot, sums, seconds, mean, cov, programs, pixels, C=c,
    )  # fmt: skip
    return mean, cov


def expand_moments(w1: Tensor, mean: Tensor | None, cov: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and variance of x W1^T from those of x, float64."""
    assert mean is not None and cov is not None
    w = w1.double()
    return w @ mean.double(), ((w @ cov.double()) * w).sum(1).clamp_min(0)


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


def depthwise(block: Block, e: Tensor, moments: bool) -> tuple[Tensor, Tensor | None, int]:
    """d (out pixels, Ch), and if wanted its partial moments with the rows that each is of."""
    if stencils(e, [k for _, k, _ in block.taps], block.stride):
        d, mean, var = torch.ops.proxyless_fast.depthwise_forward(
            image_of(e, *block.size[:3]), taps_of(block), None, None, block.stride
        )
        return rows_of(d), _whole_moments(block, mean, var) if moments else None, block.out_pixels
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


def _whole_moments(block: Block, mean: Tensor, var: Tensor) -> Tensor:
    return torch.stack([mean, var * block.out_pixels])[None]


def expand_depthwise(block: Block, norm1: Tensor | None, moments: bool) -> tuple[Tensor, Tensor | None, int]:
    """`depthwise` of `expand`, in one launch where that pays."""
    if not in_one(block):
        return depthwise(block, expand(block, norm1), moments)
    assert block.w1 is not None and norm1 is not None
    x = image_of(block.x, *block.size[:3])
    d, mean, var = torch.ops.proxyless_fast.expand_depthwise_forward(
        x, block.w1, norm1, taps_of(block), block.stride, block.activation
    )
    return rows_of(d), _whole_moments(block, mean, var) if moments else None, block.out_pixels


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


def normalise(y: Tensor, norm: Tensor) -> Tensor:
    """BN(y), rows."""
    pixels, c = y.shape
    out = torch.empty_like(y)
    cfg = launch.config("rows", y, c)
    cfg = cfg._replace(tile=cfg.tile | {"BC": padded(c)})
    launch.run(nm.normalise, (-(-pixels // cfg.tile["BM"]),), cfg, y, norm, out, pixels, C=c)
    return out
