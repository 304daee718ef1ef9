"""The MBConv candidates of the paper's ImageNet space: their shapes, and tensors of those shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

CANDIDATES = tuple((kernel, expand) for kernel in (3, 5, 7) for expand in (3, 6))


def _values(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Normal random numbers, where there is something to hold them."""
    empty = torch.empty(shape, dtype=dtype, device=device)
    return empty if device == "meta" else empty.normal_()


@dataclass(frozen=True)
class BlockShape:
    """A candidate MBConv at its place in a network."""

    batch: int
    ci: int
    co: int
    size: int
    kernel: int
    stride: int
    expand: int

    def __str__(self) -> str:
        return f"{self.ci}-{self.co} {self.size}² k{self.kernel} s{self.stride} e{self.expand}"

    @property
    def ch(self) -> int:
        return self.ci * self.expand

    @property
    def out(self) -> int:
        return (self.size - 1) // self.stride + 1

    def layer(self) -> list[BlockShape]:
        """Every MBConv candidate of its layer."""
        return [replace(self, kernel=kernel, expand=expand) for kernel, expand in CANDIDATES]

    def others(self) -> list[BlockShape]:
        """The other MBConv candidates of its layer."""
        return [other for other in self.layer() if other != self]

    def params(self, dtype: torch.dtype = torch.float32, device: str = "meta") -> list[Tensor]:
        wide, narrow = [(self.ch,)] * 2, [(self.co,)] * 2
        shapes = [(self.ch, self.ci, 1, 1), *wide] if self.expand > 1 else []
        shapes += [(self.ch, 1, self.kernel, self.kernel), *wide, (self.co, self.ch, 1, 1), *narrow]
        return [_values(shape, dtype, device) for shape in shapes]

    def running(self, device: str = "meta") -> list[Tensor]:
        """Mean and variance buffers of the norms."""
        widths = [self.ch] * (2 if self.expand > 1 else 1) + [self.co]
        return [_values((c,), torch.float32, device) for c in widths for _ in range(2)]

    def x(self, dtype: torch.dtype, device: str = "meta") -> Tensor:
        return _values((self.batch, self.size, self.size, self.ci), dtype, device).permute(0, 3, 1, 2)

    def output(self, dtype: torch.dtype, device: str = "meta") -> Tensor:
        return _values((self.batch, self.out, self.out, self.co), dtype, device).permute(0, 3, 1, 2)


def imagenet(batch: int) -> list[BlockShape]:
    """The mixed layers of the paper's ImageNet space at 224x224, each with its widest candidate (7x7, e = 6)."""
    shapes, width, size = [], 16, 112
    for out, count, stride in ((24, 4, 2), (40, 4, 2), (80, 4, 2), (96, 4, 1), (192, 4, 2), (320, 1, 1)):
        for i in range(count):
            s = stride if i == 0 else 1
            shapes.append(BlockShape(batch, width, out, size, 7, s, 6))
            width, size = out, (size - 1) // s + 1
    return shapes
