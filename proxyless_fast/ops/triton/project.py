"""Project: y = act(BN2(d)) Wp^T, BN2 and activation applied as d is read, with three epilogues.

"train" writes y and its partial moments; "probe" writes only sums of y, y^2, G and y G; "eval" writes BN3(y).
"""

import triton.language as tl

from .common import activate, kernel, load_norm, tile_moments


@kernel
def project(d, norm2, weight, offsets, y, grad, norm3, partial, pixels, tiles, CH: tl.constexpr, CO: tl.constexpr,
            ACT: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr, BM: tl.constexpr,
            BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """d (pixels, CH), norm2 (4, CH), weight (CO, CH); one program for BM pixels and BN output channels.

    Candidates lie side by side: program_id(1) takes columns offsets[j] to offsets[j + 1] - 1 of d and of weight, so
    that one launch serves a whole layer; ALIGN divides every offset. partial: (candidates, tiles, 2, CO) for "train"
    (mean, sum of squares about it), (candidates, tiles, 4, CO) for "probe" (also sum of G, sum of (y - mean) G).
    Moments are not carried from tile to tile: in the layout of a matrix product they would take half the registers.
    """
    columns: tl.constexpr = (CO + BN - 1) // BN
    tile = tl.program_id(0) // columns
    o = (tl.program_id(0) % columns) * BN + tl.arange(0, BN)
    j = tl.program_id(1)
    first = tl.multiple_of(tl.load(offsets + j), ALIGN)
    last = tl.multiple_of(tl.load(offsets + j + 1), ALIGN)
    inside_o = o < CO
    start = tile.to(tl.int64) * BM
    row = tl.arange(0, BM)[:, None]
    live = tl.arange(0, BM) < pixels - start
    d += start * CH
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(first, last, BK):
        c = k + tl.arange(0, BK)
        inside = c < last
        v = tl.load(d + row * CH + c[None, :], mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
        m, s, b = load_norm(norm2, c, inside, CH)
        h = activate((v - m[None, :]) * s[None, :] + b[None, :], ACT)
        w = tl.load(weight + o[None, :] * CH + c[:, None], mask=inside_o[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(h.to(d.dtype.element_ty), w, acc, input_precision=PRECISION)
    at = start * CO + (row * CO + o[None, :])
    written = live[:, None] & inside_o[None, :]
    if MODE == "eval":
        m, s, b = load_norm(norm3, o, inside_o, CO)
        tl.store(y + at, ((acc - m[None, :]) * s[None, :] + b[None, :]).to(y.dtype.element_ty), mask=written)
    else:
        value = acc
        if MODE == "train":
            rounded = acc.to(y.dtype.element_ty)
            tl.store(y + at, rounded, mask=written)
            value = rounded.to(tl.float32)  # the statistics are those of what backward will read
        value = tl.where(live[:, None], value, 0.0)
        mean, m2, apart = tile_moments(value, live, tl.minimum(pixels - tile * BM, BM).to(tl.float32))
        parts: tl.constexpr = 4 if MODE == "probe" else 2
        at_partial = partial + (j * tiles + tile) * (parts * CO) + o
        tl.store(at_partial, mean, mask=inside_o)
        tl.store(at_partial + CO, m2, mask=inside_o)
        if MODE == "probe":
            g = tl.load(grad + at, mask=written, other=0.0).to(tl.float32)
            tl.store(at_partial + 2 * CO, tl.sum(g, 0), mask=inside_o)
            tl.store(at_partial + 3 * CO, tl.sum(apart * g, 0), mask=inside_o)
