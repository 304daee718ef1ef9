"""The official net.config and checkpoint format (official search/models/normal_nets/proxyless_nets.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..blocks import ConvLayer, LinearLayer, MBConv, ResidualBlock, Zero
from ..checks import check_positive, unwrapped
from ..io import documents
from ..io.schemas import OfficialConfig, check
from ..io.schemas.official_config import Block, Conv, IdentityLayer, ZeroLayer
from ..io.state import load_state
from ..spaces.chain_net import ChainNet
from ..spaces.common import initialise
from . import batchnorm
from .faithful import require_same

_ACTS: dict[str | None, str] = {"h_swish": "hardswish"}  # other programs' names to ours
_WRITTEN = {"relu6": "relu6", "relu": "relu", "identity": None, None: None}  # the activations that the format has
_PLAIN = {"dropout_rate": 0, "ops_order": "weight_bn_act"}


def official(net: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The official net.config (a dict, ready for JSON) of a derived chain net, and its state dict, on the CPU.

    The format has no place for classes and preprocessing: `description(net)` tells them.
    Raises ValueError for another net, a net that still holds mixed ops, or a module that the format does not have.
    """
    net = unwrapped(net)
    if not isinstance(net, ChainNet):
        raise ValueError(f"net must be a derived ChainNet to have an official config, got {type(net).__name__}")
    blocks, width = [], net.first_conv.out_channels
    for i, block in enumerate(net.blocks):
        op = block.mobile_inverted_conv
        blocks.append(
            {
                "name": "MobileInvertedResidualBlock",
                "mobile_inverted_conv": _op_config(op, block.shortcut, f"blocks.{i}"),
                "shortcut": _identity_config(width) if block.shortcut else None,
            }
        )
        width = width if isinstance(op, Zero) else op.out_channels
    config = {
        "name": "ProxylessNASNets",
        "bn": batchnorm.common(net),
        "first_conv": _conv_config(net.first_conv, "first_conv"),
        "feature_mix_layer": _conv_config(net.feature_mix_layer, "feature_mix_layer"),
        "classifier": _linear_config(net.classifier),
        "blocks": blocks,
    }
    told = check(OfficialConfig, config, "net has no official config")
    require_same(net, lambda: _build(told, net.resolution), "an official config")
    return config, {name: value.detach().cpu() for name, value in net.state_dict().items()}


def from_official(
    config: Mapping[str, Any] | str | Path, state: Mapping[str, Any] | None = None, resolution: int | None = None
) -> ChainNet:
    """The net of an official net.config, a dict or the path of a JSON file.

    state: an official state dict for its weights, as `io.state.load_state` takes it; fresh ones when None. resolution:
    side of the images the net is meant for; by default what the config says, as MCUNet's do, else 224. Every field of
    the config is honoured, or refused where a ChainNet cannot be it. Raises FileNotFoundError, or ValueError naming the
    file, the field, what is expected and what came.
    """
    source = "the official config" if isinstance(config, Mapping) else str(config)
    read = check(OfficialConfig, documents.read(config, "official net config"), source)
    if resolution is not None and read.resolution not in (None, resolution):
        raise ValueError(f"{source}: resolution must be the {resolution!r} that was asked for, got {read.resolution}")
    net = _build(read, (read.resolution or 224) if resolution is None else resolution)
    initialise(net)
    if state is not None:
        load_state(net, state, "the official state dict")
    return net


def _build(config: OfficialConfig, resolution: int) -> ChainNet:
    check_positive(resolution=resolution)
    net = ChainNet(
        _conv(config.first_conv),
        [_block(block) for block in config.blocks],
        _conv(config.feature_mix_layer),
        LinearLayer(config.classifier.in_features, config.classifier.out_features, config.classifier.dropout_rate),
        resolution,
    )
    if config.bn is not None:
        batchnorm.apply(net, [{"momentum": config.bn.momentum, "eps": config.bn.eps}])
    return net


def _conv_config(layer: nn.Module, place: str) -> dict[str, Any]:
    if not isinstance(layer, ConvLayer) or layer.act_name not in _WRITTEN:
        raise ValueError(
            f"{place} has no form in the official config: expected a ConvLayer with ReLU6, ReLU or nothing, got {layer}"
        )
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
        "act_func": _WRITTEN[layer.act_name],
        **_PLAIN,
    }


def _linear_config(layer: nn.Module) -> dict[str, Any]:
    if not isinstance(layer, LinearLayer) or not isinstance(layer.linear, nn.Linear):
        raise ValueError(f"classifier has no form in the official config: expected a LinearLayer, got {layer}")
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


def _op_config(op: nn.Module, shortcut: bool, place: str) -> dict[str, Any]:
    if isinstance(op, Zero):
        if not shortcut or op.stride != 1 or op.out_channels is not None:
            raise ValueError(
                f"{place} has no form in the official config, where a block around a ZeroLayer is the identity: "
                "expected a Zero of stride 1 with a shortcut around it"
            )
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


def _conv(config: Conv) -> ConvLayer:
    act = _ACTS.get(config.act_func, config.act_func)
    return ConvLayer(config.in_channels, config.out_channels, config.kernel_size, config.stride, act)


def _block(config: Block) -> ResidualBlock:
    op = config.mobile_inverted_conv
    if isinstance(op, ZeroLayer):
        # The official block around a ZeroLayer is the identity, whatever its shortcut says.
        return ResidualBlock(Zero(), shortcut=True)
    made = MBConv(op.in_channels, op.out_channels, op.kernel_size, op.stride, op.expand_ratio)
    return ResidualBlock(made, isinstance(config.shortcut, IdentityLayer))
