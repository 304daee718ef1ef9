"""Latency tables: milliseconds by operation and shape, in the official YAML format, with a header of our own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..checks import is_integer
from ..costs import OpShape
from ..io.files import atomic

HEADER = "header"
ATTRIBUTES = ("expand", "kernel", "stride", "idskip")  # in the order in which the official keys name them

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class MissingKey(KeyError):
    """A latency table lacks a key; `keys` has all that were missing, and the message names them and the table."""

    def __init__(self, keys: Sequence[str], table: str) -> None:
        super().__init__(*keys)
        self.keys, self.table = tuple(keys), table

    def __str__(self) -> str:
        return f"{self.table} has no latency for {', '.join(self.keys)}"

    def __reduce__(self) -> tuple:
        return MissingKey, (self.keys, self.table)


@dataclass(frozen=True)
class Entry:
    """Measurements of one operation: how many, their mean and variance in ms and ms², and the median where known."""

    count: int
    mean: float
    var: float = 0.0
    median: float | None = None

    @property
    def ms(self) -> float:
        """The figure to use: the median where it was measured, else the mean."""
        return self.mean if self.median is None else self.median


class LatencyTable:
    """A map from official keys (official search/utils/latency_estimator.py) to measurements in milliseconds.

    header: what the figures hold for (device, runtime, threads, dtype, batch, date, versions). Its entry `overhead` is
    the latency in ms that a whole net has once, besides its layers; official tables have none.
    """

    def __init__(self, header: dict[str, Any] | None = None, path: str | Path | None = None) -> None:
        self.header: dict[str, Any] = dict(header or {})
        self.path = None if path is None else str(path)
        self._entries: dict[str, Entry] = {}

    @property
    def overhead(self) -> float:
        """Milliseconds that a net takes once, besides its layers."""
        return float(self.header.get("overhead", 0.0))

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __getitem__(self, key: str) -> Entry:
        if key not in self._entries:
            raise MissingKey([key], self._name)
        return self._entries[key]

    def __repr__(self) -> str:
        return f"LatencyTable({self._name}: {len(self)} keys, {self.header.get('device', 'device not recorded')})"

    @property
    def _name(self) -> str:
        return "the latency table" if self.path is None else f"the latency table {self.path}"

    def add(self, key: str, mean: float, count: int = 1, var: float = 0.0, median: float | None = None) -> None:
        """Set the measurements of `key`, in ms; ValueError for a latency that is not a non-negative number."""
        for name, value in (("mean", mean), ("var", var), ("median", median)):
            if value is not None and not (_is_number(value) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} of {key} must be a non-negative number, got {value!r}")
        if not is_integer(count, 1):
            raise ValueError(f"count of {key} must be a positive integer, got {count!r}")
        self._entries[key] = Entry(count, float(mean), float(var), None if median is None else float(median))

    def lookup(self, shape: OpShape | str) -> float:
        """Milliseconds of one operation, given by its shape or its key; MissingKey when the table lacks it."""
        return self[shape if isinstance(shape, str) else shape.key].ms

    def lookup_all(self, shapes: Iterable[OpShape]) -> list[float]:
        """Milliseconds of several operations; one MissingKey lists all the keys that the table lacks."""
        keys = [shape.key for shape in shapes]
        missing = [key for key in dict.fromkeys(keys) if key not in self]
        if missing:
            raise MissingKey(missing, self._name)
        return [self._entries[key].ms for key in keys]

    def predict(
        self, kind: str, input: Sequence[int] | str, output: Sequence[int] | int | str, **attributes: int
    ) -> float:
        """Milliseconds of one operation, named as the official estimator names it.

        kind: "Conv", "Conv_1", "Logits", "expanded_conv" (which takes expand, kernel, stride and idskip), or another
        kind of `OpShape`. input, output: (height, width, channels), or (features,). Raises MissingKey when the table
        lacks the key and ValueError when an attribute of expanded_conv is not given.
        """
        if kind == "expanded_conv":
            absent = [name for name in ATTRIBUTES if name not in attributes]
            if absent:
                raise ValueError(f"expanded_conv needs {', '.join(ATTRIBUTES)}; got no {', '.join(absent)}")
        rank = {name: i for i, name in enumerate(ATTRIBUTES)}
        ordered = sorted(attributes.items(), key=lambda item: rank.get(item[0], len(rank)))
        return self.lookup(OpShape(kind, _sizes(input), _sizes(output), tuple(ordered)))

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a table, the official one or ours; FileNotFoundError or ValueError when there is none at `path`."""
        path = Path(path)
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
        except FileNotFoundError:
            raise FileNotFoundError(f"no latency table at {path}") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = str(error).replace("\n", " ")
            raise ValueError(f"{path} cannot be read as a latency table: {reason}") from error
        if not isinstance(content, dict) or not content:
            raise ValueError(f"{path} is not a latency table: expected keys with count, mean and var")
        header = content.pop(HEADER, {})
        if not isinstance(header, dict) or not _is_number(header.get("overhead", 0.0)):
            raise ValueError(f"{path} is not a latency table: its header is not one")
        table = cls(header, path)
        for key, entry in content.items():
            if not isinstance(entry, dict) or "mean" not in entry:
                raise ValueError(f"{path} is not a latency table: {key} has no mean")
            try:
                table.add(str(key), entry["mean"], entry.get("count", 1), entry.get("var", 0.0), entry.get("median"))
            except ValueError as error:
                raise ValueError(f"{path} is not a latency table: {error}") from None
        return table

    def save(self, path: str | Path) -> None:
        """Write the table as YAML; it appears under its name only when it is complete."""
        path = Path(path)
        content: dict[str, Any] = {HEADER: self.header} if self.header else {}
        for key in sorted(self._entries):
            entry = self._entries[key]
            content[key] = {"count": entry.count, "mean": entry.mean, "var": entry.var}
            if entry.median is not None:
                content[key]["median"] = entry.median
        text = yaml.dump(content, Dumper=_Dumper, sort_keys=False)
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        self.path = str(path)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sizes(shape: Sequence[int] | int | str) -> tuple[int, ...]:
    if isinstance(shape, int):
        return (shape,)
    if isinstance(shape, str):
        return tuple(int(size) for size in shape.split("x"))
    return tuple(shape)
