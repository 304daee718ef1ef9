"""Time of a step against the batch: linear means that an image costs the same at every batch."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from .baselines import BASELINES, Settings, Subject
from .measure import percentiles, seconds
from .steps import draw_paths

BATCHES = (8, 16, 32, 64)
NAMES = ("ours", "ours-lean", "generic")
KINDS = ("weight", "full")


def measure(names: list[str], settings: Settings, rounds: int) -> list[dict[str, Any]]:
    """One row for each baseline, step kind and batch, all on one path; batches and baselines in turns."""
    names = [name for name in names if name in NAMES]
    net = settings.net()
    path, state = draw_paths(net, 1, settings.seed)[0], net.state_dict()
    subjects: dict[str, Subject] = {name: BASELINES[name].build(settings) for name in names}
    for subject in subjects.values():
        subject.load(state)
    rows = []
    for kind in KINDS:
        times: dict[tuple[str, int], list[float]] = {(name, batch): [] for name in names for batch in BATCHES}
        for done in range(rounds + 1):
            for name, batch in times:
                images, labels = settings.data(batch)
                images, step = subjects[name].images(images), subjects[name].step
                taken = seconds(lambda: step(images, labels, path, kind))  # noqa: B023
                if done:  # the first round is the warm-up
                    times[name, batch].append(taken)
        rows += [
            {
                "kind": "linear",
                "case": f"{kind} step",
                "baseline": name,
                "batch": batch,
                "resolution": settings.resolution,
                "samples": rounds,
                **percentiles(taken),
            }
            for (name, batch), taken in times.items()
        ]
    return rows


def deviation(rows: list[dict[str, Any]], case: str, baseline: str) -> float:
    """How far the time of an image at any batch is from that at the largest batch, at most, over the latter."""
    per_image = {
        row["batch"]: row["p50"] / row["batch"]
        for row in rows
        if row["kind"] == "linear" and row["case"] == case and row["baseline"] == baseline
    }
    last = per_image[max(per_image)]
    return max(abs(value / last - 1) for value in per_image.values())


def table(rows: list[dict[str, Any]]) -> Table:
    """Milliseconds an image by batch."""
    rows = [row for row in rows if row["kind"] == "linear"]
    batches = sorted({row["batch"] for row in rows})
    shown = Table("step", "baseline", *(f"batch {b}" for b in batches), "off linear", title="time of an image, ms")
    for case, name in dict.fromkeys((row["case"], row["baseline"]) for row in rows):
        times = {r["batch"]: r["p50"] / r["batch"] for r in rows if r["case"] == case and r["baseline"] == name}
        shown.add_row(case, name, *(f"{times[b] * 1e3:.2f}" for b in batches), f"{deviation(rows, case, name):.1%}")
    return shown
