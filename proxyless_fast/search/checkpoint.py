"""Checkpoints: written in the background, whole or not at all; read without unpickling code, and held to what a run can
go on from."""

from __future__ import annotations

import hashlib
import logging
import re
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..checks import is_integer
from ..io.files import atomic
from ..io.schemas import check
from ..io.schemas.checkpoint import Search, Session, Training
from ..io.text import said, short
from .config import RENAMED, is_number
from .snapshot import Snapshot, restored

log = logging.getLogger(__name__)

FOLDERS = {"search": "checkpoints", "train": "train-checkpoints"}
LEGACY = "checkpoint.pt"  # the one of a search of a version before 0.3.0
FORMAT = 2
NAME = re.compile(r"(\d{9,})-([0-9a-f]{16})\.pt")
SCHEMAS: dict[str, type[Session]] = {"search": Search, "train": Training}
MOMENTS = {"SGD": {"momentum_buffer"}, "Adam": {"step", "exp_avg", "exp_avg_sq"}}  # what they keep of a parameter


@dataclass(frozen=True)
class Checkpoints:
    """When a run saves, beside the ends of epochs and every stop; the last `keep` are kept.

    steps: after so many steps; None: only by the clock. minutes: after so many minutes. Raises ValueError, which names
    the field.
    """

    steps: int | None = None
    minutes: float = 10.0
    keep: int = 3

    def __post_init__(self) -> None:
        if self.steps is not None and not is_integer(self.steps, 1):
            raise ValueError(f"Checkpoints.steps: got {self.steps!r}, expected an integer of at least 1 or None")
        if not is_number(self.minutes) or self.minutes <= 0:
            raise ValueError(f"Checkpoints.minutes: got {self.minutes!r}, expected a number above 0")
        if not is_integer(self.keep, 1):
            raise ValueError(f"Checkpoints.keep: got {self.keep!r}, expected an integer of at least 1")


class Writer:
    """Writes checkpoints of a run folder in a thread, one at a time, and keeps the last `keep`.

    step: where the run goes on from; checkpoints of later steps are damaged, and go when the next one is written.

    What a write raises is raised by the next call of any method: OSError where the system could not write, ValueError
    where the state is not finite; the checkpoints that were there are as they were.
    """

    def __init__(self, folder: Path, kind: str, keep: int, step: int) -> None:
        self.folder, self.kind, self.keep = folder / FOLDERS[kind], kind, keep
        self._course = [path for path in reversed(paths(self.folder)) if _step_of(path) <= step]
        self.snapshot = Snapshot()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._running: Future[Path] | None = None

    def busy(self) -> bool:
        """Whether a write is under way."""
        if self._running is not None and self._running.done():
            self.wait()
        return self._running is not None

    def write(self, state: dict[str, Any], before: Callable[[], None] = lambda: None) -> None:
        """Copies the state, and begins to write it once an earlier write is done. before: called first, in the thread.

        When this returns, what the state's tensors are may change.
        """
        self.wait()
        self.snapshot.take(state)
        self._running = self._thread.submit(self._write, state["step"], before)

    def wait(self) -> Path | None:
        """The newest checkpoint, once it is on the disk."""
        running, self._running = self._running, None
        return None if running is None else running.result()

    def _write(self, step: int, before: Callable[[], None]) -> Path:
        before()
        buffers = self.snapshot.buffers()
        text = self.snapshot.text()
        if not all(map(_finite, buffers)):
            _require_finite(restored(text, buffers), f"step {step} is not saved")
        content = {"format": FORMAT, "values": text, "buffers": buffers}
        path = _write_hashed(content, self.folder, step)
        self._course = [*(other for other in self._course if other != path), path][-self.keep :]
        for old in paths(self.folder):
            if old not in self._course:
                with suppress(OSError):
                    old.unlink()
        return path


def paths(folder: Path) -> list[Path]:
    """The checkpoints in a folder of them, newest first."""
    found = [path for path in folder.glob("*.pt") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_step_of(path), path.name), reverse=True)


def newest(folder: str | Path, kind: str = "search") -> Path | None:
    """The newest checkpoint of a run folder, whether or not it can be read; None without any."""
    legacy = Path(folder) / LEGACY
    found = paths(Path(folder) / FOLDERS[kind])
    return found[0] if found else legacy if kind == "search" and legacy.exists() else None


def remove(folder: Path, kind: str) -> None:
    """Removes the checkpoints of a run folder, oldest first."""
    for path in reversed(paths(folder / FOLDERS[kind])):
        path.unlink()
    with suppress(OSError):
        (folder / FOLDERS[kind]).rmdir()


def save(folder: str | Path, state: dict[str, Any]) -> Path:
    """Writes a state as the newest checkpoint of a run folder; returns its path."""
    writer = Writer(Path(folder), state.get("kind", "search"), 1, state["step"])
    writer.write(state)
    path = writer.wait()
    assert path is not None
    return path


def load(folder: str | Path, kind: str = "search") -> tuple[dict[str, Any], Path]:
    """The state of the newest whole checkpoint of a run folder, and its path; of a damaged one a warning tells.

    Raises FileNotFoundError without any, and where none is whole ValueError, which names the newest, and the key where
    it has one.
    """
    found = paths(Path(folder) / FOLDERS[kind])
    if kind == "search" and (Path(folder) / LEGACY).exists():
        found.append(Path(folder) / LEGACY)
    if not found:
        place = Path(folder) / FOLDERS[kind]
        raise FileNotFoundError(f"{place}: no checkpoint in it, expected one that `proxyless-fast {kind}` writes")
    errors = []
    for path in found:
        try:
            state = read(path, kind)
        except ValueError as error:
            errors.append(error)
            continue
        for earlier in errors:
            log.warning("%s; the one before is used, %s", earlier, path.name)
        return state, path
    raise errors[0]


def read(path: Path, kind: str = "search") -> dict[str, Any]:
    """The state in one file. Raises ValueError where it is not ours, damaged, or not finite."""
    named = NAME.fullmatch(path.name)
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path}: is no regular file, expected a checkpoint")
    try:
        if named and _digest(path) != named[2]:
            raise ValueError(f"{path}: damaged, its content is not what was written")
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(f"{path}: "):
            raise
        raise ValueError(f"{path}: not a checkpoint that torch can read ({type(error).__name__})") from error
    state = _state_of(content, path)
    check(SCHEMAS[kind], state, str(path))
    _require_finite(state, str(path))
    return state


def _state_of(content: Any, path: Path) -> dict[str, Any]:
    """The state of what a file holds, of any format that this version reads."""
    if isinstance(content, dict) and content.get("format") == 1:
        return {name: value for name, value in content.items() if name != "format"}
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of format {FORMAT} of this program")
    values, buffers = content.get("values"), content.get("buffers")
    flat = (isinstance(b, Tensor) and b.dim() == 1 for b in buffers) if isinstance(buffers, list) else [False]
    if not isinstance(values, str) or not isinstance(buffers, list) or not all(flat):
        raise ValueError(f"{path}: values must be a text and buffers a list of flat tensors")
    try:
        state = restored(values, buffers)
    except ValueError as error:
        raise ValueError(f"{path}: {said(error)}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: values must be an object, got {short(state)}")
    return state


class _Hashing:
    """A file, with the digest of what is written to it."""

    def __init__(self, file: IO[bytes], digest: Any) -> None:
        self.file, self.digest = file, digest

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _write_hashed(content: dict[str, Any], folder: Path, step: int) -> Path:
    """The content as a file whose name ends in its digest, so that no rename stands between the two."""
    digest = hashlib.sha256()

    def named() -> Path:
        return folder / f"{step:09d}-{digest.hexdigest()[:16]}.pt"

    with atomic(folder / f"{step:09d}.pt", named) as partial, open(partial, "wb") as file:
        torch.save(content, _Hashing(file, digest))  # type: ignore[arg-type]
        file.flush()
    return named()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def _step_of(path: Path) -> int:
    return int(path.name.partition("-")[0])


def _finite(values: Tensor) -> bool:
    """Whether all values are finite, without a tensor of answers."""
    if not values.is_floating_point() or not len(values):
        return True
    plain = values.float() if values.dtype == torch.bfloat16 else values
    array = plain.numpy()  # torch would start threads beside those of the steps
    return bool(abs(array.min()) < float("inf") and abs(array.max()) < float("inf"))


def _require_finite(state: Mapping[str, Any], source: str) -> None:
    """Raises ValueError, which names it, where a weight, an alpha or a moment is not finite; an alpha may be -inf."""

    def look(value: Any, place: str) -> None:
        if isinstance(value, Mapping):
            for name, item in value.items():
                look(item, f"{place}.{name}" if place else str(name))
        elif isinstance(value, Tensor) and value.is_floating_point():
            finite = torch.isfinite(value)
            if place.endswith(".alpha"):  # a candidate that was pruned by an older version
                finite |= value == -torch.inf
            if not bool(finite.all()):
                raise ValueError(f"{source}: {place} must be finite, got {value[~finite].flatten()[0].item()}")

    look(state, "")


def config_of(kind: type, state: Mapping[str, Any], path: Path) -> Any:
    """The settings of a state as a SearchConfig or TrainConfig.

    Raises ValueError, with path and key, where one is missing, unknown or out of range.
    """
    config = {RENAMED.get(name, name): value for name, value in state["config"].items()}
    known = {field.name for field in fields(kind)}
    for name in sorted(known ^ config.keys()):
        raise ValueError(f"{path}: config.{name} is {'unknown' if name in config else 'missing'}")
    try:
        return kind(**config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], place: str) -> None:
    """What it has gathered. The settings of SGD and Adam are the config's, which the state has too; another's are as
    they were saved."""
    fresh = optimizer.state_dict()["param_groups"]
    indices = [group.get("params") for group in saved["param_groups"]]
    if indices != [group["params"] for group in fresh]:
        raise ValueError(
            f"{place}.param_groups does not fit the net's {sum(len(g['params']) for g in fresh)} parameters"
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    expected = MOMENTS.get(type(optimizer).__name__)
    for index, values in saved["state"].items():
        if index >= len(parameters) or (expected is not None and values.keys() != expected):
            names = ", ".join(sorted(expected or ("moments",)))
            raise ValueError(f"{place}.state.{index} must hold {names} of one of {len(parameters)} parameters")
        if expected is None:
            continue
        for name, value in values.items():
            if value is None and name == "momentum_buffer":  # of SGD without momentum
                continue
            shape = () if name == "step" else tuple(parameters[index].shape)
            if not (isinstance(value, Tensor) and value.is_floating_point() and value.shape == shape):
                got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else short(value)
                raise ValueError(f"{place}.state.{index}.{name} must be floating, of shape {shape}, got {got}")
    state = {
        index: {name: _like(value, parameters[index]) for name, value in values.items()}
        for index, values in saved["state"].items()
    }
    groups = fresh if expected else [{**new, **old} for new, old in zip(fresh, saved["param_groups"], strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _like(value: Any, parameter: Tensor) -> Any:
    """A moment in memory of its own, laid out as the parameter is."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value.clone() if isinstance(value, Tensor) else value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _check_archive(path: Path) -> None:
    """ValueError where the archive would unpack to more than it is (torch.save compresses nothing), or is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
            # torch does not compare the check sums, and reads nothing of a member that is marked as a folder
            marked = (member.filename for member in archive.infolist() if member.external_attr & 0x10)
            damaged = next(marked, None) or (archive.testzip() if unpacked <= path.stat().st_size else None)
    except Exception as error:  # zipfile's own, zlib's, and what a header may make of struct and decoders
        raise ValueError(f"{path}: not a checkpoint that torch can read ({type(error).__name__})") from error
    if unpacked > path.stat().st_size:
        raise ValueError(f"{path}: not a checkpoint that torch.save wrote: it would unpack to {unpacked:,} bytes")
    if damaged is not None:
        raise ValueError(f"{path}: damaged, {short(damaged)} is not what was written")
