"""The IDX format of MNIST and its relatives: big-endian header, then the bytes; gzipped or not."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def find(folder: Path, name: str) -> Path | None:
    """`name` or `name`.gz in `folder`, or None."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def is_complete(folder: Path) -> bool:
    return all(find(folder, name) for name in FILES)


def read(path: Path) -> Tensor:
    """The uint8 tensor in an IDX file; ValueError when the file is not one or is cut short."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as an IDX file: {error}") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of bytes: it starts with {content[:4].hex() or 'nothing'}")
    start = 4 + 4 * content[3]
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    if len(content) != start + int(np.prod(shape)):
        raise ValueError(f"{path} announces shape {shape} but holds {len(content) - start} bytes")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def _require(folder: Path, name: str) -> Path:
    path = find(folder, name)
    if path is None:
        raise FileNotFoundError(f"{folder} has neither {name} nor {name}.gz")
    return path


def read_pair(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images, uint8 (N, 1, H, W), and labels, int64 (N,), of part "train" or "t10k"."""
    x, y = (read(_require(folder, f"{part}-{name}-ubyte")) for name in ("images-idx3", "labels-idx1"))
    if x.ndim != 3 or y.ndim != 1 or len(x) != len(y) or not len(x):
        raise ValueError(
            f"the {part} files in {folder} do not belong together: images {tuple(x.shape)}, labels {tuple(y.shape)}"
        )
    return x[:, None], y.long()
