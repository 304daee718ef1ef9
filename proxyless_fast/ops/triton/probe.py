"""Second stage of the probe: gate gradients of all candidates of a launch."""

import triton
import triton.language as tl

from .norm import combine_moments


@triton.jit
def finish_probe(partial, gamma, beta, statistics, gates, tiles, pixels, rows, EPS: tl.constexpr,
                 TRAINING: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """gates[j] = <G, BN3(y_j)>, float64, and statistics (candidates, 2, C) from partial (candidates, tiles, 4, C).

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
    sum_g = tl.zeros((BC,), tl.float64)
    sum_yg = tl.zeros((BC,), tl.float64)
    for start in range(0, tiles, BT):
        t = start + tl.arange(0, BT)
        live = (t < tiles)[:, None] & inside[None, :]
        tile = partial + t[:, None] * (4 * C) + c[None, :]
        tile_mean = tl.load(tile, mask=live, other=0.0).to(tl.float64)
        tile_g = tl.load(tile + 2 * C, mask=live, other=0.0).to(tl.float64)
        tile_yg = tl.load(tile + 3 * C, mask=live, other=0.0).to(tl.float64)
        sum_g += tl.sum(tile_g, 0)
        sum_yg += tl.sum(tile_yg + (tile_mean - mean[None, :]) * tile_g, 0)
    gain = tl.load(gamma + j * C + c, mask=inside, other=0.0).to(tl.float64)
    shift = tl.load(beta + j * C + c, mask=inside, other=0.0).to(tl.float64)
    gate = gain / tl.sqrt(var + EPS) * sum_yg + shift * sum_g
    tl.store(gates + j, tl.sum(tl.where(inside, gate, 0.0), 0))
