"""Images in tar files, as WebDataset lays them out: read in place, member by member, and never unpacked.

A sample is what stands together under one key, the member's name up to the first dot of its file name: an image
(`key.jpg`, `key.png`, ...) and its label, a whole number in `key.cls` or under "label" or "cls" in `key.json`. Each
shard is looked through once for where its samples lie, so that order, split and position are those of single files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ..checks import is_integer
from ..io.files import atomic
from ..io.text import printable, said, short
from . import images
from .images import UnreadableImage
from .listing import EXTENSIONS, LITTER
from .samples import Names

log = logging.getLogger(__name__)

CLASSES = 2**16  # labels are below
LARGEST = 2**30  # bytes of an image file: more than MAX_PIXELS take uncompressed
LABEL_FILE = 2**16  # bytes of a .cls or .json file
HEADER = 2**20  # bytes of a header; a member's name is one
LOST = 0.01, 1000  # at most so many samples, or so much of the bytes, may be damaged
THREADS = 16  # shards that are looked through at a time: on a file server each header is a wait
_VERSION = 1  # of the index files


@dataclass
class Index:
    """What one shard holds: where each sample's image lies, and what is wrong with it.

    offsets, sizes, labels: int64 (N,); names: of the members that are the images. damage: samples that are passed over,
    by a sentence each. lost: bytes at the end that could not be looked through, and `why`.
    """

    offsets: list[int] | np.ndarray = field(default_factory=list)
    sizes: list[int] | np.ndarray = field(default_factory=list)
    labels: list[int] | np.ndarray = field(default_factory=list)
    names: list[bytes] | Names = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    lost: int = 0
    why: str = ""


class Shards:
    """The samples of tar files, in the order of the files and within them (`Samples`).

    Samples that are damaged, or lie behind damage, are passed over with a warning. Raises UnreadableImage, which names
    a file, where that is more than 1 % of the samples (or 1000) or of the bytes, and ValueError where none is left.
    """

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        with ThreadPoolExecutor(min(THREADS, len(paths))) as pool:
            found = list(pool.map(index, paths))
        counts = [len(one.labels) for one in found]
        if not sum(counts):
            one = next((one.why or one.damage[0] for one in found if one.why or one.damage), "")
            expected = f"expected images ({', '.join(EXTENSIONS)}) with labels (.cls or .json) under one key"
            raise ValueError(f"{printable(paths[0])}: has no sample; {f'{one}; ' if one else ''}{expected}")
        self._shards = np.repeat(np.arange(len(paths), dtype=np.int32), counts)
        self._offsets, self._sizes, self.labels = (
            np.concatenate([np.asarray(getattr(one, name), np.int64) for one in found])
            for name in ("offsets", "sizes", "labels")
        )
        self._names = Names(name for one in found for name in one.names)
        _require_little_damage(found, sum(os.stat(path).st_size for path in paths))

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{self.paths[self._shards[index]]}: {os.fsdecode(self._names[index])}"

    def key(self, index: int) -> bytes:
        return os.fsencode(split_name(os.fsdecode(self._names[index]))[0])

    def read(self, index: int) -> Image.Image:
        path, size = self.paths[self._shards[index]], int(self._sizes[index])
        try:
            with open(path, "rb", buffering=0) as file:
                content = os.pread(file.fileno(), size, int(self._offsets[index]))
        except OSError as error:
            why = f"{printable(self.name(index))} cannot be read: {error.strerror}"
            raise UnreadableImage(why) from error
        return images.decode(content, self.name(index))


def _require_little_damage(found: list[Index], total: int) -> None:
    """Warns of what is damaged; raises UnreadableImage where that is too much."""
    damage = [sentence for one in found for sentence in one.damage]
    count = sum(len(one.labels) for one in found) + len(damage)
    limit = min(int(LOST[0] * count), LOST[1])
    if len(damage) > limit:
        raise UnreadableImage(f"{damage[0]}; {len(damage)} of {count} samples are damaged, expected at most {limit}")
    lost = sum(one.lost for one in found)
    if lost > LOST[0] * total:
        why = next(one.why for one in found if one.lost)
        raise UnreadableImage(f"{why}; {lost:,} of {total:,} bytes are lost, expected at most {LOST[0]:.0%}")
    for sentence in [*damage, *(one.why for one in found if one.why)]:
        log.warning("%s; it is skipped", sentence)


def index(path: str) -> Index:
    """Where the samples of a tar file lie; kept in the user's cache, since a large file takes minutes.

    Raises FileNotFoundError or ValueError where there is no such file.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no shard at {printable(path)}: expected a tar file")
    state = os.stat(path)
    known = np.array([_VERSION, state.st_size, state.st_mtime_ns], np.int64)
    digest = hashlib.blake2b(os.fsencode(os.path.realpath(path)), digest_size=16).hexdigest()
    kept = cache_folder() / f"{digest}.npz"
    damaged = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
    with suppress(*damaged), np.load(kept, allow_pickle=False) as arrays:
        if np.array_equal(arrays["known"], known):
            return _unpacked(arrays)
    found = look_through(path)
    with suppress(OSError), atomic(kept) as temporary, temporary.open("wb") as file:  # a cache that is full is none
        np.savez(file, known=known, **_packed(found))
    return found


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "proxyless_fast" / "shards"


def _packed(found: Index) -> dict[str, Any]:
    names, rest = Names(found.names), json.dumps([found.damage, found.lost, found.why]).encode()
    arrays = {name: np.asarray(getattr(found, name), np.int64) for name in ("offsets", "sizes", "labels")}
    return {**arrays, "text": names.text, "ends": names.ends, "rest": np.frombuffer(rest, np.uint8)}


def _unpacked(arrays: Any) -> Index:
    damage, lost, why = json.loads(arrays["rest"].tobytes())
    names = Names(())
    names.text, names.ends = arrays["text"], arrays["ends"]
    return Index(arrays["offsets"], arrays["sizes"], arrays["labels"], names, damage, lost, why)


def look_through(path: str) -> Index:
    """The samples of a tar file, from the headers of its members."""
    found, shown = Index(), printable(path)
    with open(path, "rb") as file:
        size, sample = os.fstat(file.fileno()).st_size, _Sample("")
        try:
            for member in _members(file, size):
                key, extension = split_name(member.name)
                if key is None:
                    continue
                if key != sample.key:
                    sample.close(found, shown)
                    sample = _Sample(key)
                sample.add(member, extension, file)
        except Exception as error:  # whatever type: tarfile raises some of every kind for damaged files
            place = error.place if isinstance(error, _Damage) else 0
            found.lost = max(size - place, 1)
            found.why = (
                f"{shown} cannot be read as a tar file from byte {place:,} on: {said(error) or type(error).__name__}"
            )
        sample.close(found, shown)
    return found


def split_name(name: str) -> tuple[Any, str]:
    """(key, extension) of a member: a/b.seg.png is (a/b, seg.png); (None, "") of a hidden one."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, extension = file.partition(".")
    if not stem or any(part in LITTER or part.startswith("._") for part in name.split("/")):
        return None, ""
    return folder + slash + stem, extension.lower()


class _Damage(ValueError):
    def __init__(self, why: str, place: int) -> None:
        super().__init__(why)
        self.place = place


class _Sample:
    """The members of one key, as they come."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.image: tarfile.TarInfo | None = None
        self.label: int | None = None
        self.faults: list[str] = []

    def add(self, member: tarfile.TarInfo, extension: str, file: BinaryIO) -> None:
        is_image = f".{extension}" in EXTENSIONS
        if not is_image and extension not in ("cls", "json"):
            return
        if not member.isreg() or member.issparse():
            self.faults.append(f"{printable(member.name)} is no regular file")
        elif is_image:
            if self.image is not None:
                self.faults.append("it has two images")
            if not 0 < member.size <= LARGEST:
                self.faults.append(f"its image has {member.size:,} bytes, expected 1 to {LARGEST:,}")
            self.image = member
        elif extension == "cls" or self.label is None:
            self._read_label(member, extension, file)

    def _read_label(self, member: tarfile.TarInfo, extension: str, file: BinaryIO) -> None:
        if member.size > LABEL_FILE:
            self.faults.append(f".{extension} has {member.size:,} bytes, expected at most {LABEL_FILE:,}")
            return
        content = os.pread(file.fileno(), member.size, member.offset_data)
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            value = content.decode(errors="replace")
        if extension == "json":
            value = (
                next((value[key] for key in ("label", "cls") if key in value), None)
                if isinstance(value, dict)
                else None
            )
            if value is None:  # other facts of the image
                return
        if not is_integer(value, 0) or value >= CLASSES:
            self.faults.append(f"its label is {short(value)}, expected a whole number below {CLASSES:,}")
            return
        self.label = value

    def close(self, found: Index, shown: str) -> None:
        """Notes the sample, or why it is none; what has neither image nor label is something else."""
        if self.image is None and self.label is None and not self.faults:
            return
        if self.image is None and not self.faults:
            self.faults.append("it has no image")
        if self.label is None and not self.faults:
            self.faults.append("it has no label (.cls or .json)")
        if self.faults or self.image is None or self.label is None:
            found.damage.append(f"{shown}: sample {printable(self.key)} is damaged: {self.faults[0]}")
            return
        found.offsets.append(self.image.offset_data)  # type: ignore[union-attr]
        found.sizes.append(self.image.size)  # type: ignore[union-attr]
        found.labels.append(self.label)  # type: ignore[union-attr]
        found.names.append(os.fsencode(self.image.name))  # type: ignore[union-attr]


class _Headers:
    """What tarfile may read of a file: headers of a bounded size, however long one says that it is."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, count: int) -> bytes:
        if count > HEADER:
            raise ValueError(f"a header of {count:,} bytes, expected at most {HEADER:,}")
        return self._file.read(count)


def _members(file: BinaryIO, size: int) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file, from its headers; _Damage where one is damaged, or the file ends before its end."""
    place = 0
    try:
        with tarfile.open(fileobj=_Headers(file), mode="r:", encoding="utf-8", errors="surrogateescape") as tar:  # type: ignore[call-overload]
            while (member := tar.next()) is not None:
                if member.size < 0 or member.offset_data + member.size > size or tar.offset <= place:
                    raise ValueError(f"member {printable(member.name)} is cut short")
                yield member
                place = tar.offset
                tar.members.clear()  # else it keeps all
    except Exception as error:
        raise _Damage(said(error) or type(error).__name__, place) from error
    file.seek(place)
    end = file.read(tarfile.BLOCKSIZE)
    if end.strip(b"\0") or (len(end) < tarfile.BLOCKSIZE and end):
        raise _Damage("a header is damaged", place)
    if not end:
        raise _Damage("its end is missing", place)
