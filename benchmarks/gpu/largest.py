"""The largest batch that each subject takes in equal memory: predicted from two batches, then run.

Peak memory is a line in the batch, fixed + per_image * batch. Memory is judged on the path of the widest candidates,
because a search meets every path. Whoever does not fit where the line says (fragments, workspaces) gets a little less.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from rich.table import Table

from proxyless_fast.bench.baselines import BASELINES, Paths, Settings, Subject

from .session import STEP_KINDS, Session
from .steps import best_peer, prepare

MULTIPLE = 8
TRIES = 6
TARGET = 3.0


def widest(net: Any) -> Paths:
    """In every mixed op the candidate with most multiply-accumulates, and the one before it as partner."""
    paths: Paths = []
    for layer in net.layers():
        if layer.mixed is not None:
            costs = [-1 if choice is None else choice.macs for choice in layer.choices]
            best = costs.index(max(costs))
            paths.append((best, (best - 1) % len(costs)))
    return paths


def line(first: tuple[int, int], second: tuple[int, int]) -> tuple[float, float]:
    """(fixed, per image) bytes from two pairs of batch and peak."""
    per_image = (second[1] - first[1]) / (second[0] - first[0])
    return first[1] - per_image * first[0], per_image


def predicted(limit: float, fixed: float, per_image: float) -> int:
    """The largest batch, a multiple of MULTIPLE, whose peak is at most `limit`; 0 where none is."""
    if per_image <= 0:
        raise RuntimeError(f"the peak does not grow with the batch ({per_image:.0f} bytes an image)")
    return max(0, int((limit - fixed) / per_image) // MULTIPLE * MULTIPLE)


def step(subject: Subject, settings: Settings, batch: int, path: Paths, kind: str, times: int = 1) -> None:
    """Steps on a batch of their own."""
    images, labels = settings.data(batch)
    images = subject.images(images)
    for _ in range(times):
        subject.step(images, labels, path, kind)


def confirmed(
    session: Session, subject: Subject, settings: Settings, limit: int, batch: int, path: Paths, kind: str
) -> int:
    """The largest of a few batches, from `batch` down, that ran within `limit`; 0 where none did."""
    with session.device.limited(limit):
        for _ in range(TRIES):
            if batch < MULTIPLE:
                return 0
            try:
                step(subject, settings, batch, path, kind)
                return batch
            except torch.OutOfMemoryError:
                pass  # outside of this block the exception no longer holds the step's tensors
            session.device.clear()
            batch = int(batch * 0.96) // MULTIPLE * MULTIPLE
    return 0


def measure(
    session: Session, names: list[str], batch: int, dtypes: list[str], gib: float | None
) -> list[dict[str, Any]]:
    """One row for each dtype, step kind and subject; the line goes through `batch` and twice `batch`."""
    rows = session.report.setdefault("largest", [])
    limit = session.device.free() if gib is None else min(session.device.free(), int(gib * 2**30))
    path = widest(session.net())
    order = sorted(names, key=lambda name: BASELINES[name].slow)
    for dtype in dtypes:
        for kind, called in STEP_KINDS.items():
            for name in order:
                what = f"largest batch, {dtype} {called} {name}"
                if session.over(what):
                    continue
                with session.surviving(what):
                    settings = session.of(dtype, batch)
                    subject = prepare(settings, name)
                    peaks = []
                    for size in (batch, 2 * batch):
                        step(subject, settings, size, path, kind, 2)  # brings in optimizer state and workspaces
                        peaks.append((size, session.device.peak(lambda s=size: step(subject, settings, s, path, kind))))  # noqa: B023
                    fixed, per_image = line(*peaks)
                    guess = predicted(limit, fixed, per_image)
                    row = {"dtype": dtype, "step": called, "who": name, "limit_gib": limit / 2**30}
                    row |= {"fixed_mib": fixed / 2**20, "image_mib": per_image / 2**20, "predicted": guess}
                    row["batch"] = confirmed(session, subject, settings, limit, guess, path, kind)
                    rows.append(row)
                subject = None
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title="largest batch in equal memory, on the path of the widest candidates")
    for column in ("subject", "dtype", "step", "limit GiB", "MiB an image", "predicted", "ran"):
        shown.add_column(column, justify="left" if column in ("subject", "dtype", "step") else "right")
    for r in rows:
        numbers = (f"{r['limit_gib']:.1f}", f"{r['image_mib']:.1f}", str(r["predicted"]), str(r["batch"]))
        shown.add_row(r["who"], r["dtype"], r["step"], *numbers)
    return shown


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The ratio of ours to the best peer's, beside the target."""
    for dtype, called in dict.fromkeys((r["dtype"], r["step"]) for r in rows):
        here = [r for r in rows if (r["dtype"], r["step"]) == (dtype, called)]
        peer = best_peer(here, "batch", largest=True)
        for ours in (r for r in here if not BASELINES[r["who"]].peer):
            if peer and peer["batch"]:
                ratio = ours["batch"] / peer["batch"]
                verdict = "reached" if ratio >= TARGET else "missed"
                yield (
                    f"{dtype} {called} step, largest batch: {ours['who']} {ours['batch']}, best peer {peer['who']} "
                    f"{peer['batch']}: {ratio:.2f}x ({TARGET:.0f}x is {verdict})"
                )
