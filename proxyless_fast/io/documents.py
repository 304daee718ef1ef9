"""JSON documents: read with errors in one sentence, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import atomic


def read(document: Mapping[str, Any] | str | Path, what: str) -> Mapping[str, Any]:
    """The mapping itself, or what a JSON file holds; FileNotFoundError, or ValueError when it is no JSON object."""
    if isinstance(document, Mapping):
        return document
    path = Path(document)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no {what} at {path}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as {what}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be read as {what}: expected a JSON object, got {type(content).__name__}")
    return content


def write(document: Mapping[str, Any], path: str | Path) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
