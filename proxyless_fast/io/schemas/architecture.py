"""Our architecture files: enough to build a derived net again, within sizes that can be built at once."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from ..text import short
from .common import MAX_PARAMETERS, Kernel, Rate, Real, Size, Strict, Stride, Whole

Name = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[0-9A-Za-z_]+$")]
Act = Annotated[str, StringConstraints(max_length=32)]  # the blocks know which there are


class BatchNorm(Strict):
    """Settings of one batch norm, or of all."""

    momentum: Annotated[Real, Field(ge=0, le=1)] | None
    eps: Annotated[Real, Field(ge=0, le=1)]


class Conv(Strict):
    """The arguments of a ConvLayer."""

    in_channels: Size
    out_channels: Size
    kernel_size: Kernel
    stride: Stride
    act: Act | None


class Linear(Strict):
    """The arguments of a LinearLayer."""

    in_features: Size
    out_features: Size
    dropout: Rate


class Block(Strict):
    """A candidate by its name, and whether a shortcut goes around it."""

    name: Name
    in_channels: Size
    out_channels: Size
    stride: Stride
    shortcut: bool
    act: Act = "relu6"

    @model_validator(mode="after")
    def _only_mbconvs_have_a_choice(self) -> Block:
        if self.act != "relu6" and "mbconv" not in self.name.lower():
            raise ValueError(f"act must be left out where the block is no MBConv, got {self.act!r} for {self.name}")
        return self


class Chain(Strict):
    """A derived ChainNet."""

    kind: Literal["chain"]
    resolution: Size
    first_conv: Conv
    blocks: Annotated[list[Block], Field(max_length=1000)]
    feature_mix_layer: Conv
    classifier: Linear

    @model_validator(mode="after")
    def _widths_chain(self) -> Chain:
        width, parameters = self.first_conv.out_channels, _conv_parameters(self.first_conv)
        for i, block in enumerate(self.blocks):
            _equal(f"blocks.{i}.in_channels", block.in_channels, width)
            parameters += _most_parameters(block.name, width, block.out_channels, f"blocks.{i}.name")
            if block.shortcut and (block.stride != 1 or block.out_channels != width):
                raise ValueError(
                    f"blocks.{i}.shortcut must be false where the block changes the shape (stride {block.stride}, "
                    f"{width} to {block.out_channels} channels), got true"
                )
            width = block.out_channels
        _equal("feature_mix_layer.in_channels", self.feature_mix_layer.in_channels, width)
        _equal("classifier.in_features", self.classifier.in_features, self.feature_mix_layer.out_channels)
        parameters += _conv_parameters(self.feature_mix_layer)
        _limit(parameters + self.classifier.in_features * self.classifier.out_features, "blocks")
        return self


class Cell(Strict):
    """A derived CellNet."""

    kind: Literal["cell"]
    num_classes: Size
    in_channels: Size
    resolution: Size
    channels: Annotated[Whole, Field(ge=1, le=1 << 12)]
    cells_per_stage: Annotated[Whole, Field(ge=1, le=100)]
    cells: Annotated[list[Annotated[list[Name], Field(min_length=6, max_length=6)]], Field(max_length=300)]

    @model_validator(mode="after")
    def _cells_are_as_many_as_said(self) -> Cell:
        if len(self.cells) != 3 * self.cells_per_stage:
            raise ValueError(f"cells must hold {3 * self.cells_per_stage} cells, got {len(self.cells)}")
        parameters = 9 * self.channels * self.in_channels
        parameters += 4 * self.channels * self.num_classes + 200 * self.channels**2
        for i, cell in enumerate(self.cells):
            width = self.channels << (i // self.cells_per_stage)
            parameters += sum(_most_parameters(name, width, width, f"cells.{i}") for name in cell)
        _limit(parameters, "cells")
        return self


class Preprocessing(Strict):
    """What the images of a net went through, before (x - mean) / std of each channel."""

    channels: Annotated[Whole, Field(ge=1, le=1 << 12)]
    channel_order: Literal["RGB", "BGR", "gray"] | None = None
    resolution: Size
    short_side: Size | None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming", "area"]
    value_range: Annotated[list[Real], Field(min_length=2, max_length=2, default_factory=lambda: [0.0, 1.0])]
    mean: list[Real]
    std: list[Annotated[Real, Field(gt=0)]]

    @model_validator(mode="after")
    def _fits_together(self) -> Preprocessing:
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channels:
                raise ValueError(
                    f"{name} must have {self.channels} numbers, one a channel, got {len(getattr(self, name))}"
                )
        if self.short_side is not None and self.short_side < self.resolution:
            raise ValueError(f"short_side must be at least the resolution {self.resolution}, got {self.short_side}")
        if self.value_range[0] >= self.value_range[1]:
            raise ValueError(f"value_range must go up, got {self.value_range}")
        if self.channel_order is not None and self.channels != (1 if self.channel_order == "gray" else 3):
            raise ValueError(f"channel_order must fit {self.channels} channels, got {self.channel_order!r}")
        return self


def _distinct(names: list[str]) -> list[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise PydanticCustomError("distinct", "must be distinct, and {name} stands twice", {"name": short(name)})
        seen.add(name)
    return names


ClassName = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


class Description(Strict):
    """What every format carries beside the net: names of its outputs 0, 1, ..., and what its images went through."""

    classes: Annotated[list[ClassName], Field(min_length=1, max_length=1 << 16), AfterValidator(_distinct)] | None = (
        None
    )
    preprocessing: Preprocessing | None = None


class Architecture(Description):
    """A whole file."""

    format: Literal["proxyless_fast.architecture"]
    net: Annotated[Chain | Cell, Field(discriminator="kind")]
    bn: Annotated[list[BatchNorm], Field(min_length=1, max_length=10_000)]
    parameters: Annotated[Whole, Field(ge=0)] | None = None
    macs: Annotated[Whole, Field(ge=0)] | None = None


def _conv_parameters(layer: Conv) -> int:
    return layer.in_channels * layer.out_channels * layer.kernel_size**2


def _most_parameters(name: str, width: int, out: int, place: str) -> int:
    """At most as many parameters as the candidate of this name has; numbers in it are kernel size and expansion."""
    numbers = [int(digits[:9]) for digits in re.findall(r"[0-9]+", name)]
    if any(number > 64 for number in numbers):
        raise ValueError(f"{place} must have no number above 64, got {name!r}")
    if "mbconv" in name.lower():
        wide = width * (numbers[-1] if numbers else 1)
        return wide * (width + (numbers[0] if numbers else 1) ** 2 + out)
    if "conv" not in name.lower():
        return 0
    return width * out * (numbers[0] if numbers else 1) ** 2


def _limit(parameters: int, what: str) -> None:
    if parameters > MAX_PARAMETERS:
        raise ValueError(f"{what} must have at most {MAX_PARAMETERS:,} parameters, got {parameters:,}")


def _equal(place: str, got: int, wanted: int) -> None:
    if got != wanted:
        raise ValueError(f"{place} must be {wanted}, the width of what comes before, got {got}")
