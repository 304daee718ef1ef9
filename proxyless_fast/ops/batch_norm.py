"""Batch norm with its activation, in two passes forward and two backward, keeping its input alone."""

import torch
from torch import Tensor
from torch.nn import functional as F

from . import gpu
from .activation import ACTIVATIONS
from .fake import fake


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
) -> Tensor:
    """act(BN(x)): x (B, C, H, W) float32 or float64 on the CPU to the same shape, channels-last.

    weight, bias, running_mean, running_var: (C,), as nn.BatchNorm2d has them; in training the running ones (if given)
    move towards the batch's by momentum, with the unbiased variance. activation: relu6, relu, silu, hardswish or
    identity. Differentiable once, in x, weight and bias. Raises ValueError for wrong shapes, dtypes or names.
    """
    running = [] if running_mean is None or running_var is None else [running_mean, running_var]
    out, statistics = torch.ops.proxyless_fast.batch_norm_act(x, weight, bias, running, activation, training, eps)
    if training and running:
        pixels = x.numel() // x.shape[1]
        torch.ops.proxyless_fast.update_running(statistics, running, pixels, pixels, momentum)
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
    if x.dtype not in (torch.float32, torch.float64) or weight.dtype != x.dtype:
        return False, f"x is {x.dtype} and the weight {weight.dtype}; the kernels take float32 or float64, both alike"
    if x.dim() != 4 or x.numel() == 0:
        return False, f"x has shape {tuple(x.shape)}; the kernels take (batch, channels, height, width), not empty"
    if activation not in ACTIVATIONS:
        return False, f"the activation is {activation!r}; the kernels know {', '.join(ACTIVATIONS)}"
    if torch.is_autocast_enabled("cpu"):
        return False, "autocast is on, and the kernels would not see its lower precision"
    return True, ""


@fake("batch_norm_act")
def _(x, weight, bias, running, activation, training, eps):
    out = torch.empty_like(x, memory_format=torch.channels_last)
    return out, x.new_empty(2 * x.shape[1], dtype=torch.float64)


@fake("norm_dot")
def _(grad, y, statistics, gamma, beta, eps):
    return y.new_empty((), dtype=torch.promote_types(y.dtype, torch.float32))


@fake("batch_norm_act_backward")
def _(grad, x, weight, bias, statistics, activation, training, eps):
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    return dx, torch.empty_like(weight), torch.empty_like(bias)
