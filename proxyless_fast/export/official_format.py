"""The official net.config and checkpoint format (official search/models/normal_nets/proxyless_nets.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..blocks import ConvLayer, LinearLayer, MBConv, ResidualBlock, Zero
from ..io import documents
from ..io.state import load_state
from ..spaces.chain_net import ChainNet
from ..spaces.common import initialise
from . import batchnorm

_PLAIN = {"dropout_rate": 0, "ops_order": "weight_bn_act"}


def official(net: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The official net.config (a dict, ready for JSON) of a derived chain net, and its state dict, on the CPU.

    Raises ValueError for another net, a net that still holds mixed ops, or an operation the format does not have.
    """
    if not isinstance(net, ChainNet):
        raise ValueError(f"net must be a derived ChainNet to have an official config, got {type(net).__name__}")
    blocks, width = [], net.first_conv.out_channels
    for i, block in enumerate(net.blocks):
        op = block.mobile_inverted_conv
        blocks.append(
            {
                "name": "MobileInvertedResidualBlock",
                "mobile_inverted_conv": _op_config(op, f"blocks.{i}"),
                "shortcut": _identity_config(width) if block.shortcut else None,
            }
        )
        width = width if isinstance(op, Zero) else op.out_channels
    config = {
        "name": "ProxylessNASNets",
        "bn": batchnorm.common(net),
        "first_conv": _conv_config(net.first_conv),
        "feature_mix_layer": _conv_config(net.feature_mix_layer),
        "classifier": _linear_config(net.classifier),
        "blocks": blocks,
    }
    return config, {name: value.detach().cpu() for name, value in net.state_dict().items()}


def from_official(
    config: Mapping[str, Any] | str | Path, state: Mapping[str, Tensor] | None = None, resolution: int = 224
) -> ChainNet:
    """The net of an official net.config, a dict or the path of a JSON file.

    state: an official state dict for its weights; fresh ones when None. resolution: side of the images the net is meant
    for, which the format does not record. Raises FileNotFoundError, or ValueError naming what the config lacks or has
    that a ChainNet cannot be.
    """
    config = documents.read(config, "official net config")
    try:
        net = ChainNet(
            _conv(config["first_conv"], "first_conv"),
            [_block(block, f"blocks.{i}") for i, block in enumerate(config["blocks"])],
            _conv(config["feature_mix_layer"], "feature_mix_layer"),
            _linear(config["classifier"]),
            resolution,
        )
        initialise(net)
        if config.get("bn"):
            batchnorm.apply(net, [config["bn"]])
    except KeyError as error:
        raise ValueError(f"the official config lacks {error}") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"the official config is damaged: {error}") from error
    if state is not None:
        load_state(net, state, "the official state dict")
    return net


def _conv_config(layer: ConvLayer) -> dict[str, Any]:
    return {
        "name": "ConvLayer",
        "kernel_size": layer.kernel_size,
        "stride": layer.stride,
        "dilation": 1,
        "groups": 1,
        "bias": False,
        "has_shuffle": False,
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "use_bn": True,
        "act_func": layer.act_name,
        **_PLAIN,
    }


def _linear_config(layer: LinearLayer) -> dict[str, Any]:
    return {
        "name": "LinearLayer",
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bias": True,
        "use_bn": False,
        "act_func": None,
        **_PLAIN,
        "dropout_rate": layer.dropout_rate,
    }


def _identity_config(channels: int) -> dict[str, Any]:
    return {
        "name": "IdentityLayer",
        "in_channels": channels,
        "out_channels": channels,
        "use_bn": False,
        "act_func": None,
        **_PLAIN,
    }


def _op_config(op: nn.Module, place: str) -> dict[str, Any]:
    if isinstance(op, Zero):
        return {"name": "ZeroLayer", "stride": op.stride}
    if not isinstance(op, MBConv) or op.act != "relu6":
        raise ValueError(f"{place} has no form in the official config: expected an MBConv with ReLU6 or Zero, got {op}")
    return {
        "name": "MBInvertedConvLayer",
        "in_channels": op.in_channels,
        "out_channels": op.out_channels,
        "kernel_size": op.kernel_size,
        "stride": op.stride,
        "expand_ratio": op.expand_ratio,
    }


def _expect(config: Mapping[str, Any], place: str, **expected: Any) -> None:
    """ValueError where the config has another value than the only one our blocks can be."""
    for name, value in expected.items():
        if name in config and config[name] != value:
            raise ValueError(f"{place}: {name} must be {value!r}, got {config[name]!r}")


def _conv(config: Mapping[str, Any], place: str) -> ConvLayer:
    plain = dict(dilation=1, groups=1, bias=False, has_shuffle=False, use_bn=True)
    _expect(config, place, name="ConvLayer", **plain, **_PLAIN)
    sizes = {name: config[name] for name in ("in_channels", "out_channels", "kernel_size", "stride")}
    return ConvLayer(**sizes, act=config.get("act_func"))


def _linear(config: Mapping[str, Any]) -> LinearLayer:
    _expect(config, "classifier", name="LinearLayer", bias=True, use_bn=False, act_func=None)
    return LinearLayer(config["in_features"], config["out_features"], config.get("dropout_rate", 0))


def _block(config: Mapping[str, Any], place: str) -> ResidualBlock:
    _expect(config, place, name="MobileInvertedResidualBlock")
    op, shortcut = config["mobile_inverted_conv"], config["shortcut"]
    if shortcut is not None:
        _expect(shortcut, f"{place}.shortcut", name="IdentityLayer", use_bn=False, act_func=None, **_PLAIN)
    if op["name"] == "ZeroLayer":
        return ResidualBlock(Zero(op["stride"]), shortcut is not None)
    _expect(op, place, name="MBInvertedConvLayer")
    sizes = {name: op[name] for name in ("in_channels", "out_channels", "kernel_size", "stride", "expand_ratio")}
    return ResidualBlock(MBConv(**sizes), shortcut is not None)
