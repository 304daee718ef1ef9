"""A dense convolution with its batch norm and activation in one op, for few inputs: the stem of a net on images.

The covariance of the windows gives the norm's statistics, so that the convolution's output is never written: what
autograd keeps is x, where eager PyTorch keeps x and the input of each of the two ops after the convolution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch_norm import batch_norm_act_reference, can_run_batch_norm_act
from .fake import fake
from .statistics import dtype_in_autocast

MOST_INPUTS = 64  # of one output value: beyond, the windows' covariance costs more than it saves


def conv_norm_act_reference(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    stride: int = 1,
    activation: str = "relu6",
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-3,
) -> Tensor:
    """`conv_norm_act` in plain torch."""
    y = F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)
    return batch_norm_act_reference(y, gamma, beta, running_mean, running_var, activation, training, momentum, eps)


def conv_norm_act(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    stride: int = 1,
    activation: str = "relu6",
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-3,
) -> Tensor:
    """act(BN(conv(x))): x (B, Ci, H, W) to (B, Co, ceil(H / stride), ceil(W / stride)), channels-last.

    x: float32 or float64 on the CPU, any memory format (channels-last is read as it is); it must not need a gradient.
    weight: (Co, Ci, k, k), k odd, padded by k // 2. gamma, beta, running_mean, running_var: (Co,), as nn.BatchNorm2d
    has them; in training the running ones (if given) move towards the batch's by momentum, with the unbiased variance.
    activation: relu6, relu, silu, hardswish or identity. Differentiable once, in weight, gamma and beta.
    Raises ValueError for wrong shapes, dtypes or names.
    """
    running = [] if running_mean is None or running_var is None else [running_mean, running_var]
    x = x.to(dtype_in_autocast(x))
    out, statistics, _, _ = torch.ops.proxyless_fast.conv_norm_act(
        x, weight, gamma, beta, [] if training else running, stride, activation, training, eps
    )
    if training and running:
        pixels = out.numel() // out.shape[1]
        torch.ops.proxyless_fast.update_running(statistics, running, pixels, pixels, momentum)
    return out


def can_run_conv_norm_act(x: Tensor, weight: Tensor, *, activation: str = "relu6") -> tuple[bool, str]:
    """Whether the kernels take these arguments: (True, "") or (False, why not, in words)."""
    if weight.dim() != 4 or x.dim() != 4 or weight.shape[1] != x.shape[1]:
        return False, f"weight has shape {tuple(weight.shape)} and x {tuple(x.shape)}: not a dense convolution of x"
    if weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 == 0:
        return False, f"the kernel is {tuple(weight.shape[2:])}; the kernels take square ones of odd size"
    if weight[0].numel() > MOST_INPUTS:
        return False, f"an output value has {weight[0].numel()} inputs; the kernels pay up to {MOST_INPUTS}"
    if torch.is_grad_enabled() and x.requires_grad:
        return False, "x needs a gradient, which the kernels do not compute"
    return can_run_batch_norm_act(x, weight, activation=activation)


@fake("conv_norm_act")
def _(x, weight, gamma, beta, running, stride, activation, training, eps):
    batch, _, height, width = x.shape
    out = x.new_empty((batch, weight.shape[0], (height - 1) // stride + 1, (width - 1) // stride + 1))
    n = weight.shape[1] * weight.shape[2] * weight.shape[3]
    doubles = dict(dtype=torch.float64)
    statistics, mean = x.new_empty(2 * weight.shape[0], **doubles), x.new_empty(n if training else 0, **doubles)
    return out.to(memory_format=torch.channels_last), statistics, mean, x.new_empty((len(mean), n), **doubles)


@fake("conv_norm_act_backward")
def _(grad, x, weight, gamma, beta, statistics, mean, cov, stride, activation, training, eps):
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return dweight, torch.empty_like(gamma), torch.empty_like(beta)
