"""What a launch works on: x as rows of pixels x channels, and the candidates of a layer side by side.

Of wide tensors, e is the input of the depthwise convolution (after its activation) and d its output; y is the output of
project before its norm, u that of expand. Wide tensors are written once and read as rarely as possible (docs/gpu.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def rows_of(t: Tensor) -> Tensor:
    """(B, C, H, W) as (pixels, C); a copy only where t is not channels-last."""
    return t.permute(0, 2, 3, 1).contiguous().view(-1, t.shape[1])


def image_of(rows: Tensor, batch: int, height: int, width: int) -> Tensor:
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class CandidateGroup:
    """One MBConv, or several that share x: side by side, their channels following each other in wide tensors."""

    x: Tensor  # rows
    size: tuple[int, int, int, int, int]  # batch, height, width, and height and width of the output
    w1: Tensor | None  # (Ch, Ci), x's dtype
    taps: Sequence[tuple[int, int, Tensor]]  # first expanded channel, kernel size, (channels, 1, k, k)
    wp: Tensor  # (Co, Ch), x's dtype
    ch: int
    stride: int
    activation: str

    @property
    def pixels(self) -> int:
        return self.x.shape[0]

    @property
    def out_pixels(self) -> int:
        return self.size[0] * self.size[3] * self.size[4]

    @property
    def out_size(self) -> tuple[int, int, int]:
        """Batch, height and width of the output."""
        return self.size[0], self.size[3], self.size[4]

    @property
    def all_taps(self) -> Tensor:
        """The taps of candidates that have one kernel size: float32 (Ch, 1, k, k)."""
        taps = [t.float() for _, _, t in self.taps]
        return taps[0] if len(taps) == 1 else torch.cat(taps)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.x.dtype, device=self.x.device)


def make_group(x: Tensor, params: Sequence[Sequence[Tensor]], stride: int, activation: str) -> CandidateGroup:
    """x (B, Ci, H, W) and the parameters of each candidate, 9 of them, or 6 where it has no expand convolution."""
    batch, _, height, width = x.shape
    ho, wo = (height - 1) // stride + 1, (width - 1) // stride + 1
    expands = [p[0].flatten(1) for p in params if len(p) == 9]
    projects = [p[-3].flatten(1) for p in params]
    if len(params) == 1:
        *first_weight, wp = _rounded([*expands, *projects], x.dtype)
        w1 = first_weight[0] if first_weight else None
    else:
        w1 = torch.cat(expands).to(x.dtype) if expands else None
        wp = torch.cat(projects, 1).to(x.dtype)
    taps, first = [], 0
    for p in params:
        taps.append((first, p[-6].shape[-1], p[-6].contiguous()))
        first += p[-6].shape[0]
    return CandidateGroup(rows_of(x), (batch, height, width, ho, wo), w1, taps, wp, first, stride, activation)


def _rounded(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The weights in `dtype`, contiguous: themselves, or copies by one launch."""
    if all(w.dtype == dtype for w in weights):
        return [w.contiguous() for w in weights]
    rounded = [torch.empty(w.shape, dtype=dtype, device=w.device) for w in weights]
    torch._foreach_copy_(rounded, list(weights))
    return rounded
