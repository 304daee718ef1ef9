"""The two reductions a search step runs over whole activations: Gram statistics and the gate dot product.

Each has a plain-torch reference (`*_reference`), the registered op, a fake kernel and an autograd formula.
"""

import torch
from torch import Tensor


def gram_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased covariance over the pixels of x (B, C, H, W): (C,), (C, C). DESIGN: BN1 from a Gram matrix."""
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    mean = rows.mean(0)
    centred = rows - mean
    return mean, centred.t() @ centred / rows.shape[0]


def gram(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased covariance over the pixels of x, accumulated about a pivot and in float64.

    x: (B, C, H, W), float32 or float64, any memory format, not empty. Returns mean (C,) and covariance (C, C) in x's
    dtype. A 1x1 convolution's batch statistics follow from them: mean W m, variance diag(W C W^T).
    Raises ValueError for another rank or dtype. Differentiable once.
    """
    return torch.ops.proxyless_fast.gram(x)


def gate_dot_reference(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a * b as a scalar tensor."""
    return (a * b).sum()


def gate_dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a * b in one pass, without the product in memory: the gradient of a gate (ProxylessNAS eq. 5).

    a, b: same shape, both float32 or both float64. Returns a scalar tensor of their dtype, accumulated in float64.
    Raises ValueError when shapes or dtypes differ. Differentiable once.
    """
    return torch.ops.proxyless_fast.gate_dot(a, b)


@torch.library.register_fake("proxyless_fast::gram")
def _(x):
    channels, dtype = x.shape[1], torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(channels, dtype=dtype), x.new_empty(channels, channels, dtype=dtype)


@torch.library.register_fake("proxyless_fast::gate_dot")
def _(a, b):
    return a.new_empty(())


def _gram_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[0])


def _gram_backward(ctx, grad_mean, grad_cov):
    # cov = (X - m)^T (X - m) / N, and the centred rows sum to zero: d cov passes to X through them alone.
    x, mean = ctx.saved_tensors
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    grad = (grad_mean / pixels)[:, None, None]
    symmetric = (grad_cov + grad_cov.t()) / pixels
    return grad + torch.einsum("ij,bjhw->bihw", symmetric, x - mean[:, None, None])


def _dot_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _dot_backward(ctx, grad):
    a, b = ctx.saved_tensors
    return grad * b, grad * a


torch.library.register_autograd("proxyless_fast::gram", _gram_backward, setup_context=_gram_setup)
torch.library.register_autograd("proxyless_fast::gate_dot", _dot_backward, setup_context=_dot_setup)


# Where no kernel of ours is registered (a GPU without our CUDA part, half precision), the references stand in.
def dot(a: Tensor, b: Tensor) -> Tensor:
    """`gate_dot` where a kernel of ours runs, its reference elsewhere."""
    if a.device.type == "cpu" and a.dtype == b.dtype and a.dtype in (torch.float32, torch.float64):
        return gate_dot(a, b)
    return gate_dot_reference(a.float() if a.dtype.itemsize < 4 else a, b)
