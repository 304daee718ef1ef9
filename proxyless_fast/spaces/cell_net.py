"""A stack of DAG cells: NAS-Bench-201's five operations on six edges, each edge a mixed op of its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import ConvLayer, LinearLayer, ReluConv, candidate
from ..blocks.parts import batch_norm
from ..checks import check_positive
from ..costs import Layer, OpShape, conv_output, count_elements, require_cost
from ..mixed import MixedOp
from ..reading import Unreadable, read_convolution
from .common import attribute_of, describe_layer, initialise

OPERATIONS = ("Zero", "Identity", "1x1_Conv", "3x3_Conv", "3x3_AvgPool")
# The names of NAS-Bench-201 (Dong and Yang, ICLR 2020, section 2.1), for its architecture strings.
BENCHMARK_NAMES = {
    "Zero": "none",
    "Identity": "skip_connect",
    "1x1_Conv": "nor_conv_1x1",
    "3x3_Conv": "nor_conv_3x3",
    "3x3_AvgPool": "avg_pool_3x3",
}
EDGES = tuple((source, node) for node in range(1, 4) for source in range(node))


class Cell(nn.Module):
    """Four nodes, each the sum of its incoming edges: x (B, C, H, W) to the same shape."""

    def __init__(self, edges: Sequence[nn.Module]):
        super().__init__()
        self.edges = nn.ModuleList(edges)

    def forward(self, x: Tensor) -> Tensor:
        nodes = [x]
        edges = iter(self.edges)
        for node in range(1, 4):
            total = next(edges)(nodes[0])
            for source in range(1, node):
                total = total + next(edges)(nodes[source])
            nodes.append(total)
        return nodes[-1]


class Reduction(nn.Module):
    """The residual block between stages: halves the image, sets the channels (NAS-Bench-201, section 2.1)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv_a = ReluConv(in_channels, out_channels, 3, 2)
        self.conv_b = ReluConv(out_channels, out_channels, 3, 1)
        pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
        conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.downsample = nn.Sequential(OrderedDict(pool=pool, conv=conv))

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(x) + self.conv_b(self.conv_a(x))

    def shape(self, input: tuple[int, ...]) -> OpShape:
        """Cost at input (height, width, channels).

        Raises ValueError where the modules no longer halve the image, or do not add up.
        """
        first = self.conv_a.shape(input)
        second = self.conv_b.shape(first.output)
        halved = (conv_output(input[0], 2), conv_output(input[1], 2), first.output[2])
        pool, conv = self.downsample
        try:
            point = read_convolution(conv, "downsample.conv")
        except Unreadable as reason:
            raise ValueError(f"Reduction: {reason}") from None
        pooled = type(pool) is nn.AvgPool2d and (pool.kernel_size, pool.stride, pool.ceil_mode) == (2, 2, True)
        if not pooled or point[1:6] != (halved[2], input[2], 1, 1, 1) or not first.output == second.output == halved:
            raise ValueError("Reduction: its shortcut and its convolutions do not both halve the image")
        macs = first.macs + second.macs + halved[0] * halved[1] * halved[2] * input[2]
        return OpShape("reduction", input, halved, (), macs, count_elements(self))


class CellNet(nn.Module):
    """Stem, three stages of cells with reductions between them, pooling, classifier.

    cells: per cell, the six operation names of its edges in the order 0-1, 0-2, 1-2, 0-3, 1-3, 2-3; None makes every
    edge a mixed op over `OPERATIONS`. Every cell chooses for itself: ProxylessNAS drops the repeated-cell restriction
    (paper section 1). x (B, in_channels, resolution, resolution) to logits (B, num_classes).
    Raises ValueError for wrong arguments.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        resolution: int,
        channels: int,
        cells_per_stage: int,
        cells: Sequence[Sequence[str]] | None = None,
    ):
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels, resolution=resolution)
        check_positive(channels=channels, cells_per_stage=cells_per_stage)
        if cells is not None and [len(c) for c in cells] != [len(EDGES)] * 3 * cells_per_stage:
            raise ValueError(f"cells must hold {3 * cells_per_stage} lists of {len(EDGES)} operation names")
        self.resolution, self.cells_per_stage = resolution, cells_per_stage
        self.stem = ConvLayer(in_channels, channels, 3, 1, act=None)
        body: list[nn.Module] = []
        count, width = 0, channels
        for stage in range(3):
            if stage > 0:
                body.append(Reduction(width, 2 * width))
                width *= 2
            for _ in range(cells_per_stage):
                edges = []
                for edge, (source, node) in enumerate(EDGES):
                    if cells is not None:
                        edges.append(candidate(cells[count][edge], width, width, 1))
                    else:
                        ops = {name: candidate(name, width, width, 1) for name in OPERATIONS}
                        edges.append(MixedOp(ops, label=f"cells.{count}.{source}-{node}"))
                body.append(Cell(edges))
                count += 1
        self.body = nn.ModuleList(body)
        self.lastact = nn.Sequential(OrderedDict(bn=batch_norm(width), act=nn.ReLU(inplace=True)))
        self.global_avg_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = LinearLayer(width, num_classes)
        initialise(self)

    @property
    def in_channels(self) -> int:
        """Channels of the images. Raises ValueError where the stem is no plain convolution any more."""
        return attribute_of(self.stem, "stem", "in_channels")

    @property
    def channels(self) -> int:
        """Of the first stage. Raises ValueError as `in_channels` does."""
        return attribute_of(self.stem, "stem", "out_channels")

    @property
    def num_classes(self) -> int:
        """Raises ValueError where the classifier does not tell its outputs."""
        return attribute_of(self.classifier, "classifier", "out_features")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for module in self.body:
            x = module(x)
        return self.classifier(torch.flatten(self.global_avg_pooling(self.lastact(x)), 1))

    def layers(self) -> list[Layer]:
        """Every layer with the cost of each of its choices at this net's resolution."""
        stem = require_cost("stem", self.stem, (self.resolution, self.resolution, self.in_channels))
        found = [Layer("stem", (stem,), (self.stem,))]
        size = stem.output
        cell = 0
        for i, module in enumerate(self.body):
            if isinstance(module, Cell):
                for (source, node), op in zip(EDGES, module.edges, strict=True):
                    found.append(describe_layer(f"cells.{cell}.{source}-{node}", op, size, idskip=0))
                cell += 1
            elif isinstance(module, Reduction):
                shape = require_cost(f"body.{i}", module, size)
                found.append(Layer(f"body.{i}", (shape,), (module,)))
                size = shape.output
        head = require_cost("classifier", self.classifier, size)
        bn = OpShape("bn", size, size, (), 0, count_elements(self.lastact))
        return [*found, Layer("lastact", (bn,), (self.lastact,)), Layer("classifier", (head,), (self.classifier,))]

    def config(self) -> dict[str, Any]:
        """A JSON-ready description of a derived net, from which `spaces.from_config` rebuilds it.

        Raises ValueError for a net that still holds mixed ops.
        """
        names: list[list[Any]] = []
        for module in self.body:
            if isinstance(module, Cell):
                if any(isinstance(op, MixedOp) for op in module.edges):
                    raise ValueError(f"net must be derived before it is described; cell {len(names)} holds mixed ops")
                names.append([op.name for op in module.edges])
        return {
            "kind": "cell",
            "num_classes": self.num_classes,
            "in_channels": self.in_channels,
            "resolution": self.resolution,
            "channels": self.channels,
            "cells_per_stage": self.cells_per_stage,
            "cells": names,
        }

    def architecture_strings(self) -> list[str]:
        """Each cell of a derived net as NAS-Bench-201 writes it, e.g. "|nor_conv_3x3~0|+|none~0|none~1|+...".

        Raises ValueError for a net that still holds mixed ops.
        """
        strings = []
        for names in self.config()["cells"]:
            nodes = ["", "", ""]
            for (source, node), name in zip(EDGES, names, strict=True):
                nodes[node - 1] += f"{BENCHMARK_NAMES[name]}~{source}|"
            strings.append("+".join("|" + text for text in nodes))
        return strings


def cell(
    num_classes: int = 10, in_channels: int = 3, resolution: int = 32, channels: int = 16, cells_per_stage: int = 5
) -> CellNet:
    """A supernet of DAG cells with NAS-Bench-201's five operations and macro skeleton (its section 2.1).

    channels: of the first stage, doubled at each of the two reductions. Raises ValueError for wrong arguments.
    """
    return CellNet(num_classes, in_channels, resolution, channels, cells_per_stage)
