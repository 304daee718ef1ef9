"""The IDX format of MNIST and its relatives: big-endian header, then the bytes; gzipped or not."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
# What a gzipped file may unpack to: so many times its size, and 16 MiB in any case.
MAX_RATIO, ALWAYS = 10, 2**24


def find(folder: Path, name: str) -> Path | None:
    """`name` or `name`.gz in `folder`, or None."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def is_complete(folder: Path) -> bool:
    return all(find(folder, name) for name in FILES)


def read(path: Path, dimensions: int) -> Tensor:
    """The uint8 tensor in an IDX file; ValueError when the file is not one of so many dimensions, or is cut short.

    Nothing is read or allocated for a header that promises what the file cannot hold; a gzipped file may unpack to
    MAX_RATIO times its size or to ALWAYS bytes.
    """
    size = path.stat().st_size
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            shape = _read_shape(path, file, dimensions)
            count, held = math.prod(shape), size - 4 - 4 * dimensions
            if path.suffix != ".gz" and held != count:
                raise ValueError(f"{path} announces shape {shape} but holds {held} bytes")
            if count > max(MAX_RATIO * size, ALWAYS):
                raise ValueError(
                    f"{path} announces shape {shape}, {count:,} bytes, in {size:,} bytes gzipped: expected at most "
                    f"{MAX_RATIO} times as many, or the file unpacked"
                )
            content, held = np.empty(count, np.uint8), 0
            while piece := file.read(min(2**20, count - held)):  # reading a gzipped file at once would hold it twice
                content[held : held + len(piece)] = np.frombuffer(piece, np.uint8)
                held += len(piece)
            if held < count or file.read(1):
                found = f"{held}" if held < count else f"more than {count}"
                raise ValueError(f"{path} announces shape {shape} but holds {found} bytes")
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as an IDX file: {error}") from error
    return torch.from_numpy(content.reshape(shape))


def _read_shape(path: Path, file: BinaryIO | gzip.GzipFile, dimensions: int) -> tuple[int, ...]:
    """The shape that the header announces, of positive sizes."""
    magic = file.read(4)
    if len(magic) < 4 or magic[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of bytes: it starts with {magic.hex() or 'nothing'}")
    if magic[3] != dimensions:
        raise ValueError(f"{path} has {magic[3]} dimensions, expected {dimensions}")
    sizes = file.read(4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise ValueError(f"{path} ends within its header")
    shape = tuple(int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4))
    if not all(shape):
        raise ValueError(f"{path} announces shape {shape}, expected sizes of at least 1")
    return shape


def _require(folder: Path, name: str) -> Path:
    path = find(folder, name)
    if path is None:
        raise FileNotFoundError(f"{folder} has neither {name} nor {name}.gz")
    return path


def read_pair(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images, uint8 (N, 1, H, W), and labels, int64 (N,), of part "train" or "t10k"."""
    x, y = (read(_require(folder, f"{part}-{name}{d}-ubyte"), d) for name, d in (("images-idx", 3), ("labels-idx", 1)))
    if len(x) != len(y):
        raise ValueError(
            f"the {part} files in {folder} do not belong together: images {tuple(x.shape)}, labels {tuple(y.shape)}"
        )
    return x[:, None], y.long()
