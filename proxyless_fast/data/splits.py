"""`loaders`: one call from a dataset's name or folder to its train, validation and test loaders."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import fashion_mnist, idx
from .folder import MEAN, STD, FolderLoader, eval_transform, short_side, train_transform
from .listing import check_apart, scan, some
from .memory import MemoryLoader, resize, statistics
from .seeds import generator_of

log = logging.getLogger(__name__)

Loader = MemoryLoader | FolderLoader
SHIFT = 2  # pixels, for small images
_SPLIT = 0x5B117  # keeps the split's random stream apart from those of the epochs


@dataclass(frozen=True)
class Splits:
    """Train, validation (None when no fraction was held out) and test loaders, and what a net must know of them.

    `classes` are the names of the labels 0, 1, ...; `preprocessing` is what the evaluation does to an image, in values
    that JSON can hold: `channels`, `resolution`, `short_side` (to which the image is resized before the centre crop to
    resolution × resolution; None where it is resized to that whole), `interpolation`, and `mean` and `std` of each
    channel, (value / 255 − mean) / std. Each loader has `num_classes`, `in_channels` and `resolution` too.
    """

    train: Loader
    valid: Loader | None
    test: Loader
    num_classes: int
    in_channels: int
    resolution: int
    classes: tuple[str, ...]
    preprocessing: dict[str, Any]


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
    224 for image folders; `workers` processes decode an image folder's files.

    In an image folder hidden files are passed over, and each file counts once, however many links lead to it: a file in
    two classes, or in train/ and val/, is an error. So is a fraction that takes a class's last training image; one that
    holds none of a class out is warned of. Raises FileNotFoundError (DataNotFound for Fashion-MNIST) or ValueError with
    a sentence that names the path or the argument.
    """
    _check_arguments(batch_size, resolution, valid_fraction, seed, workers)
    if name_or_path == "fashion-mnist":
        folder = fashion_mnist.fashion_mnist_folder()
        return _from_idx(folder, batch_size, resolution, valid_fraction, seed, fashion_mnist.CLASSES)
    if not isinstance(name_or_path, str | os.PathLike):
        raise ValueError(f"name_or_path must be a folder or the name fashion-mnist, got {name_or_path!r}")
    root = Path(name_or_path)
    if not root.is_dir():
        raise FileNotFoundError(f"no dataset at {root}: expected a folder, or the name fashion-mnist")
    if any(idx.find(root, name) for name in idx.FILES):
        return _from_idx(root, batch_size, resolution, valid_fraction, seed)
    return _from_images(root, batch_size, resolution or 224, valid_fraction, seed, workers)


def _check_arguments(batch_size: Any, resolution: Any, valid_fraction: Any, seed: Any, workers: Any) -> None:
    sizes = {"batch_size": batch_size} | ({} if resolution is None else {"resolution": resolution})
    for name, value in {**sizes, "seed": seed, "workers": workers}.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ValueError(f"{name} must be an integer, got {value!r}")
        if name in sizes and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if not (isinstance(valid_fraction, Real) and 0 <= float(valid_fraction) < 1):
        raise ValueError(f"valid_fraction must lie in [0, 1), got {valid_fraction!r}")


def hold_out(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (train, valid) of a seeded split that takes round(fraction · n) of the n images of each class."""
    order = torch.randperm(len(labels), generator=generator_of(seed, _SPLIT))
    by_class = order[labels[order].sort(stable=True).indices]
    counts = torch.bincount(labels)
    valid = torch.cat([part[: round(fraction * len(part))] for part in by_class.split(counts.tolist())])
    keep = torch.ones(len(labels), dtype=torch.bool)
    keep[valid] = False
    return keep.nonzero().flatten(), valid.sort().values


def _split(
    labels: Tensor, fraction: float, seed: int, batch_size: int, classes: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    train, valid = hold_out(labels, fraction, seed)
    images, held_out = (torch.bincount(part, minlength=len(classes)).tolist() for part in (labels, labels[valid]))
    emptied = [f"{name} (of {n})" for name, n, held in zip(classes, images, held_out, strict=True) if 0 < n == held]
    if emptied:
        raise ValueError(
            f"valid_fraction {fraction} holds out every training image of class {some(emptied)}: expected a smaller "
            "fraction, or more images"
        )
    if fraction and not len(valid):
        raise ValueError(f"valid_fraction {fraction} of {len(labels)} training images holds out none")
    if len(train) < batch_size:
        raise ValueError(f"batch_size {batch_size} is larger than the {len(train)} training images")
    unseen = [f"{name} (of {n})" for name, n, held in zip(classes, images, held_out, strict=True) if n and not held]
    if fraction and unseen:
        log.warning("valid_fraction %s holds out no image of class %s; a larger one does", fraction, some(unseen))
    return train, valid


def _from_idx(
    folder: Path,
    batch_size: int,
    resolution: int | None,
    fraction: float,
    seed: int,
    names: tuple[str, ...] = (),
) -> Splits:
    images, labels = idx.read_pair(folder, "train")
    test_images, test_labels = idx.read_pair(folder, "t10k")
    strange = sorted(set(test_labels.tolist()) - set(labels.tolist()))
    if strange:
        raise ValueError(f"{folder}: no training image has the test images' label {some(map(str, strange))}")
    height, width = images.shape[-2:]
    if resolution is None and max(height, width) > 4 * min(height, width):
        raise ValueError(
            f"resolution must be given for images as long as those in {folder}, of {width}x{height} pixels"
        )
    resolution = resolution or max(height, width)
    mean, std = statistics(images)
    images, test_images = resize(images, resolution), resize(test_images, resolution)
    count = int(labels.max()) + 1
    classes = names if len(names) == count else tuple(map(str, range(count)))
    train, valid = _split(labels, fraction, seed, batch_size, classes)

    def loader(x: Tensor, y: Tensor, **options: Any) -> MemoryLoader:
        return MemoryLoader(x, y, batch_size, mean=mean, std=std, num_classes=count, seed=seed, **options)

    return Splits(
        train=loader(images[train], labels[train], shuffle=True, shift=SHIFT, drop_last=True),
        valid=loader(images[valid], labels[valid], shuffle=True) if len(valid) else None,
        test=loader(test_images, test_labels),
        num_classes=count,
        in_channels=images.shape[1],
        resolution=resolution,
        classes=classes,
        preprocessing=_preprocessing(resolution, None, mean.tolist(), std.tolist()),
    )


def _from_images(root: Path, batch_size: int, resolution: int, fraction: float, seed: int, workers: int) -> Splits:
    training, testing = scan(root / "train"), scan(root / "val")
    if training.classes != testing.classes:
        odd = some(sorted(set(training.classes) ^ set(testing.classes)))
        raise ValueError(f"{root}: train/ and val/ must have the same classes; only one of them has {odd}")
    check_apart(training, testing)
    labels = torch.tensor([label for _, label in training.samples])
    train, valid = _split(labels, fraction, seed, batch_size, training.classes)
    augmented, plain = train_transform(resolution), eval_transform(resolution)
    count = len(training.classes)

    def loader(samples: list[tuple[str, int]], transform, **options: Any) -> FolderLoader:
        options |= {"resolution": resolution, "num_classes": count, "seed": seed, "workers": workers}
        return FolderLoader(samples, transform, batch_size, **options)

    held_out = [training.samples[i] for i in valid.tolist()]
    return Splits(
        train=loader([training.samples[i] for i in train.tolist()], augmented, shuffle=True, drop_last=True),
        valid=loader(held_out, plain, shuffle=True) if held_out else None,
        test=loader(testing.samples, plain),
        num_classes=count,
        in_channels=FolderLoader.in_channels,
        resolution=resolution,
        classes=training.classes,
        preprocessing=_preprocessing(resolution, short_side(resolution), list(MEAN), list(STD)),
    )


def _preprocessing(resolution: int, short: int | None, mean: list[float], std: list[float]) -> dict[str, Any]:
    return {
        "channels": len(mean),
        "resolution": resolution,
        "short_side": short,
        "interpolation": "bilinear",
        "mean": mean,
        "std": std,
    }
