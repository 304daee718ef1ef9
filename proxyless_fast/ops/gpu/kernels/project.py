"""Project, forward and backward.

Forward: y = act(BN2(d)) Wp^T, BN2 and activation applied as d is read, with three epilogues: "train" writes y and its
partial moments; "probe" writes only sums of y, y^2, G and y G; "eval" writes BN3(y). Backward: one pass over d, its
tiles held as channels x pixels (expand.py says why).
"""

import triton.language as tl

from .common import activate, kernel, load_affine, load_norm, through, tile_moments


@kernel
def project_kernel(d, norm2, weight, offsets, y, grad, norm3, partial, pixels, tiles, CH: tl.constexpr,
                   CO: tl.constexpr, ACT: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr,
                   ALIGN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
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


@kernel
def project_backward_kernel(d, norm2, grad, y, affine3, weight, dz, partial, dweight, pixels, rows, CH: tl.constexpr,
                            CO: tl.constexpr, ACT: tl.constexpr, TRAINING: tl.constexpr, FIRST: tl.constexpr,
                            PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """dz = (dY Wp) act'(BN2(d)) with dY = p G + r (y - mean) + t, all from one read of d.

    BN output channels from FIRST on. dz, and partial (programs, 2, CH), sums of dz and of dz (d - mean), are given
    together, and then BN covers all of CO. dweight, where it is given: (programs, output channels, CH), dY^T h over
    `rows` pixels each.
    """
    columns: tl.constexpr = (CH + BC - 1) // BC
    program = tl.program_id(0) // columns
    c = (tl.program_id(0) % columns) * BC + tl.arange(0, BC)
    o = FIRST + tl.arange(0, BN)
    inside, inside_o = c < CH, o < CO
    m2, s2, b2 = load_norm(norm2, c, inside, CH)
    p, q, m3, t = load_affine(affine3, o, inside_o, CO)
    w = tl.load(weight + o[None, :] * CH + c[:, None], mask=inside_o[None, :] & inside[:, None], other=0.0)
    sum_dz, sum_dzd = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    if dweight is not None:
        dw = tl.zeros((BC, BN), tl.float32)
    count = tl.minimum(rows, pixels - program * rows)
    first = program.to(tl.int64) * rows
    d += first * CH
    if dz is not None:
        dz += first * CH
    grad += first * CO
    y += first * CO
    for start in range(0, count, BM):
        r = start + tl.arange(0, BM)
        narrow = (r < count)[:, None] & inside_o[None, :]
        at = r[:, None] * CO + o[None, :]
        dy = p[None, :] * tl.load(grad + at, mask=narrow, other=0.0).to(tl.float32)
        if TRAINING:
            yt = tl.load(y + at, mask=narrow, other=0.0).to(tl.float32)
            dy = tl.where(narrow, dy + q[None, :] * (yt - m3[None, :]) + t[None, :], 0.0)
        dy = dy.to(d.dtype.element_ty)
        wide = inside[:, None] & (r < count)[None, :]
        at = r[None, :] * CH + c[:, None]
        v = tl.load(d + at, mask=wide, other=0.0).to(tl.float32) - m2[:, None]
        z = v * s2[:, None] + b2[:, None]
        if dweight is not None:
            h = activate(z, ACT).to(d.dtype.element_ty)  # pixels that are not live meet dY = 0
            dw = tl.dot(h, dy, dw, input_precision=PRECISION)
        if dz is not None:
            dzt = through(tl.dot(w, tl.trans(dy), input_precision=PRECISION), z, ACT).to(dz.dtype.element_ty)
            tl.store(dz + at, dzt, mask=wide)
            rounded = dzt.to(tl.float32)
            sum_dz += tl.sum(rounded, 1)
            sum_dzd += tl.sum(rounded * v, 1)
    if dz is not None:
        tl.store(partial + program * 2 * CH + c, sum_dz, mask=inside)
        tl.store(partial + program * 2 * CH + CH + c, sum_dzd, mask=inside)
    if dweight is not None:
        share: tl.constexpr = CO - FIRST if CO - FIRST < BN else BN
        at = dweight + program * (share * CH) + (o - FIRST)[None, :] * CH + c[:, None]
        tl.store(at, dw, mask=inside_o[None, :] & inside[:, None])
