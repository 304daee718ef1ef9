"""Convolutions with their norm and activation: stem and feature mix, separable ones, those of NAS-Bench-201."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from torch import Tensor, nn

from ..checks import check_positive
from ..costs import OpShape, conv_output, count_elements
from ..fusion import FusedArguments, Fusible, count_batch, gather, why_not_now
from ..ops.batch_norm import batch_norm_act, can_run_batch_norm_act
from ..ops.conv import can_run_conv_norm_act, conv_norm_act
from ..reading import (
    Convolution,
    Snapshot,
    Stage,
    Unreadable,
    read_activation,
    read_children,
    read_convolution,
    read_norm,
    require_unhooked,
)
from .parts import activation, batch_norm, check_odd, conv2d


class _Fused(NamedTuple):
    """A ConvLayer as its modules are, for the fused ops: stride is None where its convolution runs by itself."""

    arguments: FusedArguments
    conv: nn.Module
    stride: int | None


class ConvLayer(Fusible, nn.Sequential):
    """Convolution, BN, activation: x (B, in, H, W) to (B, out, ceil(H/stride), ceil(W/stride)).

    State-dict names conv.weight and bn.* as in the official ConvLayer. Raises ValueError for wrong sizes. BN and
    activation run as one op, with the convolution where it has few inputs; `fused(x)` says why, where they do not, and
    policy "off" keeps them apart. Whatever is changed or added inside is run as it is, as in any nn.Sequential.
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

    @property
    def in_channels(self) -> int:
        conv = self._read().conv
        return conv.inputs * conv.groups

    @property
    def out_channels(self) -> int:
        return self._read().conv.out_channels

    @property
    def kernel_size(self) -> int:
        return self._read().conv.kernel_size

    @property
    def stride(self) -> int:
        return self._read().conv.stride

    @property
    def act_name(self) -> str | None:
        """The activation's name, None where there is none."""
        name = self._read().activation
        return None if name == "identity" else name

    def _read(self) -> Stage:
        try:
            return read_children(self, "ConvLayer")
        except Unreadable as reason:
            raise ValueError(f"{reason}; as it is, the layer has no size of that name") from None

    def forward(self, x: Tensor) -> Tensor:
        _, found = self._plan(x)
        if found is None:
            return super().forward(x)
        arguments, conv, stride = found
        weight, (gamma, beta), (mean, var) = arguments.params[0], arguments.params[-2:], arguments.running
        norm = arguments.norm
        takes = (
            stride is not None
            and not norm.group
            and can_run_conv_norm_act(x, weight, activation=arguments.activation)[0]
        )
        whole = stride if takes else None
        if whole is None:
            x = conv(x)
            if not can_run_batch_norm_act(x, gamma, activation=arguments.activation)[0]:
                for module in list(self)[1:]:
                    x = module(x)
                return x
        if norm.training:
            count_batch(arguments.norms)
        options = dict(activation=arguments.activation, **norm._asdict())
        if whole is not None:
            del options["group"]  # there is none
            return conv_norm_act(x, weight, gamma, beta, mean, var, stride=whole, **options)
        return batch_norm_act(x, gamma, beta, mean, var, **options)

    def _plan(self, x: Tensor) -> tuple[str, _Fused | None]:
        reason = "the policy is 'off'" if self.policy == "off" else why_not_now(x)
        if reason:
            return reason, None
        found = Snapshot.of(self, self._gather)
        reason = str(found) if isinstance(found, Unreadable) else found.arguments.why_stale()
        return reason, None if reason else found

    def _gather(self) -> _Fused:
        """Norm and activation must be plain; the convolution may be anything, which then runs by itself."""
        children = list(self._modules.values())
        if len(children) not in (2, 3):
            raise Unreadable(f"the layer holds {len(children)} modules, not convolution, norm and activation")
        require_unhooked(children[1:])
        norm = read_norm(children[1], "bn")
        act = "identity" if len(children) == 2 else read_activation(children[2], "act")
        try:
            conv: Convolution | None = read_convolution(children[0], "conv")
            require_unhooked(children[:1])
        except Unreadable:
            conv = None
        if conv is None or conv.groups != 1:
            return _Fused(gather([None], [norm], 1, act), children[0], None)
        return _Fused(gather([conv], [norm], conv.stride, act), children[0], conv.stride)

    def shape(self, input: tuple[int, ...], kind: str = "Conv") -> OpShape:
        """Cost at input (height, width, channels), under the table's name `kind`.

        Raises ValueError where the layer's modules are no convolution, norm and activation any more.
        """
        (h, w, channels), conv = input, self._read().conv
        if channels != conv.inputs * conv.groups:
            raise ValueError(f"ConvLayer: input has {channels} channels, expected {conv.inputs * conv.groups}")
        ho, wo = conv_output(h, conv.stride), conv_output(w, conv.stride)
        macs = ho * wo * conv.out_channels * conv.inputs * conv.kernel_size**2
        attributes = () if self.act_name in ("relu6", None) else (("act", self.act_name),)
        return OpShape(kind, input, (ho, wo, conv.out_channels), attributes, macs, count_elements(self))


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

    def _read(self) -> tuple[Convolution, Convolution]:
        """The two convolutions. Raises ValueError where the modules are no depthwise-separable convolution any more."""
        try:
            depth = read_convolution(self.depth_conv, "depth_conv", dilated=True)
            point = read_convolution(self.point_conv, "point_conv")
            read_norm(self.bn, "bn")
            if read_activation(self.act, "act") != "relu" or len(self) != 4:
                raise Unreadable("its modules are not two convolutions, norm and ReLU")
            if depth.inputs != 1 or point[2:6] != (depth.out_channels, 1, 1, 1):
                raise Unreadable("its convolutions are not depthwise and 1x1")
            return depth, point
        except Unreadable as reason:
            raise ValueError(f"DepthConv: {reason}") from None

    @property
    def in_channels(self) -> int:
        return self._read()[0].out_channels

    @property
    def out_channels(self) -> int:
        return self._read()[1].out_channels

    @property
    def stride(self) -> int:
        return self._read()[0].stride

    @property
    def name(self) -> str:
        """The official name, e.g. 3x3_DilatedDepthConv."""
        depth, _ = self._read()
        return f"{depth.kernel_size}x{depth.kernel_size}_{'Dilated' if depth.dilation > 1 else ''}DepthConv"

    def shape(self, input: tuple[int, ...], idskip: int = 0) -> OpShape:
        """Cost at input (height, width, channels)."""
        (h, w, c), (depth, point) = input, self._read()
        ho, wo = conv_output(h, depth.stride), conv_output(w, depth.stride)
        macs = ho * wo * c * (depth.kernel_size**2 + point.out_channels)
        attributes: tuple[tuple[str, int], ...] = (
            ("kernel", depth.kernel_size),
            ("stride", depth.stride),
            ("idskip", idskip),
        )
        if depth.dilation > 1:
            attributes += (("dilation", depth.dilation),)
        return OpShape("depth_conv", input, (ho, wo, point.out_channels), attributes, macs, count_elements(self))


class ReluConv(nn.Sequential):
    """ReLU, convolution, BN: the convolutions of NAS-Bench-201 (Dong and Yang, ICLR 2020, section 2.1)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1):
        check_positive(in_channels=in_channels, out_channels=out_channels, stride=stride)
        check_odd(kernel_size)
        # Not in place: the input feeds other edges of the cell too.
        conv = conv2d(in_channels, out_channels, kernel_size, stride)
        super().__init__(OrderedDict(act=nn.ReLU(), conv=conv, bn=batch_norm(out_channels)))

    def _read(self) -> Convolution:
        """The convolution. Raises ValueError where the modules are not ReLU, convolution and norm any more."""
        try:
            read_norm(self.bn, "bn")
            if read_activation(self.act, "act") != "relu" or len(self) != 3:
                raise Unreadable("its modules are not ReLU, convolution and norm")
            conv = read_convolution(self.conv, "conv")
            if conv.groups != 1:
                raise Unreadable(f"conv has {conv.groups} groups")
            return conv
        except Unreadable as reason:
            raise ValueError(f"ReluConv: {reason}") from None

    @property
    def in_channels(self) -> int:
        return self._read().inputs

    @property
    def out_channels(self) -> int:
        return self._read().out_channels

    @property
    def stride(self) -> int:
        return self._read().stride

    @property
    def name(self) -> str:
        """E.g. 3x3_Conv."""
        kernel = self._read().kernel_size
        return f"{kernel}x{kernel}_Conv"

    def shape(self, input: tuple[int, ...], idskip: int = 0) -> OpShape:
        """Cost at input (height, width, channels)."""
        (h, w, c), conv = input, self._read()
        ho, wo = conv_output(h, conv.stride), conv_output(w, conv.stride)
        macs = ho * wo * c * conv.out_channels * conv.kernel_size**2
        attributes = (("kernel", conv.kernel_size), ("stride", conv.stride), ("idskip", idskip))
        return OpShape("relu_conv", input, (ho, wo, conv.out_channels), attributes, macs, count_elements(self))
