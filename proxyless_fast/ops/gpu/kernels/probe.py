"""Last stages of the gate gradients: of all candidates of a probe, and of the active path from its own y."""

import triton.language as tl

from .common import kernel
from .partial import combine_moments, combine_pairs, combine_products


@kernel
def finish_probe_kernel(partial, gamma, beta, statistics, gates, tiles, pixels, rows, EPS: tl.constexpr,
                        TRAINING: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """gates[j] = <G, BN3(y_j)>, and statistics (candidates, 2, C), float64, from partial (candidates, tiles, 4, C).

    gamma, beta: (candidates, C). With TRAINING false, statistics is read: the running mean and variance.
    """
    j = tl.program_id(0)
    c = tl.arange(0, BC)
    inside = c < C
    partial += j * tiles * (4 * C)
    mean, var = combine_moments(partial, c, inside, tiles, pixels, rows, 4 * C, C, BT, BC)
    at = statistics + j * (2 * C) + c
    if TRAINING:
        tl.store(at, mean, mask=inside)
        tl.store(at + C, var, mask=inside)
    else:
        mean = tl.load(at, mask=inside, other=0.0)
        var = tl.load(at + C, mask=inside, other=1.0)
    sum_g, sum_yg = combine_products(partial, mean, c, inside, tiles, 4 * C, C, BT, BC)
    gain = tl.load(gamma + j * C + c, mask=inside, other=0.0).to(tl.float64)
    shift = tl.load(beta + j * C + c, mask=inside, other=0.0).to(tl.float64)
    gate = gain / tl.sqrt(var + EPS) * sum_yg + shift * sum_g
    tl.store(gates + j, tl.sum(tl.where(inside, gate, 0.0), 0))


@kernel
def finish_gate_kernel(partial, mean, var, gamma, beta, gate, tiles, EPS: tl.constexpr, C: tl.constexpr,
                       BT: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """gate = <G, BN(y)> from partial (tiles, 2, C) of `pair_sums_kernel`, whose mean was this one in float32."""
    c = tl.arange(0, BC)
    inside = c < C
    sum_g, sum_gy = combine_pairs(partial, c, inside, tiles, C, BT, BC)
    m = tl.load(mean + c, mask=inside, other=0.0)
    sum_gy += (m.to(tl.float32).to(tl.float64) - m) * sum_g
    gain = tl.load(gamma + c, mask=inside, other=0.0).to(tl.float64)
    shift = tl.load(beta + c, mask=inside, other=0.0).to(tl.float64)
    inverse = 1.0 / tl.sqrt(tl.load(var + c, mask=inside, other=1.0) + EPS)
    tl.store(gate, tl.sum(tl.where(inside, gain * inverse * sum_gy + shift * sum_g, 0.0), 0))
