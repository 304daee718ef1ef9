"""The images of a folder, class folders or shards, with the standard ImageNet transforms, decoded by workers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms.functional import center_crop

from . import recipe
from . import workers as processes
from .images import UnreadableImage
from .order import Order
from .samples import Files, Samples
from .seeds import seeded

log = logging.getLogger(__name__)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LONGEST = 4  # sides of an image in evaluation: of a longer one, all that the centre crop can see
SKIPPED = 0.01, 1000  # of a loader's images, at most so many damaged ones are skipped


def short_side(resolution: int) -> int:
    """What the short side is resized to before the centre crop: 256 for 224."""
    return round(resolution * 256 / 224)


def middle(image: Image.Image) -> Image.Image:
    """The image, or the middle of one longer than LONGEST times its short side: resized whole, it has no bound."""
    longest = LONGEST * min(image.size)
    # an even number of pixels goes, or the middle would move
    height, width = (min(side, longest + (side - longest) % 2) for side in (image.height, image.width))
    return center_crop(image, [height, width])


def train_transform(resolution: int, rand_augment: str | None = None, random_erasing: float = 0.0) -> Callable:
    """Random crop of 8 % to 100 % of the area, random flip, normalised: as the official search trains on ImageNet.

    rand_augment ("rand-m9-mstd0.5") after the flip, and random_erasing (a probability) at the end, are timm's.
    """
    return transforms.Compose([
        transforms.RandomResizedCrop(resolution, scale=(0.08, 1.0)),
        transforms.RandomHorizontalFlip(),
        *([] if rand_augment is None else [recipe.rand_augment(rand_augment, resolution, MEAN)]),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
        *([recipe.random_erasing(random_erasing)] if random_erasing else []),
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


# What a worker is asked for: the epoch and the images of one batch; what it gives: the batch, without damaged images
# (None where all are), and the damaged files met on the way, {path: sentence}.
Asked = tuple[int, list[int]]
Given = tuple[tuple[Tensor, Tensor] | None, dict[str, str]]


class _Images(Dataset):
    """Batches by what is asked for: (seed, epoch, index) alone decide an image's augmentation, whichever worker runs.

    Damaged files are given back, since an error that is raised in a worker arrives with a traceback for its message.
    With stand_ins the next readable image takes a damaged one's place, so that batches keep their size. Beyond `limit`
    damaged files nothing is looked for any more: the loader raises.
    """

    def __init__(self, samples: Samples, transform: Callable, seed: int, limit: int, stand_ins: bool) -> None:
        self.samples, self.transform, self.seed = samples, transform, seed
        self.limit, self.stand_ins = limit, stand_ins

    def __getitem__(self, asked: Asked) -> Given:
        epoch, indices = asked
        damaged: dict[str, str] = {}
        found = [item for index in indices if (item := self._item(epoch, index, damaged)) is not None]
        if not found:
            return None, damaged
        first = found[0][0]
        batch = torch.empty((len(found), *first.shape), dtype=first.dtype).contiguous(memory_format=_format(first))
        for place, (image, _) in zip(batch, found, strict=True):
            place.copy_(image)
        return (batch, torch.tensor([label for _, label in found])), damaged

    def _item(self, epoch: int, index: int, damaged: dict[str, str]) -> tuple[Tensor, int] | None:
        count, place = len(self.samples), index
        while len(damaged) <= self.limit:
            try:
                image = self.samples.read(place)
            except UnreadableImage as error:
                damaged[self.samples.name(place)] = str(error)
                place = (place + 1) % count
                if self.stand_ins and place != index:
                    continue
                return None
            with seeded(self.seed, epoch, index):
                return self.transform(image), int(self.samples.labels[place])
        return None


def _as_it_is(given: Any) -> Any:
    return given


def _format(image: Tensor) -> torch.memory_format:
    return torch.channels_last if image.dim() == 3 else torch.contiguous_format


class _Asked:
    """What a pass over the loader asks for; set before the pass starts."""

    def __init__(self) -> None:
        self.batches: Iterator[Asked] = iter(())

    def __iter__(self) -> Iterator[Asked]:
        return self.batches


class FolderLoader(Order):
    """Batches of (images, labels): float32 (B, 3, R, R), channels_last, and int64 (B,).

    samples: (path, label) of each image, or Samples. The order and every augmentation are pure functions of
    (seed, epoch), whatever the number of workers. A damaged file is named by a warning and skipped: with `shuffle` a
    neighbour stands in for it, without its batch is shorter. Raises UnreadableImage, which names the file, where more
    than 1 % of the images (or 1000) are damaged, and ChildProcessError where the system ended a worker.
    """

    in_channels = 3

    def __init__(
        self,
        samples: Samples | list[tuple[str, int]],
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
        samples = Files(samples) if isinstance(samples, list) else samples
        super().__init__(len(samples), batch_size, seed, shuffle, drop_last)
        self.samples, self.resolution, self.num_classes, self.workers = samples, resolution, num_classes, workers
        self.limit = min(int(SKIPPED[0] * len(samples)), SKIPPED[1])
        self._damaged: dict[str, str] = {}
        self._asked = _Asked()
        self._loader = DataLoader(
            _Images(samples, transform, seed, self.limit, stand_ins=shuffle and self.limit > 0),
            batch_size=None,  # an item is a batch
            sampler=self._asked,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_as_it_is,
            worker_init_fn=processes.subordinate,
            generator=torch.Generator(),  # else the workers' seed is drawn from the global generator
            pin_memory=torch.cuda.is_available(),
        )

    def batches_from(self, epoch: int, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from number `skip` on."""
        asked = ((epoch, whole[mine].tolist()) for _, whole, mine in self._indices(epoch, skip))
        for batch, damaged in self._given(asked):
            self._skip(damaged)
            if batch is not None:
                images, labels = batch
                yield images, labels

    def _given(self, asked: Iterator[Asked]) -> Iterator[Given]:
        self._asked.batches = asked
        try:
            with processes.starting(), processes.steady():
                given = iter(self._loader)
            yield from given
        except processes.ENDED as error:
            raise processes.told(error, self.workers) from None

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
