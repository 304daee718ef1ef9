"""The log of a run: one JSON object a line, and TensorBoard; device values are fetched only when it is flushed."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Journal:
    """Collects scalars per step and writes them to `path` (JSON lines) and to tensorboard/ beside it.

    path None: nothing is written, epoch means are still kept. first_step: records of that step and later, left by a
    run that was cut off after its last checkpoint, are dropped from an existing file.
    """

    def __init__(self, path: Path | None, first_step: int = 0) -> None:
        self._pending: list[tuple[int, str, dict[str, Any]]] = []
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
        self._file = self._board = None
        if path is not None:
            from torch.utils.tensorboard import SummaryWriter

            kept = _records_before(path, first_step)
            self._file = open(path, "w")  # noqa: SIM115  (closed by close)
            self._file.writelines(kept)
            self._board = SummaryWriter(str(path.parent / "tensorboard"), purge_step=first_step or None)

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
        fetched = iter(torch.stack(tensors).tolist() if tensors else ())
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
        self.flush()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        self._file = self._board = None

    def _emit(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    self._board.add_scalar(f"{kind}/{name}", value, step)


def _records_before(path: Path, step: int) -> list[str]:
    if step == 0 or not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    # A run that was killed may have left half a line at the end.
    return [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] < step]
