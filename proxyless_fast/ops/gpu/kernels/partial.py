"""Partial sums of many programs, combined in float64 and in a fixed order."""

import triton
import triton.language as tl

from .common import kernel


@triton.jit
def combine_moments(partial, c, inside, tiles, pixels, rows, STRIDE: tl.constexpr, C: tl.constexpr, BT: tl.constexpr,
                    BC: tl.constexpr):  # fmt: skip
    """Mean and biased variance, float64 (BC,), of partial moments (tiles, STRIDE / C, C) of `rows` rows each."""
    total = tl.zeros((BC,), tl.float64)
    for start in range(0, tiles, BT):
        t = start + tl.arange(0, BT)
        live = (t < tiles)[:, None] & inside[None, :]
        n = tl.minimum(rows, pixels - t * rows).to(tl.float64)
        mean_t = tl.load(partial + t[:, None] * STRIDE + c[None, :], mask=live, other=0.0).to(tl.float64)
        total += tl.sum(mean_t * n[:, None], 0)
    mean = total / pixels
    m2 = tl.zeros((BC,), tl.float64)
    for start in range(0, tiles, BT):
        t = start + tl.arange(0, BT)
        live = (t < tiles)[:, None] & inside[None, :]
        n = tl.minimum(rows, pixels - t * rows).to(tl.float64)
        at = partial + t[:, None] * STRIDE + c[None, :]
        mean_t = tl.load(at, mask=live, other=0.0).to(tl.float64)
        m2_t = tl.load(at + C, mask=live, other=0.0).to(tl.float64)
        apart = tl.where(live, mean_t - mean[None, :], 0.0)
        m2 += tl.sum(m2_t + apart * apart * n[:, None], 0)
    return mean, m2 / pixels


@triton.jit
def combine_products(partial, mean, c, inside, tiles, STRIDE: tl.constexpr, C: tl.constexpr, BT: tl.constexpr,
                     BC: tl.constexpr):  # fmt: skip
    """Sums of G and of (y - mean) G, float64 (BC,), of `tiles` partial ones, each about its own mean (project.py)."""
    sum_g = tl.zeros((BC,), tl.float64)
    sum_yg = tl.zeros((BC,), tl.float64)
    for start in range(0, tiles, BT):
        t = start + tl.arange(0, BT)
        live = (t < tiles)[:, None] & inside[None, :]
        at = partial + t[:, None] * STRIDE + c[None, :]
        tile_mean = tl.load(at, mask=live, other=0.0).to(tl.float64)
        tile_g = tl.load(at + 2 * C, mask=live, other=0.0).to(tl.float64)
        tile_yg = tl.load(at + 3 * C, mask=live, other=0.0).to(tl.float64)
        sum_g += tl.sum(tile_g, 0)
        sum_yg += tl.sum(tile_yg + (tile_mean - mean[None, :]) * tile_g, 0)
    return sum_g, sum_yg


@triton.jit
def combine_pairs(partial, c, inside, tiles, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """Sums of g and of g (v - mean), float64 (BC,), from partial (tiles, 2, C) of `pair_sums_kernel` and its like."""
    sum_g = tl.zeros((BC,), tl.float64)
    sum_gv = tl.zeros((BC,), tl.float64)
    for start in range(0, tiles, BT):
        t = start + tl.arange(0, BT)
        live = (t < tiles)[:, None] & inside[None, :]
        at = partial + t[:, None] * (2 * C) + c[None, :]
        sum_g += tl.sum(tl.load(at, mask=live, other=0.0).to(tl.float64), 0)
        sum_gv += tl.sum(tl.load(at + C, mask=live, other=0.0).to(tl.float64), 0)
    return sum_g, sum_gv


@kernel
def merge_partials_kernel(partial, merged, tiles, pixels, rows, group, groups, PARTS: tl.constexpr, C: tl.constexpr,
                          BT: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """partial (candidates, tiles, PARTS, C) to merged (candidates, groups, PARTS, C): `group` tiles become one.

    Between project and the last stage, where a large batch has too many tiles for one program to walk through.
    """
    g = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    j = tl.program_id(2)
    inside = c < C
    partial += (j * tiles + g * group) * (PARTS * C)
    some = tl.minimum(group, tiles - g * group)
    n = tl.minimum(group * rows, pixels - g * group * rows)
    mean, var = combine_moments(partial, c, inside, some, n, rows, PARTS * C, C, BT, BC)
    at = merged + (j * groups + g) * (PARTS * C) + c
    rounded = mean.to(tl.float32)
    tl.store(at, rounded, mask=inside)
    tl.store(at + C, (var * n).to(tl.float32), mask=inside)
    if PARTS == 4:
        sum_g, sum_yg = combine_products(partial, rounded.to(tl.float64), c, inside, some, PARTS * C, C, BT, BC)
        tl.store(at + 2 * C, sum_g.to(tl.float32), mask=inside)
        tl.store(at + 3 * C, sum_yg.to(tl.float32), mask=inside)
