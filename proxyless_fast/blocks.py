"""The operations networks are made of, under the official names, and `candidate`, which builds one by name."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .engine import Fused, Norm, count_batch, has_hooks, norm_of, parameter
from .ops.batch_norm import batch_norm_act, can_run_batch_norm_act
from .ops.conv import can_run_conv_norm_act, conv_norm_act
from .ops.mbconv import can_run_mbconv, mbconv, mbconv_before_norm, probe
from .ops.statistics import gram
from .shapes import OpShape, conv_output

BN_EPS, BN_MOMENTUM = 1e-3, 0.1  # the official set_bn_param defaults

_ACTIVATIONS = {"relu6": nn.ReLU6, "relu": nn.ReLU, "silu": nn.SiLU, "hardswish": nn.Hardswish, "identity": nn.Identity}


Gram = tuple[Tensor, Tensor]  # mean (C,) and covariance (C, C) of a tensor's pixels


class Kept(NamedTuple):
    """What the gate gradients of a layer need of its active path: y before the last norm, the norm, x's statistics."""

    y: Tensor
    statistics: Tensor
    gamma: Tensor
    beta: Tensor
    eps: float
    gram: Gram | None


def activation(name: str) -> nn.Module:
    """The activation module called `name`: relu6, relu, silu, hardswish or identity. Raises ValueError for another."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name](inplace=True) if name != "identity" else nn.Identity()


def _positive(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _odd(kernel_size: int) -> None:
    _positive(kernel_size=kernel_size)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")


def _conv(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(cin, cout, kernel, stride, padding, dilation=dilation, groups=groups, bias=False)


def _bn(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=BN_EPS, momentum=BN_MOMENTUM)


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class MBConv(nn.Module):
    """Mobile inverted bottleneck: 1x1 expand, depthwise, 1x1 project; BN after each, an activation after the first two.

    in_channels, out_channels: channels of x (B, in, H, W) and of the output (B, out, ceil(H/stride), ceil(W/stride)).
    kernel_size: odd. stride: of the depthwise convolution. expand_ratio: width of the inner tensors over in_channels;
    1 leaves the expansion out. State-dict names are the official ones (official search/modules/layers.py,
    MBInvertedConvLayer); paper section 4.1 has the candidates. Raises ValueError for wrong sizes.

    Runs as one fused op where `fused(x)` says so, else module by module: the same results and running statistics.
    policy: what the fused op keeps for backward, "fast" or "lean"; "off" never fuses (see `proxyless_fast.set_policy`).
    """

    policy = "fast"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        expand_ratio: int = 6,
        act: str = "relu6",
    ):
        super().__init__()
        _positive(in_channels=in_channels, out_channels=out_channels, stride=stride, expand_ratio=expand_ratio)
        _odd(kernel_size)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.expand_ratio, self.act = kernel_size, stride, expand_ratio, act
        wide = in_channels * expand_ratio

        def group(conv: nn.Conv2d, act: str | None) -> nn.Sequential:
            parts: list[tuple[str, nn.Module]] = [("conv", conv), ("bn", _bn(conv.out_channels))]
            if act is not None:
                parts.append(("act", activation(act)))
            return nn.Sequential(OrderedDict(parts))

        self.inverted_bottleneck = group(_conv(in_channels, wide, 1), act) if expand_ratio > 1 else None
        self.depth_conv = group(_conv(wide, wide, kernel_size, stride, groups=wide), act)
        self.point_linear = group(_conv(wide, out_channels, 1), None)

    @property
    def name(self) -> str:
        """The official name, e.g. 5x5_MBConv6."""
        return f"{self.kernel_size}x{self.kernel_size}_MBConv{self.expand_ratio}"

    def forward(self, x: Tensor, shortcut: bool = False) -> Tensor:
        """x (B, in, H, W) to the output, plus x with `shortcut`, which costs nothing where the op is fused."""
        _, plan = self._plan(x)
        if plan is None:
            y = x if self.inverted_bottleneck is None else self.inverted_bottleneck(x)
            y = self.point_linear(self.depth_conv(y))
            return y + x if shortcut else y
        if plan.norm.training:
            count_batch(plan.norms)
        return mbconv(x, plan.params, plan.running, **self._options(plan), shortcut=shortcut)

    def gated(self, x: Tensor, shortcut: bool = False) -> tuple[Tensor, Kept | None]:
        """The output, and what a gate's gradient needs of it; (output without the shortcut, None) where not fused."""
        _, plan = self._plan(x)
        if plan is None:
            return self(x), None
        if plan.norm.training:
            count_batch(plan.norms)
        shared = gram(x.detach()) if plan.norm.training and self.expand_ratio > 1 else None
        out, y, statistics = mbconv_before_norm(
            x, plan.params, plan.running, **self._options(plan), gram=shared, shortcut=shortcut
        )
        return out, Kept(y.detach(), statistics, plan.params[-2], plan.params[-1], plan.norm.eps, shared)

    def _options(self, plan: Fused) -> dict[str, Any]:
        return dict(stride=self.stride, activation=self.act, policy=self.policy, **plan.norm._asdict())

    def fused(self, x: Tensor) -> tuple[bool, str]:
        """Whether the fused op takes x: (True, ""), or (False, why not, in words)."""
        reason, _ = self._plan(x)
        return not reason, reason

    def _plan(self, x: Tensor) -> tuple[str, Fused | None]:
        if self.policy == "off":
            return "the policy is 'off'", None
        modules = [m for m in (self.inverted_bottleneck, self.depth_conv, self.point_linear) if m is not None]
        groups = [module._modules for module in modules]
        if has_hooks(*modules) or any(has_hooks(*group.values()) for group in groups):
            return "a module inside the block has hooks, which the fused op would not run", None
        norms = [group["bn"] for group in groups]
        reason, norm = norm_of(norms)
        if norm is None:
            return reason, None
        params, running = [], []
        for group, bn in zip(groups, norms, strict=True):
            params += [parameter(group["conv"], "weight"), parameter(bn, "weight"), parameter(bn, "bias")]
            running += [bn._buffers["running_mean"], bn._buffers["running_var"]]
        reason = can_run_mbconv(x, params, stride=self.stride, activation=self.act)[1]
        return reason, None if reason else Fused(params, running, norms, norm)

    def shape(self, input: tuple[int, ...], idskip: int = 0) -> OpShape:
        """Cost at input (height, width, channels); idskip 1 where the block around it adds its input."""
        h, w, _ = input
        ho, wo = conv_output(h, self.stride), conv_output(w, self.stride)
        wide = self.in_channels * self.expand_ratio
        expand = h * w * self.in_channels * wide if self.expand_ratio > 1 else 0
        macs = expand + ho * wo * wide * (self.kernel_size**2 + self.out_channels)
        attributes = (
            ("expand", self.expand_ratio),
            ("kernel", self.kernel_size),
            ("stride", self.stride),
            ("idskip", idskip),
        )
        return OpShape("expanded_conv", input, (ho, wo, self.out_channels), attributes, macs, _parameters(self))

    def extra_repr(self) -> str:
        return f"{self.in_channels} -> {self.out_channels}, {self.name}, stride {self.stride}"


def is_mbconv(module: nn.Module) -> bool:
    """Whether calling the module is MBConv's own forward: no subclass's, no hooks of a user."""
    return isinstance(module, MBConv) and type(module).forward is MBConv.forward and not has_hooks(module)


def probe_fused(
    blocks: Sequence[tuple[int, nn.Module]], x: Tensor, grad: Tensor, gram: Gram | None = None
) -> dict[int, Tensor]:
    """Gate gradients <grad, o(x)> of those blocks that the fused engine takes, in one call for each kind of block.

    blocks: pairs of a key and a module; the result has the keys of the fused ones, and what is missing has to be run
    module by module. gram: of x, if the caller has it. Running statistics move as if each block had run. No autograd.
    """
    kinds: dict[tuple, list[tuple[int, Fused]]] = {}
    for key, block in blocks:
        if isinstance(block, MBConv) and is_mbconv(block):
            _, plan = block._plan(x)
            if plan is not None:
                kinds.setdefault((block.stride, block.act, plan.norm), []).append((key, plan))
    gates: dict[int, Tensor] = {}
    for (stride, act, norm), members in kinds.items():
        plans = [plan for _, plan in members]
        params, running = [plan.params for plan in plans], [plan.running for plan in plans]
        values = probe(x, grad, params, running, stride=stride, activation=act, gram=gram, **norm._asdict())
        gates |= zip((key for key, _ in members), values.unbind(), strict=True)
        if norm.training:
            count_batch([bn for plan in plans for bn in plan.norms])
    return gates


class ConvLayer(nn.Sequential):
    """Convolution, BN, activation: x (B, in, H, W) to (B, out, ceil(H/stride), ceil(W/stride)).

    State-dict names conv.weight and bn.* as in the official ConvLayer. Raises ValueError for wrong sizes. BN and
    activation run as one op, with the convolution where it has few inputs; policy "off" keeps them apart.
    """

    policy = "fast"
    conv: nn.Conv2d
    bn: nn.BatchNorm2d
    act: nn.Module

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, act: str | None = "relu6"
    ):
        _positive(in_channels=in_channels, out_channels=out_channels, stride=stride)
        _odd(kernel_size)
        parts: list[tuple[str, nn.Module]] = [
            ("conv", _conv(in_channels, out_channels, kernel_size, stride)),
            ("bn", _bn(out_channels)),
        ]
        if act is not None:
            parts.append(("act", activation(act)))
        super().__init__(OrderedDict(parts))
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.act_name = kernel_size, stride, act

    def forward(self, x: Tensor) -> Tensor:
        bn, act = self.bn, self.act_name or "identity"
        _, norm = self._norm()
        whole = norm is not None and self._takes_conv(x)
        if not whole:
            x = self.conv(x)
            if norm is None or not can_run_batch_norm_act(x, bn.weight, activation=act)[0]:
                x = bn(x)
                return x if self.act_name is None else self.act(x)
        assert norm is not None
        if norm.training:
            count_batch([bn])
        options = dict(activation=act, **norm._asdict())
        affine = bn.weight, bn.bias, bn.running_mean, bn.running_var
        if whole:
            return conv_norm_act(x, self.conv.weight, *affine, stride=self.stride, **options)
        return batch_norm_act(x, *affine, **options)

    def _norm(self) -> tuple[str, Norm | None]:
        if self.policy == "off":
            return "the policy is 'off'", None
        if has_hooks(*self):
            return "a module inside the layer has hooks, which the fused op would not run", None
        return norm_of([self.bn])

    def _takes_conv(self, x: Tensor) -> bool:
        """Whether the convolution goes into the op too: one with few inputs whose x needs no gradient, as a stem."""
        conv = self.conv
        plain = type(conv) is nn.Conv2d and conv.bias is None and conv.groups == 1 and conv.dilation == (1, 1)
        half = conv.kernel_size[0] // 2
        plain = plain and (conv.stride, conv.padding) == ((self.stride,) * 2, (half, half))
        plain = plain and conv.padding_mode == "zeros"
        return plain and can_run_conv_norm_act(x, conv.weight, activation=self.act_name or "identity")[0]

    def shape(self, input: tuple[int, ...], kind: str = "Conv") -> OpShape:
        """Cost at input (height, width, channels), under the table's name `kind`."""
        h, w, _ = input
        ho, wo = conv_output(h, self.stride), conv_output(w, self.stride)
        macs = ho * wo * self.out_channels * self.in_channels * self.kernel_size**2
        return OpShape(kind, input, (ho, wo, self.out_channels), (), macs, _parameters(self))


class LinearLayer(nn.Module):
    """The classifier: features (B, in) to logits (B, out). State-dict names linear.* as in the official LinearLayer."""

    def __init__(self, in_features: int, out_features: int, dropout: float = 0.0):
        super().__init__()
        _positive(in_features=in_features, out_features=out_features)
        self.in_features, self.out_features, self.dropout_rate = in_features, out_features, dropout
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x if self.dropout is None else self.dropout(x))

    def shape(self, input: tuple[int, ...]) -> OpShape:
        """Cost of pooling and classifying at input (height, width, channels): the table's Logits row."""
        macs = self.in_features * self.out_features
        return OpShape("Logits", input, (self.out_features,), (), macs, _parameters(self))


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
        _positive(stride=stride, **({} if out_channels is None else {"out_channels": out_channels}))
        self.stride, self.out_channels = stride, out_channels

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return torch.utils._pytree.tree_map_only(Tensor, self._zeros, x)

    def _zeros(self, x: Tensor) -> Tensor:
        shape = tuple(x.shape)
        if self.stride > 1 or self.out_channels is not None:
            if x.dim() != 4:
                raise ValueError(f"x must have shape (batch, channels, height, width), got {shape}")
            b, c, h, w = shape
            shape = (b, self.out_channels or c, conv_output(h, self.stride), conv_output(w, self.stride))
        return _ZeroFunction.apply(x, shape)

    def shape(self, input: tuple[int, ...], idskip: int = 0) -> None:
        """Zero costs nothing."""
        return None


class Identity(nn.Module):
    """The candidate that passes its first argument on (paper section 4.1: a skip connection)."""

    name = "Identity"

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x

    def shape(self, input: tuple[int, ...], idskip: int = 0) -> None:
        """Identity costs nothing."""
        return None


class Pool(nn.Module):
    """Average or max pooling, "same"-padded; the average leaves the padding out (official PoolingLayer)."""

    def __init__(self, kind: str, channels: int, kernel_size: int = 3, stride: int = 1):
        super().__init__()
        if kind not in ("Avg", "Max"):
            raise ValueError(f"kind must be 'Avg' or 'Max', got {kind!r}")
        _positive(channels=channels, stride=stride)
        _odd(kernel_size)
        self.kind, self.channels, self.kernel_size, self.stride = kind, channels, kernel_size, stride
        padding = kernel_size // 2
        self.pool: nn.Module = (
            nn.AvgPool2d(kernel_size, stride, padding, count_include_pad=False)
            if kind == "Avg"
            else nn.MaxPool2d(kernel_size, stride, padding)
        )

    @property
    def name(self) -> str:
        """E.g. 3x3_AvgPool."""
        return f"{self.kernel_size}x{self.kernel_size}_{self.kind}Pool"

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)

    def shape(self, input: tuple[int, ...], idskip: int = 0) -> OpShape:
        """Cost at input (height, width, channels): no multiply-accumulates, as the official code counts."""
        h, w, c = input
        attributes = (("kernel", self.kernel_size), ("stride", self.stride), ("idskip", idskip))
        output = (conv_output(h, self.stride), conv_output(w, self.stride), c)
        return OpShape(f"{self.kind.lower()}_pool", input, output, attributes)


class DepthConv(nn.Sequential):
    """Depthwise-separable convolution: depthwise, 1x1, BN, ReLU (official DepthConvLayer; the paper's CIFAR set)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, dilation: int = 1):
        _positive(in_channels=in_channels, out_channels=out_channels, stride=stride, dilation=dilation)
        _odd(kernel_size)
        super().__init__(
            OrderedDict(
                depth_conv=_conv(in_channels, in_channels, kernel_size, stride, groups=in_channels, dilation=dilation),
                point_conv=_conv(in_channels, out_channels, 1),
                bn=_bn(out_channels),
                act=activation("relu"),
            )
        )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation

    @property
    def name(self) -> str:
        """The official name, e.g. 3x3_DilatedDepthConv."""
        return f"{self.kernel_size}x{self.kernel_size}_{'Dilated' if self.dilation > 1 else ''}DepthConv"

    def shape(self, input: tuple[int, ...], idskip: int = 0) -> OpShape:
        """Cost at input (height, width, channels)."""
        h, w, c = input
        ho, wo = conv_output(h, self.stride), conv_output(w, self.stride)
        macs = ho * wo * c * (self.kernel_size**2 + self.out_channels)
        attributes: tuple[tuple[str, int], ...] = (
            ("kernel", self.kernel_size),
            ("stride", self.stride),
            ("idskip", idskip),
        )
        if self.dilation > 1:
            attributes += (("dilation", self.dilation),)
        return OpShape("depth_conv", input, (ho, wo, self.out_channels), attributes, macs, _parameters(self))


class ReluConv(nn.Sequential):
    """ReLU, convolution, BN: the convolutions of NAS-Bench-201 (Dong and Yang, ICLR 2020, section 2.1)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1):
        _positive(in_channels=in_channels, out_channels=out_channels, stride=stride)
        _odd(kernel_size)
        # Not in place: the input feeds other edges of the cell too.
        conv = _conv(in_channels, out_channels, kernel_size, stride)
        super().__init__(OrderedDict(act=nn.ReLU(), conv=conv, bn=_bn(out_channels)))
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = kernel_size, stride

    @property
    def name(self) -> str:
        """E.g. 3x3_Conv."""
        return f"{self.kernel_size}x{self.kernel_size}_Conv"

    def shape(self, input: tuple[int, ...], idskip: int = 0) -> OpShape:
        """Cost at input (height, width, channels)."""
        h, w, c = input
        ho, wo = conv_output(h, self.stride), conv_output(w, self.stride)
        macs = ho * wo * c * self.out_channels * self.kernel_size**2
        attributes = (("kernel", self.kernel_size), ("stride", self.stride), ("idskip", idskip))
        return OpShape("relu_conv", input, (ho, wo, self.out_channels), attributes, macs, _parameters(self))


class ResidualBlock(nn.Module):
    """One operation or a mixed op, with or without a shortcut (official MobileInvertedResidualBlock).

    With a shortcut, a Zero inside makes the block an identity that costs nothing.
    """

    def __init__(self, mobile_inverted_conv: nn.Module, shortcut: bool):
        super().__init__()
        self.mobile_inverted_conv = mobile_inverted_conv
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        op = self.mobile_inverted_conv
        if not self.shortcut:
            return op(x)
        if isinstance(op, Zero):
            return x
        if is_mbconv(op):
            return op(x, shortcut=True)
        run = None if has_hooks(op) else getattr(op, "with_shortcut", None)  # a mixed op has it
        return op(x) + x if run is None else run(x)


_NAMES = (
    "{k}x{k}_MBConv{e} (k odd, e at least 1), Zero, Identity, 3x3_AvgPool, 3x3_MaxPool, {k}x{k}_DepthConv, "
    "3x3_DilatedDepthConv, {k}x{k}_Conv"
)
_PATTERN = re.compile(r"(\d+)x(\d+)_(MBConv|AvgPool|MaxPool|DepthConv|DilatedDepthConv|Conv)(\d*)", re.IGNORECASE)


def candidate(name: str, in_channels: int, out_channels: int, stride: int = 1) -> nn.Module:
    """Build a candidate operation by its official name (official search/modules/mix_op.py and layers.py).

    name: "5x5_MBConv6" and the like, "Zero", "Identity", "3x3_AvgPool", "3x3_MaxPool", "3x3_DepthConv" (also 5x5 and
    7x7), "3x3_DilatedDepthConv" (the paper's CIFAR set), "1x1_Conv", "3x3_Conv" (NAS-Bench-201); case does not matter.
    Raises ValueError for an unknown name, or sizes that the operation cannot have.
    """
    _positive(in_channels=in_channels, out_channels=out_channels, stride=stride)
    if str(name).lower() == "zero":
        return Zero(stride, None if in_channels == out_channels else out_channels)
    if str(name).lower() == "identity":
        if stride != 1 or in_channels != out_channels:
            raise ValueError(
                f"Identity needs stride 1 and equal channels, got stride {stride}, {in_channels} -> {out_channels}"
            )
        return Identity()
    match = _PATTERN.fullmatch(str(name))
    kind = match[3].lower() if match else ""
    if match is None or match[1] != match[2] or (kind == "mbconv") != bool(match[4]):
        raise ValueError(f"candidate {name!r} is unknown; known are {_NAMES}")
    kernel = int(match[1])
    if kind == "mbconv":
        return MBConv(in_channels, out_channels, kernel, stride, int(match[4]))
    if kind in ("avgpool", "maxpool"):
        if in_channels != out_channels:
            raise ValueError(f"{name} keeps the channels, got {in_channels} -> {out_channels}")
        return Pool(kind[:3].capitalize(), in_channels, kernel, stride)
    if kind == "conv":
        return ReluConv(in_channels, out_channels, kernel, stride)
    return DepthConv(in_channels, out_channels, kernel, stride, dilation=2 if kind.startswith("dilated") else 1)
