"""What an image folder holds: its classes and its image files, each file once, whatever links lead to it."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..io.text import printable

log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
LITTER = ("__MACOSX", "@eaDir")  # folders that systems leave behind, with copies or thumbnails; also all hidden ones

# Where a file really is; (device, inode) where it has several names there, that is hard links.
Place = str | tuple[int, int]


@dataclass(frozen=True)
class Listing:
    """Class names, in the order of their labels; (path, label) of each image; and the path by the place of the file."""

    classes: tuple[str, ...]
    samples: list[tuple[str, int]]
    places: dict[Place, str]


def some(names: Iterable[str], most: int = 5) -> str:
    """Names for a message, the first few of many."""
    names = [printable(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def scan(folder: Path) -> Listing:
    """The classes and images under `folder`, each class a subfolder, in torchvision's order.

    Hidden files and folders are passed over. Links are followed, but for those to a folder above. A file found again in
    its class is passed over; FileNotFoundError or ValueError says what is missing, and which file has two classes.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no image folder at {printable(folder)}")
    classes = _class_folders(folder)
    if not classes:
        raise ValueError(f"{printable(folder)} has no class folders: an image folder holds one subfolder a class")
    samples: list[tuple[str, int]] = []
    places: dict[Place, str] = {}
    empty, others = [], Counter[str]()
    for label, (name, path) in enumerate(sorted(classes.items())):
        images = _images_of(path, others)
        for place, image in images.items():
            if place in places:
                raise ValueError(
                    f"{printable(places[place])} and {printable(image)} are one file: expected each image in one class"
                )
            places[place] = image
            samples.append((image, label))
        if not images:
            empty.append(name)
    if empty:
        raise ValueError(
            f"{printable(folder)} has a class without images: {some(empty)} (expected files in {', '.join(EXTENSIONS)})"
        )
    if others:
        log.warning(
            "%s: %d files are passed over for their names: %s", printable(folder), others.total(), some(sorted(others))
        )
    return Listing(tuple(sorted(classes)), samples, places)


def check_apart(training: Listing, testing: Listing) -> None:
    """Raises ValueError where an image belongs to both listings."""
    for place, path in testing.places.items():
        if place in training.places:
            raise ValueError(
                f"{printable(training.places[place])} and {printable(path)} are one file: expected none in both parts"
            )


def _class_folders(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    loose, real = 0, os.path.realpath(folder)
    for entry, place in _entries(str(folder), real):
        if not os.path.isdir(entry.path):
            loose += entry.name.lower().endswith(EXTENSIONS)
            continue
        if _leads_up(entry.path, place, real):
            continue
        # a Mac writes é as e and an accent: one name here and there, or train/ and val/ would have different classes
        name = unicodedata.normalize("NFC", entry.name)
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{printable(entry.path)}: the name of a class must be UTF-8 text") from error
        if name in found:
            raise ValueError(f"{printable(folder)} has two folders for class {name}, whose names look the same")
        found[name] = entry.path
    if loose and found:
        log.warning("%s: %d images lie in no class folder and are passed over", printable(folder), loose)
    return found


def _images_of(folder: str, others: Counter[str]) -> dict[Place, str]:
    """Image paths by their places, each place once, in the order of the paths; counts the other files by suffix."""
    found: list[tuple[tuple[str, str], str, Place]] = []
    first = os.path.realpath(folder)
    entered, waiting = {first}, deque([(folder, first)])
    while waiting:
        folder, real = waiting.popleft()
        for entry, place in _entries(folder, real):
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                if not _leads_up(entry.path, place, real) and place not in entered:
                    entered.add(place)
                    waiting.append((entry.path, place))
            elif entry.name.lower().endswith(EXTENSIONS):
                found.append(((folder, entry.name), entry.path, _place(entry, place)))
            else:
                others[os.path.splitext(entry.name)[1] or entry.name] += 1
    images: dict[Place, str] = {}
    for _, path, where in sorted(found, key=lambda item: item[0]):
        images.setdefault(where, path)
    return images


def _entries(folder: str, real: str) -> Iterator[tuple[os.DirEntry[str], str]]:
    """What a folder shows, by name and links last, with the path at which each really is."""
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not (entry.name.startswith(".") or entry.name in LITTER)]
    except OSError as error:
        raise ValueError(f"{printable(folder)} cannot be listed: {error.strerror}") from error
    for entry in sorted(shown, key=lambda entry: (entry.is_symlink(), entry.name)):
        yield entry, os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)


def _leads_up(path: str, place: str, real: str) -> bool:
    """Whether `path`, which stands in the folder `real`, is a link to that folder or to one above it: a loop."""
    above = real == place or real.startswith(place.rstrip(os.sep) + os.sep)
    if above:
        log.warning("%s links to a folder above it and is passed over", printable(path))
    return above


def _place(entry: os.DirEntry[str], place: str) -> Place:
    try:
        found = entry.stat()
    except OSError:  # a link to nothing, which reading will name
        return place
    return (found.st_dev, found.st_ino) if found.st_nlink > 1 else place
