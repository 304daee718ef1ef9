"""The fused MBConv: 1x1 expand, BN, activation, k x k depthwise, BN, activation, 1x1 project, BN, in one op.

The expanded tensor is never written: the first batch norm follows from the Gram matrix of x, and expand and depthwise
run tile by tile. What autograd keeps is x, y (before the last norm) and, by policy "fast", d (the depthwise output).

`params` is, in the order and with the shapes that the official modules hold them,

    inverted_bottleneck.conv.weight (Ch, Ci, 1, 1), .bn.weight (Ch,), .bn.bias (Ch,)    absent with expand ratio 1
    depth_conv.conv.weight (Ch, 1, k, k),           .bn.weight (Ch,), .bn.bias (Ch,)
    point_linear.conv.weight (Co, Ch, 1, 1),        .bn.weight (Co,), .bn.bias (Co,)

and `running` the mean and variance buffers of the same norms: six tensors, or four. All of x's dtype.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._deprecated import callable_module
from . import gpu  # registers the ops for CUDA; the kernels are imported when a GPU tensor comes
from .activation import ACTIVATIONS
from .fake import fake
from .statistics import dtype_in_autocast
from .statistics import gram as gram_of

_KEEP = {"lean": 1, "fast": 2}


def mbconv_reference(
    x: Tensor,
    params: Sequence[Tensor],
    running: Sequence[Tensor] = (),
    *,
    stride: int = 1,
    activation: str = "relu6",
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    shortcut: bool = False,
) -> Tensor:
    """`mbconv` in plain torch, in the same arguments: what tests and benchmarks compare with."""
    act, given = ACTIVATIONS[activation], x
    norms = len(params) // 3
    for i in range(norms):
        weight, gamma, beta = params[3 * i : 3 * i + 3]
        mean, var = running[2 * i : 2 * i + 2] if running else (None, None)
        if weight.shape[1] == 1 and i == norms - 2:
            x = F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2, groups=weight.shape[0])
        else:
            x = F.conv2d(x, weight)
        x = F.batch_norm(x, mean, var, gamma, beta, training, momentum, eps)
        if i < norms - 1:
            x = act(x)
    return x + given if shortcut else x


def probe_reference(
    x: Tensor, grad: Tensor, params: Sequence[Sequence[Tensor]], running: Sequence[Sequence[Tensor]] = (), **options
) -> Tensor:
    """`probe` in plain torch: <grad, o_j(x)> for each candidate j, every o_j written out in turn."""
    own = list(running) or [()] * len(params)
    with torch.no_grad():
        return torch.stack(
            [(mbconv_reference(x, p, r, **options) * grad).sum() for p, r in zip(params, own, strict=True)]
        )


def can_run_mbconv(
    x: Tensor, params: Sequence[Tensor], *, stride: int = 1, activation: str = "relu6"
) -> tuple[bool, str]:
    """Whether the fused path takes these arguments: (True, "") or (False, why not, in words)."""
    reason = why_not_block(params, stride, activation) or why_not_input(x, params, activation)
    return not reason, reason


def why_not_block(params: Sequence[Tensor], stride: int, activation: str) -> str:
    """Why the fused path takes no block of these, whatever its input; empty if it does."""
    if len(params) not in (6, 9):
        return f"the block has {len(params)} parameters, not 9, or 6 without an expand convolution"
    depthwise = params[-6]
    channels, kernel = depthwise.shape[0], tuple(depthwise.shape[2:])
    if kernel not in ((3, 3), (5, 5), (7, 7)):
        return f"the kernel is {kernel}, and the fused kernels are 3x3, 5x5 and 7x7"
    if stride not in (1, 2):
        return f"the stride is {stride}, and the fused kernels have strides 1 and 2"
    if activation not in ACTIVATIONS:
        return f"the activation is {activation!r}, and the fused kernels know {', '.join(ACTIVATIONS)}"
    if depthwise.shape[1] != 1 or params[-3].shape[1:] != (channels, 1, 1):
        return "the middle convolution is not depthwise, or the last is not 1x1 on its channels"
    if len(params) == 9 and params[0].shape[2:] != (1, 1):
        return "the first convolution is not 1x1"
    return ""


def why_not_input(x: Tensor, params: Sequence[Tensor], activation: str, group: str = "") -> str:
    """Why the fused path does not take x, of a block that it takes otherwise; empty if it does."""
    device = x.device.type
    if device == "cpu":
        dtype = dtype_in_autocast(x)
        if dtype not in (torch.float32, torch.float64):
            return f"x is {x.dtype}, and the fused kernels take float32 and float64"
        if {p.dtype for p in params} != {dtype}:
            return f"a parameter has another dtype than x, {dtype}"
    elif device != "cuda":
        return f"x is on {device}, and the fused kernels run on CPU and CUDA devices"
    if x.dim() != 4 or x.numel() == 0:
        return f"x has shape {tuple(x.shape)}, and the fused kernels take (batch, channels, height, width), not empty"
    if x.shape[1] != (params[0].shape[1] if len(params) == 9 else params[0].shape[0]):
        return f"the first convolution does not take the {x.shape[1]} channels of x"
    if device == "cuda" and group:
        return "its norms share statistics with other processes, which the GPU kernels do not"
    if device == "cuda":
        return gpu.can_run(_autocast(x[:0]), x.shape[1], params[-3].shape[0], activation)[1]
    return ""


def _autocast(x: Tensor) -> Tensor:
    """x as the fused op takes it under autocast: on a GPU in autocast's dtype, as a convolution would; see
    `dtype_in_autocast` for the CPU."""
    if x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype.is_floating_point and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype("cuda"))
    return x if x.is_cuda else x.to(dtype_in_autocast(x))


def mbconv(
    x: Tensor,
    params: Sequence[Tensor],
    running: Sequence[Tensor] = (),
    *,
    stride: int = 1,
    activation: str = "relu6",
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    policy: str = "fast",
    gram: tuple[Tensor, Tensor] | None = None,
    shortcut: bool = False,
    group: str = "",
) -> Tensor:
    """A whole MBConv block, (B, Ci, H, W) -> (B, Co, ceil(H / stride), ceil(W / stride)), channels-last.

    x: float32 or float64 (on a GPU also half precision), any memory format (channels-last is read as it is).
    `training` norms by the batch and moves
    `running`, if given, by `momentum` (the variance unbiased, as torch does); otherwise `running` norms, and gradients
    flow as through a frozen norm. policy: "fast" keeps the depthwise output for backward, "lean" recomputes it.
    gram: (mean, covariance) of x from `ops.gram`, if the caller has them, to share among the candidates of a layer.
    shortcut: add x to the output, and the gradient to dx, where both are written anyway.
    group: of the processes whose images share the statistics in training, by torch.distributed's name; CPU only.
    Differentiable once in x and params; backward does no work for weights that need no gradient.
    Raises ValueError naming the argument that does not fit.
    """
    return mbconv_before_norm(
        x, params, running, stride, activation, training, momentum, eps, policy, gram, shortcut, group, keep_y=False
    )[0]


def mbconv_before_norm(
    x: Tensor,
    params: Sequence[Tensor],
    running: Sequence[Tensor],
    stride: int,
    activation: str,
    training: bool,
    momentum: float,
    eps: float,
    policy: str,
    gram: tuple[Tensor, Tensor] | None,
    shortcut: bool,
    group: str = "",
    keep_y: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mbconv`, and what its last norm took: (output, y, statistics), the latter two as `norm_dot` takes them.

    keep_y: have y even where no gradient is wanted and it would not be written.
    """
    if policy not in _KEEP:
        raise ValueError(f"policy must be one of {', '.join(_KEEP)}, got {policy!r}")
    x = _autocast(x)
    mean, cov = _statistics(x, gram, training and len(params) == 9, group)
    differentiable = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in params))
    out, y, _, statistics = torch.ops.proxyless_fast.mbconv(
        x, params, [] if training else running, mean, cov, stride, activation, training, eps,
        _KEEP[policy] if differentiable else int(keep_y), shortcut, group,
    )  # fmt: skip
    if training and running:
        pixels_in, pixels_out = x.numel() // x.shape[1], out.numel() // out.shape[1]
        torch.ops.proxyless_fast.update_running(statistics, running, pixels_in, pixels_out, momentum, group)
    return out, y, statistics


def probe(
    x: Tensor,
    grad: Tensor,
    params: Sequence[Sequence[Tensor]],
    running: Sequence[Sequence[Tensor]] = (),
    *,
    stride: int = 1,
    activation: str = "relu6",
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    gram: tuple[Tensor, Tensor] | None = None,
    group: str = "",
) -> Tensor:
    """Gate gradients <grad, o_j(x)> (ProxylessNAS eq. 5) of several candidates of a layer, with no o_j written: (n,).

    params[j], running[j]: of candidate j, as for `mbconv`, whose other arguments mean the same here. Running statistics
    move as if each candidate had run. One wide workspace serves all candidates. No autograd.
    """
    x = _autocast(x)
    grad = grad if x.is_cuda else grad.to(x.dtype)  # under autocast the active candidate may have another dtype
    needs_gram = training and any(len(p) == 9 for p in params)
    mean, cov = _statistics(x, gram, needs_gram, group)
    with torch.no_grad():
        return torch.ops.proxyless_fast.mbconv_probe(
            x, grad, [t for p in params for t in p], [t for r in running for t in r], [len(p) for p in params],
            mean, cov, stride, activation, training, momentum, eps, group,
        )  # fmt: skip


def _statistics(
    x: Tensor, gram: tuple[Tensor, Tensor] | None, needed: bool, group: str
) -> tuple[Tensor | None, Tensor | None]:
    # Backward of the op includes what flows through them, so they enter as constants.
    if not needed:
        return None, None
    mean, cov = gram if gram is not None else gram_of(x.detach(), group)
    return mean.detach(), cov.detach()


@fake("mbconv")
def _(x, params, running, mean, cov, stride, activation, training, eps, keep, shortcut=False, group=""):
    batch, _, height, width = x.shape
    depthwise, project = params[-6], params[-3]
    wide, narrow = depthwise.shape[0], project.shape[0]
    shape = (batch, narrow, (height - 1) // stride + 1, (width - 1) // stride + 1)
    pixels = shape[0] * shape[2] * shape[3]
    out = x.new_empty(shape).to(memory_format=torch.channels_last)
    y = x.new_empty(shape).to(memory_format=torch.channels_last) if keep >= 1 else x.new_empty(0)
    d = x.new_empty(0)
    if keep == 2 and x.is_cuda:
        d = x.new_empty((batch, wide, *shape[2:])).to(memory_format=torch.channels_last)
    elif keep == 2:
        d = x.new_empty((wide + 15) // 16, pixels, 16)
    norms = wide * (len(params) // 3 - 1) + narrow
    return out, y, d, x.new_empty(2 * norms, dtype=torch.float64)


@fake("mbconv_backward")
def _(
    grad, x, y, d, statistics, params, mean, cov, stride, activation, training, eps, input, weights, shortcut=False,
    group="",
):  # fmt: skip
    dx = x.new_empty(x.shape).to(memory_format=torch.channels_last) if input else x.new_empty(0)
    return dx, [torch.empty_like(p, memory_format=torch.contiguous_format) for p in params] if weights else []


@fake("mbconv_probe")
def _(x, grad, params, running, sizes, mean, cov, stride, activation, training, momentum, eps, group=""):
    return x.new_empty(len(sizes), dtype=torch.promote_types(x.dtype, torch.float32))


@fake("update_running")
def _(statistics, running, pixels_in, pixels_out, momentum, group=""):
    return None


callable_module(__name__, "mbconv")
