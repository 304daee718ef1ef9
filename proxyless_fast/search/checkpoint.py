"""Checkpoints: written whole or not at all, read without unpickling code."""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..io.files import atomic

NAME = "checkpoint.pt"
FORMAT = 1


def save(folder: Path, state: dict[str, Any]) -> Path:
    """Writes state (tensors and plain Python values) as folder/checkpoint.pt by an atomic rename."""
    path = folder / NAME
    with atomic(path) as partial, open(partial, "wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    return path


def load(folder: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The state saved in a run folder. Raises FileNotFoundError without one, ValueError where it is not ours."""
    path = Path(folder) / NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint, expected one written by a search into {Path(folder)}")
    _check_size(path)
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not a checkpoint that torch can read ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of format {FORMAT} of this program")
    return state


def _check_size(path: Path) -> None:
    """ValueError where the archive would unpack to more than it is: torch.save compresses nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path}: not a checkpoint that torch can read ({type(error).__name__})") from error
    if unpacked > path.stat().st_size:
        raise ValueError(f"{path}: not a checkpoint that torch.save wrote: it would unpack to {unpacked:,} bytes")
