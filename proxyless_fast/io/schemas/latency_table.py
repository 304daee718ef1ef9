"""Latency tables: a header of ours, and entries as the official tables have them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from ..text import plain, short
from .common import Real, Strict, Whole

MOST_MS = 1e9  # eleven days: what is above is no latency, and sums of it would overflow

Milliseconds = Annotated[Real, Field(ge=0, le=MOST_MS)]
Ratio = Annotated[Real, Field(ge=0, le=MOST_MS)]
Count = Annotated[Whole, Field(ge=1, le=1 << 62)]


class Header(Strict):
    """What the figures hold for. Entries of the writer's own are taken where they say something."""

    model_config = ConfigDict(extra="allow", strict=True)

    overhead: Milliseconds = 0.0
    path_error: Ratio = 0.0
    scale: Annotated[Real, Field(gt=0, le=MOST_MS)] = 1.0
    threads: Count = 1
    batch: Count = 1
    paths: Annotated[Whole, Field(ge=0, le=1 << 62)] = 0

    @model_validator(mode="after")
    def _notes_say_something(self) -> Header:
        for name, value in (self.model_extra or {}).items():
            _check_note(value, plain(name))
        return self


def _check_note(value: Any, place: str) -> None:
    """ValueError for an entry, or a part of one, that is null or a number that is infinite, negative or NaN."""
    children: Any = ()
    if isinstance(value, Mapping):
        children = value.items()
    elif isinstance(value, list | tuple):
        children = enumerate(value)
    for key, child in children:
        _check_note(child, f"{place}.{plain(str(key))}")
    if value is None or (isinstance(value, int | float) and not 0 <= value < math.inf):
        got = "nothing" if value is None else short(value)
        raise ValueError(f"{place} must be text or a finite number of at least 0, got {got}")


class Entry(Strict):
    """Measurements of one operation, in ms and ms²."""

    count: Count = 1
    mean: Milliseconds
    var: Annotated[Real, Field(ge=0, le=MOST_MS**2)] = 0.0
    median: Milliseconds = Field(default=None)  # type: ignore[assignment]  # absent, not empty, if not measured


def _some(entries: dict[str, Any]) -> dict[str, Any]:
    if not entries:
        raise PydanticCustomError("some", "must hold operations with their means")
    return entries


class LatencyTableFile(Strict):
    """A whole table: the header, and beside it the entries by key."""

    header: Header = Field(default_factory=Header)
    entries: Annotated[dict[str, Entry], AfterValidator(_some)]
