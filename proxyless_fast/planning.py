"""How large a batch fits into memory, before anything large runs."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .checks import is_integer, told
from .fusion import POLICIES, set_policy
from .supernet import arch_parameters, frozen, mixed_ops, weight_parameters

SMALL = 2, 4  # batches that are tried: every tensor of a step grows on a line from one to the other
STREAMED_BYTES, STREAMED_IMAGES = 128 << 20, 4  # csrc/cpu/ops/mbconv_forward.cpp: wide tensors beyond are not written
POOLED_BYTES, PAGE = 256 << 10, 4096  # csrc/cpu/ops/memory.cpp
TILE_BYTES = 1 << 20  # what a thread of the CPU ops works on

_OPS = ("mbconv", "mbconv_backward", "mbconv_probe")


class Plan(NamedTuple):
    """What fits: by policy, images of the largest batch, 0 where not even one does; and what it was found from.

    kept_bytes: weights, statistics and momentum, which are there whatever the batch. step_bytes: policy -> function of
    the batch, the most that a weight step or an arch step needs beside them, in bytes.
    """

    largest: dict[str, int]
    kept_bytes: int
    step_bytes: dict[str, Callable[[int], int]]


def plan(
    net: nn.Module,
    budget_bytes: int,
    *,
    image: tuple[int, int, int] | None = None,
    step: Callable[[nn.Module, Tensor], Tensor] | None = None,
    policies: tuple[str, ...] = ("fast", "lean", "off"),
) -> Plan:
    """The largest batch of a search within a budget, for each policy of `set_policy`.

    net: a supernet (or any module), on the CPU, in float32. budget_bytes: for weights, momentum, gradients, activations
    and scratch memory together. image: (channels, height, width); by default as the net says. step: (net, images) to a
    scalar loss; default: the cross-entropy of net(images). policies: those to plan for.

    A weight step and an arch step of the largest paths run with 2 and with 4 images on a copy of the net; what each of
    their ops takes and gives back is replayed for larger batches. Raises ValueError for a budget that is no positive
    integer, an unknown policy, a net elsewhere than on the CPU, or one that does not tell its images where image is not
    given.

    Example: `pf.plan(pf.spaces.mobile(), 8 << 30).largest["lean"]`.
    """
    if not is_integer(budget_bytes, 1):
        raise ValueError(f"budget_bytes: got {budget_bytes!r}, expected a positive integer")
    for policy in policies:
        if policy not in POLICIES or policy == "auto":
            raise ValueError(f"policies: got {policy!r}, expected fast, lean or off")
    shape = _image_of(net) if image is None else tuple(image)
    tensors = [*net.parameters(), *net.buffers()]
    if any(t.device.type != "cpu" for t in tensors):
        raise ValueError("net: got one that is not on the CPU, expected to plan before it is moved to its device")
    kept = sum(t.numel() * t.element_size() for t in tensors)
    kept += sum(p.numel() * p.element_size() for p in weight_parameters(net))  # momentum
    own = copy.deepcopy(net).train()
    loss = step or (lambda net, images: cross_entropy(net(images), torch.zeros(len(images), dtype=torch.long)))
    needs = {}
    for policy in policies:
        set_policy(own, policy)
        needs[policy] = _most_of([*_traces(own, loss, shape)])
    largest = {policy: _largest(need, budget_bytes - kept) for policy, need in needs.items()}
    return Plan(largest, kept, needs)


def _image_of(net: nn.Module) -> tuple[int, int, int]:
    channels, side = told(net, "in_channels"), told(net, "resolution")
    if channels is None or side is None:
        raise ValueError(f"image: got None, and {type(net).__name__} does not tell in_channels and resolution")
    return channels, side, side


class _Event(NamedTuple):
    """A tensor that an op made (key above 0), that went (its key, negative), or scratch memory of one op (key 0).

    pooled: in the memory that the CPU ops keep (csrc/cpu/ops/memory.cpp). copies: of scratch memory, how many wide
    tensors it is.
    """

    key: int
    size: int
    pooled: bool
    copies: int = 0


def _traces(net: nn.Module, loss: Callable, shape: tuple) -> Iterator[tuple[list[_Event], list[_Event]]]:
    """The events of each kind of step with the two small batches."""
    ops = list(mixed_ops(net).values())
    paths = range(max((len(op) for op in ops), default=1))
    for mode in ("path", "full") if ops else ("path",):
        for place in paths:
            found = []
            for images in SMALL:
                for op in ops:
                    op.activate(min(place, len(op) - 1), mode=mode)  # type: ignore[arg-type]
                found.append(_trace(net, loss, torch.zeros(images, *shape), mode))
            yield found[0], found[1]


def _trace(net: nn.Module, loss: Callable, images: Tensor, mode: str) -> list[_Event]:
    """The events of one step; its parameters' gradients are made in it and dropped after it."""
    still = weight_parameters(net) if mode == "full" else arch_parameters(net)
    with frozen(list(still)), _Watch() as watch:
        loss(net, images).backward()
    net.zero_grad(set_to_none=True)
    return watch.events


class _Watch(TorchDispatchMode):
    """Notes the memory that ops take and give back within, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[_Event] = []
        self._keys: dict[int, int] = {}  # by address
        self._last = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        ours, name = function.namespace == "proxyless_fast", function.overloadpacket.__name__
        given = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self._add(tensor, given, ours)
        if ours:  # which read images as channels-last, and copy those that are not
            copied = sum(t.nbytes for t in pytree.tree_leaves(args) if isinstance(t, Tensor) and not _as_read(t))
            self.events.append(_Event(0, copied, False))
        copies, size = _wide(name, args) if ours and name in _OPS else (0, 0)
        if copies:  # beside what the op made
            self.events.append(_Event(0, copies * size, True, copies))
        return out

    def _add(self, tensor: Tensor, given: set[int], ours: bool) -> None:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in given or address in self._keys or not storage.nbytes():
            return
        self._last += 1
        self._keys[address] = self._last
        self.events.append(_Event(self._last, storage.nbytes(), ours))
        weakref.finalize(storage, self._drop, address, self._last)

    def _drop(self, address: int, key: int) -> None:
        if self._keys.get(address) == key:
            del self._keys[address]
        self.events.append(_Event(-key, 0, False))


def _as_read(t: Tensor) -> bool:
    return t.dim() != 4 or t.is_contiguous(memory_format=torch.channels_last)


def _wide(name: str, args: tuple) -> tuple[int, int]:
    """(copies, bytes of one) of the depthwise output, or its gradient, in an op's scratch memory."""
    if name == "mbconv":
        x, params, stride, keep = args[0], [args[1]], args[5], args[9]
        copies = 0 if keep == 2 else 1
    elif name == "mbconv_backward":
        x, params, stride = args[1], [args[5]], args[8]
        copies = 1 if args[3].numel() else 2
    else:
        x, stride, sizes = args[0], args[7], args[4]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        params, copies = [args[2][a : a + n] for a, n in zip(starts, sizes, strict=True)], 1
    rows, columns = (math.ceil(side / stride) for side in x.shape[2:])
    most = max(math.ceil(p[-6].shape[0] / 16) * 16 for p in params)
    return copies, most * len(x) * rows * columns * x.element_size()


def _most_of(traces: list[tuple[list[_Event], list[_Event]]]) -> Callable[[int], int]:
    """Bytes of a step by its batch, of the traces that need most; each size is on its line through the two batches."""
    few, more = SMALL
    scripts = []
    for one, two in traces:
        if [event[0::2] for event in one] != [event[0::2] for event in two]:
            raise ValueError(f"net: ran other ops with {more} images than with {few}, expected the same for any batch")
        slopes = [(b.size - a.size) / (more - few) for a, b in zip(one, two, strict=True)]
        scripts.append([(event, event.size - few * slope, slope) for event, slope in zip(one, slopes, strict=True)])

    def sized(script: list, images: int) -> list[_Event]:
        return [event._replace(size=int(base + slope * images)) for event, base, slope in script]

    # What holds most without the pool's gaps is what is replayed with them.
    largest = sorted(scripts, key=lambda script: -_replayed(sized(script, 64), 64, False))[:3]
    tiles = TILE_BYTES * torch.get_num_threads()
    return lambda images: tiles + max(_replayed(sized(script, images), images) for script in largest)


def _replayed(events: list[_Event], images: int, gaps: bool = True) -> int:
    """The most bytes that are resident in a step. What the pool has touched stays so, gaps included."""
    pool, held, plain, most = _Pool(), {}, 0, 0
    for event in events:
        size, pooled = event.size, event.pooled and event.size >= POOLED_BYTES and gaps
        if event.copies and size // event.copies > STREAMED_BYTES and images >= STREAMED_IMAGES:
            continue
        if event.key >= 0 and pooled:
            held[event.key] = pool.take(size), size
        elif event.key >= 0:
            plain += size
            held[event.key] = -1, size
        most = max(most, pool.touched + plain)
        if event.key <= 0 and -event.key in held:
            place, size = held.pop(-event.key)
            if place < 0:
                plain -= size
            else:
                pool.give(place, size)
    return most


class _Pool:
    """Where csrc/cpu/ops/memory.cpp puts what it is asked for: at the lowest place that is large enough."""

    def __init__(self) -> None:
        self.free: list[tuple[int, int]] = [(0, 1 << 62)]
        self.touched = 0

    def take(self, size: int) -> int:
        size = -(-size // PAGE) * PAGE
        at = next(i for i, (_, room) in enumerate(self.free) if room >= size)
        start, room = self.free.pop(at)
        if room > size:
            self.free.insert(at, (start + size, room - size))
        self.touched = max(self.touched, start + size)
        return start

    def give(self, start: int, size: int) -> None:
        size = -(-size // PAGE) * PAGE
        at = next(i for i, (other, _) in enumerate(self.free) if other > start)
        self.free.insert(at, (start, size))
        for i in (at, at - 1):  # joined with its free neighbours
            if 0 <= i < len(self.free) - 1 and sum(self.free[i]) == self.free[i + 1][0]:
                self.free[i : i + 2] = [(self.free[i][0], self.free[i][1] + self.free[i + 1][1])]


def _largest(need: Callable[[int], int], budget: int) -> int:
    """The largest batch that needs no more than the budget, by halves: of streams it may be a little less."""
    most = 1
    while need(most) <= budget and most < 1 << 30:
        most *= 2
    fits, least = most // 2, most
    while least - fits > max(1, fits // 1024):
        middle = (fits + least) // 2
        fits, least = (middle, least) if need(middle) <= budget else (fits, middle)
    return fits
