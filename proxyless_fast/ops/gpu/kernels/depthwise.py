"""Depthwise convolution, forward and backward, by plain gathers through the first-level cache.

Where the CUDA C++ part is built, its stencils do this job; these kernels make the Triton path whole without it.
"""

import triton.language as tl

from .common import kernel, load_affine, merge_moments, tile_moments

# Loops over the rows of a kernel stay loops: unrolled, the loads of all 49 taps would be in flight at once and spill.


@kernel
def depthwise_kernel(e, taps, d, partial, pixels, rows, height, width, out_height, out_width, E_STRIDE: tl.constexpr,
                     D_STRIDE: tl.constexpr, P_STRIDE: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
                     STRIDE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """e (B, height, width, C), taps (C, K, K) to d (B, out_height, out_width, C), and d's partial moments.

    *_STRIDE: elements between pixels, so that e and d may be columns of wider tensors. partial, where it is given:
    (programs, 2, P_STRIDE), mean and sum of squares about it of `rows` output pixels each.
    """
    program = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C
    count, mean, m2 = 0.0, tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    seen_rows = tl.minimum(rows, pixels - program * rows)
    area, first = out_width * out_height, program * rows
    e += (first // area).to(tl.int64) * height * width * E_STRIDE
    d += first.to(tl.int64) * D_STRIDE
    for start in range(0, seen_rows, BM):
        r = start + tl.arange(0, BM)
        live = r < seen_rows
        ox = (r + first) % out_width
        oy = (r + first) // out_width % out_height
        image = ((r + first) // area - first // area) * height
        acc = tl.zeros((BM, BC), tl.float32)
        for ky in range(K):
            for kx in tl.static_range(K):
                iy, ix = oy * STRIDE + (ky - K // 2), ox * STRIDE + (kx - K // 2)
                seen = live & (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
                at = ((image + iy) * width + ix)[:, None] * E_STRIDE + c[None, :]
                v = tl.load(e + at, mask=seen[:, None] & inside[None, :], other=0.0).to(tl.float32)
                w = tl.load(taps + c * (K * K) + ky * K + kx, mask=inside, other=0.0).to(tl.float32)
                acc += v * w[None, :]
        value = acc.to(d.dtype.element_ty)
        at = r[:, None] * D_STRIDE + c[None, :]
        tl.store(d + at, value, mask=live[:, None] & inside[None, :])
        if partial is not None:
            n = tl.minimum(seen_rows - start, BM).to(tl.float32)
            tile_mean, tile_m2, _ = tile_moments(value.to(tl.float32), live, n)
            count, mean, m2 = merge_moments(count, mean, m2, n, tile_mean, tile_m2)
    if partial is not None:
        tl.store(partial + program * 2 * P_STRIDE + c, mean, mask=inside)
        tl.store(partial + program * 2 * P_STRIDE + P_STRIDE + c, m2, mask=inside)


@kernel
def depthwise_backward_kernel(dz, d, affine, taps, e, de, partial, pixels, rows, height, width, out_height, out_width,
                              C: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, TRAINING: tl.constexpr,
                              BM: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr):  # fmt: skip
    """Both gradients in one pass, BN2's backward applied to (dz, d) as they are read.

    de (B, height, width, C): the input's. partial, where it is given, (programs, K * K, C): the taps', summed over
    `rows` input pixels each; tap k of input pixel p meets the same output pixel in both. BT covers K * K.
    """
    program = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C
    tap = tl.arange(0, BT)
    p, q, mean, t = load_affine(affine, c, inside, C)
    if partial is not None:
        dw = tl.zeros((BT, BC), tl.float32)
    count = tl.minimum(rows, pixels - program * rows)
    area, first = width * height, program * rows
    before = (first // area).to(tl.int64) * (out_height * out_width) * C
    dz += before
    d += before
    if partial is not None:
        e += first.to(tl.int64) * C
    de += first.to(tl.int64) * C
    for start in range(0, count, BM):
        r = start + tl.arange(0, BM)
        live = r < count
        ix = (r + first) % width
        iy = (r + first) // width % height
        image = ((r + first) // area - first // area) * out_height
        at = r[:, None] * C + c[None, :]
        here = live[:, None] & inside[None, :]
        acc = tl.zeros((BM, BC), tl.float32)
        if partial is not None:
            et = tl.load(e + at, mask=here, other=0.0).to(tl.float32)
        for ky in range(K):
            for kx in tl.static_range(K):
                y, x = iy + (K // 2 - ky), ix + (K // 2 - kx)  # STRIDE times the output pixel that the tap serves
                oy, ox = y // STRIDE, x // STRIDE
                seen = live & (y >= 0) & (oy < out_height) & (x >= 0) & (ox < out_width)
                if STRIDE > 1:
                    seen = seen & (y % STRIDE == 0) & (x % STRIDE == 0)
                there = ((image + oy) * out_width + ox)[:, None] * C + c[None, :]
                mask = seen[:, None] & inside[None, :]
                dd = p[None, :] * tl.load(dz + there, mask=mask, other=0.0).to(tl.float32)
                if TRAINING:
                    v = tl.load(d + there, mask=mask, other=0.0).to(tl.float32)
                    dd = tl.where(mask, dd + q[None, :] * (v - mean[None, :]) + t[None, :], 0.0)
                w = tl.load(taps + c * (K * K) + ky * K + kx, mask=inside, other=0.0).to(tl.float32)
                acc += dd * w[None, :]
                if partial is not None:
                    dw += tl.where(tap[:, None] == ky * K + kx, tl.sum(dd * et, 0)[None, :], 0.0)
        tl.store(de + at, acc.to(de.dtype.element_ty), mask=here)
    if partial is not None:
        at = partial + program * (K * K * C) + tap[:, None] * C + c[None, :]
        tl.store(at, dw, mask=(tap < K * K)[:, None] & inside[None, :])
