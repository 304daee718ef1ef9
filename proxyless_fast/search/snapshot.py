"""A copy of a state, taken between two steps in little time: into memory that is kept from one to the next."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# A dict with this key stands for what JSON does not have: {MARK: [kind, ...]}.
MARK = ""
GROWTH = 1.25  # optimizers gather moments of what they have not met yet


class Snapshot:
    """Of a state of nested dicts, lists, tuples, plain values and tensors: a tree of the rest, and one flat buffer for
    all tensors of a type on a device.

    `take` costs one copy; what is on an accelerator is on its way to the host when it returns, in the order of the
    stream, and there once `buffers` is called.
    """

    def __init__(self) -> None:
        self.values: Any = None
        self._groups: dict[tuple[torch.dtype, torch.device], _Group] = {}
        self._used: list[_Group] = []

    def take(self, state: Mapping[str, Any]) -> None:
        """Copies the state; raises TypeError, which names the type, for what is no plain value."""
        found: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        self.values = _marked(state, found)
        self._used = []
        for key, tensors in found.items():
            group = self._groups.setdefault(key, _Group(*key))
            group.copy(tensors)
            self._used.append(group)

    def reserve(self, state: Mapping[str, Any], factor: float) -> None:
        """Makes memory for `factor` times the tensors of a state, and touches it, so that no step waits for pages."""
        found: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        _marked(state, found)
        for key, tensors in found.items():
            self._groups.setdefault(key, _Group(*key)).reserve(int(factor * sum(t.numel() for t in tensors)))

    def buffers(self) -> list[Tensor]:
        """The tensors' values on the host, one flat tensor for each type, in the order that the tree counts them by."""
        return [group.on_host() for group in self._used]


class _Group:
    """All tensors of a type on a device, one behind the other."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.flat = self.host = torch.empty(0, dtype=dtype)
        self.count = 0
        self.shapes: list[torch.Size] = []
        self.views: list[Tensor] = []
        self.arrived: torch.cuda.Event | None = None

    def reserve(self, count: int) -> None:
        if count > len(self.flat):
            self.flat = torch.zeros(count, dtype=self.dtype, device=self.device)
            local = self.device.type == "cpu"
            pinned = not local and torch.cuda.is_available()
            self.host = self.flat if local else torch.zeros(count, dtype=self.dtype, pin_memory=pinned)
            self.shapes = []

    def copy(self, tensors: list[Tensor]) -> None:
        shapes = [tensor.shape for tensor in tensors]
        if shapes != self.shapes:
            counts = [math.prod(shape) for shape in shapes]
            self.count = sum(counts)
            if self.count > len(self.flat):
                self.reserve(int(GROWTH * self.count))
            parts = self.flat[: self.count].split(counts)
            self.shapes, self.views = shapes, [part.view(s) for part, s in zip(parts, shapes, strict=True)]
        with torch.no_grad():
            torch._foreach_copy_(self.views, tensors)
        if self.host is not self.flat:
            self.host[: self.count].copy_(self.flat[: self.count], non_blocking=True)
            if self.device.type == "cuda":
                self.arrived = torch.cuda.current_stream(self.device).record_event()

    def on_host(self) -> Tensor:
        if self.arrived is not None:
            self.arrived.synchronize()
        # By numpy the memory is a storage of its own: of a slice torch.save would write the whole buffer.
        return torch.from_numpy(self.host[: self.count].view(torch.uint8).numpy()).view(self.dtype)


def _marked(value: Any, found: dict[tuple[torch.dtype, torch.device], list[Tensor]]) -> Any:
    """What JSON can hold of a value; its tensors go to `found`."""
    if isinstance(value, Tensor):
        key = value.dtype, value.device
        number = list(found).index(key) if key in found else len(found)
        found[key].append(value)
        return {MARK: ["tensor", number, list(value.shape)]}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and key != MARK for key in value):
            return {key: _marked(item, found) for key, item in value.items()}
        return {MARK: ["dict", *([_marked(key, found), _marked(item, found)] for key, item in value.items())]}
    if isinstance(value, list):
        return [_marked(item, found) for item in value]
    if isinstance(value, tuple):
        return {MARK: ["tuple", *(_marked(item, found) for item in value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"state: got a {type(value).__name__}, expected tensors, numbers, texts and dicts and lists of such"
    )


def to_text(values: Any) -> str:
    return json.dumps(values, separators=(",", ":"))


def restored(text: str, buffers: Sequence[Tensor]) -> Any:
    """The state that `take` was given, of a tree as text and the buffers. Raises ValueError where they do not fit."""
    places = [0] * len(buffers)

    def unmarked(value: Any) -> Any:
        if isinstance(value, list):
            return [unmarked(item) for item in value]
        if not isinstance(value, dict):
            return value
        if value.keys() != {MARK}:
            return {key: unmarked(item) for key, item in value.items()}
        kind, *rest = value[MARK]
        if kind == "tuple":
            return tuple(unmarked(item) for item in rest)
        if kind == "dict":
            return {unmarked(key): unmarked(item) for key, item in rest}
        number, shape = rest
        start, count = places[number], math.prod(shape)
        places[number] += count
        return buffers[number][start : start + count].view(shape)

    try:
        state = unmarked(json.loads(text))
    except (TypeError, IndexError, RuntimeError, RecursionError) as error:
        raise ValueError(f"its values cannot be read ({error})") from error
    if places != [len(buffer) for buffer in buffers]:
        raise ValueError("its tensors are not all told of")
    return state
