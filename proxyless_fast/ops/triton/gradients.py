"""Backward of a whole MBConv: all gradients, or the input's alone (an arch step, whose weights are frozen)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backward as bw
from . import depthwise as dw
from . import gram as gm
from . import launch, passes
from .configs import Config, padded
from .passes import (
    Block,
    depthwise,
    expand,
    expand_depthwise,
    finish_gradient,
    image_of,
    inputs_config,
    make_block,
    norms_of,
    pair_sums,
    rows_of,
    taps_of,
)

CORRECTION = Config({"BI": 32, "BC": 32}, 4, 2)


def mbconv_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    d: Tensor,
    statistics: Tensor,
    params: Sequence[Tensor],
    mean: Tensor | None,
    cov: Tensor | None,
    stride: int,
    activation: str,
    training: bool,
    eps: float,
    input: bool,
    weights: bool,
    shortcut: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """proxyless_fast::mbconv_backward: dx if `input`, and if `weights` the gradients of params in their order."""
    block = make_block(x, [params], stride, activation)
    g, y_rows = rows_of(grad.to(x.dtype)), rows_of(y)
    norm1, norm2, norm3 = norms_of(statistics, params, eps)
    lean, in_one = d.numel() == 0, passes.in_one(block)
    e = expand(block, norm1) if (weights or lean) and not in_one else None
    if not lean:
        d_rows = rows_of(d)
    elif e is not None:
        d_rows = depthwise(block, e, moments=False)[0]
    else:
        d_rows = expand_depthwise(block, norm1, moments=False)[0]

    third, affine3 = _norm3(block, g, y_rows, norm3, training)
    dz, dwp, second, affine2 = _project(block, d_rows, g, y_rows, norm2, affine3, training, weights)
    dtaps: Tensor | None
    if in_one and weights:
        de, dtaps = _expand_depthwise(block, dz, d_rows, affine2, norm1)
    else:
        de, dtaps = _depthwise(block, dz, d_rows, affine2, e if weights else None, training)
    del dz, e
    first: list[Tensor] = []
    dx = de if input else None
    if norm1 is not None:
        dx, first = _expand(block, de, norm1, mean, cov, training, input, weights, g if shortcut else None)
    elif shortcut and dx is not None:
        dx = dx.add_(g)
    result = block.empty(0) if dx is None else image_of(dx, *block.size[:3])
    if dtaps is None or dwp is None:
        return result, []
    found = [*first, dtaps, *second, dwp, *third]
    return result, [t.reshape(p.shape).to(p.dtype) for t, p in zip(found, params, strict=True)]


Pair = tuple[Tensor, Tensor]  # gradients of a norm's gamma and beta


def _norm3(block: Block, g: Tensor, y: Tensor, norm3: Tensor, training: bool) -> tuple[Pair, Tensor]:
    return finish_gradient(pair_sums(g, y, norm3), block.out_pixels, norm3, training)


# Output channels whose share of dWp fits into a program's registers beside dz; with more, dWp has launches of its own.
MOST_OUTPUTS = 256


def _project(
    block: Block,
    d: Tensor,
    g: Tensor,
    y: Tensor,
    norm2: Tensor,
    affine3: Tensor,
    training: bool,
    weights: bool,
) -> tuple[Tensor, Tensor | None, Pair, Tensor]:
    """dz, dWp if `weights`, BN2's gradients and its backward as an affine: one pass over d."""
    co, ch = block.wp.shape
    dz = torch.empty_like(d)

    def run(with_dz: bool, with_weights: bool, first: int, channels: int) -> tuple[Tensor | None, Tensor | None]:
        cfg = launch.config("project_backward", d, channels, BC=ch)
        columns = -(-ch // cfg.tile["BC"])
        rows, programs = launch.split(block.out_pixels, cfg, columns, least=4 * co if with_weights else 1)
        partial = block.empty(programs, 2, ch, dtype=torch.float32) if with_dz else None
        parts = block.empty(programs, channels, ch, dtype=torch.float32) if with_weights else None
        launch.run(
            bw.project_backward, (programs * columns,), cfg, d, norm2, g, y, affine3, block.wp,
            dz if with_dz else None, partial, parts, block.out_pixels, rows, CH=ch, CO=co, ACT=block.activation,
            TRAINING=training, FIRST=first, PRECISION=launch.precision(d.dtype), BN=padded(channels),
        )  # fmt: skip
        return partial, None if parts is None else parts.sum(0)

    together = weights and co <= MOST_OUTPUTS
    partial, dwp = run(True, together, 0, co)
    if weights and not together:
        firsts = range(0, co, MOST_OUTPUTS)
        shares = [run(False, True, first, min(MOST_OUTPUTS, co - first))[1] for first in firsts]
        dwp = torch.cat([share for share in shares if share is not None])
    assert partial is not None
    second, affine2 = finish_gradient(partial, block.out_pixels, norm2, training)
    return dz, dwp, second, affine2


def _depthwise(
    block: Block, dz: Tensor, d: Tensor, affine2: Tensor, e: Tensor | None, training: bool
) -> tuple[Tensor, Tensor | None]:
    """de, and where e is given the gradient of the taps."""
    ((_, k, taps),) = block.taps
    if passes.stencils(dz, [k], block.stride):
        return _depthwise_stencil(block, dz, d, affine2, e)
    cfg = launch.config("depthwise_backward", dz, block.ch, BC=block.ch)
    columns = -(-block.ch // cfg.tile["BC"])
    de, partial = block.empty(block.pixels, block.ch), None
    rows = cfg.tile["BM"]
    programs = -(-block.pixels // rows)
    if e is not None:
        rows, programs = launch.split(block.pixels, cfg, columns, least=16 * k * k)
        partial = block.empty(programs, k * k, block.ch, dtype=torch.float32)
    launch.run(
        dw.depthwise_backward, (programs, columns), cfg, dz, d, affine2, taps, e, de, partial, block.pixels,
        rows, *block.size[1:], C=block.ch, K=k, STRIDE=block.stride, TRAINING=training, BT=padded(k * k),
    )  # fmt: skip
    return de, None if partial is None else partial.sum(0).t()


def _depthwise_stencil(
    block: Block, dz: Tensor, d: Tensor, affine2: Tensor, e: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    gradient, taps = _gradient(block, dz, d, affine2), taps_of(block)
    if e is None:  # of the input the stencil needs only the shape then
        like = image_of(block.empty(block.pixels, block.ch), *block.size[:3])
        q = torch.ops.proxyless_fast.depthwise_backward_input(*gradient, like, None, None, taps, block.stride, False)
        return rows_of(q), None
    q, dtaps = torch.ops.proxyless_fast.depthwise_backward(
        *gradient, image_of(e, *block.size[:3]), None, None, taps, block.stride, False
    )
    return rows_of(q), dtaps


def _expand_depthwise(
    block: Block, dz: Tensor, d: Tensor, affine2: Tensor, norm1: Tensor | None
) -> tuple[Tensor, Tensor]:
    """de and the gradient of the taps, e made again in shared memory."""
    assert block.w1 is not None and norm1 is not None
    de, dtaps = torch.ops.proxyless_fast.expand_depthwise_backward(
        *_gradient(block, dz, d, affine2), image_of(block.x, *block.size[:3]), block.w1, norm1, taps_of(block),
        block.stride, block.activation,
    )  # fmt: skip
    return rows_of(de), dtaps


def _gradient(block: Block, dz: Tensor, d: Tensor, affine2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dz, d and BN2's backward as the stencils take them."""
    out = (block.size[0], *block.size[3:])
    return image_of(dz, *out), image_of(d, *out), affine2


def _expand(
    block: Block,
    de: Tensor,
    norm1: Tensor,
    mean: Tensor | None,
    cov: Tensor | None,
    training: bool,
    input: bool,
    weights: bool,
    shortcut: Tensor | None,
) -> tuple[Tensor | None, list[Tensor]]:
    """dx (rows), with the shortcut's gradient added, if `input`, and [dW1, dgamma1, dbeta1] if `weights`, from de."""
    x, w1 = block.x, block.w1
    assert w1 is not None
    if training and (mean is None or cov is None):
        raise ValueError("mbconv_backward: mean and cov of x are needed in training, got None")
    ch, ci = w1.shape
    centre = torch.zeros(ci, device=x.device) if mean is None else mean.float()
    shares, a, partial = _expand_passes(block, de, norm1, centre, input, weights)
    (dgamma, dbeta), _ = finish_gradient(partial, block.pixels, norm1, training)

    dx = None
    if input and shares is not None:
        correction = constant = None
        if training:
            correction, constant = block.empty(ci, ci), torch.empty_like(centre)
            tiles = -(-ci // CORRECTION.tile["BI"])
            launch.run(
                gm.expand_correction, (tiles, tiles), CORRECTION, w1, norm1, dgamma, dbeta, correction, constant,
                block.pixels, CI=ci, CH=ch,
            )  # fmt: skip
        dx = torch.empty_like(x)
        cfg = launch.config("finish_input", x, ci, BN=ci, BK=ci)
        launch.run(
            bw.finish_input, (-(-block.pixels // cfg.tile["BM"]) * -(-ci // cfg.tile["BN"]),), cfg, shares, x, centre,
            correction, constant, shortcut, dx, block.pixels, CI=ci, PARTS=shares.shape[0],
            PRECISION=launch.precision(x.dtype),
        )  # fmt: skip
    if a is None:
        return dx, []
    wide = x.dtype == torch.float32
    total = a.sum(0, dtype=torch.float64 if wide else torch.float32)
    dweight = torch.empty(ch, ci, dtype=torch.float32, device=x.device)
    cfg = inputs_config(ci)
    launch.run(
        gm.finish_weight, (-(-ch // cfg.tile["BC"]),), cfg, total, w1, cov, norm1, dgamma, dweight, CI=ci, CH=ch,
        TRAINING=training, WIDE=wide,
    )  # fmt: skip
    return dx, [dweight, dgamma, dbeta]


def _expand_passes(
    block: Block, de: Tensor, norm1: Tensor, centre: Tensor, input: bool, weights: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Shares of dX (shares, pixels, Ci), parts of A (parts, Ch, Ci), partial sums of q: one pass over de, or two."""
    x, w1 = block.x, block.w1
    assert w1 is not None
    ch, ci = w1.shape
    pixels, dtype = block.pixels, x.dtype
    shared = {"CI": ci, "CH": ch, "ACT": block.activation, "PRECISION": launch.precision(dtype), "BI": padded(ci)}
    cfg = launch.config("expand_once", de, ci, BC=ch)
    # One pass for everything, unless the shares of dX, one for each group of channels, are more than de itself.
    once = input and weights and 2 * ci <= cfg.tile["BC"]
    # Without tensor cores a tile of a wide A does not fit into registers: q is left in memory for a library's product.
    library = weights and not once and dtype == torch.float32 and ci > 64
    shares = a = partial = None
    if (input or library) and not once:
        cfg = launch.config("expand_input", de, ci, BC=ch)
        programs = -(-pixels // cfg.tile["BM"])
        shares = block.empty(1, pixels, ci)
        partial = block.empty(programs, 2, ch, dtype=torch.float32)
        launch.run(
            bw.expand_input, (programs,), cfg, de, x, w1, norm1, shares, partial, de if library else None, pixels,
            **shared,
        )  # fmt: skip
    if library:
        a = (de.t() @ (x - centre))[None]
    elif weights:
        cfg = cfg if once else launch.config("expand_weight", de, ci, BC=ch)
        columns = -(-ch // cfg.tile["BC"])
        rows, programs = launch.split(pixels, cfg, columns, least=4 * ci)
        sums = None
        if partial is None:
            sums = partial = block.empty(programs, 2, ch, dtype=torch.float32)
        if once:
            shares = block.empty(columns, pixels, ci)
        a = block.empty(programs, ch, ci, dtype=torch.float32)
        launch.run(
            bw.expand_backward, (programs * columns,), cfg, de, x, centre, w1, norm1, shares if once else None, sums, a,
            pixels, rows, **shared,
        )  # fmt: skip
    assert partial is not None
    return shares, a, partial
