"""JSON documents: read within limits and with errors in one sentence, written whole or not at all."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import atomic
from .text import read_text, said, short

# A thousand times what a net of the paper needs, and little enough that no file takes a second.
MAX_BYTES, MAX_NODES, MAX_DEPTH, MAX_DIGITS = 4 << 20, 200_000, 32, 64


def read(document: Mapping[str, Any] | str | Path, what: str) -> Mapping[str, Any]:
    """The mapping itself, or what a JSON file holds.

    Raises FileNotFoundError, or ValueError for a file that is no JSON object, has a key twice, holds NaN or an
    infinity, or passes a limit of this module. The limits are checked before anything is built.
    """
    if isinstance(document, Mapping):
        return document
    path = Path(document)
    content = parse(read_text(path, what, MAX_BYTES), what, str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be read as {what}: expected a JSON object, got {type(content).__name__}")
    return content


def parse(text: str, what: str, source: str) -> Any:
    """What a JSON text holds, within the limits of this module; ValueError, which names `source`, where it does not."""
    try:
        return _parse(text)
    except ValueError as error:
        raise ValueError(f"{source} cannot be read as {what}: {said(error)}") from error


def write(document: Mapping[str, Any], path: str | Path) -> None:
    """Write a document as JSON; ValueError for NaN and infinities, which JSON cannot say, and for what `read` would not
    take for its size."""
    try:
        text = json.dumps(document, indent=1, allow_nan=False)
    except ValueError as error:
        place = _not_finite(document)
        if place is None:
            raise
        raise ValueError(f"{Path(path)} cannot hold {place}, expected finite numbers") from error
    if len(text) > MAX_BYTES:
        raise ValueError(f"{Path(path)} can hold at most {MAX_BYTES:,} bytes, got a document of {len(text):,}")
    with atomic(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _parse(text: str) -> Any:
    # Escapes can only stand in strings: without them and without the strings, what is left is the structure.
    bare = re.sub('"[^"]*"?', "", text.replace("\\\\", "").replace('\\"', ""))
    depth = deepest = 0
    brackets = re.findall(r"[\[\]{}]", bare)
    for bracket in brackets:
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise ValueError(f"expected at most {MAX_DEPTH} levels of brackets, got {deepest}")
    if bare.count(",") + len(brackets) > MAX_NODES:
        raise ValueError(f"expected at most {MAX_NODES:,} values, got more")
    return json.loads(
        text, parse_int=_integer, parse_float=_finite, parse_constant=_no_constant, object_pairs_hook=_object
    )


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"expected numbers of at most {MAX_DIGITS} digits, got one of {len(digits)}")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"expected finite numbers, got {short(digits)}")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"expected finite numbers, got {name}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {short(key)} stands twice in one object")
        found[key] = value
    return found


def _not_finite(value: Any, place: str = "") -> str | None:
    """The first number in a document that is not finite, with its place."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{place} {value}"
    children = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    found = (_not_finite(child, f"{place}.{key}" if place else str(key)) for key, child in children)
    return next((text for text in found if text), None)
