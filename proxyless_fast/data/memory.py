"""Small images held in memory: batches are cut, shifted, flipped and normalised by a few tensor operations."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .order import Order
from .seeds import generator_of

CHUNK = 2**22  # pixels that are resized at a time


class MemoryLoader(Order):
    """Batches of (images, labels) from uint8 images in memory: float32 (B, C, H, W), channels_last, and int64 (B,).

    The order and the augmentation are pure functions of (seed, epoch, batch): iterate twice without `set_epoch` and the
    same batches come again. `shift` > 0 moves each image by up to that many pixels, with zeros moving in, and flips
    half of them left to right; `shuffle=False` keeps the order given.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        mean: Tensor,
        std: Tensor,
        num_classes: int | None = None,
        seed: int = 0,
        shuffle: bool = False,
        shift: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(len(labels), batch_size, seed, shuffle, drop_last)
        self.images, self.labels, self.shift = images, labels, shift
        self.num_classes, self.in_channels, self.resolution = num_classes, images.shape[1], images.shape[-1]
        # (x / 255 - mean) / std as one multiply and one add
        self._scale = (1 / (255 * std)).view(1, -1, 1, 1)
        self._offset = (-mean / std).view(1, -1, 1, 1)

    def batches_from(self, epoch: int, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from number `skip` on."""
        for number, whole, mine in self._indices(epoch, skip):
            images = self.images[whole[mine]]
            if self.shift:
                moves = draw_moves(len(whole), self.shift, generator_of(self.seed, epoch, number))
                images = augment(images, self.shift, *(draws[..., mine, :] for draws in moves))
            images = torch.addcmul(self._offset, images.float(), self._scale)
            yield images.contiguous(memory_format=torch.channels_last), self.labels[whole[mine]]


def draw_moves(count: int, shift: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of `count` images: how far each is moved down and right, int64 (2, N, 1) in 0 to 2 · shift; whether mirrored."""
    moves = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator)
    return moves, torch.rand(count, 1, generator=generator) < 0.5


def augment(images: Tensor, shift: int, moves: Tensor, mirrored: Tensor) -> Tensor:
    """Each image (B, C, H, W) moved by moves - shift pixels, zeros moving in, and mirrored where `mirrored` (B, 1)."""
    count, _, height, width = images.shape
    padded = F.pad(images, [shift] * 4)
    rows = torch.arange(height) + moves[0]
    columns = torch.arange(width)
    columns = torch.where(mirrored, columns.flip(0), columns) + moves[1]
    image = torch.arange(count)[:, None, None]
    # the indexed dimensions come first, so the result is (B, H, W, C) in memory: channels_last for free
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, in units of 0 to 1, of uint8 images (N, C, H, W), from histograms."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in images.unbind(1):
        weights = torch.bincount(channel.reshape(-1), minlength=256).double()
        weights /= weights.sum()
        mean = (weights * levels).sum()
        means.append(mean)
        deviations.append((weights * (levels - mean) ** 2).sum().sqrt())
    return torch.stack(means).float(), torch.stack(deviations).float().clamp_min(1e-6)


def resize(images: Tensor, resolution: int) -> Tensor:
    """uint8 images (N, C, H, W) resized to resolution × resolution, bilinear with antialiasing, in chunks."""
    if images.shape[-2:] == (resolution, resolution):
        return images
    resized = torch.empty(*images.shape[:2], resolution, resolution, dtype=torch.uint8)
    count = max(1, CHUNK // max(resolution**2, images.shape[-2] * images.shape[-1]))
    for chunk, place in zip(images.split(count), resized.split(count), strict=True):
        place.copy_(F.interpolate(chunk.float(), (resolution, resolution), mode="bilinear", antialias=True).round())
    return resized
