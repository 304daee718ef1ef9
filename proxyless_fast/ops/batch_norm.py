"""Batch norm with its activation, in two passes forward and two backward, keeping its input alone."""

import torch
from torch import Tensor
from torch.nn import functional as F

from . import gpu
from .activation import ACTIVATIONS
from .fake import fake
from .statistics import add_up, dtype_in_autocast


def batch_norm_act_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    activation: str = "relu6",
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-3,
) -> Tensor:
    """`batch_norm_act` in plain torch."""
    return ACTIVATIONS[activation](F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps))


def batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    activation: str = "relu6",
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-3,
    group: str = "",
) -> Tensor:
    """act(BN(x)): x (B, C, H, W) float32 or float64 on the CPU to the same shape, channels-last.

    weight, bias, running_mean, running_var: (C,), as nn.BatchNorm2d has them; in training the running ones (if given)
    move towards the batch's by momentum, with the unbiased variance. activation: relu6, relu, silu, hardswish or
    identity. group: of the processes whose images share the statistics in training, by torch.distributed's name.
    Differentiable once, in x, weight and bias. Raises ValueError for wrong shapes, dtypes or names.
    """
    running = [] if running_mean is None or running_var is None else [running_mean, running_var]
    x = x.to(dtype_in_autocast(x))
    out, statistics = torch.ops.proxyless_fast.batch_norm_act(
        x, weight, bias, running, activation, training, eps, group
    )
    if training and running:
        pixels = x.numel() // x.shape[1]
        torch.ops.proxyless_fast.update_running(statistics, running, pixels, pixels, momentum, group)
    return out


class _SharedBatchNorm(torch.autograd.Function):
    """BN over the pixels of several processes in plain torch; backward passes on what the shared statistics add."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: str):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        channels, over = x.shape[1], [0, *range(2, x.dim())]
        count = wide.new_full((1,), x.numel() / channels)
        *_, total = sums = add_up(torch.cat([wide.sum(over), count]), group)
        mean = sums[:-1] / total
        centred = wide - _per_channel(mean, x)
        var = add_up(centred.square().sum(over), group) / total
        inverse = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, inverse, total)
        ctx.group = group
        out = centred * _per_channel(inverse * weight, x) + _per_channel(bias, x)
        ctx.mark_non_differentiable(mean, var, total)
        return out.to(x.dtype), mean, var, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, *_):
        x, weight, mean, inverse, total = ctx.saved_tensors
        over = [0, *range(2, x.dim())]
        wide = grad.to(mean.dtype)
        normed = (x.to(mean.dtype) - _per_channel(mean, x)) * _per_channel(inverse, x)
        dbias, dweight = wide.sum(over), (wide * normed).sum(over)
        all_bias, all_weight = (add_up(torch.cat([dbias, dweight]), ctx.group) / total).chunk(2)
        dx = wide - _per_channel(all_bias, x) - normed * _per_channel(all_weight, x)
        dx = dx * _per_channel(weight * inverse, x)
        return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype), None, None


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))


def shared_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    group: str,
) -> Tensor:
    """F.batch_norm in training, over the images of all processes of a group: plain torch, any device, x (B, C, ...).

    group: torch.distributed's name of it. The running statistics, if given, move by momentum, the variance unbiased.
    Sums are at least float32. Differentiable once, in x, weight and bias.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    gamma = x.new_ones(x.shape[1], dtype=wide) if weight is None else weight
    beta = x.new_zeros(x.shape[1], dtype=wide) if bias is None else bias
    out, mean, var, total = _SharedBatchNorm.apply(x, gamma, beta, eps, group)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (total / (total - 1))).to(running_var.dtype), momentum)
    return out


def norm_dot_reference(grad: Tensor, y: Tensor, statistics: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """`norm_dot` in plain torch."""
    mean, var = (s.view(1, -1, 1, 1).to(gamma.dtype) for s in statistics[-2 * len(gamma) :].chunk(2))
    scale, shift = gamma.view(1, -1, 1, 1) / (var + eps).sqrt(), beta.view(1, -1, 1, 1)
    return (grad * ((y - mean) * scale + shift)).sum()


def norm_dot(grad: Tensor, y: Tensor, statistics: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """<grad, BN(y)> with BN(y) never written: the gate gradient (ProxylessNAS eq. 5) of a block that ends in a norm.

    grad, y: (B, C, H, W) of one dtype. statistics: float64, ending in the norm's mean and variance (C,) each, as
    `proxyless_fast::mbconv` returns them. gamma, beta: (C,). Returns a scalar tensor, at least float32; no autograd.
    In one pass and in float64 sums for float32 and float64 on the CPU and for what the Triton kernels take on a GPU,
    elsewhere by the reference. Raises ValueError for wrong shapes.
    """
    on_cpu = y.device.type == "cpu" and y.dtype in (torch.float32, torch.float64)
    if on_cpu or (y.is_cuda and gpu.can_run(y, y.shape[1], y.shape[1], "identity")[0]):
        return torch.ops.proxyless_fast.norm_dot(grad, y, statistics, gamma, beta, eps)
    return norm_dot_reference(grad, y, statistics, gamma, beta, eps)


def can_run_batch_norm_act(x: Tensor, weight: Tensor, *, activation: str = "relu6") -> tuple[bool, str]:
    """Whether the kernels take these arguments: (True, "") or (False, why not, in words)."""
    if x.device.type != "cpu":
        return False, f"x is on {x.device.type}, and the kernels run on the CPU"
    dtype = dtype_in_autocast(x)
    if dtype not in (torch.float32, torch.float64) or weight.dtype != dtype:
        return False, f"x is {x.dtype} and the weight {weight.dtype}; the kernels take float32 or float64, both alike"
    if x.dim() != 4 or x.numel() == 0:
        return False, f"x has shape {tuple(x.shape)}; the kernels take (batch, channels, height, width), not empty"
    if activation not in ACTIVATIONS:
        return False, f"the activation is {activation!r}; the kernels know {', '.join(ACTIVATIONS)}"
    return True, ""


@fake("batch_norm_act")
def _(x, weight, bias, running, activation, training, eps, group=""):
    out = torch.empty_like(x, memory_format=torch.channels_last)
    return out, x.new_empty(2 * x.shape[1], dtype=torch.float64)


@fake("norm_dot")
def _(grad, y, statistics, gamma, beta, eps):
    return y.new_empty((), dtype=torch.promote_types(y.dtype, torch.float32))


@fake("batch_norm_act_backward")
def _(grad, x, weight, bias, statistics, activation, training, eps, group=""):
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    return dx, torch.empty_like(weight), torch.empty_like(bias)
