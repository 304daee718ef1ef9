"""Image folders (one subfolder a class) with the standard ImageNet transforms, decoded by worker processes."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision import transforms
from torchvision.transforms.functional import center_crop

from . import images
from .images import UnreadableImage
from .seeds import generator_of, seed_of

log = logging.getLogger(__name__)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LONGEST = 4  # sides of an image in evaluation: of a longer one, all that the centre crop can see
SKIPPED = 0.01, 1000  # of a loader's images, at most so many damaged ones are skipped
STAND_INS = 10  # neighbours to try for a damaged image


def short_side(resolution: int) -> int:
    """What the short side is resized to before the centre crop: 256 for 224."""
    return round(resolution * 256 / 224)


def middle(image: Image.Image) -> Image.Image:
    """The image, or the middle of one longer than LONGEST times its short side: resized whole, it has no bound."""
    longest = LONGEST * min(image.size)
    # an even number of pixels goes, or the middle would move
    height, width = (min(side, longest + (side - longest) % 2) for side in (image.height, image.width))
    return center_crop(image, [height, width])


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
        middle,
        transforms.Resize(short_side(resolution)),
        transforms.CenterCrop(resolution),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])  # fmt: skip


class _Images(Dataset):
    """Items are asked for as (index, seed): the seed alone decides the item's augmentation, whichever worker runs.

    An item is (image and label, or None) and the damaged files met on the way, {path: sentence}: raised in a worker, an
    error would arrive with a traceback for its message. With stand-ins the next readable image takes a damaged one's
    place, so that batches keep their size.
    """

    def __init__(self, samples: list[tuple[str, int]], transform: Callable, stand_ins: int) -> None:
        self.samples, self.transform, self.stand_ins = samples, transform, stand_ins

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: tuple[int, int]) -> tuple[tuple[Tensor, int] | None, dict[str, str]]:
        index, seed = item
        damaged: dict[str, str] = {}
        for tried in range(min(1 + self.stand_ins, len(self))):
            path, label = self.samples[(index + tried) % len(self)]
            try:
                image = images.read(path)
            except UnreadableImage as error:
                damaged[path] = str(error)
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return (self.transform(image), label), damaged
        return None, damaged


def _collate(items: list) -> tuple[list[Tensor] | None, dict[str, str]]:
    """A batch of the readable items, None without any, and the damaged files of all."""
    readable = [item for item, _ in items if item is not None]
    damaged = {path: why for _, some in items for path, why in some.items()}
    return default_collate(readable) if readable else None, damaged


def _subordinate(worker: int) -> None:
    """A worker leaves words and ends to the main process.

    What Pillow warns of has no reader there: what matters comes back as the sentence about the file. And what a
    terminal sends to all processes of a run must not end the workers of a step that is to be finished. SIGTERM is left:
    by it Python ends the workers itself.
    """
    warnings.simplefilter("ignore")
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


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

    The order and every augmentation are pure functions of (seed, epoch), whatever the number of workers. A damaged file
    is named by a warning and skipped: with `shuffle` a neighbour stands in for it, without its batch is shorter. Raises
    UnreadableImage, which names the file, where more than 1 % of the images (or 1000) are damaged, and
    ChildProcessError where the system ended a worker.
    """

    in_channels = 3

    def __init__(
        self,
        samples: list[tuple[str, int]],
        transform: Callable,
        batch_size: int,
        *,
        resolution: int | None = None,
        num_classes: int | None = None,
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        workers: int = 0,
    ) -> None:
        self.resolution, self.num_classes = resolution, num_classes
        self.limit = min(int(SKIPPED[0] * len(samples)), SKIPPED[1])
        self._damaged: dict[str, str] = {}
        self._order = _Order(len(samples), seed, shuffle)
        self._loader = DataLoader(
            _Images(samples, transform, STAND_INS if shuffle and self.limit else 0),
            batch_size,
            sampler=self._order,
            collate_fn=_collate,
            num_workers=workers,
            drop_last=drop_last,
            persistent_workers=workers > 0,
            worker_init_fn=_subordinate,
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
        for batch, damaged in self._batches():
            self._skip(damaged)
            if batch is not None:
                images, labels = batch
                yield images.contiguous(memory_format=torch.channels_last), labels

    def _batches(self) -> Iterator[tuple[list[Tensor] | None, dict[str, str]]]:
        batches = iter(self._loader)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                workers = self._loader.num_workers
                raise ChildProcessError(
                    f"a process that reads images was ended by the system ({str(error).strip().rstrip('.')}): expected "
                    f"memory for workers={workers}"
                ) from None
            yield batch

    def _skip(self, damaged: dict[str, str]) -> None:
        """Names the files that are damaged and new; raises UnreadableImage beyond the limit."""
        for path, why in damaged.items():
            if path in self._damaged:
                continue
            self._damaged[path] = why
            if len(self._damaged) > self.limit:
                count = f"; more than {self.limit} of {self.size} images are damaged" if self.limit else ""
                raise UnreadableImage(why + count)
            log.warning("%s; it is skipped", why)
