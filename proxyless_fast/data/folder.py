"""Image folders (one subfolder a class) with the standard ImageNet transforms, decoded by worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision import transforms
from torchvision.datasets import ImageFolder

from .seeds import generator_of, seed_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class UnreadableImage(ValueError):
    """An image file that cannot be decoded; the message names it."""


def train_transform(resolution: int) -> Callable:
    """Random crop of 8 % to 100 % of the area, random flip, normalised: as the official search trains on ImageNet."""
    return transforms.Compose([
        transforms.RandomResizedCrop(resolution, scale=(0.08, 1.0)),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])  # fmt: skip


def eval_transform(resolution: int) -> Callable:
    """The short side to 256/224 of `resolution`, centre crop, normalised."""
    return transforms.Compose([
        transforms.Resize(round(resolution * 256 / 224)),
        transforms.CenterCrop(resolution),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])  # fmt: skip


def scan(folder: Path) -> ImageFolder:
    """The classes and image paths under `folder`; FileNotFoundError or ValueError when there are none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no image folder at {folder}")
    if not any(path.is_dir() for path in folder.iterdir()):
        raise ValueError(f"{folder} has no class folders: an image folder holds one subfolder a class")
    try:
        return ImageFolder(str(folder))
    except FileNotFoundError as error:  # torchvision's word for a class without images
        raise ValueError(f"{folder} has a class without images: {error}") from error


class _Images(Dataset):
    """Items are asked for as (index, seed): the seed alone decides the item's augmentation, whichever worker runs."""

    def __init__(self, samples: list[tuple[str, int]], transform: Callable) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int] | UnreadableImage:
        from PIL import Image

        path, label = self.samples[item[0]]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
            return UnreadableImage(f"{path} cannot be read as an image: {error}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(item[1])
            return self.transform(image), label


def _collate(items: list) -> list[Tensor] | UnreadableImage:
    """A batch, or the first error in it: raised in a worker, it would arrive with a traceback for its message."""
    return next((item for item in items if isinstance(item, UnreadableImage)), None) or default_collate(items)


class _Order(Sampler):
    def __init__(self, count: int, seed: int, shuffle: bool) -> None:
        self.count, self.seed, self.shuffle, self.epoch = count, seed, shuffle, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = generator_of(self.seed, self.epoch)
        order = torch.randperm(self.count, generator=generator) if self.shuffle else torch.arange(self.count)
        return ((index, seed_of(self.seed, self.epoch, index)) for index in order.tolist())


class FolderLoader:
    """Batches of (images, labels): float32 (B, 3, R, R), channels_last, and int64 (B,).

    The order and every augmentation are pure functions of (seed, epoch), whatever the number of workers. Raises
    UnreadableImage, naming the file, when an image cannot be decoded.
    """

    def __init__(
        self,
        samples: list[tuple[str, int]],
        transform: Callable,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        workers: int = 0,
    ) -> None:
        self._order = _Order(len(samples), seed, shuffle)
        self._loader = DataLoader(
            _Images(samples, transform),
            batch_size,
            sampler=self._order,
            collate_fn=_collate,
            num_workers=workers,
            drop_last=drop_last,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # else the workers' seed is drawn from the global generator
            pin_memory=torch.cuda.is_available(),
        )

    @property
    def size(self) -> int:
        """The number of images."""
        return len(self._order)

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        return len(self._loader)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order and augmentation the next iteration follows."""
        self._order.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._loader:
            if isinstance(batch, UnreadableImage):
                try:
                    raise batch
                finally:
                    del batch  # else it and this frame hold each other, and the workers end only by a timeout
            images, labels = batch
            yield images.contiguous(memory_format=torch.channels_last), labels
