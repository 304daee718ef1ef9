"""Depthwise convolution with batch-norm prologues, channels-last: the two wide passes of MBConv on a GPU.

Words of the fused block: u = BN1 of the expanded tensor, e = its ReLU6, d = depthwise output, z = BN2 of d.

    forward    e = clamp(scale * x + shift, 0, 6);  d = depthwise(e);  mean and variance of d, for BN2
    backward   dd = affine[0] * dz + affine[1] * (d - affine[2]) + affine[3]    (BN2's backward, one affine of dz and d)
               q = gradient to u (masked where the clamp was active);  dw = gradient to the weights

expand_depthwise_* make e themselves, activation(BN1(x W1^T)) in x's dtype, and never store it.

On CUDA the kernels of csrc/cuda run, where they are built; elsewhere ATen calls of the same meaning.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from .activation import ACTIVATIONS
from .fake import fake


def _accumulate(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _activated(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    u = x.to(_accumulate(x))
    if scale is None or shift is None:
        return u, u
    u = u * scale[:, None, None] + shift[:, None, None]
    return u, u.clamp(0, 6)


def depthwise_forward_reference(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, stride: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """`depthwise_forward` in plain torch."""
    _, e = _activated(x, scale, shift)
    d = F.conv2d(e, weight.to(e.dtype), stride=stride, padding=weight.shape[-1] // 2, groups=x.shape[1]).to(x.dtype)
    stored = d.to(e.dtype)
    mean = stored.mean((0, 2, 3))
    return d, mean, (stored - mean[:, None, None]).square().mean((0, 2, 3))


def depthwise_backward_reference(
    dz: Tensor,
    d: Tensor | None,
    affine: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    stride: int = 1,
    mask: bool = True,
) -> tuple[Tensor, Tensor]:
    """`depthwise_backward` in plain torch."""
    u, e = _activated(x, scale, shift)
    w = weight.to(e.dtype)
    dd = dz.to(e.dtype)
    if d is not None and affine is not None:
        a = affine[:, :, None, None]
        dd = a[0] * dd + a[1] * (d.to(e.dtype) - a[2]) + a[3]
    options = {"stride": stride, "padding": weight.shape[-1] // 2, "groups": x.shape[1]}
    q = conv2d_input(e.shape, w, dd, **options)
    dw = conv2d_weight(e, w.shape, dd, **options)
    if mask:
        q = q * ((u > 0) & (u < 6))
    return q.to(x.dtype), dw.to(weight.dtype)


def expand_reference(x: Tensor, w1: Tensor, norm1: Tensor, activation: str) -> Tensor:
    """e of `expand_depthwise_forward` in plain torch: batch norm of the unrounded product, the result in x's dtype."""
    wide = _accumulate(x)
    mean, _, scale, shift = norm1.to(wide)[:, :, None, None]
    product = F.linear(x.permute(0, 2, 3, 1).to(wide), w1.to(wide)).permute(0, 3, 1, 2)
    return ACTIVATIONS[activation]((product - mean) * scale + shift).to(x.dtype)


def expand_depthwise_forward_reference(
    x: Tensor, w1: Tensor, norm1: Tensor, weight: Tensor, stride: int = 1, activation: str = "relu6"
) -> tuple[Tensor, Tensor, Tensor]:
    """`expand_depthwise_forward` in plain torch."""
    return depthwise_forward_reference(expand_reference(x, w1, norm1, activation), weight, stride=stride)


def expand_depthwise_backward_reference(
    dz: Tensor,
    d: Tensor | None,
    affine: Tensor | None,
    x: Tensor,
    w1: Tensor,
    norm1: Tensor,
    weight: Tensor,
    stride: int = 1,
    activation: str = "relu6",
) -> tuple[Tensor, Tensor]:
    """`expand_depthwise_backward` in plain torch."""
    e = expand_reference(x, w1, norm1, activation)
    return depthwise_backward_reference(dz, d, affine, e, None, None, weight, stride, False)


def depthwise_forward(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, stride: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Depthwise convolution of clamp(scale * x + shift, 0, 6), or of x itself, with the statistics of the result.

    x: (B, C, H, W), float16, bfloat16, float32 or float64; weight: (C, 1, k, k), odd k, in x's dtype or float32; scale
    and shift: (C,) float32 (float64 with x in float64), both or neither: a folded BN1. Padding is k // 2, after the
    activation. Returns d (B, C, ceil(H / stride), ceil(W / stride)) in x's dtype, channels-last, and the mean and
    biased variance of d per channel (C,), float32 (float64). Raises ValueError for other shapes or dtypes and for
    strides other than 1 and 2. Differentiable once in x, weight, scale and shift, through the statistics too.
    """
    return torch.ops.proxyless_fast.depthwise_forward(x, weight, scale, shift, stride)


def depthwise_backward(
    dz: Tensor,
    d: Tensor | None,
    affine: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    stride: int = 1,
    mask: bool = True,
) -> tuple[Tensor, Tensor]:
    """Both gradients of `depthwise_forward` in one pass over dz, d and x.

    dz, d: as the output of `depthwise_forward`, in x's dtype. affine: (4, C) in scale's dtype; the gradient to d is
    affine[0] * dz + affine[1] * (d - affine[2]) + affine[3], or dz itself without d and affine. Of BN2 with weight g2,
    mean m2, inverse spread i2, sums db2 = sum(dz) and dg2 = sum(dz * d_hat) over M pixels the rows are
    g2*i2, -g2*i2*i2*dg2/M, m2, -g2*i2*db2/M (`bn_affine`). x, scale, shift, weight: as the forward had them.
    mask: multiply by (u > 0) & (u < 6), u = scale * x + shift or, without scale, x (then x is e, already activated).
    Returns q, the gradient to u (to e without mask) in x's shape and dtype, channels-last, and dw in weight's shape and
    dtype. Raises ValueError for shapes, dtypes or devices that do not fit together.
    """
    return torch.ops.proxyless_fast.depthwise_backward(dz, d, affine, x, scale, shift, weight, stride, mask)


def depthwise_backward_input(
    dz: Tensor,
    d: Tensor | None,
    affine: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    stride: int = 1,
    mask: bool = True,
) -> Tensor:
    """q of `depthwise_backward` alone: what an arch step needs. Without mask only the shape of x is used."""
    return torch.ops.proxyless_fast.depthwise_backward_input(dz, d, affine, x, scale, shift, weight, stride, mask)


def depthwise_backward_weight(
    dz: Tensor,
    d: Tensor | None,
    affine: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    stride: int = 1,
) -> Tensor:
    """dw of `depthwise_backward` alone; of weight only shape and dtype are used."""
    return torch.ops.proxyless_fast.depthwise_backward_weight(dz, d, affine, x, scale, shift, weight, stride)


def expand_depthwise_forward(
    x: Tensor, w1: Tensor, norm1: Tensor, weight: Tensor, stride: int = 1, activation: str = "relu6"
) -> tuple[Tensor, Tensor, Tensor]:
    """`depthwise_forward` of e = activation((x W1^T - mean) * scale + shift), never stored in half precision on CUDA.

    x: (B, Ci, H, W); w1: (C, Ci) in x's dtype; norm1: (4, C) float32 (float64 with x in float64): mean, inverse
    deviation (not used), scale, shift. activation: relu6, relu, silu, hardswish or identity. The norm applies to sums
    in norm1's dtype, and e is rounded to x's dtype before it is convolved. weight, stride and what is returned: as in
    `depthwise_forward`. Raises ValueError for other shapes, dtypes, strides and names. Not differentiable.
    """
    return torch.ops.proxyless_fast.expand_depthwise_forward(x, w1, norm1, weight, stride, activation)


def expand_depthwise_backward(
    dz: Tensor,
    d: Tensor | None,
    affine: Tensor | None,
    x: Tensor,
    w1: Tensor,
    norm1: Tensor,
    weight: Tensor,
    stride: int = 1,
    activation: str = "relu6",
) -> tuple[Tensor, Tensor]:
    """The gradients to e and to weight of `expand_depthwise_forward`, e made again from x; otherwise as
    `depthwise_backward` without mask: returns de (B, C, H, W) in x's dtype, channels-last, and dw."""
    return torch.ops.proxyless_fast.expand_depthwise_backward(dz, d, affine, x, w1, norm1, weight, stride, activation)


def bn_affine(weight: Tensor, mean: Tensor, inverse_std: Tensor, db: Tensor, dg: Tensor, pixels: int) -> Tensor:
    """The affine (4, C) of `depthwise_backward` for a batch norm over `pixels` pixels; every argument (C,).

    Gradient to the norm's input: g*i * (dz - db/M - d_hat * dg/M), d_hat = (d - mean) * i.
    """
    a = weight * inverse_std
    return torch.stack([a, -a * inverse_std * dg / pixels, mean, -a * db / pixels])


def _channels_last(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@fake("depthwise_forward")
def _(x, weight, scale, shift, stride):
    b, c, h, w = x.shape
    d = _channels_last(x, b, c, (h - 1) // stride + 1, (w - 1) // stride + 1)
    return d, x.new_empty(c, dtype=_accumulate(x)), x.new_empty(c, dtype=_accumulate(x))


@fake("depthwise_backward")
def _(dz, d, affine, x, scale, shift, weight, stride, mask):
    return _channels_last(x, *x.shape), weight.new_empty(weight.shape)


@fake("depthwise_backward_input")
def _(dz, d, affine, x, scale, shift, weight, stride, mask):
    return _channels_last(x, *x.shape)


@fake("depthwise_backward_weight")
def _(dz, d, affine, x, scale, shift, weight, stride):
    return weight.new_empty(weight.shape)


@fake("expand_depthwise_forward")
def _(x, w1, norm1, weight, stride, activation):
    (b, _, h, w), c = x.shape, w1.shape[0]
    d = _channels_last(x, b, c, (h - 1) // stride + 1, (w - 1) // stride + 1)
    return d, x.new_empty(c, dtype=_accumulate(x)), x.new_empty(c, dtype=_accumulate(x))


@fake("expand_depthwise_backward")
def _(dz, d, affine, x, w1, norm1, weight, stride, activation):
    return _channels_last(x, x.shape[0], w1.shape[0], *x.shape[2:]), weight.new_empty(weight.shape)


def _setup(ctx, inputs, output):
    x, weight, scale, shift, ctx.stride = inputs
    d, mean, _ = output
    ctx.save_for_backward(x, weight, scale, shift, d, mean)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_d, grad_mean, grad_var):
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "depthwise_forward can be differentiated once, and this backward was asked to be differentiable itself "
            "(create_graph=True)"
        )
    # A gradient to mean and variance is the same affine of (dz, d) that BN2's backward is.
    x, weight, scale, shift, d, mean = ctx.saved_tensors
    dz = torch.zeros_like(d) if grad_d is None else grad_d
    stored, affine = None, None
    if grad_mean is not None or grad_var is not None:
        pixels = d.shape[0] * d.shape[2] * d.shape[3]
        zero = torch.zeros_like(mean)
        slope = zero if grad_var is None else 2 * grad_var / pixels
        constant = zero if grad_mean is None else grad_mean / pixels
        stored, affine = d, torch.stack([torch.ones_like(mean), slope, mean, constant])
    arguments = (dz, stored, affine, x, scale, shift, weight, ctx.stride)
    masked = scale is not None
    need_input = any(ctx.needs_input_grad[i] for i in (0, 2, 3))
    q = dw = None
    if need_input and ctx.needs_input_grad[1]:
        q, dw = depthwise_backward(*arguments, mask=masked)
    elif need_input:
        q = depthwise_backward_input(*arguments, mask=masked)
    elif ctx.needs_input_grad[1]:
        dw = depthwise_backward_weight(*arguments)
    if q is None or scale is None:
        return q, dw, None, None, None
    wide = q.to(scale.dtype)
    dx = (wide * scale[:, None, None]).to(x.dtype) if ctx.needs_input_grad[0] else None
    dscale = (wide * x).sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
    dshift = wide.sum((0, 2, 3)) if ctx.needs_input_grad[3] else None
    return dx, dw, dscale, dshift, None


torch.library.register_autograd("proxyless_fast::depthwise_forward", _backward, setup_context=_setup)
