"""Checks of arguments that several packages share, with messages of one form."""

from __future__ import annotations

from typing import Any


def is_integer(value: Any, least: int) -> bool:
    """Whether value is an integer of at least `least`; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_positive(**values: Any) -> None:
    """Raises ValueError, which names the argument, where a value is no positive integer."""
    for name, value in values.items():
        if not is_integer(value, 1):
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
