"""Second stages of the batch norms: partial sums of many programs, combined in float64 and in a fixed order."""

import triton
import triton.language as tl


@triton.jit
def combine_moments(partial, c, inside, tiles, pixels, rows, STRIDE: tl.constexpr, C: tl.constexpr, BT: tl.constexpr,
                    BC: tl.constexpr):  # fmt: skip
    """Mean and biased variance, float64 (BC,), of `tiles` partial moments (tiles, STRIDE / C, C) of `rows` rows each."""
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
def finish_moments(partial, gamma, beta, statistics, norm, tiles, pixels, rows, EPS: tl.constexpr, C: tl.constexpr,
                   BT: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """statistics, float64 (2, C): mean and biased variance; norm, float32 (4, C), from partial (tiles, 2, C)."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < C
    mean, var = combine_moments(partial, c, inside, tiles, pixels, rows, 2 * C, C, BT, BC)
    tl.store(statistics + c, mean, mask=inside)
    tl.store(statistics + C + c, var, mask=inside)
    inverse = 1.0 / tl.sqrt(var + EPS)
    gain = tl.load(gamma + c, mask=inside, other=0.0).to(tl.float64)
    tl.store(norm + c, mean.to(tl.float32), mask=inside)
    tl.store(norm + C + c, inverse.to(tl.float32), mask=inside)
    tl.store(norm + 2 * C + c, (gain * inverse).to(tl.float32), mask=inside)
    tl.store(norm + 3 * C + c, tl.load(beta + c, mask=inside, other=0.0).to(tl.float32), mask=inside)


@triton.jit
def finish_gradient(partial, norm, gradients, affine, tiles, pixels, TRAINING: tl.constexpr, C: tl.constexpr,
                    BT: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """A batch norm's backward from partial (tiles, 2, C): sums of g and of g (v - mean).

    gradients, float32 (2, C): of gamma and beta. affine, float32 (3, C): p, r, t with
    dv = p g + r (v - mean) + t.
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < C
    sum_g = tl.zeros((BC,), tl.float64)
    sum_gv = tl.zeros((BC,), tl.float64)
    for start in range(0, tiles, BT):
        t = start + tl.arange(0, BT)
        live = (t < tiles)[:, None] & inside[None, :]
        at = partial + t[:, None] * (2 * C) + c[None, :]
        sum_g += tl.sum(tl.load(at, mask=live, other=0.0).to(tl.float64), 0)
        sum_gv += tl.sum(tl.load(at + C, mask=live, other=0.0).to(tl.float64), 0)
    inverse = tl.load(norm + C + c, mask=inside, other=0.0).to(tl.float64)
    scale = tl.load(norm + 2 * C + c, mask=inside, other=0.0).to(tl.float64)
    dgamma = sum_gv * inverse
    tl.store(gradients + c, dgamma.to(tl.float32), mask=inside)
    tl.store(gradients + C + c, sum_g.to(tl.float32), mask=inside)
    tl.store(affine + c, scale.to(tl.float32), mask=inside)
    if TRAINING:
        tl.store(affine + C + c, (-scale * inverse * dgamma / pixels).to(tl.float32), mask=inside)
        tl.store(affine + 2 * C + c, (-scale * sum_g / pixels).to(tl.float32), mask=inside)
    else:
        tl.store(affine + C + c, tl.zeros((BC,), tl.float32), mask=inside)
        tl.store(affine + 2 * C + c, tl.zeros((BC,), tl.float32), mask=inside)


@triton.jit
def normalise(y, norm, residual, out, pixels, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """out = BN(y), plus residual where there is one: rows x channels, one narrow pass."""
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    inside = c < C
    live = (r < pixels)[:, None] & inside[None, :]
    at = r[:, None].to(tl.int64) * C + c[None, :]
    mean = tl.load(norm + c, mask=inside, other=0.0)
    scale = tl.load(norm + 2 * C + c, mask=inside, other=0.0)
    shift = tl.load(norm + 3 * C + c, mask=inside, other=0.0)
    value = (tl.load(y + at, mask=live, other=0.0).to(tl.float32) - mean[None, :]) * scale[None, :] + shift[None, :]
    if residual is not None:
        value += tl.load(residual + at, mask=live, other=0.0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=live)


@triton.jit
def pair_sums(g, v, norm, partial, pixels, rows, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """partial (programs, 2, C): sums of g and of g (v - mean) over `rows` rows each; what `finish_gradient` reads."""
    program = tl.program_id(0)
    c = tl.arange(0, BC)
    inside = c < C
    mean = tl.load(norm + c, mask=inside, other=0.0)
    sum_g = tl.zeros((BC,), tl.float32)
    sum_gv = tl.zeros((BC,), tl.float32)
    for start in range(program * rows, tl.minimum(program * rows + rows, pixels), BM):
        r = start + tl.arange(0, BM)
        live = (r < pixels)[:, None] & inside[None, :]
        at = r[:, None].to(tl.int64) * C + c[None, :]
        gt = tl.load(g + at, mask=live, other=0.0).to(tl.float32)
        vt = tl.load(v + at, mask=live, other=0.0).to(tl.float32)
        sum_g += tl.sum(gt, 0)
        sum_gv += tl.sum(gt * (vt - mean[None, :]), 0)
    tl.store(partial + program * 2 * C + c, sum_g, mask=inside)
    tl.store(partial + program * 2 * C + C + c, sum_gv, mask=inside)
