"""Gram statistics: mean and covariance of x over its pixels, from which BN1 is known before anything is expanded."""

import triton
import triton.language as tl

from .common import kernel, write_norm

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
def gram_partial(x, sums, seconds, pixels, rows, C: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
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
def gram_finish(x, sums, seconds, mean, cov, programs, pixels, C: tl.constexpr, BT: tl.constexpr,
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


@triton.jit
def times_cov(weight, cov, c, i, inside, inside_i, CI: tl.constexpr, WIDE: tl.constexpr):
    """(weight cov)[c, i] in float64, or float32 where x has so few digits that they are enough."""
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    acc = tl.zeros((c.shape[0], i.shape[0]), dtype)
    for k in range(CI):
        w = tl.load(weight + c * CI + k, mask=inside, other=0.0).to(dtype)
        row = tl.load(cov + k * CI + i, mask=inside_i, other=0.0).to(dtype)
        acc += w[:, None] * row[None, :]
    return acc


@kernel
def expand_moments(weight, mean, cov, gamma, beta, statistics, norm, EPS: tl.constexpr, CI: tl.constexpr,
                   CH: tl.constexpr, WIDE: tl.constexpr, BI: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """BN1 before anything is expanded: mean W mean(x), variance diag(W cov(x) W^T). BI covers CI.

    weight (CH, CI), mean (CI,), cov (CI, CI) to statistics, float64 (2, CH), and norm, float32 (4, CH).
    """
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    i = tl.arange(0, BI)
    inside, inside_i = c < CH, i < CI
    w = tl.load(weight + c[:, None] * CI + i[None, :], mask=inside[:, None] & inside_i[None, :], other=0.0).to(dtype)
    m = tl.sum(w * tl.load(mean + i, mask=inside_i, other=0.0).to(dtype)[None, :], 1).to(tl.float64)
    var = tl.sum(w * times_cov(weight, cov, c, i, inside, inside_i, CI, WIDE), 1).to(tl.float64)
    var = tl.where(var < 0.0, 0.0, var)  # not maximum: NaN stays
    tl.store(statistics + c, m, mask=inside)
    tl.store(statistics + CH + c, var, mask=inside)
    write_norm(m, var, gamma, beta, norm, c, inside, EPS, CH)


@kernel
def expand_correction(weight, norm1, dgamma, dbeta, correction, constant, pixels, CI: tl.constexpr, CH: tl.constexpr,
                      BI: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """What BN1's statistics take back from dX: correction (CI, CI) = W^T diag(a) W and constant (CI,) = b W.

    a = scale / std * dgamma / pixels, b = scale * dbeta / pixels: the oracle's last lines, written about the mean of x.
    """
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    o = tl.program_id(1) * BI + tl.arange(0, BI)
    inside_i, inside_o = i < CI, o < CI
    acc = tl.zeros((BI, BI), tl.float32)
    total = tl.zeros((BI,), tl.float32)
    for k in range(0, CH, BC):
        c = k + tl.arange(0, BC)
        inside = c < CH
        inverse = tl.load(norm1 + CH + c, mask=inside, other=0.0)
        scale = tl.load(norm1 + 2 * CH + c, mask=inside, other=0.0) / pixels
        a = scale * inverse * tl.load(dgamma + c, mask=inside, other=0.0)
        b = scale * tl.load(dbeta + c, mask=inside, other=0.0)
        row = weight + c[:, None] * CI
        left = tl.load(row + i[None, :], mask=inside[:, None] & inside_i[None, :], other=0.0).to(tl.float32)
        right = tl.load(row + o[None, :], mask=inside[:, None] & inside_o[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(tl.trans(left * a[:, None]), right, acc, input_precision="ieee")
        total += tl.sum(right * b[:, None], 0)
    tl.store(correction + i[:, None] * CI + o[None, :], acc, mask=inside_i[:, None] & inside_o[None, :])
    if tl.program_id(0) == 0:
        tl.store(constant + o, total, mask=inside_o)


@kernel
def finish_weight(total, weight, cov, norm1, dgamma, dweight, CI: tl.constexpr, CH: tl.constexpr,
                  TRAINING: tl.constexpr, WIDE: tl.constexpr, BI: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """dW1 = scale (A - dgamma / std W cov(x)), total being A (CH, CI) about the mean of x. BI covers CI."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    i = tl.arange(0, BI)
    inside, inside_i = c < CH, i < CI
    at = c[:, None] * CI + i[None, :]
    mask = inside[:, None] & inside_i[None, :]
    value = tl.load(total + at, mask=mask, other=0.0).to(tl.float64 if WIDE else tl.float32)
    if TRAINING:
        taken = tl.load(dgamma + c, mask=inside, other=0.0) * tl.load(norm1 + CH + c, mask=inside, other=0.0)
        value -= taken[:, None] * times_cov(weight, cov, c, i, inside, inside_i, CI, WIDE)
    tl.store(dweight + at, value * tl.load(norm1 + 2 * CH + c, mask=inside, other=0.0)[:, None], mask=mask)
