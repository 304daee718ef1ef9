"""`loaders`: one call from a dataset's name or folder to its train, validation and test loaders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import idx
from .fashion_mnist import fashion_mnist_folder
from .folder import FolderLoader, eval_transform, scan, train_transform
from .memory import MemoryLoader, resize, statistics
from .seeds import generator_of

Loader = MemoryLoader | FolderLoader
SHIFT = 2  # pixels, for small images
_SPLIT = 0x5B117  # keeps the split's random stream apart from those of the epochs


@dataclass(frozen=True)
class Splits:
    """Train, validation (None when no fraction was held out) and test loaders, and what a net must know of them."""

    train: Loader
    valid: Loader | None
    test: Loader
    num_classes: int
    in_channels: int
    resolution: int


def loaders(
    name_or_path: str | Path,
    batch_size: int,
    resolution: int | None = None,
    valid_fraction: float = 0.1,
    seed: int = 0,
    workers: int = 2,
) -> Splits:
    """Loaders of "fashion-mnist", of a folder with the four IDX files, or of an image folder with train/ and val/.

    A `valid_fraction` of each class is held out of the training images, disjoint and decided by `seed`, for the arch
    steps; it goes through the evaluation transforms, as in the official code (search/data_providers/imagenet.py), and
    comes in a new order each epoch. Training batches are full ones only. `resolution` is that of the images when None,
    224 for image folders; `workers` processes decode an image folder's files. Raises FileNotFoundError (DataNotFound
    for Fashion-MNIST) or ValueError with a sentence that names the path or the argument.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if resolution is not None and resolution < 1:
        raise ValueError(f"resolution must be at least 1, got {resolution}")
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"valid_fraction must lie in [0, 1), got {valid_fraction}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if workers < 0:
        raise ValueError(f"workers must not be negative, got {workers}")
    if name_or_path == "fashion-mnist":
        return _from_idx(fashion_mnist_folder(), batch_size, resolution, valid_fraction, seed)
    root = Path(name_or_path)
    if not root.is_dir():
        raise FileNotFoundError(f"no dataset at {root}: expected a folder, or the name fashion-mnist")
    if any(idx.find(root, name) for name in idx.FILES):
        return _from_idx(root, batch_size, resolution, valid_fraction, seed)
    return _from_images(root, batch_size, resolution or 224, valid_fraction, seed, workers)


def hold_out(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (train, valid) of a seeded split that takes round(fraction · n) of the n images of each class."""
    order = torch.randperm(len(labels), generator=generator_of(seed, _SPLIT))
    by_class = order[labels[order].sort(stable=True).indices]
    counts = torch.bincount(labels)
    valid = torch.cat([part[: round(fraction * len(part))] for part in by_class.split(counts.tolist())])
    keep = torch.ones(len(labels), dtype=torch.bool)
    keep[valid] = False
    return keep.nonzero().flatten(), valid.sort().values


def _split(labels: Tensor, fraction: float, seed: int, batch_size: int) -> tuple[Tensor, Tensor]:
    train, valid = hold_out(labels, fraction, seed)
    if fraction and not len(valid):
        raise ValueError(f"valid_fraction {fraction} of {len(labels)} training images holds out none")
    if len(train) < batch_size:
        raise ValueError(f"batch_size {batch_size} is larger than the {len(train)} training images")
    return train, valid


def _from_idx(folder: Path, batch_size: int, resolution: int | None, fraction: float, seed: int) -> Splits:
    images, labels = idx.read_pair(folder, "train")
    test_images, test_labels = idx.read_pair(folder, "t10k")
    resolution = resolution or max(images.shape[-2:])
    mean, std = statistics(images)
    images, test_images = resize(images, resolution), resize(test_images, resolution)
    train, valid = _split(labels, fraction, seed, batch_size)

    def loader(x: Tensor, y: Tensor, **options: bool | int) -> MemoryLoader:
        return MemoryLoader(x, y, batch_size, mean=mean, std=std, seed=seed, **options)  # type: ignore[arg-type]

    return Splits(
        train=loader(images[train], labels[train], shuffle=True, shift=SHIFT, drop_last=True),
        valid=loader(images[valid], labels[valid], shuffle=True) if len(valid) else None,
        test=loader(test_images, test_labels),
        num_classes=int(torch.cat([labels, test_labels]).max()) + 1,
        in_channels=images.shape[1],
        resolution=resolution,
    )


def _from_images(root: Path, batch_size: int, resolution: int, fraction: float, seed: int, workers: int) -> Splits:
    training, testing = scan(root / "train"), scan(root / "val")
    if training.classes != testing.classes:
        odd = sorted(set(training.classes) ^ set(testing.classes))
        raise ValueError(f"{root}: train/ and val/ must have the same classes; only one of them has {', '.join(odd)}")
    train, valid = _split(torch.tensor(training.targets), fraction, seed, batch_size)
    augmented, plain = train_transform(resolution), eval_transform(resolution)

    def loader(samples: list[tuple[str, int]], transform, **options: bool) -> FolderLoader:
        return FolderLoader(samples, transform, batch_size, seed=seed, workers=workers, **options)

    held_out = [training.samples[i] for i in valid.tolist()]
    return Splits(
        train=loader([training.samples[i] for i in train.tolist()], augmented, shuffle=True, drop_last=True),
        valid=loader(held_out, plain, shuffle=True) if held_out else None,
        test=loader(testing.samples, plain),
        num_classes=len(training.classes),
        in_channels=3,
        resolution=resolution,
    )
