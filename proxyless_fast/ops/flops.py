"""What the ops count for torch.utils.flop_counter.FlopCounterMode: what their references do, by torch's own formulas.

Norms, activations and sums count nothing there. Nor does what the ops do to save memory or passes: Gram statistics, and
what is computed again in backward. A whole net runs module by module under the counter, whose hooks a fused op would
pass over; this is for the ops by themselves.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch

# Where Triton is not installed, the import says so to everybody who never counts a flop.
_log = logging.getLogger("torch.utils.flop_counter")
_log.disabled = True
from torch.utils.flop_counter import conv_backward_flop, conv_flop_count, register_flop_formula  # noqa: E402

_log.disabled = False

_OPS = torch.ops.proxyless_fast
Shape = Sequence[int]


def _output(x: Shape, weight: Shape, stride: int) -> list[int]:
    return [x[0], weight[0], *((side - 1) // stride + 1 for side in x[2:])]


def _forward(x: Shape, weight: Shape, stride: int = 1) -> int:
    return conv_flop_count(list(x), list(weight), _output(x, weight, stride))


def _backward(x: Shape, weight: Shape, stride: int, wanted: tuple[bool, bool]) -> int:
    """Of the gradients to x and to weight, those that are wanted."""
    output = torch.Size(_output(x, weight, stride))
    shapes = (torch.Size(x), torch.Size(weight), None)
    backward: Any = conv_backward_flop  # registered, it takes the output in place of its shape
    return backward(output, x, weight, None, 0, 0, 0, False, 0, 1, [*wanted, False], out_val=shapes)


def _steps(x: Shape, params: Sequence[Shape], stride: int) -> list[tuple[Shape, Shape, int]]:
    """Input, weight and stride of each convolution in an MBConv; `params` as `ops.mbconv` has them."""
    found = []
    for place in range(0, len(params), 3):
        step = x, params[place], stride if place == len(params) - 6 else 1
        found.append(step)
        x = _output(*step)
    return found


@register_flop_formula(_OPS.mbconv)
def _(x, params, running, mean, cov, stride, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sum(_forward(*step) for step in _steps(x, params, stride))


@register_flop_formula(_OPS.mbconv_backward)
def _(
    grad, x, y, d, statistics, params, mean, cov, stride, activation, training, eps, input, weights, *rest: Any,
    out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    # Only the gradient to the block's own input may not be wanted: the others lead to the weights before.
    steps = _steps(x, params, stride)
    return sum(_backward(*step, (bool(i or input), weights)) for i, step in enumerate(steps))


@register_flop_formula(_OPS.mbconv_probe)
def _(x, grad, params, running, sizes, mean, cov, stride, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    total, start = 0, 0
    for size in sizes:
        total += sum(_forward(*step) for step in _steps(x, params[start : start + size], stride))
        start += size
    return total


@register_flop_formula(_OPS.conv_norm_act)
def _(x, weight, gamma, beta, running, stride, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _forward(x, weight, stride)


@register_flop_formula(_OPS.conv_norm_act_backward)
def _(
    grad, x, weight, gamma, beta, statistics, mean, cov, stride, *rest: Any, out_shape: Any = None, **kwargs: Any
) -> int:  # fmt: skip
    return _backward(x, weight, stride, (False, True))


@register_flop_formula(_OPS.depthwise_forward)
def _(x, weight, scale, shift, stride, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _forward(x, weight, stride)


@register_flop_formula(_OPS.depthwise_backward)
def _(dz, d, affine, x, scale, shift, weight, stride, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _backward(x, weight, stride, (True, True))


@register_flop_formula(_OPS.depthwise_backward_input)
def _(dz, d, affine, x, scale, shift, weight, stride, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _backward(x, weight, stride, (True, False))


@register_flop_formula(_OPS.depthwise_backward_weight)
def _(dz, d, affine, x, scale, shift, weight, stride, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _backward(x, weight, stride, (False, True))


def _expanded(x: Shape, w1: Shape) -> list[int]:
    return [x[0], w1[0], *x[2:]]


@register_flop_formula(_OPS.expand_depthwise_forward)
def _(x, w1, norm1, weight, stride, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _forward(x, [*w1, 1, 1]) + _forward(_expanded(x, w1), weight, stride)


@register_flop_formula(_OPS.expand_depthwise_backward)
def _(dz, d, affine, x, w1, norm1, weight, stride, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _backward(_expanded(x, w1), weight, stride, (True, True))
