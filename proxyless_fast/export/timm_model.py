"""A derived chain net as a timm EfficientNet, whose architecture strings can say any MBConv."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from ..blocks import MBConv, ResidualBlock, Zero
from ..checks import unwrapped
from ..spaces.chain_net import ChainNet
from . import batchnorm
from .architecture_json import architecture
from .described import description


def timm(net: nn.Module) -> nn.Module:
    """A `timm.models.efficientnet.EfficientNet` that computes what the derived chain net does, with its weights.

    Blocks that chose Zero are left out. What `describe` said of the net is in its `pretrained_cfg`, where timm's
    transforms look for it. Needs the package timm (ImportError where it is absent). Raises ValueError for
    another net, or an operation that timm's architecture strings cannot say.
    """
    try:
        from timm.models._efficientnet_builder import decode_arch_def
        from timm.models.efficientnet import EfficientNet
    except ImportError as error:
        raise ImportError("export to timm needs the package timm: pip install timm") from error

    net = unwrapped(net)
    if not isinstance(net, ChainNet):
        raise ValueError(f"net must be a derived ChainNet to become a timm model, got {type(net).__name__}")
    kept = [
        (f"blocks.{i}", block)
        for i, block in enumerate(net.blocks)
        if not (block.shortcut and isinstance(block.mobile_inverted_conv, Zero))
    ]
    for place, layer in (("first_conv", net.first_conv), ("feature_mix_layer", net.feature_mix_layer)):
        if layer.act_name != "relu6":
            raise ValueError(f"{place} has no form in timm: expected ReLU6, got {layer.act_name}")
    if net.feature_mix_layer.kernel_size != 1 or net.feature_mix_layer.stride != 1:
        raise ValueError("feature_mix_layer has no form in timm: expected kernel size 1 and stride 1")
    stages = _stages(kept)
    architecture(net)  # raises for modules that are not what the net's own blocks can be
    model = EfficientNet(
        decode_arch_def(stages),
        num_classes=net.num_classes,
        num_features=net.feature_mix_layer.out_channels,
        in_chans=net.in_channels,
        stem_size=net.first_conv.out_channels,
        stem_kernel_size=net.first_conv.kernel_size,
        fix_stem=True,
        output_stride=2**16,  # else timm turns strides beyond 32 into dilations
        act_layer=nn.ReLU6,
        norm_layer=partial(nn.BatchNorm2d, **batchnorm.common(net)),
        round_chs_fn=int,
        drop_rate=net.classifier.dropout_rate,
    )
    model.conv_stem.stride = (net.first_conv.stride,) * 2  # timm's stem always halves the image
    model.load_state_dict(_state(net, kept, model))
    model.__dict__["pretrained_cfg"] = _settings(net, description(net))
    return model.train(net.training)


def _settings(net: ChainNet, known: dict[str, Any]) -> dict[str, Any]:
    """timm's words for a description. Raises ValueError for a preprocessing that timm's transforms cannot do."""
    found: dict[str, Any] = {"architecture": "proxyless", "num_classes": net.num_classes}
    if "classes" in known:
        found["label_names"] = tuple(known["classes"])
    images = known.get("preprocessing")
    if images is None:
        return found
    if images.get("channel_order") == "BGR" or images["value_range"] != [0, 1]:
        raise ValueError("preprocessing has no form in timm: expected RGB or gray, and a value_range of [0, 1]")
    side, short_side = images["resolution"], images["short_side"]
    return found | {
        "input_size": (images["channels"], side, side),
        "mean": tuple(images["mean"]),
        "std": tuple(images["std"]),
        "interpolation": images["interpolation"],
        "crop_pct": 1.0 if short_side is None else side / short_side,
        "crop_mode": "squash" if short_side is None else "center",
    }


def _stages(kept: list[tuple[str, ResidualBlock]]) -> list[list[str]]:
    """timm's architecture strings, a new stage wherever the stride or the width changes."""
    stages: list[list[str]] = []
    for place, block in kept:
        op = block.mobile_inverted_conv
        if not isinstance(op, MBConv) or op.act != "relu6":
            raise ValueError(f"{place} has no form in timm: expected an MBConv with ReLU6, got {op}")
        wide = op.in_channels * op.expand_ratio
        if op.expand_ratio > 1 and wide % 8:
            raise ValueError(f"{place} has no form in timm, which rounds the width {wide} to a multiple of 8")
        kind = "ds" if op.expand_ratio == 1 else "ir"
        expand = "" if op.expand_ratio == 1 else f"_e{op.expand_ratio}"
        skip = "" if block.shortcut else "_noskip"
        text = f"{kind}_r1_k{op.kernel_size}_s{op.stride}{expand}_c{op.out_channels}{skip}"
        if not stages or op.stride > 1 or op.in_channels != op.out_channels:
            stages.append([])
        stages[-1].append(text)
    return stages


def _state(net: ChainNet, kept: list[tuple[str, ResidualBlock]], model: Any) -> dict[str, Tensor]:
    names = {
        "conv_stem": "first_conv.conv",
        "bn1": "first_conv.bn",
        "conv_head": "feature_mix_layer.conv",
        "bn2": "feature_mix_layer.bn",
        "classifier": "classifier.linear",
    }
    places = [f"blocks.{i}.{j}" for i, stage in enumerate(model.blocks) for j in range(len(stage))]
    for theirs, (ours, _) in zip(places, kept, strict=True):
        groups, convs = ["depth_conv", "point_linear"], ["conv_dw", "conv_pw"]
        if hasattr(model.get_submodule(theirs), "conv_pwl"):
            groups, convs = ["inverted_bottleneck", *groups], ["conv_pw", "conv_dw", "conv_pwl"]
        for i, (group, conv) in enumerate(zip(groups, convs, strict=True), start=1):
            names[f"{theirs}.{conv}"] = f"{ours}.mobile_inverted_conv.{group}.conv"
            names[f"{theirs}.bn{i}"] = f"{ours}.mobile_inverted_conv.{group}.bn"
    state = net.state_dict()
    keys = (key.rsplit(".", 1) for key in model.state_dict())
    return {f"{module}.{name}": state[f"{names[module]}.{name}"] for module, name in keys}
