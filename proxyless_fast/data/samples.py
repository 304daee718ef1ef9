"""Where images come from: the files of a folder. Paths and labels in arrays, which worker processes share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from . import images


class Samples(Protocol):
    """Images with labels, known by their place in the list."""

    labels: np.ndarray  # int64 (N,)

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The image in a message: its path."""

    def key(self, index: int) -> bytes:
        """What stays the same of the image when others come and go: the split goes by it."""

    def read(self, index: int) -> Image.Image:
        """The image in RGB; UnreadableImage where it is damaged."""


class Names(Sequence[bytes]):
    """A list of byte strings as two arrays.

    A million strings of Python's are a million objects, whose counts of references every worker process that looks at
    them writes to: the memory that the workers share with the main process would become their own, page by page.
    """

    def __init__(self, names: Iterable[bytes]) -> None:
        names = list(names)
        self.text = np.frombuffer(b"".join(names), np.uint8)
        self.ends = np.cumsum(np.fromiter(map(len, names), np.int64, len(names)))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index):  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.text[self.ends[index - 1] if index else 0 : self.ends[index]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        return (self[index] for index in range(len(self)))


class Files:
    """Image files by path; `root` is what their keys leave out."""

    def __init__(self, samples: Iterable[tuple[str, int]], root: str = "") -> None:
        samples = list(samples)
        self._paths = Names(os.fsencode(path) for path, _ in samples)
        self.labels = np.array([label for _, label in samples], np.int64)
        self._root = len(os.fsencode(root))

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return os.fsdecode(self._paths[index])

    def key(self, index: int) -> bytes:
        return self._paths[index][self._root :].lstrip(b"/")

    def read(self, index: int) -> Image.Image:
        return images.read(self.name(index))


class Part:
    """Some of the images, in the order of `indices`, int64 (N,)."""

    def __init__(self, samples: Samples, indices: np.ndarray) -> None:
        self._samples, self._indices, self.labels = samples, indices, samples.labels[indices]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return self._samples.name(int(self._indices[index]))

    def key(self, index: int) -> bytes:
        return self._samples.key(int(self._indices[index]))

    def read(self, index: int) -> Image.Image:
        return self._samples.read(int(self._indices[index]))
