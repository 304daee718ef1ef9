"""Derived nets from what their `config()` says."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..blocks import ConvLayer, LinearLayer, ResidualBlock, candidate
from .cell_net import CellNet
from .chain_net import ChainNet
from .common import initialise


def from_config(config: dict[str, Any]) -> nn.Module:
    """Rebuild a derived net, with fresh weights, from what its `config()` gave.

    Raises ValueError for an unknown kind of net, KeyError for a missing entry.
    """
    kind = config.get("kind")
    if kind == "cell":
        return CellNet(**{name: value for name, value in config.items() if name != "kind"})
    if kind != "chain":
        raise ValueError(f"config's kind must be 'chain' or 'cell', got {kind!r}")
    blocks = [
        ResidualBlock(
            candidate(b["name"], b["in_channels"], b["out_channels"], b["stride"], b.get("act", "relu6")), b["shortcut"]
        )
        for b in config["blocks"]
    ]
    net = ChainNet(
        ConvLayer(**config["first_conv"]),
        blocks,
        ConvLayer(**config["feature_mix_layer"]),
        LinearLayer(**config["classifier"]),
        config["resolution"],
    )
    initialise(net)
    return net
