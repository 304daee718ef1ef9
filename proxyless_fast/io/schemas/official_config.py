"""Official net configs: official search/models/normal_nets/proxyless_nets.py, and what once-for-all and MCUNet add.

A field is honoured, or may have only the value that changes nothing. Defaults are the official ones.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from .common import MAX_PARAMETERS, Kernel, Rate, Real, Size, Strict, Stride, Whole, fixed


def _square(value: Any) -> Any:
    """[3, 3] is 3; sides that differ are refused as a list."""
    if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
        return value[0]
    return value


SquareKernel = Annotated[Kernel, BeforeValidator(_square)]
SquareStride = Annotated[Stride, BeforeValidator(_square)]
No = Annotated[Any, fixed(False)]
Nothing = Annotated[Any, fixed(None)]
One = Annotated[Any, fixed(1)]
Order = Annotated[Any, fixed("weight_bn_act")]

# relu6, relu and no activation are official; h_swish is once-for-all's name; the others are ours of version 0.2.


class BatchNorm(Strict):
    """Settings of all batch norms."""

    momentum: Annotated[Real, Field(ge=0, le=1)] | None
    eps: Annotated[Real, Field(ge=0, le=1)]
    ws_eps: Nothing = None  # weight standardisation of once-for-all


class Conv(Strict):
    """ConvLayer: the stem and the feature mix."""

    name: Literal["ConvLayer"]
    in_channels: Size
    out_channels: Size
    kernel_size: SquareKernel
    stride: SquareStride
    dilation: One = 1
    groups: One = 1
    bias: No = False
    has_shuffle: No = False
    use_se: No = False
    use_bn: Annotated[Any, fixed(True)] = True
    # Where it is absent, all official versions take ReLU.
    act_func: Literal["relu6", "relu", "h_swish", "hardswish", "silu", "identity", None] = "relu"
    dropout_rate: Annotated[Any, fixed(0)] = 0
    ops_order: Order = "weight_bn_act"


class MBInvertedConv(Strict):
    """MBInvertedConvLayer, which once-for-all calls MBConvLayer."""

    name: Literal["MBInvertedConvLayer", "MBConvLayer"]
    in_channels: Size
    out_channels: Size
    kernel_size: SquareKernel
    stride: SquareStride
    expand_ratio: Annotated[Whole, Field(ge=1, le=64)]
    mid_channels: Size | None = None
    act_func: Annotated[Any, fixed("relu6")] = "relu6"  # once-for-all's; the official layer has no other
    use_se: No = False
    groups: Nothing = None  # with a number, once-for-all's depthwise convolution is none

    @model_validator(mode="after")
    def _width_is_of_the_ratio(self) -> MBInvertedConv:
        wide = self.in_channels * self.expand_ratio
        if self.mid_channels not in (None, wide):
            raise ValueError(
                f"mid_channels must be in_channels * expand_ratio = {wide} or null, got {self.mid_channels}"
            )
        return self


class ZeroLayer(Strict):
    """ZeroLayer: as an operation it makes the block an identity, as a shortcut it is none."""

    name: Literal["ZeroLayer"]
    stride: SquareStride


class IdentityLayer(Strict):
    """IdentityLayer: the shortcut."""

    name: Literal["IdentityLayer"]
    in_channels: Size
    out_channels: Size
    use_bn: No = False
    act_func: Nothing = None
    dropout_rate: Annotated[Any, fixed(0)] = 0
    ops_order: Order = "weight_bn_act"


class Block(Strict):
    """MobileInvertedResidualBlock."""

    name: Literal["MobileInvertedResidualBlock"]
    mobile_inverted_conv: Annotated[MBInvertedConv | ZeroLayer, Field(discriminator="name")]
    shortcut: Annotated[IdentityLayer | ZeroLayer, Field(discriminator="name")] | None


class Linear(Strict):
    """LinearLayer: the classifier."""

    name: Literal["LinearLayer"]
    in_features: Size
    out_features: Size
    bias: Annotated[Any, fixed(True)] = True
    use_bn: No = False
    act_func: Nothing = None
    dropout_rate: Rate = 0.0
    ops_order: Order = "weight_bn_act"


class OfficialConfig(Strict):
    """A whole net, whose widths chain and whose shortcuts join equal shapes."""

    name: Literal["ProxylessNASNets"]
    bn: BatchNorm | None = None
    first_conv: Conv
    blocks: Annotated[list[Block], Field(min_length=1, max_length=1000)]
    feature_mix_layer: Conv
    classifier: Linear
    resolution: Annotated[Size, BeforeValidator(_square)] | None = None  # MCUNet's

    @model_validator(mode="after")
    def _widths_chain(self) -> OfficialConfig:
        width = self.first_conv.out_channels
        parameters = _conv_parameters(self.first_conv)
        for i, block in enumerate(self.blocks):
            place, op, shortcut = f"blocks.{i}", block.mobile_inverted_conv, block.shortcut
            out, stride = width, op.stride
            if isinstance(op, MBInvertedConv):
                _equal(f"{place}.mobile_inverted_conv.in_channels", op.in_channels, width)
                out, wide = op.out_channels, op.in_channels * op.expand_ratio
                parameters += wide * (width + op.kernel_size**2 + out)
            elif stride != 1:
                raise ValueError(
                    f"{place}.mobile_inverted_conv.stride must be 1: the official block around a ZeroLayer is the "
                    f"identity, got {stride}"
                )
            if isinstance(shortcut, IdentityLayer):
                _equal(f"{place}.shortcut.in_channels", shortcut.in_channels, width)
                _equal(f"{place}.shortcut.out_channels", shortcut.out_channels, width)
                if stride != 1 or out != width:
                    raise ValueError(
                        f"{place}.shortcut must be null where the block changes the shape (stride {stride}, {width} to "
                        f"{out} channels), got an IdentityLayer"
                    )
            width = out
        _equal("feature_mix_layer.in_channels", self.feature_mix_layer.in_channels, width)
        _equal("classifier.in_features", self.classifier.in_features, self.feature_mix_layer.out_channels)
        parameters += _conv_parameters(self.feature_mix_layer)
        parameters += self.classifier.in_features * self.classifier.out_features
        if parameters > MAX_PARAMETERS:
            raise ValueError(f"the net must have at most {MAX_PARAMETERS:,} parameters, got {parameters:,}")
        return self


def _conv_parameters(layer: Conv) -> int:
    return layer.in_channels * layer.out_channels * layer.kernel_size**2


def _equal(place: str, got: int, wanted: int) -> None:
    if got != wanted:
        raise ValueError(f"{place} must be {wanted}, the width of what comes before, got {got}")
