"""What latency is measured in: a file per runtime, each behind the small protocol `Runtime`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import onnx

from . import onnxruntime


class Session(Protocol):
    """A model ready to run, with an input of its own."""

    def run(self) -> Any:
        """One call on a batch of 1."""


class Runtime(Protocol):
    """What a module of this folder has."""

    name: str

    def versions(self) -> dict[str, str]:
        """What a table's header says of the runtime."""

    def Session(self, model: onnx.ModelProto, threads: int, input_shape: Sequence[int] | None = None) -> Session:
        """`model` on `threads` threads; input_shape: (C, H, W), by default what the model says."""


RUNTIMES: dict[str, Runtime] = {runtime.name: runtime for runtime in (onnxruntime,)}


def find_runtime(name: str) -> Runtime:
    """The runtime of this name. Raises ValueError for another."""
    if name not in RUNTIMES:
        raise ValueError(f"runtime must be {' or '.join(map(repr, RUNTIMES))}, got {name!r}")
    return RUNTIMES[name]
