"""The log of a run: one JSON object a line, and TensorBoard; device values are fetched only when it is flushed."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..checks import is_integer

log = logging.getLogger(__name__)


class Journal:
    """Collects scalars per step; between `open` and `close` it also writes them, as JSON lines and for TensorBoard.

    `sums` has the total and the count of each name since the last epoch. `lengths` has the bytes of each file that hold
    what was noted so far: a checkpoint keeps them, and by them a resumed run cuts off what came after it.

    mean: over the processes, of the values of one; all must flush at the same step.
    """

    def __init__(self, mean: Callable[[Tensor], Tensor] = lambda values: values) -> None:
        self._mean = mean
        self._pending: list[tuple[int, str, dict[str, Any]]] = []
        self.sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
        self.lengths: dict[str, int] = {}
        self._lines: IO[bytes] | None = None
        self._board: _Board | None = None

    def open(self, path: Path) -> None:
        """Goes on writing to `path`, and to tensorboard/ beside it, from where `lengths` says; without, anew.

        Raises OSError, with the path, where the system cannot write, ValueError where a file is no regular one.
        """
        events = path.parent / "tensorboard" / f"events.out.tfevents.{path.stem}"
        events.parent.mkdir(parents=True, exist_ok=True)
        self._lines = _cut(path, self.lengths.get(path.name, 0))
        self._board = _Board(_cut(events, self.lengths.get(events.name, 0)), events)
        self._path, self._events = path, events
        self._note_lengths()

    def add(self, step: int, kind: str, **values: Tensor | float | None) -> None:
        """Notes scalars (tensors stay on their device) of one step; None is left out."""
        # Detached: a loss kept with its graph would keep the graph.
        plain = {k: v.detach() if isinstance(v, Tensor) else v for k, v in values.items() if v is not None}
        self._pending.append((step, kind, plain))

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Writes one record of plain values at once, after those that were noted before it."""
        self.flush()
        self._emit(step, kind, values)

    def measure(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Writes what a clock says, for TensorBoard alone: the lines of a run are the same however often it stopped."""
        if self._board is not None:
            with _named(self._events):
                self._board.write(step, kind, values)
        self._note_lengths()

    def flush(self) -> dict[str, float]:
        """Fetches all that was noted since the last flush in one copy, writes it, and returns the newest values."""
        tensors = [v.float().reshape(()) for _, _, vs in self._pending for v in vs.values() if isinstance(v, Tensor)]
        fetched = iter(self._mean(torch.stack(tensors).cpu()).tolist() if tensors else ())
        newest = {}
        pending, self._pending = self._pending, []
        for step, kind, values in pending:
            plain = {k: next(fetched) if isinstance(v, Tensor) else float(v) for k, v in values.items()}
            for name, value in plain.items():
                total = self.sums[f"{kind}_{name}"]
                total[0] += value
                total[1] += 1
                newest[f"{kind}_{name}"] = value
            self._emit(step, kind, plain)
        self._note_lengths()
        return newest

    def close_epoch(self) -> dict[str, float]:
        """The mean of each name since the last call."""
        self.flush()
        means = {name: total / count for name, (total, count) in self.sums.items()}
        self.sums.clear()
        return means

    def state(self) -> dict[str, Any]:
        """`sums` and the lengths, of all that was noted so far, for a checkpoint."""
        self.flush()
        return {"sums": {name: list(total) for name, total in self.sums.items()}, "log": dict(self.lengths)}

    def sync(self) -> None:
        """What was flushed is on the disk when this returns; may be called from another thread."""
        for file, path in self._files():
            with _named(path):
                os.fsync(file.fileno())

    def close(self) -> None:
        try:
            self.flush()
        finally:
            for file, _ in self._files():
                with suppress(OSError):  # was said when it was flushed
                    file.close()
            self._lines = self._board = None

    def _files(self) -> list[tuple[IO[bytes], Path]]:
        if self._lines is None or self._board is None:
            return []
        return [(self._lines, self._path), (self._board.file, self._events)]

    def _note_lengths(self) -> None:
        for file, path in self._files():
            with _named(path):
                file.flush()
                self.lengths[path.name] = file.tell()

    def _emit(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        if self._lines is None or self._board is None:
            return
        with _named(self._path):
            self._lines.write(f"{json.dumps({'step': step, 'kind': kind, **values})}\n".encode())
        with _named(self._events):
            self._board.write(step, kind, values)


class _Board:
    """TensorBoard's event file, written at once: its own writer has a thread, which knows of no checkpoint."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.file, self._event, self._summary = file, Event, Summary
        self._records = RecordWriter(file)
        if not file.tell():
            with _named(path):
                self._records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        shown = [
            self._summary.Value(tag=f"{kind}/{name}", simple_value=value)
            for name, value in values.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        ]
        if shown:
            event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=shown))
            self._records.write(event.SerializeToString())


def length_before(path: Path, step: int) -> int:
    """Bytes of a log's lines before the first record of `step` or later, and before half a line at its end.

    For checkpoints of older versions, which know no lengths.
    """
    if not path.is_file():
        return 0
    length = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
            of_later = isinstance(record, dict) and is_integer(record.get("step"), step)
        except (ValueError, RecursionError):
            of_later = not line.endswith(b"\n")
        if of_later:
            break
        length += len(line)
    return length


def _cut(path: Path, length: int) -> IO[bytes]:
    """The file, open for writing behind its first `length` bytes, without what came after them.

    The bytes before are never written again, so that neither a kill nor a full disk can take them.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path}: is no regular file, expected the log of a run")
    with _named(path):
        file = open(path, "ab")  # noqa: SIM115  (closed by the journal)
        found = file.tell()
        if found < length:
            log.warning("%s has %s bytes, of %s that the checkpoint knows: records are missing", path, found, length)
        elif found > length:
            file.truncate(length)
            file.seek(length)
    return file


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """The system's errors within name the path."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error
