"""What follows from the mean and covariance of x: the first norm, and what its statistics take back in backward."""

import triton
import triton.language as tl

from .common import kernel, write_norm


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
def expand_moments_kernel(weight, mean, cov, gamma, beta, statistics, norm, EPS: tl.constexpr, CI: tl.constexpr,
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
def expand_correction_kernel(weight, norm1, dgamma, dbeta, correction, constant, pixels, CI: tl.constexpr,
                             CH: tl.constexpr, BI: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """What BN1's statistics take back from dX: correction (CI, CI) = W^T diag(a) W and constant (CI,) = b W.

    a = scale / std * dgamma / pixels, b = scale * dbeta / pixels, written about the mean of x.
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
def finish_weight_kernel(total, weight, cov, norm1, dgamma, dweight, CI: tl.constexpr, CH: tl.constexpr,
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
