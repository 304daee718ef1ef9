"""Expand, forward and backward. The first norm is known beforehand from the Gram matrix of x.

Forward: e = act(BN1(x W1^T)). Backward: one pass over the gradient of e, and a narrow one that ends dX. Wide tiles are
held as channels x pixels there: what belongs to a channel is spread over the threads of a matrix product's result
instead of being repeated in each, and sums over pixels can be carried through a loop.
"""

import triton
import triton.language as tl

from .common import activate, kernel, load_norm, through


@kernel
def expand_kernel(x, weight, norm, e, pixels, CI: tl.constexpr, CH: tl.constexpr, ACT: tl.constexpr,
                  PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
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


@triton.jit
def masked_gradient(de, x, w, r, c, live, inside, m1, s1, b1, CH: tl.constexpr, ACT: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    """q = de act'(BN1(x W1^T)) and x W1^T - mean, both (channels, pixels); q is 0 outside."""
    u = tl.dot(w, tl.trans(x), input_precision=PRECISION) - m1[:, None]
    g = tl.load(de + r[None, :] * CH + c[:, None], mask=inside[:, None] & live[None, :], other=0.0).to(tl.float32)
    return through(g, u * s1[:, None] + b1[:, None], ACT), u


@kernel
def expand_backward_kernel(de, x, mean_x, weight, norm1, dx, partial, dweight, pixels, rows, CI: tl.constexpr,
                           CH: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
                           BI: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """One pass over de for a group of BC expanded channels: q = de act'(u), u recomputed from x.

    dx, where it is given, (groups, pixels, CI): each group's share of (q a1) W1. partial, where it is given,
    (programs, 2, CH): sums of q and of q (x W1^T - mean). dweight, where it is given, (programs, CH, CI):
    A = q^T (x - mean_x) over `rows` pixels each. BI covers CI.
    """
    columns: tl.constexpr = (CH + BC - 1) // BC
    program = tl.program_id(0) // columns
    column = tl.program_id(0) % columns
    c = column * BC + tl.arange(0, BC)
    i = tl.arange(0, BI)
    inside, inside_i = c < CH, i < CI
    m1, s1, b1 = load_norm(norm1, c, inside, CH)
    centre = tl.load(mean_x + i, mask=inside_i, other=0.0)
    w = tl.load(weight + c[:, None] * CI + i[None, :], mask=inside[:, None] & inside_i[None, :], other=0.0)
    sum_q, sum_qu = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    if dweight is not None:
        a = tl.zeros((BC, BI), tl.float32)
    count = tl.minimum(rows, pixels - program * rows)
    first = program.to(tl.int64) * rows
    de += first * CH
    x += first * CI
    if dx is not None:
        dx += (column.to(tl.int64) * pixels + first) * CI
    for start in range(0, count, BM):
        r = start + tl.arange(0, BM)
        live = r < count
        at = r[:, None] * CI + i[None, :]
        narrow = live[:, None] & inside_i[None, :]
        xt = tl.load(x + at, mask=narrow, other=0.0)
        q, u = masked_gradient(de, xt, w, r, c, live, inside, m1, s1, b1, CH, ACT, PRECISION)
        if partial is not None:
            sum_q += tl.sum(q, 1)
            sum_qu += tl.sum(q * u, 1)
        if dx is not None:
            scaled = tl.trans((q * s1[:, None]).to(x.dtype.element_ty))
            part = tl.dot(scaled, w, input_precision=PRECISION)
            tl.store(dx + at, part.to(dx.dtype.element_ty), mask=narrow)
        if dweight is not None:
            centred = (xt.to(tl.float32) - centre[None, :]).to(x.dtype.element_ty)  # not live: meets q = 0
            a = tl.dot(q.to(x.dtype.element_ty), centred, a, input_precision=PRECISION)
    if partial is not None:
        tl.store(partial + program * 2 * CH + c, sum_q, mask=inside)
        tl.store(partial + program * 2 * CH + CH + c, sum_qu, mask=inside)
    if dweight is not None:
        at = dweight + program * (CH * CI) + c[:, None] * CI + i[None, :]
        tl.store(at, a, mask=inside[:, None] & inside_i[None, :])


@kernel
def expand_input_kernel(de, x, weight, norm1, dx, partial, kept, pixels, CI: tl.constexpr, CH: tl.constexpr,
                        ACT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr,
                        BC: tl.constexpr):  # fmt: skip
    """dx and partial of `expand_backward_kernel` where CH is too wide for one program: a loop over BC channels.

    partial: (programs, 2, CH), one program for BM pixels. kept, where it is given, is de again: q is left in its place.
    """
    program = tl.program_id(0)
    i = tl.arange(0, BI)
    r = tl.arange(0, BM)
    first = program.to(tl.int64) * BM
    inside_i, live = i < CI, r < pixels - first
    de += first * CH
    x += first * CI
    dx += first * CI
    at = r[:, None] * CI + i[None, :]
    narrow = live[:, None] & inside_i[None, :]
    xt = tl.load(x + at, mask=narrow, other=0.0)
    acc = tl.zeros((BM, BI), tl.float32)
    for k in range(0, CH, BC):
        c = k + tl.arange(0, BC)
        inside = c < CH
        m1, s1, b1 = load_norm(norm1, c, inside, CH)
        w = tl.load(weight + c[:, None] * CI + i[None, :], mask=inside[:, None] & inside_i[None, :], other=0.0)
        q, u = masked_gradient(de, xt, w, r, c, live, inside, m1, s1, b1, CH, ACT, PRECISION)
        if kept is not None:
            at_wide = first * CH + (r[None, :] * CH + c[:, None])
            tl.store(kept + at_wide, q.to(kept.dtype.element_ty), mask=inside[:, None] & live[None, :])
        tl.store(partial + program * 2 * CH + c, tl.sum(q, 1), mask=inside)
        tl.store(partial + program * 2 * CH + CH + c, tl.sum(q * u, 1), mask=inside)
        scaled = tl.trans((q * s1[:, None]).to(x.dtype.element_ty))
        acc = tl.dot(scaled, w, acc, input_precision=PRECISION)
    tl.store(dx + at, acc.to(dx.dtype.element_ty), mask=narrow)


@kernel
def finish_input_kernel(parts, x, mean_x, correction, constant, shortcut, dx, pixels, CI: tl.constexpr,
                        PARTS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                        BK: tl.constexpr):  # fmt: skip
    """dx = sum of parts - (x - mean_x) correction - constant + shortcut: one narrow pass.

    parts (PARTS, pixels, CI). correction (CI, CI), in x's dtype, and constant (CI,): what BN1's statistics take back,
    from sums over all pixels (`expand_correction_kernel`); both absent with a frozen norm. shortcut: the output's
    gradient, where it is added.
    """
    columns: tl.constexpr = (CI + BN - 1) // BN
    first = (tl.program_id(0) // columns).to(tl.int64) * BM
    row = tl.arange(0, BM)[:, None]
    o = (tl.program_id(0) % columns) * BN + tl.arange(0, BN)
    live, inside = row < pixels - first, o < CI
    x += first * CI
    value = tl.zeros((BM, BN), tl.float32)
    if correction is not None:
        for k in range(0, CI, BK):
            i = k + tl.arange(0, BK)
            inside_i = i < CI
            xt = tl.load(x + row * CI + i[None, :], mask=live & inside_i[None, :], other=0.0).to(tl.float32)
            xt -= tl.load(mean_x + i, mask=inside_i, other=0.0)[None, :]
            w = tl.load(correction + i[:, None] * CI + o[None, :], mask=inside_i[:, None] & inside[None, :], other=0.0)
            value = tl.dot(xt.to(x.dtype.element_ty), w, value, input_precision=PRECISION)
        value = -value - tl.load(constant + o, mask=inside, other=0.0)[None, :]
    at = first * CI + (row * CI + o[None, :])
    if shortcut is not None:
        value += tl.load(shortcut + at, mask=live & inside[None, :], other=0.0).to(tl.float32)
    for _ in tl.static_range(PARTS):
        value += tl.load(parts + at, mask=live & inside[None, :], other=0.0).to(tl.float32)
        parts += tl.cast(pixels, tl.int64) * CI
    tl.store(dx + at, value.to(dx.dtype.element_ty), mask=live & inside[None, :])
