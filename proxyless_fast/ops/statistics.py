"""The two reductions a search step runs over whole activations: Gram statistics and the gate dot product.

Each has a plain-torch reference (`*_reference`), the registered op and a fake kernel; autograd is in csrc/autograd.cpp.
"""

import torch
from torch import Tensor

from .fake import fake


def gram_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased covariance over the pixels of x (B, C, H, W): (C,), (C, C). DESIGN: BN1 from a Gram matrix."""
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    mean = rows.mean(0)
    centred = rows - mean
    return mean, centred.t() @ centred / rows.shape[0]


def dtype_in_autocast(x: Tensor) -> torch.dtype:
    """What the CPU kernels read x as: under autocast they compute in float32, where torch's own ops round to half.

    More exact than asked for, and fused: torch's depthwise convolutions in bfloat16 are slow on CPUs.
    """
    half = x.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and torch.is_autocast_enabled("cpu") else x.dtype


def add_up(values: Tensor, group: str) -> Tensor:
    """The sums of values over the processes of a group, by torch.distributed's name of it; no gradient."""
    summed = torch.ops._c10d_functional.all_reduce(values, "sum", group)
    return torch.ops._c10d_functional.wait_tensor(summed)


def gram(x: Tensor, group: str = "") -> tuple[Tensor, Tensor]:
    """Mean and biased covariance over the pixels of x, accumulated about a pivot and in float64.

    x: (B, C, H, W), float32 or float64, any memory format, not empty. Returns mean (C,) and covariance (C, C) in x's
    dtype. A 1x1 convolution's batch statistics follow from them: mean W m, variance diag(W C W^T). group: of the
    processes whose pixels are meant, by torch.distributed's name; then they are float64, and have no gradient.
    Raises ValueError for another rank or dtype. Differentiable once.
    """
    if not group:
        return torch.ops.proxyless_fast.gram(x)
    with torch.no_grad():
        mean, cov = (t.double() for t in torch.ops.proxyless_fast.gram(x))
        count = x.numel() / x.shape[1]
        *_, total = sums = add_up(torch.cat([mean * count, mean.new_tensor([count])]), group)
        apart = mean - sums[:-1] / total  # the squares about the mean of all: no digits are lost
        return sums[:-1] / total, add_up(count * (cov + torch.outer(apart, apart)), group) / total


def gate_dot_reference(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a * b as a scalar tensor."""
    return (a * b).sum()


def gate_dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a * b in one pass, without the product in memory: the gradient of a gate (ProxylessNAS eq. 5).

    a, b: same shape, both float32 or both float64. Returns a scalar tensor of their dtype, accumulated in float64.
    Raises ValueError when shapes or dtypes differ. Differentiable once.
    """
    return torch.ops.proxyless_fast.gate_dot(a, b)


@fake("gram")
def _(x):
    channels, dtype = x.shape[1], torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(channels, dtype=dtype), x.new_empty(channels, channels, dtype=dtype)


@fake("gate_dot")
def _(a, b):
    if a.shape != b.shape:
        raise ValueError(f"gate_dot: a and b must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    return a.new_empty(())


# Where no kernel of ours is registered (a GPU without our CUDA part, half precision), the references stand in.
def dot(a: Tensor, b: Tensor) -> Tensor:
    """`gate_dot` where a kernel of ours runs, its reference elsewhere."""
    if a.device.type == "cpu" and a.dtype == b.dtype and a.dtype in (torch.float32, torch.float64):
        return gate_dot(a, b)
    return gate_dot_reference(a.float() if a.dtype.itemsize < 4 else a, b)
