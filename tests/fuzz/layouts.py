"""Every native op and its backward on tensors of any layout in memory, beside plain torch in float64.

`python -m tests.fuzz.layouts [--seconds N] [--seed S] [--cases N]`. A case is one valid call, each tensor of which lies
in memory in its own way: sliced, broadcast, transposed, overlapping, at an offset. Prints the failing case and exits
with 1.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.fuzz._command import from_command_line
from tests.fuzz._ops import MOVES, OPS, Arguments, Call, Draw, outputs_of

# Of the largest value: rounding grows in a batch norm of few values, whose variance may be near eps.
CLOSE = {torch.float32: 6e-4, torch.float64: 3e-9}


def dense(t: Tensor, draw: random.Random) -> Tensor:
    return t


def channels_last(t: Tensor, draw: random.Random) -> Tensor:
    return t.to(memory_format=torch.channels_last) if t.dim() == 4 else t


def transposed(t: Tensor, draw: random.Random) -> Tensor:
    order = draw.sample(range(t.dim()), t.dim())
    back = [order.index(i) for i in range(t.dim())]
    return t.permute(order).contiguous().permute(back)


def stepped(t: Tensor, draw: random.Random) -> Tensor:
    """Every second, or third, of a dimension."""
    dim, step = draw.randrange(t.dim()), draw.choice((2, 3))
    wide = torch.full([n * step if i == dim else n for i, n in enumerate(t.shape)], 1e30, dtype=t.dtype)
    view = wide[(slice(None),) * dim + (slice(draw.randrange(step), None, step),)]
    view.copy_(t)
    return view


def cut(t: Tensor, draw: random.Random) -> Tensor:
    """A window of something larger, at an offset."""
    wide = torch.full([n + draw.choice((0, 0, 1, 3)) for n in t.shape], -1e30, dtype=t.dtype)
    if draw.random() < 0.5:
        wide = channels_last(wide, draw)
    starts = [draw.randint(0, w - n) for w, n in zip(wide.shape, t.shape, strict=True)]
    view = wide[tuple(slice(s, s + n) for s, n in zip(starts, t.shape, strict=True))]
    view.copy_(t)
    return view


def offset(t: Tensor, draw: random.Random) -> Tensor:
    start = draw.choice((1, 2, 3, 7))
    flat = torch.full((t.numel() + start,), 1e30, dtype=t.dtype)
    flat[start:] = t.reshape(-1)
    return flat[start:].view(t.shape)


def odd_strides_of_ones(t: Tensor, draw: random.Random) -> Tensor:
    """Dimensions of size 1 may have any stride: what looks channels-last need not be."""
    strides = [draw.choice((0, 1, 7, s)) if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)]
    return t.contiguous().as_strided(t.shape, strides) if t.is_contiguous() else t


def broadcast(t: Tensor, draw: random.Random) -> Tensor:
    """One entry of a dimension in place of all."""
    dim = draw.randrange(t.dim())
    return t.narrow(dim, 0, 1).expand(t.shape)


def overlapping(t: Tensor, draw: random.Random) -> Tensor:
    """Windows that share their values, as unfold gives them."""
    if t.dim() < 2:
        return t
    strides = [draw.choice((1, 2)) for _ in t.shape]
    n = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, strides, strict=True))
    return t.reshape(-1)[torch.arange(n) % t.numel()].as_strided(t.shape, strides)


def conjugated(t: Tensor, draw: random.Random) -> Tensor:
    """A view whose values are to be negated when they are read."""
    return torch._neg_view(-t)


LAYOUTS: list[Callable[[Tensor, random.Random], Tensor]] = [
    dense, channels_last, transposed, stepped, cut, offset, odd_strides_of_ones, broadcast, overlapping, conjugated,
]  # fmt: skip
OWN_MEMORY = [dense, stepped, offset, cut]  # for what is written to


def laid_out(call: Call, draw: random.Random) -> tuple[Arguments, Arguments, str]:
    """What the reference and what the op is given, each tensor in a layout of its own, and what was done."""
    done = []

    def lay(place: str, value: Any, layouts: list) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0 or value.numel() == 0:
            return value
        layout = draw.choice(layouts)
        done.append(f"{place} {layout.__name__}")
        return layout(value, draw)

    def each(arguments: Arguments, done_before: Arguments) -> Arguments:
        found: Arguments = {}
        for name, value in arguments.items():
            if name in done_before and done_before[name] is value:
                found[name] = value
                continue
            layouts = OWN_MEMORY if name == "running" and call.op in MOVES else LAYOUTS
            # Half of the statistics are variances; and other values than the forward's would make another backward.
            if name == "statistics" or (name in ("y", "d", "mean", "cov") and call.arguments.get(name) is None):
                layouts = [layout for layout in LAYOUTS if layout not in (broadcast, overlapping)]
            if isinstance(value, list):
                found[name] = [lay(f"{name}[{i}]", item, layouts) for i, item in enumerate(value)]
            else:
                found[name] = lay(name, value, layouts)
        return found

    given = each(call.arguments, {})
    return given, each(call.complete(given), given), ", ".join(done)


def in_float64(arguments: Arguments) -> Arguments:
    def wide(value: Any) -> Any:
        return value.double().clone().contiguous() if isinstance(value, Tensor) else value

    return pytree.tree_map(wide, arguments)


def wrong(call: Call, draw: random.Random, dtype: torch.dtype) -> str:
    """What the op computed that plain torch does not; empty if nothing."""
    given, arguments, done = laid_out(call, draw)
    try:
        found = outputs_of(call.op, arguments)
    except Exception as error:
        return f"{done}: {type(error).__name__}: {error}"
    exact = call.reference(in_float64(given))
    moved = len(given["running"]) if call.op in MOVES else 0
    pairs = list(zip(found, exact, strict=False))
    if moved and call.op == "mbconv_probe":
        pairs = pairs[:1] + list(zip(found[1:], _moved_by_reference(call, given), strict=True))
    for i, (ours, truth) in enumerate(pairs):
        if truth is None:
            continue
        scale = max(float(truth.abs().max()) if truth.numel() else 0.0, 1.0)
        if ours.shape != truth.shape:
            return f"{done}: output {i} has shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
        error = float((ours.double() - truth).abs().max()) if truth.numel() else 0.0
        if not error <= CLOSE[dtype] * scale:
            return f"{done}: output {i} is wrong by {error:.3g} of {scale:.3g}"
    return ""


def _moved_by_reference(call: Call, given: Arguments) -> list[Tensor]:
    exact = in_float64(given)
    call.reference(exact)
    return exact["running"]


def main(seconds: float, seed: int, cases: int) -> int:
    start, case = time.monotonic(), seed
    while case < seed + cases and time.monotonic() - start < seconds:
        chance = random.Random(case)
        dtype = torch.float64 if chance.random() < 0.6 else torch.float32
        call = chance.choice(OPS)(Draw(chance, dtype))
        fault = wrong(call, chance, dtype)
        if fault:
            print(f"layouts: case {case}, {call.op} in {dtype}: {fault}")
            return 1
        case += 1
    print(f"layouts: {case - seed:,} calls, none computed wrong")
    return 0


if __name__ == "__main__":
    from_command_line(main, __doc__)
