"""Latency tables: milliseconds by operation and shape, in the official YAML format, with a header of our own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ..checks import is_integer
from ..costs import OpShape
from ..io.schemas import LatencyTableFile, check
from ..io.schemas.latency_table import MOST_MS, Header
from ..io.text import short
from ..io.yaml_documents import read_yaml, write_yaml

HEADER = "header"
ATTRIBUTES = ("expand", "kernel", "stride", "idskip")  # in the order in which the official keys name them
MOST_NAMED = 3  # keys that the message of MissingKey names


class MissingKey(KeyError):
    """A latency table lacks a key; `keys` has all that were missing, the message names the table and the first keys."""

    def __init__(self, keys: Sequence[str], table: str) -> None:
        super().__init__(*keys)
        self.keys, self.table = tuple(keys), table

    def __str__(self) -> str:
        named, more = self.keys[:MOST_NAMED], len(self.keys) - MOST_NAMED
        return f"{self.table} has no latency for {', '.join(named)}{f' and {more} more' if more > 0 else ''}"

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
        """Milliseconds that a net takes once, besides its layers; ValueError where the header has no such number."""
        given: dict[str, Any] = {name: self.header[name] for name in ("overhead", "path_error") if name in self.header}
        return float(check(Header, given, f"the header of {self._name}").overhead)

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
        """Set the measurements of `key`, in ms; ValueError for what is no number from 0 to a billion."""
        for name, value in (("mean", mean), ("var", var), ("median", median)):
            most = MOST_MS**2 if name == "var" else MOST_MS
            unknown = value is None and name == "median"
            if not unknown and not (_is_number(value) and 0 <= value <= most):
                raise ValueError(f"{name} of {key} must be a number from 0 to {most:g}, got {short(value)}")
        if not is_integer(count, 1):
            raise ValueError(f"count of {key} must be a positive integer, got {short(count)}")
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
        """Read a table, the official one or ours.

        Raises FileNotFoundError, or ValueError with the file, the key and the reason where it is none.
        """
        content = read_yaml(path, "latency table")
        if not isinstance(content, dict):
            raise ValueError(f"{path} is not a latency table: expected keys with count, mean and var")
        header = {HEADER: content.pop(HEADER)} if HEADER in content else {}
        read = check(LatencyTableFile, {**header, "entries": content}, f"{path} is not a latency table")
        table = cls(header.get(HEADER), path)
        for key, entry in read.entries.items():
            table.add(key, entry.mean, entry.count, entry.var, entry.median)
        return table

    def save(self, path: str | Path) -> None:
        """Write the table as YAML; it appears under its name only when it is complete.

        Raises ValueError for a header that `load` would refuse, yaml.YAMLError for one that YAML cannot say.
        """
        check(Header, self.header, f"the header of {self._name}")
        content: dict[str, Any] = {HEADER: self.header} if self.header else {}
        for key in sorted(self._entries):
            entry = self._entries[key]
            # The median stands before what must be there, so that a file that was cut within it is refused.
            median = {} if entry.median is None else {"median": entry.median}
            content[key] = {"count": entry.count, **median, "mean": entry.mean, "var": entry.var}
        write_yaml(content, path)
        self.path = str(path)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sizes(shape: Sequence[int] | int | str) -> tuple[int, ...]:
    if isinstance(shape, int):
        return (shape,)
    if isinstance(shape, str):
        return tuple(int(size) for size in shape.split("x"))
    return tuple(shape)
