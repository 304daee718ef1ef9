"""The log of a run: one JSON object a line, and TensorBoard; device values are fetched only when it is flushed."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import is_integer
from ..io.files import atomic
from ..io.text import said, short


class Journal:
    """Collects scalars per step and writes them to `path` (JSON lines) and to tensorboard/ beside it.

    mean: over the processes, of the values of one.
    path None: nothing is written, epoch means are still kept. first_step: records of that step and later, left by a
    run that was cut off after its last checkpoint, are dropped from an existing file. Raises OSError, with the path,
    where the system cannot write it, ValueError where an existing file is no log.
    """

    def __init__(
        self, path: Path | None, first_step: int = 0, mean: Callable[[Tensor], Tensor] = lambda values: values
    ) -> None:
        self._mean = mean
        self._pending: list[tuple[int, str, dict[str, Any]]] = []
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
        self._file = self._board = None
        if path is not None:
            self._path, self._folder = path, path.parent / "tensorboard"
            from torch.utils.tensorboard import SummaryWriter

            kept = _records_before(path, first_step)
            with atomic(path) as temporary:
                temporary.write_bytes(b"".join(kept))
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (closed by close)
            self._board = SummaryWriter(str(self._folder), purge_step=first_step or None)

    def add(self, step: int, kind: str, **values: Tensor | float | None) -> None:
        """Notes scalars (tensors stay on their device) of one step; None is left out."""
        # Detached: a loss kept with its graph would keep the graph.
        plain = {k: v.detach() if isinstance(v, Tensor) else v for k, v in values.items() if v is not None}
        self._pending.append((step, kind, plain))

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Writes one record of plain values at once, after those that were noted before it."""
        self.flush()
        self._emit(step, kind, values)

    def flush(self) -> dict[str, float]:
        """Fetches all that was noted since the last flush in one copy, writes it, and returns the newest values."""
        tensors = [v.float().reshape(()) for _, _, vs in self._pending for v in vs.values() if isinstance(v, Tensor)]
        fetched = iter(self._mean(torch.stack(tensors).cpu()).tolist() if tensors else ())
        newest = {}
        for step, kind, values in self._pending:
            plain = {k: next(fetched) if isinstance(v, Tensor) else float(v) for k, v in values.items()}
            for name, value in plain.items():
                total = self._sums[f"{kind}_{name}"]
                total[0] += value
                total[1] += 1
                newest[f"{kind}_{name}"] = value
            self._emit(step, kind, plain)
        self._pending.clear()
        if self._file is not None:
            with _named(self._path):
                self._file.flush()
        return newest

    def close_epoch(self) -> dict[str, float]:
        """The mean of each name since the last call."""
        self.flush()
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums.clear()
        return means

    def state_dict(self) -> dict[str, list[float]]:
        self.flush()
        return {name: list(total) for name, total in self._sums.items()}

    def load_state_dict(self, sums: Mapping[str, list[float]]) -> None:
        self._sums.update({name: list(total) for name, total in sums.items()})

    def close(self) -> None:
        try:
            self.flush()
            if self._board is not None:
                with _named(self._folder):
                    self._board.flush()
        finally:
            for writer in (self._file, self._board):
                if writer is not None:
                    with suppress(OSError):  # was said when it was flushed
                        writer.close()
            self._file = self._board = None

    def _emit(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        if self._file is not None:
            with _named(self._path):
                self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    with _named(self._folder):
                        self._board.add_scalar(f"{kind}/{name}", value, step)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """The system's errors within name the path."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error


def _records_before(path: Path, step: int) -> list[bytes]:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path}: is no regular file, expected the log of a search")
    if step == 0 or not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"}\n"):
        lines.pop()  # half a line of a run that was killed
    return [line for number, line in enumerate(lines, 1) if _step_of(line, path, number) < step]


def _step_of(line: bytes, path: Path, number: int) -> int:
    """The step of a record; ValueError with the file, the line and the key where it has none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: line {number} is no record of a search ({said(error)}); without the file the search goes on, "
            "with a new log"
        ) from error
    step: Any = record.get("step") if isinstance(record, dict) else None
    if not is_integer(step, 0):
        raise ValueError(f"{path}: step of line {number} must be a whole number of at least 0, got {short(step)}")
    return step
