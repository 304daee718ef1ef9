"""Native ops with damaged arguments, in processes of their own: the right result or an error that names the op.

`python -m tests.fuzz.native [--seconds N] [--seed S] [--cases N]`. A case is a valid call with one to three arguments
made wrong: shapes, sizes near 2**31, dtypes, devices, layouts, empty lists, NaN. Prints the failing case and exits
with 1; a crash is one.
"""

from __future__ import annotations

import math
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.fuzz._command import from_command_line
from tests.fuzz._ops import MOVES, OPS, Arguments, Call, Draw, outputs_of
from tests.fuzz.layouts import LAYOUTS, in_float64

BATCH = 1000  # calls of one process
MEMORY = 6 * 2**30  # of address space beyond what is there: what 2**31 numbers ask for is refused, not fetched
HUGE = (2**31 - 1, 2**31, 2**31 + 1)


def _resized(t: Tensor, draw: random.Random) -> Tensor:
    shape = list(t.shape) or [1]
    dim = draw.randrange(len(shape))
    shape[dim] = draw.choice((0, 1, shape[dim] + 1, max(shape[dim] - 1, 0), shape[dim] * 2))
    return torch.ones(shape, dtype=t.dtype)


def _reshaped(t: Tensor, draw: random.Random) -> Tensor:
    ways: list[Callable[[], Tensor]] = [
        lambda: t.flatten(), lambda: t.unsqueeze(draw.randint(0, t.dim())), lambda: t.new_ones(()),
        lambda: t.squeeze(), lambda: t.reshape(-1)[:1], lambda: t.T if t.dim() == 2 else t.mT if t.dim() > 2 else t,
        lambda: t.new_ones(2, 2), lambda: t.new_empty(0),
    ]  # fmt: skip
    return draw.choice(ways)()


def _retyped(t: Tensor, draw: random.Random) -> Tensor:
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64)
    return t.to(draw.choice(kinds))


def _moved(t: Tensor, draw: random.Random) -> Tensor:
    return draw.choice((lambda: t.to("meta"), lambda: t.to_sparse(), lambda: t.float().to_mkldnn(), lambda: None))()


def _not_numbers(t: Tensor, draw: random.Random) -> Tensor:
    if not t.is_floating_point() or not t.numel():
        return t
    t = t.clone()
    t.view(-1)[draw.randrange(t.numel())] = draw.choice((math.nan, math.inf, -math.inf, 1e30, 0.0))
    return t


def _huge(t: Tensor, draw: random.Random) -> Tensor:
    """As many entries as no int32 counts, all in one place of memory."""
    shape = [1] * t.dim() or [1]
    shape[draw.randrange(len(shape))] = draw.choice(HUGE)
    return t.new_ones(1).expand(shape)


def _laid_out(t: Tensor, draw: random.Random) -> Tensor:
    return draw.choice(LAYOUTS)(t, draw) if t.dim() and t.numel() else t


TENSORS = [_resized, _resized, _reshaped, _reshaped, _retyped, _moved, _not_numbers, _laid_out, _laid_out]


def damaged_tensor(t: Tensor, draw: random.Random) -> Any:
    try:
        return draw.choice(TENSORS)(t, draw)
    except RuntimeError:  # what torch cannot make of this one
        return None


def damaged(value: Any, draw: random.Random) -> Any:
    """A value of the same kind, or nearly."""
    if isinstance(value, Tensor):
        return damaged_tensor(value, draw)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice((0, -1, 1, 3, 100, 2**31, 2**62, 2**63 - 1, -(2**63)))
    if isinstance(value, float):
        return draw.choice((0.0, -1.0, math.nan, math.inf, -math.inf, 1e300, 1e-320))
    if isinstance(value, str):
        return draw.choice(("", "gelu", "ReLU6", "relu6 ", "x" * 10_000, "reluÄ"))
    if value is None:
        return torch.ones(draw.choice(((), (0,), (3,), (3, 3), (2, 3, 4, 4))))
    items = list(value)
    way = draw.randrange(6)
    if way == 0 or not items:
        return draw.choice(([], [9], [2**62, 2**62], [torch.ones(3)], [torch.ones(3)] * 4))
    place = draw.randrange(len(items))
    if way == 1:
        del items[place]
    elif way == 2:
        items.insert(place, items[draw.randrange(len(items))])
    elif way == 3:
        draw.shuffle(items)
    else:
        items[place] = damaged(items[place], draw)
    return items


def drawn(case: int) -> tuple[Call, Arguments, str]:
    """The call of a case, its arguments, and which of them are damaged."""
    draw = random.Random(case)
    call = draw.choice(OPS)(Draw(draw, draw.choice((torch.float32, torch.float64))))
    arguments = call.complete(call.arguments)
    names = draw.sample(sorted(arguments), min(draw.choice((1, 1, 1, 2, 3)), len(arguments)))
    for name in names:
        # gram needs no memory for what is broadcast: it runs over 2**31 pixels, rightly, for half a minute.
        huge = isinstance(arguments[name], Tensor) and call.op != "gram" and draw.random() < 0.02
        arguments[name] = (_huge if huge else damaged)(arguments[name], draw)
    if draw.random() < 0.2:
        arguments = pytree.tree_map(lambda v: _wanting(v, draw), arguments)
    return call, arguments, ", ".join(names)


def _wanting(value: Any, draw: random.Random) -> Any:
    plain = isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided
    return value.detach().requires_grad_() if plain and draw.random() < 0.5 else value


def verdict(call: Call, arguments: Arguments) -> str:
    """What is wrong with how the op took these arguments; empty where nothing is."""
    dense = pytree.tree_map(lambda v: _dense(v), arguments)
    try:
        with torch.no_grad() if call.op in MOVES else torch.enable_grad():
            found = outputs_of(call.op, arguments)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        text = str(error)
        named = call.op in text or "proxyless_fast::" in text or "allocate memory" in text
        return "" if named else f"the error does not say which op it is of: {type(error).__name__}: {text[:300]}"
    if any(t.is_meta for t in found):
        given = [v for v in pytree.tree_leaves(arguments) if isinstance(v, Tensor)]
        return "" if all(t.is_meta for t in given) else "a meta tensor came out of arguments that hold values"
    again = outputs_of(call.op, dense)
    for i, (a, b) in enumerate(zip(found, again, strict=True)):
        if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True):
            return f"output {i} is another than of the same values laid out densely"
    return reference_verdict(call, arguments, found)


def reference_verdict(call: Call, arguments: Arguments, found: list[Tensor]) -> str:
    """What was accepted must be what plain torch computes of it, if it can."""
    leaves = [v for v in pytree.tree_leaves(arguments) if isinstance(v, Tensor)]
    overflows = any(bool((v.double().abs() > 1e20).any()) for v in leaves if v.numel() < 2**24 and not v.is_complex())
    # A forward's results, and the mean and covariance of another x, are taken at their word.
    if set(arguments) - set(call.arguments) or arguments.get("mean") is not None or call.op in MOVES or overflows:
        return ""
    try:
        exact = call.reference(in_float64(pytree.tree_map(lambda v: _dense(v), arguments)))
    except Exception as error:
        if "allocate memory" in str(error) or "eps must be positive" in str(error):  # of newer torch, in training
            return ""
        return f"accepted what plain torch refuses: {type(error).__name__}: {str(error)[:200]}"
    for i, (a, b) in enumerate(zip(found, exact, strict=False)):
        finite = b is not None and bool(torch.isfinite(b).all() and torch.isfinite(a).all())
        if finite and not torch.allclose(a.double(), b, rtol=1e-2, atol=1e-2 * max(1.0, float(b.abs().max()))):
            return f"output {i} is not what plain torch computes: off by {float((a.double() - b).abs().max()):.3g}"
    return ""


def _dense(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.numel() > 2**24:
        return value
    return value.detach().clone(memory_format=torch.contiguous_format) if value.layout == torch.strided else value


def work(first: int, cases: int) -> None:
    """In a process of its own: a line for each case, before it runs, and one more if it is wrong."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    torch.set_num_threads(1)
    for case in range(first, first + cases):
        call, arguments, names = drawn(case)
        print(f"case {case}: {call.op} with {names}", flush=True)
        fault = verdict(call, arguments)
        if fault:
            print(f"WRONG {' '.join(fault.split())}", flush=True)


def main(seconds: float, seed: int, cases: int) -> int:
    start, done = time.monotonic(), 0
    while done < cases and time.monotonic() - start < seconds:
        first, batch = seed + done, min(BATCH, cases - done)
        code = f"from tests.fuzz.native import work; work({first}, {batch})"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, errors="replace")
        lines = run.stdout.splitlines()
        wrong = next((i for i, line in enumerate(lines) if line.startswith("WRONG")), None)
        if wrong is not None:
            print(f"native: {lines[wrong - 1]}: {lines[wrong][6:]}")
            return 1
        if run.returncode:
            print(f"native: {lines[-1] if lines else 'start'}: exit code {run.returncode}: {run.stderr[-1500:]}")
            return 1
        done += batch
    print(f"native: {done:,} calls, each right or refused by name")
    return 0


if __name__ == "__main__":
    from_command_line(main, __doc__)
