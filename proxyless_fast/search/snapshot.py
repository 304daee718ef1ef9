"""A copy of a state, taken between two steps in little time: into memory that is kept from one to the next."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._C import copy_behind  # type: ignore[import-not-found]  # compiled

# A dict with this key stands for what JSON does not have: {MARK: [kind, ...]}.
MARK = ""
Kind = tuple[torch.dtype, torch.device]
GROWTH = 1.25  # optimizers gather moments of what they have not met yet


class Snapshot:
    """Of a state of nested dicts, lists, tuples, plain values and tensors: a tree of the rest, and one flat buffer for
    all tensors of a type on a device.

    `take` costs a walk and a copy; what is on an accelerator is on its way to the host when it returns, in the order of
    the stream, and there once `buffers` is called. `text` is the rest, and costs more.
    """

    def __init__(self) -> None:
        self._tree: Any = None
        self._groups: dict[Kind, _Group] = {}
        self._used: list[_Group] = []

    def take(self, state: dict[str, Any]) -> None:
        """Copies the state."""
        found: dict[Kind, list[Tensor]] = {}
        self._tree = _copied(state, found)
        self._used = []
        for kind, tensors in found.items():
            group = self._groups.setdefault(kind, _Group(*kind))
            group.copy(tensors)
            self._used.append(group)

    def reserve(self, state: dict[str, Any], factor: float) -> None:
        """Makes memory for `factor` times the tensors of a state, and touches it, so that no step waits for pages."""
        found: dict[Kind, list[Tensor]] = {}
        _copied(state, found)
        for kind, tensors in found.items():
            self._groups.setdefault(kind, _Group(*kind)).reserve(int(factor * sum(t.numel() for t in tensors)))

    def buffers(self) -> list[Tensor]:
        """The tensors' values on the host, one flat tensor for each type, in the order that the text counts them by."""
        return [group.on_host() for group in self._used]

    def text(self) -> str:
        """All but the tensors' values, as JSON; TypeError, which names the type, for what is no plain value."""
        numbers = {(group.dtype, group.device): number for number, group in enumerate(self._used)}
        return json.dumps(_marked(self._tree, numbers), separators=(",", ":"))


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
        if self.device.type == "cpu":
            # A third of the time of torch's copies, one by one: a few large pieces for all threads.
            dense = [t if t.is_contiguous() else t.detach().contiguous() for t in tensors]
            size = self.dtype.itemsize
            copy_behind([t.data_ptr() for t in dense], [t.numel() * size for t in dense], self.flat.data_ptr())
        else:
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


class _Leaf(tuple):
    """The place of a tensor in a tree: kind and shape (a named tuple would cost a millisecond in all)."""

    __slots__ = ()


def _copied(value: Any, found: dict[Kind, list[Tensor]]) -> Any:
    """The tree of a value, which nobody else changes; its tensors go to `found`."""
    if isinstance(value, Tensor):
        kind = value.dtype, value.device
        tensors = found.get(kind)
        if tensors is None:
            tensors = found[kind] = []
        tensors.append(value)
        return _Leaf((kind, value.shape))
    if isinstance(value, dict):
        return {key: _copied(item, found) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item, found) for item in value]
    if isinstance(value, tuple):
        return tuple(_copied(item, found) for item in value)
    return value


def _marked(value: Any, numbers: dict[Kind, int]) -> Any:
    """A tree as JSON can hold it."""
    if isinstance(value, _Leaf):
        kind, shape = value
        return {MARK: ["tensor", numbers[kind], list(shape)]}
    if isinstance(value, dict):
        if all(isinstance(key, str) and key != MARK for key in value):
            return {key: _marked(item, numbers) for key, item in value.items()}
        return {MARK: ["dict", *([_marked(key, numbers), _marked(item, numbers)] for key, item in value.items())]}
    if isinstance(value, list):
        return [_marked(item, numbers) for item in value]
    if isinstance(value, tuple):
        return {MARK: ["tuple", *(_marked(item, numbers) for item in value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    expected = "tensors, numbers, texts and dicts and lists of such"
    raise TypeError(f"state: got a {type(value).__name__}, expected {expected}")


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
