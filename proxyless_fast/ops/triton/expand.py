"""Expand: e = act(BN1(x W1^T)), the batch norm known beforehand from the Gram matrix of x."""

import triton.language as tl

from .common import activate, kernel, load_norm


@kernel
def expand(x, weight, norm, e, pixels, CI: tl.constexpr, CH: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
           BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """x (pixels, CI), weight (CH, CI), norm (4, CH) to e (pixels, CH).

    The norm is applied to the float32 sum, not folded into the weights: one multiplication more per element, hidden
    behind the store, and the weights keep the rounding that the statistics were computed with.
    """
    columns: tl.constexpr = (CH + BN - 1) // BN  # neighbours share a tile of x
    first = (tl.program_id(0) // columns).to(tl.int64) * BM
    r = tl.arange(0, BM)
    c = (tl.program_id(0) % columns) * BN + tl.arange(0, BN)
    live, inside = (r < pixels - first)[:, None], c < CH
    x += first * CI
    e += first * CH
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, CI, BK):
        i = k + tl.arange(0, BK)
        a = tl.load(x + r[:, None] * CI + i[None, :], mask=live & (i < CI)[None, :], other=0.0)
        w = tl.load(weight + c[None, :] * CI + i[:, None], mask=inside[None, :] & (i < CI)[:, None], other=0.0)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
    mean, scale, shift = load_norm(norm, c, inside, CH)
    value = activate((acc - mean[None, :]) * scale[None, :] + shift[None, :], ACT)
    tl.store(e + r[:, None] * CH + c[None, :], value.to(e.dtype.element_ty), mask=live & inside[None, :])
