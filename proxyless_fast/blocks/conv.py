"""Convolutions with their norm and activation: stem and feature mix, separable ones, those of NAS-Bench-201."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from ..candidates import has_hooks
from ..checks import check_positive
from ..costs import OpShape, conv_output, count_elements
from ..fusion import Fusible, Norm, count_batch, norm_of
from ..ops.batch_norm import batch_norm_act, can_run_batch_norm_act
from ..ops.conv import can_run_conv_norm_act, conv_norm_act
from .parts import activation, batch_norm, check_odd, conv2d


class ConvLayer(Fusible, nn.Sequential):
    """Convolution, BN, activation: x (B, in, H, W) to (B, out, ceil(H/stride), ceil(W/stride)).

    State-dict names conv.weight and bn.* as in the official ConvLayer. Raises ValueError for wrong sizes. BN and
    activation run as one op, with the convolution where it has few inputs; policy "off" keeps them apart.
    """

    conv: nn.Conv2d
    bn: nn.BatchNorm2d
    act: nn.Module

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, act: str | None = "relu6"
    ):
        check_positive(in_channels=in_channels, out_channels=out_channels, stride=stride)
        check_odd(kernel_size)
        parts: list[tuple[str, nn.Module]] = [
            ("conv", conv2d(in_channels, out_channels, kernel_size, stride)),
            ("bn", batch_norm(out_channels)),
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
        return OpShape(kind, input, (ho, wo, self.out_channels), (), macs, count_elements(self))


class DepthConv(nn.Sequential):
    """Depthwise-separable convolution: depthwise, 1x1, BN, ReLU (official DepthConvLayer; the paper's CIFAR set)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, dilation: int = 1):
        check_positive(in_channels=in_channels, out_channels=out_channels, stride=stride, dilation=dilation)
        check_odd(kernel_size)
        super().__init__(
            OrderedDict(
                depth_conv=conv2d(in_channels, in_channels, kernel_size, stride, groups=in_channels, dilation=dilation),
                point_conv=conv2d(in_channels, out_channels, 1),
                bn=batch_norm(out_channels),
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
        return OpShape("depth_conv", input, (ho, wo, self.out_channels), attributes, macs, count_elements(self))


class ReluConv(nn.Sequential):
    """ReLU, convolution, BN: the convolutions of NAS-Bench-201 (Dong and Yang, ICLR 2020, section 2.1)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1):
        check_positive(in_channels=in_channels, out_channels=out_channels, stride=stride)
        check_odd(kernel_size)
        # Not in place: the input feeds other edges of the cell too.
        conv = conv2d(in_channels, out_channels, kernel_size, stride)
        super().__init__(OrderedDict(act=nn.ReLU(), conv=conv, bn=batch_norm(out_channels)))
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
        return OpShape("relu_conv", input, (ho, wo, self.out_channels), attributes, macs, count_elements(self))
