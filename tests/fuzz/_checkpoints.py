"""Checkpoints that no run would write, whole as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from proxyless_fast.search import checkpoint
from proxyless_fast.search.snapshot import Snapshot


def content_of(state: dict[str, Any]) -> dict[str, Any]:
    """What a file of a state holds."""
    snapshot = Snapshot()
    snapshot.take(state)
    return {"format": checkpoint.FORMAT, "values": snapshot.text(), "buffers": snapshot.buffers()}


def rewrite(folder: Path, state: dict[str, Any], kind: str = "search") -> Path:
    """Makes a state the only checkpoint of a run folder, whatever it holds."""
    checkpoint.remove(folder, kind)
    step = state.get("step")
    number = step if isinstance(step, int) and 0 <= step < 10**9 else 0
    return checkpoint._write_hashed(content_of(state), folder / checkpoint.FOLDERS[kind], number)


def only(folder: Path, kind: str = "search") -> Path:
    """The newest checkpoint of a run folder, without those before it."""
    newest, *before = checkpoint.paths(folder / checkpoint.FOLDERS[kind])
    for path in before:
        path.unlink()
    return newest
