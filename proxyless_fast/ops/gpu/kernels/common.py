"""What the kernels share: activations, their slopes, and the merging of moments.

Activations are seen as rows of pixels x channels (channels-last memory), the channel counts known at compile time, so
that the compiler sees which accesses are 16 bytes wide; the number of pixels is known at run time.

A batch norm comes to a kernel as `norm`, float32 (4, C): mean, 1 / sqrt(var + eps), gamma / sqrt(var + eps), beta.
"""

from functools import partial

import triton
import triton.language as tl

# Sizes that differ from batch to batch: a kernel is the same for all of them, also where one is 1 or a multiple of 16.
# What is read 16 bytes at a time follows from channels, which are compiled in.
SIZES = (
    "pixels", "pixels_in", "pixels_out", "rows", "tiles", "programs", "group", "groups", "height", "width",
    "out_height", "out_width",
)  # fmt: skip
kernel = partial(triton.jit, do_not_specialize=SIZES)


@triton.jit
def activate(z, ACT: tl.constexpr):
    # NaN goes through, as in torch: a search must see that its loss is not a number.
    if ACT == "relu6":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        z = tl.minimum(z, 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "relu":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "silu":
        z = z * tl.sigmoid(z)
    elif ACT == "hardswish":
        z = z * tl.minimum(tl.maximum(z + 3.0, 0.0), 6.0) * (1.0 / 6.0)
    else:
        tl.static_assert(ACT == "identity")
    return z


@triton.jit
def through(grad, z, ACT: tl.constexpr):
    """grad * act'(z)."""
    if ACT == "relu6":
        grad = tl.where((z <= 0.0) | (z >= 6.0), 0.0, grad)
    elif ACT == "relu":
        grad = tl.where(z <= 0.0, 0.0, grad)
    elif ACT == "silu":
        s = tl.sigmoid(z)
        grad = grad * (s * (1.0 + z * (1.0 - s)))
    elif ACT == "hardswish":
        grad = tl.where(z < -3.0, 0.0, tl.where(z <= 3.0, grad * (z * (1.0 / 3.0) + 0.5), grad))
    else:
        tl.static_assert(ACT == "identity")
    return grad


@triton.jit
def load_norm(norm, c, inside, C: tl.constexpr):
    """mean, scale and shift of channels c: z = (v - mean) * scale + shift; zeros outside."""
    mean = tl.load(norm + c, mask=inside, other=0.0)
    scale = tl.load(norm + 2 * C + c, mask=inside, other=0.0)
    shift = tl.load(norm + 3 * C + c, mask=inside, other=0.0)
    return mean, scale, shift


@triton.jit
def load_affine(affine, c, inside, C: tl.constexpr):
    """p, r, mean and t of channels c: a norm's backward dv = p g + r (v - mean) + t (norm.py); zeros outside."""
    p = tl.load(affine + c, mask=inside, other=0.0)
    r = tl.load(affine + C + c, mask=inside, other=0.0)
    mean = tl.load(affine + 2 * C + c, mask=inside, other=0.0)
    return p, r, mean, tl.load(affine + 3 * C + c, mask=inside, other=0.0)


@triton.jit
def write_norm(mean, var, gamma, beta, norm, c, inside, EPS: tl.constexpr, C: tl.constexpr):
    """A norm as `load_norm` reads it, from its statistics in float64 and its weights, of channels c."""
    inverse = 1.0 / tl.sqrt(var + EPS)
    gain = tl.load(gamma + c, mask=inside, other=0.0).to(tl.float64)
    tl.store(norm + c, mean.to(tl.float32), mask=inside)
    tl.store(norm + C + c, inverse.to(tl.float32), mask=inside)
    tl.store(norm + 2 * C + c, (gain * inverse).to(tl.float32), mask=inside)
    tl.store(norm + 3 * C + c, tl.load(beta + c, mask=inside, other=0.0).to(tl.float32), mask=inside)


@triton.jit
def tile_moments(v, live, n):
    """Mean over the n live rows of v, and the sum of squares about it. v must be 0 where not live."""
    mean = tl.sum(v, 0) / n
    apart = tl.where(live[:, None], v - mean[None, :], 0.0)
    return mean, tl.sum(apart * apart, 0), apart


@triton.jit
def merge_moments(count, mean, m2, n, mean_n, m2_n):
    """Moments of the union of two sets of rows (Chan, Golub, LeVeque 1979), which lose no digits to a large mean."""
    total = count + n
    delta = mean_n - mean
    return total, mean + delta * (n / total), m2 + m2_n + delta * delta * (count * n / total)
