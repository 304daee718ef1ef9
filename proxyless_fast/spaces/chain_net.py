"""ChainNet: stem, a chain of blocks, feature mix, classifier; the paper's supernets and the nets derived from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import ConvLayer, LinearLayer, MBConv, ResidualBlock, candidate
from ..checks import check_positive
from ..costs import Layer, require_cost
from ..mixed import MixedOp
from .common import attribute_of, describe_layer, initialise

MBCONVS = ("3x3_MBConv3", "3x3_MBConv6", "5x5_MBConv3", "5x5_MBConv6", "7x7_MBConv3", "7x7_MBConv6")


def make_divisible(value: float, divisor: int = 8) -> int:
    """The multiple of divisor nearest to value, at least divisor and never below 0.9 value (MobileNetV2's rule)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


class ChainNet(nn.Module):
    """x (B, in_channels, resolution, resolution) to logits (B, num_classes); other resolutions work too.

    State-dict names are the official ones: first_conv.*, blocks.{i}.mobile_inverted_conv.*, feature_mix_layer.*,
    classifier.linear.* (official search/models/normal_nets/proxyless_nets.py).
    """

    def __init__(
        self,
        first_conv: ConvLayer,
        blocks: Sequence[ResidualBlock],
        feature_mix_layer: ConvLayer,
        classifier: LinearLayer,
        resolution: int,
    ):
        super().__init__()
        self.first_conv = first_conv
        self.blocks: Any = nn.ModuleList(blocks)
        self.feature_mix_layer = feature_mix_layer
        self.global_avg_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = classifier
        self.resolution = resolution

    @property
    def in_channels(self) -> int:
        """Channels of the images. Raises ValueError where the stem is no plain convolution any more."""
        return attribute_of(self.first_conv, "first_conv", "in_channels")

    @property
    def num_classes(self) -> int:
        """Raises ValueError where the classifier does not tell its outputs."""
        return attribute_of(self.classifier, "classifier", "out_features")

    def forward(self, x: Tensor) -> Tensor:
        x = self.first_conv(x)
        # A mixed op breaks a compiled graph: one break for all of them, and no graph of each of the pieces between.
        mixed = torch.compiler.is_compiling() and any(
            isinstance(getattr(block, "mobile_inverted_conv", None), MixedOp) for block in self.blocks
        )
        x = self._run_uncompiled(x) if mixed else self._run_blocks(x)
        return self.classifier(self.global_avg_pooling(self.feature_mix_layer(x)).flatten(1))

    def _run_blocks(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    _run_uncompiled = torch.compiler.disable(_run_blocks)

    def layers(self) -> list[Layer]:
        """Every layer with the cost of each of its choices at this net's resolution."""
        fixed = require_cost("first_conv", self.first_conv, (self.resolution, self.resolution, self.in_channels))
        found = [Layer("first_conv", (fixed,), (self.first_conv,))]
        size = fixed.output
        for i, block in enumerate(self.blocks):
            layer = describe_layer(f"blocks.{i}", block.mobile_inverted_conv, size, int(block.shortcut))
            found.append(layer)
            size = layer.output or size
        last = require_cost("feature_mix_layer", self.feature_mix_layer, size, kind="Conv_1")
        found.append(Layer("feature_mix_layer", (last,), (self.feature_mix_layer,)))
        head = require_cost("classifier", self.classifier, last.output)
        found.append(Layer("classifier", (head,), (self.classifier,)))
        return found

    def config(self) -> dict[str, Any]:
        """A JSON-ready description of a derived net, from which `from_config` rebuilds it.

        Raises ValueError for a net that still holds mixed ops, or modules that no description can say.
        """
        size = attribute_of(self.first_conv, "first_conv", "out_channels")
        blocks = []
        for i, block in enumerate(self.blocks):
            op: Any = block.mobile_inverted_conv
            if isinstance(op, MixedOp):
                raise ValueError(f"net must be derived before it is described; blocks.{i} is still a mixed op")
            out = getattr(op, "out_channels", None) or size
            entry = {
                "name": attribute_of(op, f"blocks.{i}", "name"),
                "in_channels": size,
                "out_channels": out,
                "stride": getattr(op, "stride", 1),
                "shortcut": block.shortcut,
            }
            if isinstance(op, MBConv) and op.act != "relu6":
                entry["act"] = op.act
            blocks.append(entry)
            size = out
        return {
            "kind": "chain",
            "resolution": self.resolution,
            "first_conv": _conv_config(self.first_conv),
            "blocks": blocks,
            "feature_mix_layer": _conv_config(self.feature_mix_layer),
            "classifier": {
                "in_features": attribute_of(self.classifier, "classifier", "in_features"),
                "out_features": self.num_classes,
                "dropout": attribute_of(self.classifier, "classifier", "dropout_rate"),
            },
        }


def _conv_config(layer: ConvLayer) -> dict[str, Any]:
    return {
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "kernel_size": layer.kernel_size,
        "stride": layer.stride,
        "act": layer.act_name,
    }


def supernet(
    *,
    num_classes: int,
    in_channels: int,
    resolution: int,
    first: tuple[int, int],
    first_block: int,
    stages: Sequence[tuple[int, int, int]],
    last: int,
    candidates: Sequence[str],
    dropout: float = 0.0,
) -> ChainNet:
    """A chain of mixed ops (official super_proxyless.py).

    first: (width, stride) of the stem. first_block: width of the fixed MBConv 3x3 e1 behind it. stages: (width, blocks,
    stride of the first block). last: width of the feature mix. A block whose input and output agree has a shortcut and
    one more candidate, Zero.
    """
    check_positive(num_classes=num_classes, in_channels=in_channels, resolution=resolution)
    if not candidates:
        raise ValueError("candidates must name at least one operation, got none")
    width, stride = first
    first_conv = ConvLayer(in_channels, width, 3, stride)
    blocks = [ResidualBlock(MBConv(width, first_block, 3, 1, 1), shortcut=False)]
    width = first_block
    for out, count, stage_stride in stages:
        for i in range(count):
            stride = stage_stride if i == 0 else 1
            shortcut = stride == 1 and width == out
            names = [*candidates, "Zero"] if shortcut and "Zero" not in candidates else list(candidates)
            op = MixedOp({name: candidate(name, width, out, stride) for name in names}, label=f"blocks.{len(blocks)}")
            blocks.append(ResidualBlock(op, shortcut))
            width = out
    net = ChainNet(first_conv, blocks, ConvLayer(width, last, 1), LinearLayer(last, num_classes, dropout), resolution)
    initialise(net)
    return net
