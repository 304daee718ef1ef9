"""Every pass of a layer's weight and arch step against the roof: measured copy bandwidth, measured product rate.

A pass is a Triton launch, a CUDA C++ op or a PyTorch call in between, as the composition makes them on the device. Each
is run once where it stands, then again alone, with its own tensors, cold in the caches, and the median is its time. Its
bytes and FLOPs are those of the model (traffic.py): each tensor read or written once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from rich.table import Table
from torch.utils._python_dispatch import _disable_current_modes

from proxyless_fast.ops.gpu.host import launch, ops

from .device import DTYPES
from .launches import RecordedLaunch
from .session import STEP_KINDS, Session
from .shapes import BlockShape, imagenet
from .traffic import Card, Count, Pass, launch_pass

TARGET = 0.6  # of the roof, in each pass
SHOWN = 0.02  # passes of less than this share of a step's time are in the JSON only
EPS = 1e-3


@dataclass
class Timed:
    what: Pass
    seconds: float


class Watch(Count):
    """Times what runs inside: calls of PyTorch and of the C++ ops here, Triton's launches by `watching`."""

    partial_sums = False  # a share of the roof should not gain by what is only bounded

    def __init__(self, seconds: Callable[[Callable[[], Any]], float]) -> None:
        super().__init__()
        self.seconds = seconds
        self.timed: list[Timed] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        counted = len(self.passes)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        found = self.passes[counted:]
        self.timed += [Timed(p, self.seconds(lambda: func(*args, **(kwargs or {})))) for p in found if p.bytes]
        return out


@contextmanager
def watching(seconds: Callable[[Callable[[], Any]], float]) -> Iterator[Watch]:
    """Within, every pass runs once where it stands, and is then timed by `seconds`, which calls it again and again.

    A pass that writes over its input does so again; that changes values, not time.
    """
    original = launch.run
    with Watch(seconds) as watch:

        def run(kernel, grid, config, *args, **constants):
            call = lambda: original(kernel, grid, config, *args, **constants)  # noqa: E731
            with _disable_current_modes():  # what the clock does is no pass
                call()
                taken = seconds(call)
            watch.timed.append(Timed(launch_pass(RecordedLaunch(kernel, grid, config, args, constants)), taken))

        with mock.patch.object(launch, "run", run):
            yield watch


def step(shape: BlockShape, dtype: torch.dtype, kind: str, device: str) -> None:
    """A weight step of the candidate, or an arch step with it active and every other candidate probed."""
    params, x, grad = shape.params(device=device), shape.x(dtype, device), shape.output(dtype, device)
    mean, cov = ops.gram(x) if shape.expand > 1 else (None, None)
    _, y, d, statistics = ops.mbconv(x, params, [], mean, cov, shape.stride, "relu6", True, EPS, 2)
    pixels = shape.batch * shape.size**2, shape.batch * shape.out**2
    ops.update_running(statistics, shape.running(device=device), *pixels, 0.1)
    if kind != "weight":
        ops.norm_dot(grad, y, statistics, params[-2], params[-1], EPS)
        others = shape.others()
        own = [other.params(device=device) for other in others]
        running = [t for other in others for t in other.running(device=device)]
        flat, sizes = [t for p in own for t in p], [len(p) for p in own]
        ops.mbconv_probe(x, grad, flat, running, sizes, mean, cov, shape.stride, "relu6", True, 0.1, EPS)
    ops.mbconv_backward(
        grad, x, y, d, statistics, params, mean, cov, shape.stride, "relu6", True, EPS, True, kind == "weight"
    )


def of_step(session: Session, shape: BlockShape, dtype: str, kind: str, card: Card) -> list[dict[str, Any]]:
    """One row for each kind of pass of a layer's step: its launches together."""
    step(shape, DTYPES[dtype], kind, session.settings.device)  # compiles
    with watching(lambda call: session.median(call, 0.01, cold=True)) as watch:
        step(shape, DTYPES[dtype], kind, session.settings.device)
    groups: dict[str, list[Timed]] = defaultdict(list)
    for timed in watch.timed:
        groups[timed.what.name].append(timed)
    total = sum(t.seconds for t in watch.timed)
    rows = []
    for name, all_of in sorted(groups.items(), key=lambda item: -sum(t.seconds for t in item[1])):
        seconds, moved = sum(t.seconds for t in all_of), sum(t.what.bytes for t in all_of)
        flops, products = sum(t.what.flops for t in all_of), sum(t.what.products for t in all_of)
        rate = card.half if all_of[0].what.matrix and dtype != "fp32" else card.single
        of_copy, of_product = moved / seconds / card.memory, (flops / rate + products / card.half) / seconds
        row = {"dtype": dtype, "layer": str(shape), "step": STEP_KINDS[kind], "pass": name, "launches": len(all_of)}
        row |= {"us": seconds * 1e6, "of_step": seconds / total, "gb_s": moved / seconds / 1e9, "of_copy": of_copy}
        row |= {"tflop_s": (flops + products) / seconds / 1e12, "of_product": of_product}
        row |= {"of_roof": max(of_copy, of_product)}
        rows.append(row | {"below": max(of_copy, of_product) < TARGET})
    return rows


def measure(session: Session, batch: int, dtypes: list[str], ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of all distinct layers of the ImageNet space, each with its widest candidate active."""
    rows = session.report.setdefault("passes", [])
    card = Card("measured", ceilings["copy_bytes_s"], ceilings["bf16_flop_s"], ceilings["fp32_flop_s"])
    for dtype in dtypes:
        for shape in dict.fromkeys(imagenet(batch)):
            for kind in STEP_KINDS:
                what = f"passes, {dtype} {shape} {STEP_KINDS[kind]}"
                if session.over(what):
                    continue
                with session.surviving(what):
                    rows += of_step(session, shape, dtype, kind, card)
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """The passes that take time; a mark where a pass is under the target."""
    shown = Table(title="passes, each alone and cold; share of the roof: the larger of the two shares")
    for column in ("dtype", "layer", "step", "pass"):
        shown.add_column(column)
    for column in ("µs", "of step", "GB/s", "of copy", "TFLOP/s", "of product", "of roof"):
        shown.add_column(column, justify="right")
    for r in rows:
        if r["of_step"] >= SHOWN:
            name = r["pass"] + (f" x{r['launches']}" if r["launches"] > 1 else "")
            times = (f"{r['us']:.0f}", f"{r['of_step']:.0%}", f"{r['gb_s']:.0f}", f"{r['of_copy']:.0%}")
            rates = (f"{r['tflop_s']:.1f}", f"{r['of_product']:.0%}", f"{r['of_roof']:.0%}{' <' if r['below'] else ''}")
            shown.add_row(r["dtype"], r["layer"], r["step"], name, *times, *rates)
    return shown


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """By dtype and step: the roof's share of the time, and which of the passes that take time are under the target."""
    for dtype, called in dict.fromkeys((r["dtype"], r["step"]) for r in rows):
        here = [r for r in rows if (r["dtype"], r["step"]) == (dtype, called)]
        total = sum(r["us"] for r in here)
        roof = sum(r["us"] * r["of_roof"] for r in here) / total
        large = [r for r in here if r["of_step"] >= SHOWN]
        slow: dict[str, float] = defaultdict(float)
        for r in large:
            if r["below"]:
                slow[r["pass"]] += r["us"] / total
        worst = ", ".join(f"{name} ({share:.0%})" for name, share in sorted(slow.items(), key=lambda item: -item[1]))
        rest = 1 - sum(r["us"] for r in large) / total
        yield (
            f"{dtype} {called} step: {roof:.0%} of the roof; of the passes with {SHOWN:.0%} of their step or more, "
            f"{sum(r['below'] for r in large)} of {len(large)} are under {TARGET:.0%}, with {sum(slow.values()):.0%} "
            f"of the time{': ' if worst else ''}{worst}; the small ones take {rest:.0%}"
        )
