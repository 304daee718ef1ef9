"""Batch norms: their last stages, the two narrow passes of the third norm, and the running statistics."""

import triton
import triton.language as tl

from .common import kernel, write_norm
from .partial import combine_moments, combine_pairs


@kernel
def finish_moments_kernel(partial, gamma, beta, statistics, norm, tiles, pixels, rows, EPS: tl.constexpr,
                          C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """statistics, float64 (2, C): mean and biased variance; norm, float32 (4, C), from partial (tiles, 2, C)."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < C
    mean, var = combine_moments(partial, c, inside, tiles, pixels, rows, 2 * C, C, BT, BC)
    tl.store(statistics + c, mean, mask=inside)
    tl.store(statistics + C + c, var, mask=inside)
    write_norm(mean, var, gamma, beta, norm, c, inside, EPS, C)


@kernel
def norm_from_kernel(mean, var, gamma, beta, statistics, norm, EPS: tl.constexpr, C: tl.constexpr, BC: tl.constexpr):
    """`finish_moments_kernel` where mean and variance (C,) are already there; statistics may be absent."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < C
    m = tl.load(mean + c, mask=inside, other=0.0).to(tl.float64)
    v = tl.load(var + c, mask=inside, other=0.0).to(tl.float64)
    if statistics is not None:
        tl.store(statistics + c, m, mask=inside)
        tl.store(statistics + C + c, v, mask=inside)
    write_norm(m, v, gamma, beta, norm, c, inside, EPS, C)


@kernel
def norms_of_block_kernel(statistics, gamma1, beta1, gamma2, beta2, gamma3, beta3, norm1, norm2, norm3,
                          EPS: tl.constexpr, CH: tl.constexpr, CO: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """All norms of a block from its statistics: mean and variance of each, in order. Grid: (blocks, 3)."""
    which = tl.program_id(1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside, inside_o = c < CH, c < CO
    if norm1 is not None:
        if which == 0:
            m = tl.load(statistics + c, mask=inside, other=0.0)
            v = tl.load(statistics + CH + c, mask=inside, other=0.0)
            write_norm(m, v, gamma1, beta1, norm1, c, inside, EPS, CH)
        statistics += 2 * CH
    if which == 1:
        m = tl.load(statistics + c, mask=inside, other=0.0)
        v = tl.load(statistics + CH + c, mask=inside, other=0.0)
        write_norm(m, v, gamma2, beta2, norm2, c, inside, EPS, CH)
    if which == 2:
        m = tl.load(statistics + 2 * CH + c, mask=inside_o, other=0.0)
        v = tl.load(statistics + 2 * CH + CO + c, mask=inside_o, other=0.0)
        write_norm(m, v, gamma3, beta3, norm3, c, inside_o, EPS, CO)


@kernel
def finish_gradient_kernel(partial, norm, dgamma, dbeta, affine, tiles, pixels, TRAINING: tl.constexpr, C: tl.constexpr,
                           BT: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """A batch norm's backward from partial (tiles, 2, C): sums of g and of g (v - mean).

    dgamma, dbeta: float32 (C,). affine, float32 (4, C): p, r, mean, t with dv = p g + r (v - mean) + t.
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < C
    sum_g, sum_gv = combine_pairs(partial, c, inside, tiles, C, BT, BC)
    inverse = tl.load(norm + C + c, mask=inside, other=0.0).to(tl.float64)
    scale = tl.load(norm + 2 * C + c, mask=inside, other=0.0).to(tl.float64)
    gain = sum_gv * inverse
    tl.store(dgamma + c, gain.to(tl.float32), mask=inside)
    tl.store(dbeta + c, sum_g.to(tl.float32), mask=inside)
    r = tl.zeros((BC,), tl.float64)
    t = tl.zeros((BC,), tl.float64)
    if TRAINING:
        r = -scale * inverse * gain / pixels
        t = -scale * sum_g / pixels
    tl.store(affine + c, scale.to(tl.float32), mask=inside)
    tl.store(affine + C + c, r.to(tl.float32), mask=inside)
    tl.store(affine + 2 * C + c, tl.load(norm + c, mask=inside, other=0.0), mask=inside)
    tl.store(affine + 3 * C + c, t.to(tl.float32), mask=inside)


@kernel
def normalise_kernel(y, norm, shortcut, out, pixels, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """out = BN(y) + shortcut, which may be absent: rows x channels, one narrow pass."""
    first = tl.program_id(0).to(tl.int64) * BM
    r = tl.arange(0, BM)
    c = tl.arange(0, BC)
    inside = c < C
    live = (r < pixels - first)[:, None] & inside[None, :]
    at = first * C + (r[:, None] * C + c[None, :])
    mean = tl.load(norm + c, mask=inside, other=0.0)
    scale = tl.load(norm + 2 * C + c, mask=inside, other=0.0)
    shift = tl.load(norm + 3 * C + c, mask=inside, other=0.0)
    value = (tl.load(y + at, mask=live, other=0.0).to(tl.float32) - mean[None, :]) * scale[None, :] + shift[None, :]
    if shortcut is not None:
        value += tl.load(shortcut + at, mask=live, other=0.0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=live)


@kernel
def pair_sums_kernel(g, v, mean, partial, pixels, rows, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """partial (programs, 2, C): sums of g and of g (v - mean) over `rows` rows each, mean (C,) taken as float32.

    What `finish_gradient_kernel` and `finish_gate_kernel` read.
    """
    program = tl.program_id(0)
    c = tl.arange(0, BC)
    inside = c < C
    m = tl.load(mean + c, mask=inside, other=0.0).to(tl.float32)
    sum_g = tl.zeros((BC,), tl.float32)
    sum_gv = tl.zeros((BC,), tl.float32)
    count = tl.minimum(rows, pixels - program * rows)
    g += program.to(tl.int64) * rows * C
    v += program.to(tl.int64) * rows * C
    for start in range(0, count, BM):
        r = start + tl.arange(0, BM)
        live = (r < count)[:, None] & inside[None, :]
        at = r[:, None] * C + c[None, :]
        gt = tl.load(g + at, mask=live, other=0.0).to(tl.float32)
        vt = tl.load(v + at, mask=live, other=0.0).to(tl.float32)
        sum_g += tl.sum(gt, 0)
        sum_gv += tl.sum(gt * (vt - m[None, :]), 0)
    tl.store(partial + program * 2 * C + c, sum_g, mask=inside)
    tl.store(partial + program * 2 * C + C + c, sum_gv, mask=inside)


@triton.jit
def move_norm(mean, var, running_mean, running_var, c, inside, pixels, MOMENTUM: tl.constexpr):
    count = tl.cast(pixels, tl.float64)
    unbiased = count / tl.where(count > 1, count - 1, 1)
    old = tl.load(running_mean + c, mask=inside, other=0.0).to(tl.float64)
    new = tl.load(mean + c, mask=inside, other=0.0)
    tl.store(running_mean + c, (old + (new - old) * MOMENTUM).to(tl.float32), mask=inside)
    old = tl.load(running_var + c, mask=inside, other=0.0).to(tl.float64)
    new = tl.load(var + c, mask=inside, other=0.0) * unbiased
    tl.store(running_var + c, (old + (new - old) * MOMENTUM).to(tl.float32), mask=inside)


@kernel
def update_running_kernel(mean1, var1, running_mean1, running_var1, mean2, var2, running_mean2, running_var2, mean3,
                          var3, running_mean3, running_var3, pixels_in, pixels_out, MOMENTUM: tl.constexpr,
                          CH: tl.constexpr, CO: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Running statistics of up to three norms, as torch's batch norm moves them. Grid: (blocks, 3)."""
    which = tl.program_id(1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    if mean1 is not None:  # noqa: SIM102  (known when compiled, unlike the next)
        if which == 0:
            move_norm(mean1, var1, running_mean1, running_var1, c, c < CH, pixels_in, MOMENTUM)
    if mean2 is not None:  # noqa: SIM102
        if which == 1:
            move_norm(mean2, var2, running_mean2, running_var2, c, c < CH, pixels_out, MOMENTUM)
    if which == 2:
        move_norm(mean3, var3, running_mean3, running_var3, c, c < CO, pixels_out, MOMENTUM)
