"""Mean and covariance of x over its pixels: from them the first norm is known before anything is expanded."""

import triton
import triton.language as tl

from .common import kernel

SPREAD: tl.constexpr = tl.constexpr(64)  # rows of x whose mean is the pivot


@triton.jit
def pivot_of(x, c, inside, pixels, C: tl.constexpr):
    """A value near the mean of channels c, the same in every program: the mean of rows spread over x."""
    count = tl.cast(pixels, tl.int32)
    r = tl.arange(0, SPREAD) * tl.maximum(count // SPREAD, 1)
    live = r < count
    at = r.to(tl.int64)[:, None] * C + c[None, :]
    v = tl.load(x + at, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
    return tl.sum(v, 0) / tl.sum(live.to(tl.float32), 0)


@kernel
def gram_partial_kernel(x, sums, seconds, pixels, rows, C: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
                        BC: tl.constexpr):  # fmt: skip
    """About the pivot: sums (programs, C) and second moments (programs, C, C), upper tiles, of `rows` rows each.

    The pivot, any value near the mean, saves the digits that the squares of far values would cost.
    """
    program = tl.program_id(0)
    if tl.program_id(2) < tl.program_id(1):
        return
    i = tl.program_id(1) * BC + tl.arange(0, BC)
    j = tl.program_id(2) * BC + tl.arange(0, BC)
    inside_i, inside_j = i < C, j < C
    pivot_i = pivot_of(x, i, inside_i, pixels, C)
    pivot_j = pivot_of(x, j, inside_j, pixels, C)
    total = tl.zeros((BC,), tl.float32)
    second = tl.zeros((BC, BC), tl.float32)
    count = tl.minimum(rows, pixels - program * rows)
    x += program.to(tl.int64) * rows * C
    for start in range(0, count, BM):
        r = start + tl.arange(0, BM)
        live = (r < count)[:, None]
        row = r[:, None] * C
        a = tl.load(x + row + i[None, :], mask=live & inside_i[None, :], other=0.0).to(tl.float32)
        b = tl.load(x + row + j[None, :], mask=live & inside_j[None, :], other=0.0).to(tl.float32)
        a = tl.where(live, a - pivot_i[None, :], 0.0)
        b = tl.where(live, b - pivot_j[None, :], 0.0)
        total += tl.sum(b, 0)
        second = tl.dot(tl.trans(a.to(x.dtype.element_ty)), b.to(x.dtype.element_ty), second, input_precision=PRECISION)
    if tl.program_id(1) == tl.program_id(2):
        tl.store(sums + program * C + j, total, mask=inside_j)
    at = seconds + program * (C * C) + i[:, None] * C + j[None, :]
    tl.store(at, second, mask=inside_i[:, None] & inside_j[None, :])


@kernel
def gram_finish_kernel(x, sums, seconds, mean, cov, programs, pixels, C: tl.constexpr, BT: tl.constexpr,
                       BC: tl.constexpr):  # fmt: skip
    """mean (C,) and covariance (C, C) from the partial sums, in float64 before they are stored; one row per program."""
    i = tl.program_id(0)
    j = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = j < C
    at = tl.minimum(i, j) * C + tl.maximum(i, j)  # below the diagonal its mirror: exactly symmetric
    second = tl.zeros((BC,), tl.float64)
    sum_j = tl.zeros((BC,), tl.float64)
    sum_i = tl.zeros((BT,), tl.float64)
    for start in range(0, programs, BT):
        p = start + tl.arange(0, BT)
        live = (p < programs)[:, None] & inside[None, :]
        second += tl.sum(tl.load(seconds + p[:, None] * (C * C) + at[None, :], mask=live, other=0.0).to(tl.float64), 0)
        sum_j += tl.sum(tl.load(sums + p[:, None] * C + j[None, :], mask=live, other=0.0).to(tl.float64), 0)
        sum_i += tl.load(sums + p * C + i, mask=p < programs, other=0.0).to(tl.float64)
    mean_j = sum_j / pixels
    tl.store(cov + i * C + j, second / pixels - (tl.sum(sum_i, 0) / pixels) * mean_j, mask=inside)
    if i == 0:
        tl.store(mean + j, pivot_of(x, j, inside, pixels, C).to(tl.float64) + mean_j, mask=inside)
