"""Whole search steps: the paths they run, what these cost, and how long and how large the steps are."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

import proxyless_fast as pf

from .baselines import BASELINES, Paths, Settings, Subject
from .measure import MatmulRate, SavedBytes, available_bytes, peak_bytes, percentiles, seconds


def draw_paths(net: Any, count: int, seed: int) -> list[Paths]:
    """The paths of `count` steps: in every mixed op the active candidate, and the partner for mode "two"."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Paths] = []
    for _ in range(count):
        pf.sample(net, "two", generator)
        drawn.append([(op.active, op.partner) for op in pf.mixed_ops(net).values()])
    return drawn


def flops(net: Any, paths: Paths, kind: str, batch: int, weighted: bool = False) -> int:
    """FLOPs of a step, 2 per multiply-accumulate.

    A weight step takes its active paths 3 times (forward, gradients of inputs, gradients of weights), an arch step 2
    times (forward, gradients of inputs) and every probe once. weighted: all paths are active, as in DARTS.
    """
    passes = 3 if kind == "weight" else 2
    total, remaining = 0, iter(paths)
    for layer in net.layers():
        costs = [0 if choice is None else choice.macs for choice in layer.choices]
        active, partner = next(remaining) if layer.mixed is not None else (0, None)
        if weighted:
            total += passes * sum(costs)
            continue
        total += passes * costs[active]
        if kind == "full":
            total += sum(costs) - costs[active]
        elif kind == "two" and partner is not None:
            total += costs[partner]
    return 2 * batch * total


def saved_bytes(subject: Subject, data: tuple, paths: Paths, kind: str) -> int:
    """What autograd keeps between the forward pass and backward of one step, without parameters and buffers."""
    images, labels = data
    watch = SavedBytes([*subject.net.parameters(), *subject.net.buffers()])
    subject.differentiate(subject.images(images), labels, paths, kind, watch)
    subject.update(kind)
    return watch.total


def fresh_step(baseline: str, kind: str, settings: dict[str, Any], paths: Paths) -> tuple[Callable, Callable]:
    """For peak_bytes: a step at batch 2 to warm up, and the step itself."""
    of = Settings(**settings)
    torch.set_num_threads(of.threads)
    subject = BASELINES[baseline].build(of)
    subject.load(of.net().state_dict())
    (few, few_labels), (images, labels) = of.data(2), of.data()
    few, images = subject.images(few), subject.images(images)
    return lambda: subject.step(few, few_labels, paths, kind), lambda: subject.step(images, labels, paths, kind)


def uniform_paths(net: Any) -> list[Paths]:
    """For each candidate a path on which every mixed op runs it (or its last one, where it has fewer)."""
    sizes = [len(op) for op in pf.mixed_ops(net).values()]
    return [[(min(j, n - 1), (min(j, n - 1) + 1) % n) for n in sizes] for j in range(max(sizes))]


def warm_up(subjects: dict[str, Subject], settings: Settings, kinds: list[str]) -> None:
    """Run every candidate once, so that no timed step waits for code to be generated.

    What oneDNN generates serves all baselines of one memory format and all kinds; torch.compile's serves only its own.
    """
    net, data = settings.net(), settings.data()
    warmed = set()
    for name, subject in subjects.items():
        compiled = BASELINES[name].slow
        if subject.weighted or (not compiled and (subject.layout in warmed or not BASELINES[name].peer)):
            continue
        warmed.add(subject.layout)
        for kind in kinds if compiled else kinds[:1]:
            for path in uniform_paths(net):
                subject.step(subject.images(data[0]), data[1], path, kind)


def unfit(subject: Subject, settings: Settings, path: Paths) -> str | None:
    """Why a baseline's activations would not fit into this machine's memory, judged by a step at batch 2; else None."""
    needed = saved_bytes(subject, settings.data(2), path, "weight") * settings.batch / 2
    available = available_bytes()
    if needed < 0.4 * available:  # the peak is measured in a second process, beside this one
        return None
    return (
        f"it needs {needed / 1e9:.1f} GB for activations twice (its peak is taken in a second process), and "
        f"{available / 1e9:.1f} GB are available"
    )


def measure(
    subjects: dict[str, Subject], settings: Settings, kind: str, paths: list[Paths], rate: MatmulRate
) -> list[dict[str, Any]]:
    """One row for each baseline. Every round runs all baselines on one path, in an order of its own.

    The first of `paths` is the warm-up, and the one that memory is measured on.
    """
    net, data = settings.net(), settings.data()
    inputs = {name: subject.images(data[0]) for name, subject in subjects.items()}
    times: dict[str, list[float]] = {name: [] for name in subjects}
    kept = {name: saved_bytes(subject, data, paths[0], kind) for name, subject in subjects.items()}
    order, shuffle = list(subjects), random.Random(settings.seed)
    for path in paths[1:]:
        rate.sample()
        shuffle.shuffle(order)
        for name in order:
            step = subjects[name].step
            times[name].append(seconds(lambda: step(inputs[name], data[1], path, kind)))  # noqa: B023
    rows = []
    for name, subject in subjects.items():
        work = [flops(net, path, kind, settings.batch, subject.weighted) for path in paths[1:]]
        speeds = [of / taken for of, taken in zip(work, times[name], strict=True)]
        rows.append(
            {
                "kind": kind,
                "case": settings.space,
                "baseline": name,
                "batch": settings.batch,
                "resolution": settings.resolution,
                "samples": len(times[name]),
                **percentiles(times[name]),
                "flops": sum(work) / len(work),
                "limit_fraction": percentiles(speeds)["p50"] / rate.flops_per_second,
                "saved_bytes": kept[name],
                "peak_bytes": peak_bytes(
                    "proxyless_fast.bench.steps:fresh_step",
                    baseline=name,
                    kind=kind,
                    settings=settings.to_dict(),
                    paths=paths[0],
                ),
            }
        )
    return rows
