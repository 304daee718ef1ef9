"""`loaders`: one call from a dataset's name or folder to its train, validation and test loaders."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import fashion_mnist, idx, shard_files, shards
from .folder import MEAN, STD, FolderLoader, eval_transform, short_side, train_transform
from .listing import check_apart, scan, some
from .memory import MemoryLoader, resize, statistics
from .recipe import check_rand_augment, check_random_erasing
from .samples import Files, Part, Samples

log = logging.getLogger(__name__)

Loader = MemoryLoader | FolderLoader
SHIFT = 2  # pixels, for small images
# How `hold_out` splits, for whoever keeps what it gave: 1, up to version 0.2, drew a permutation, 2 goes by hashes.
SPLIT = 2


@dataclass(frozen=True)
class _Wanted:
    """The arguments of `loaders` that loaders are made by."""

    batch_size: int
    resolution: int | None
    valid_fraction: float
    seed: int
    workers: int
    rand_augment: str | None = None
    random_erasing: float = 0.0

    def __post_init__(self) -> None:
        sizes = {"batch_size": self.batch_size} | ({} if self.resolution is None else {"resolution": self.resolution})
        for name, value in {**sizes, "seed": self.seed, "workers": self.workers}.items():
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise ValueError(f"{name} must be an integer, got {value!r}")
            if name in sizes and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if not (isinstance(self.valid_fraction, Real) and 0 <= float(self.valid_fraction) < 1):
            raise ValueError(f"valid_fraction must lie in [0, 1), got {self.valid_fraction!r}")
        check_rand_augment(self.rand_augment)
        check_random_erasing(self.random_erasing)


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
    rand_augment: str | None = None,
    random_erasing: float = 0.0,
) -> Splits:
    """Loaders of "fashion-mnist", of a folder with the four IDX files, or of images or shards in train/ and val/.

    Shards are tar files as WebDataset lays them out (`data.shards`), in a folder or named by a brace pattern such as
    /data/imagenet-{train-{0000..1023},val-{00..63}}.tar.

    About a `valid_fraction` of each class is held out of the training images for the arch steps, as `seed` and each
    image's path (in IDX files, its number) decide: see `hold_out`. It goes through the evaluation transforms, as in the
    official code (search/data_providers/imagenet.py), and comes in a new order each epoch. Training batches are full
    ones only. `resolution` is that of the images when None, 224 for image folders; `workers` processes decode an image
    folder's files.

    `rand_augment` (timm's, such as "rand-m9-mstd0.5") and `random_erasing` (a probability) change the training images
    of folders and shards further; both need timm.

    In an image folder hidden files are passed over, and each file counts once, however many links lead to it: a file in
    two classes, or in train/ and val/, is an error. So is a fraction that takes a class's last training image; one that
    holds none of a class out is warned of. Raises FileNotFoundError (DataNotFound for Fashion-MNIST) or ValueError with
    a sentence that names the path or the argument.
    """
    wanted = _Wanted(batch_size, resolution, valid_fraction, seed, workers, rand_augment, random_erasing)
    if name_or_path == "fashion-mnist":
        return _from_idx(fashion_mnist.fashion_mnist_folder(), wanted, fashion_mnist.CLASSES)
    if not isinstance(name_or_path, str | os.PathLike):
        raise ValueError(f"name_or_path must be a folder or the name fashion-mnist, got {name_or_path!r}")
    root = Path(name_or_path)
    found = shard_files.find(os.fspath(name_or_path))
    if found is not None:
        return _from_shards(*found, wanted)
    if not root.is_dir():
        raise FileNotFoundError(f"no dataset at {root}: expected a folder, or the name fashion-mnist")
    if any(idx.find(root, name) for name in idx.FILES):
        return _from_idx(root, wanted)
    return _from_images(root, wanted)


def hold_out(keys: Iterable[bytes], labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (train, valid) of a split that a hash of each image's key and the seed decides.

    So about `fraction` of every class goes to valid, and an image stays where it is when others come, go or are sorted
    anew. The last image of a class by this hash is in train all the same, and the first of all in valid.
    """
    salt = b"%d " % seed
    places = [int.from_bytes(hashlib.blake2b(salt + key, digest_size=8).digest(), "little") for key in keys]
    place = torch.tensor(np.array(places, np.uint64) / 2.0**64)
    order = place.argsort()
    order = order[labels[order].argsort(stable=True)]
    last = order[torch.bincount(labels).cumsum(0).unique() - 1]  # of each class
    place[last] = 1.0
    held_out = place < fraction
    if not held_out.any() and round(fraction * len(labels)):
        held_out[place.argmin()] = place.min() < 1
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def _split(keys: Iterable[bytes], labels: Tensor, wanted: _Wanted, classes: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    fraction, batch_size = wanted.valid_fraction, wanted.batch_size
    images = torch.bincount(labels, minlength=len(classes)).tolist()
    emptied = [f"{name} (of {n})" for name, n in zip(classes, images, strict=True) if 0 < n == round(fraction * n)]
    if emptied:
        raise ValueError(
            f"valid_fraction {fraction} holds out every training image of class {some(emptied)}: expected a smaller "
            "fraction, or more images"
        )
    if fraction and not round(fraction * len(labels)):
        raise ValueError(f"valid_fraction {fraction} of {len(labels)} training images holds out none")
    train, valid = (
        hold_out(keys, labels, fraction, wanted.seed) if fraction else (torch.arange(len(labels)), labels[:0])
    )
    if len(train) < batch_size:
        raise ValueError(f"batch_size {batch_size} is larger than the {len(train)} training images")
    held_out = torch.bincount(labels[valid], minlength=len(classes)).tolist()
    unseen = [f"{name} (of {n})" for name, n, held in zip(classes, images, held_out, strict=True) if n and not held]
    if fraction and unseen:
        log.warning("valid_fraction %s holds out no image of class %s; a larger one does", fraction, some(unseen))
    return train, valid


def _from_idx(folder: Path, wanted: _Wanted, names: tuple[str, ...] = ()) -> Splits:
    if wanted.rand_augment is not None or wanted.random_erasing:
        name = "random_erasing" if wanted.rand_augment is None else "rand_augment"
        value = getattr(wanted, name)
        raise ValueError(f"{name}: got {value!r} for IDX files, expected an image folder or shards with it")
    resolution = wanted.resolution
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
    numbers = (str(number).encode() for number in range(len(labels)))
    train, valid = _split(numbers, labels, wanted, classes)

    def loader(x: Tensor, y: Tensor, **options: Any) -> MemoryLoader:
        options |= {"mean": mean, "std": std, "num_classes": count, "seed": wanted.seed}
        return MemoryLoader(x, y, wanted.batch_size, **options)

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


def _from_images(root: Path, wanted: _Wanted) -> Splits:
    training, testing = scan(root / "train"), scan(root / "val")
    if training.classes != testing.classes:
        odd = some(sorted(set(training.classes) ^ set(testing.classes)))
        raise ValueError(f"{root}: train/ and val/ must have the same classes; only one of them has {odd}")
    check_apart(training, testing)
    train, test = Files(training.samples, str(root / "train")), Files(testing.samples, str(root / "val"))
    return _from_samples(train, test, training.classes, wanted)


def _from_shards(training: list[str], testing: list[str], wanted: _Wanted) -> Splits:
    same = {os.path.realpath(path) for path in training} & {os.path.realpath(path) for path in testing}
    if same:
        raise ValueError(f"{some(sorted(same))}: expected no shard in both parts")
    train, test = shards.Shards(training), shards.Shards(testing)
    strange = sorted(set(np.unique(test.labels).tolist()) - set(np.unique(train.labels).tolist()))
    if strange:
        raise ValueError(f"{testing[0]}: no training image has the test images' label {some(map(str, strange))}")
    classes = tuple(map(str, range(int(train.labels.max()) + 1)))
    return _from_samples(train, test, classes, wanted)


def _from_samples(training: Samples, testing: Samples, classes: tuple[str, ...], wanted: _Wanted) -> Splits:
    keys, resolution = (training.key(index) for index in range(len(training))), wanted.resolution or 224
    train, valid = _split(keys, torch.from_numpy(training.labels), wanted, classes)
    augmented = train_transform(resolution, wanted.rand_augment, wanted.random_erasing)
    plain = eval_transform(resolution)

    def loader(samples: Samples, transform, **options: Any) -> FolderLoader:
        options |= {"resolution": resolution, "num_classes": len(classes)}
        return FolderLoader(samples, transform, wanted.batch_size, seed=wanted.seed, workers=wanted.workers, **options)

    return Splits(
        train=loader(Part(training, train.numpy()), augmented, shuffle=True, drop_last=True),
        valid=loader(Part(training, valid.numpy()), plain, shuffle=True) if len(valid) else None,
        test=loader(testing, plain),
        num_classes=len(classes),
        in_channels=FolderLoader.in_channels,
        resolution=resolution,
        classes=classes,
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
