"""Blocks without a convolution: Zero, Identity, pooling, and the classifier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..candidates import has_hooks
from ..checks import check_positive
from ..costs import OpShape, conv_output, count_elements
from .parts import check_odd


class _ZeroFunction(torch.autograd.Function):
    """Zeros that stay connected to x, so that a loss behind them can be differentiated (to zero)."""

    @staticmethod
    def forward(ctx, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.shape = x.shape
        return x.new_zeros(shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(()).expand(ctx.shape), None


class Zero(nn.Module):
    """The candidate that outputs zeros: in a residual block, choosing it removes the block (paper section 3.2.1).

    x: (B, C, H, W) to (B, out_channels or C, ceil(H/stride), ceil(W/stride)); with stride 1 any shape, and tuples,
    lists and dicts of tensors, each to zeros like itself. Further arguments are ignored.
    """

    name = "Zero"

    def __init__(self, stride: int = 1, out_channels: int | None = None):
        super().__init__()
        check_positive(stride=stride, **({} if out_channels is None else {"out_channels": out_channels}))
        self.stride, self.out_channels = stride, out_channels

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing():
            return self._recorded_zeros(x)
        return torch.utils._pytree.tree_map_only(Tensor, self._zeros, x)

    def _recorded_zeros(self, x: Any) -> Any:
        """Zeros by operations on x alone, which torch.fx and torch.jit.trace record for any size of the batch: to the
        former x is no tensor, and the latter has no form for an autograd function in Python."""
        if self.stride == 1 and self.out_channels is None:
            return torch.zeros_like(x)
        if self.out_channels is None:
            return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])
        return torch.zeros_like(x[:, :1, :: self.stride, :: self.stride]).repeat(1, self.out_channels, 1, 1)

    def _zeros(self, x: Tensor) -> Tensor:
        shape = tuple(x.shape)
        if self.stride > 1 or self.out_channels is not None:
            if x.dim() != 4:
                raise ValueError(f"x must have shape (batch, channels, height, width), got {shape}")
            b, c, h, w = shape
            shape = (b, self.out_channels or c, conv_output(h, self.stride), conv_output(w, self.stride))
        return _ZeroFunction.apply(x, shape)

    def with_shortcut(self, x: Tensor) -> Tensor:
        """self(x) + x: x itself, where the zeros have its shape."""
        return x if self.stride == 1 and self.out_channels is None else self(x) + x

    outputs_zeros = launches_nothing = True

    def why_not_recorded(self, x: Tensor) -> str:
        """Empty: zeros can be recorded."""
        return ""

    def shape(self, input: tuple[int, ...], idskip: int = 0) -> None:
        """Zero costs nothing."""
        return None


class Identity(nn.Module):
    """The candidate that passes its first argument on (paper section 4.1: a skip connection)."""

    name = "Identity"

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x

    launches_nothing = True

    def why_not_recorded(self, x: Tensor) -> str:
        """Empty: passing x on can be recorded."""
        return ""

    def shape(self, input: tuple[int, ...], idskip: int = 0) -> None:
        """Identity costs nothing."""
        return None


class Pool(nn.Module):
    """Average or max pooling, "same"-padded; the average leaves the padding out (official PoolingLayer)."""

    def __init__(self, kind: str, channels: int, kernel_size: int = 3, stride: int = 1):
        super().__init__()
        if kind not in ("Avg", "Max"):
            raise ValueError(f"kind must be 'Avg' or 'Max', got {kind!r}")
        check_positive(channels=channels, stride=stride)
        check_odd(kernel_size)
        self.channels = channels
        padding = kernel_size // 2
        self.pool: nn.Module = (
            nn.AvgPool2d(kernel_size, stride, padding, count_include_pad=False)
            if kind == "Avg"
            else nn.MaxPool2d(kernel_size, stride, padding)
        )

    def _read(self) -> tuple[str, int, int]:
        """Kind, kernel and stride. Raises ValueError where the module inside is no "same"-padded pooling any more."""
        pool: Any = self.pool
        kind = {nn.AvgPool2d: "Avg", nn.MaxPool2d: "Max"}.get(type(pool))
        plain = kind is not None and isinstance(pool.kernel_size, int) and isinstance(pool.stride, int)
        plain = plain and pool.padding == pool.kernel_size // 2 and not pool.ceil_mode and not has_hooks(pool)
        if kind == "Avg":
            plain = plain and not pool.count_include_pad and pool.divisor_override is None
        elif kind == "Max":
            plain = plain and pool.dilation == 1 and not pool.return_indices
        if kind is None or not plain:
            raise ValueError(f"Pool: {pool} is no average or max pooling that the block could have been built with")
        return kind, pool.kernel_size, pool.stride

    @property
    def stride(self) -> int:
        return self._read()[2]

    @property
    def name(self) -> str:
        """E.g. 3x3_AvgPool."""
        kind, kernel, _ = self._read()
        return f"{kernel}x{kernel}_{kind}Pool"

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)

    def shape(self, input: tuple[int, ...], idskip: int = 0) -> OpShape:
        """Cost at input (height, width, channels): no multiply-accumulates, as the official code counts."""
        (h, w, c), (kind, kernel, stride) = input, self._read()
        attributes = (("kernel", kernel), ("stride", stride), ("idskip", idskip))
        return OpShape(f"{kind.lower()}_pool", input, (conv_output(h, stride), conv_output(w, stride), c), attributes)


class LinearLayer(nn.Module):
    """The classifier: features (B, in) to logits (B, out). State-dict names linear.* as in the official LinearLayer."""

    def __init__(self, in_features: int, out_features: int, dropout: float = 0.0):
        super().__init__()
        check_positive(in_features=in_features, out_features=out_features)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        self.linear = nn.Linear(in_features, out_features)

    def _read(self) -> nn.Linear:
        """The linear map. Raises ValueError where the classifier holds another module."""
        linear, dropout = self.linear, self.dropout
        plain = type(linear) is nn.Linear and linear.bias is not None and not has_hooks(linear)
        if not plain or (dropout is not None and type(dropout) is not nn.Dropout):
            raise ValueError(
                f"LinearLayer: holds {linear} and {dropout}, expected an nn.Linear with bias, and nn.Dropout"
            )
        return linear

    @property
    def in_features(self) -> int:
        return self._read().weight.shape[1]

    @property
    def out_features(self) -> int:
        return self._read().weight.shape[0]

    @property
    def dropout_rate(self) -> float:
        self._read()
        return 0.0 if self.dropout is None else self.dropout.p

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x if self.dropout is None else self.dropout(x))

    def shape(self, input: tuple[int, ...]) -> OpShape:
        """Cost of pooling and classifying at input (height, width, channels): the table's Logits row."""
        macs = self.in_features * self.out_features
        return OpShape("Logits", input, (self.out_features,), (), macs, count_elements(self))
