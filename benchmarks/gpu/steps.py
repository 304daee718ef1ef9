"""Whole weight and arch steps on a GPU, of every subject of the registry: same weights, same paths, same clock.

What is timed is the whole step, sampling and optimizer included, as `make bench` does on a CPU. A single path is not
representative, so the figure is the median over a fixed list of sampled paths, the same for all, each the median of its
own runs. In bf16 and fp16 all run under autocast; in fp32 TF32 is off for all.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from proxyless_fast.bench.baselines import BASELINES, Paths, Settings, Subject
from proxyless_fast.bench.gate import GateError
from proxyless_fast.bench.gate import check as check_gate
from proxyless_fast.bench.steps import draw_paths, uniform_paths

from .session import STEP_KINDS, Session

# Who is measured: names of the registry, in this order.
SUBJECTS = (
    "ours", "ours-graphed", "ours-lean", "generic-nchw", "generic", "official", "official-channels-last", "checkpoint",
    "compiled",
)  # fmt: skip
PATHS = 5
SECONDS = 1.0  # about, for the timed runs of one subject and step kind


def subjects(session: Session) -> list[str]:
    """The names to measure. Says so where the official code is left out."""
    names = list(SUBJECTS)
    if session.settings.official is None or session.settings.space != "mobile":
        names = [name for name in names if not BASELINES[name].official]
        session.leave_out(
            "official code", "clone https://github.com/mit-han-lab/proxylessnas and give it as --official PATH"
        )
    return names


def checked(names: list[str]) -> list[str]:
    """Those that the gate takes: compiling every candidate once more, in float32 and small, takes too long."""
    return [name for name in names if not BASELINES[name].slow]


def cases(names: list[str], batches: list[int], dtypes: list[str]) -> Iterator[tuple[str, int, str]]:
    """(dtype, batch, name) by importance: all at the first batch, the slow ones there last, then the larger batches."""
    for slow in (False, True):
        for dtype in dtypes:
            yield from ((dtype, batches[0], name) for name in names if BASELINES[name].slow == slow)
    for batch in batches[1:]:
        yield from ((dtype, batch, name) for dtype in dtypes for name in checked(names))


def prepare(settings: Settings, name: str) -> Subject:
    """The subject, with the weights that all start from."""
    subject = BASELINES[name].build(settings)
    subject.load(replace(settings, device="cpu").net().state_dict())
    return subject


def warm(session: Session, subject: Subject, name: str, data: tuple, paths: list[Paths], kind: str, what: str) -> bool:
    """Run everything once that the timed steps run. False: there was no time for all of it.

    A compiled peer makes code for a layer's candidates one after the other, by paths of mode "two", so that the clock
    is looked at in between.
    """
    if BASELINES[name].slow and kind != "weight":
        for path in uniform_paths(session.net()):
            if session.over(f"{what} (compiling)"):
                return False
            subject.step(*data, path, "two")
    for path in paths:
        if session.over(what):
            return False
        subject.step(*data, path, kind)
    return True


def correct(session: Session, names: list[str], batch: int) -> str | None:
    """What the gate of the benchmarks has against one of the subjects, in float32 on this device; None: nothing."""
    settings = session.of("fp32", batch)
    try:
        paths = draw_paths(session.net(), 1, settings.seed)[0]
        check_gate({name: prepare(settings, name) for name in checked(names)}, settings, STEP_KINDS, paths)
    except GateError as error:
        return str(error)
    except torch.OutOfMemoryError:
        session.leave_out("the correctness gate of the steps", "out of memory")
    return None


def measure(session: Session, names: list[str], batches: list[int], dtypes: list[str]) -> list[dict[str, Any]]:
    """One row for each dtype, batch, subject and step kind, also in the run's report as they come."""
    rows = session.report.setdefault("steps", [])
    paths = draw_paths(session.net(), PATHS, session.settings.seed)
    failed = set()  # who ran out of memory needs not try a larger batch
    for dtype, batch, name in cases(names, batches, dtypes):
        what = f"{dtype} {name} batch {batch}"
        if (dtype, name) in failed:
            continue
        if session.over(f"steps from {what} on"):
            break
        before = len(rows)
        with session.surviving(f"steps, {what}"):
            settings = session.of(dtype, batch)
            subject = prepare(settings, name)
            images, labels = settings.data()
            data = subject.images(images), labels
            for kind, called in STEP_KINDS.items():
                if warm(session, subject, name, data, paths, kind, f"steps, {what}, {called}"):
                    row = {"dtype": dtype, "step": called, "who": name, "batch": batch}
                    rows.append(row | _figures(session, subject, data, paths, kind))
        if len(rows) < before + len(STEP_KINDS):
            failed.add((dtype, name))
        subject = data = images = labels = None  # the next subject finds the memory free
    return rows


def _figures(session: Session, subject: Subject, data: tuple, paths: list[Paths], kind: str) -> dict[str, Any]:
    times = [1e3 * session.median(lambda p=p: subject.step(*data, p, kind), SECONDS / len(paths)) for p in paths]
    peak = session.device.peak(lambda: [subject.step(*data, p, kind) for p in paths])
    return {"ms": statistics.median(times), "ms_by_path": times, "peak_mib": peak / 2**20}


def best_peer(rows: list[dict[str, Any]], value: str, largest: bool = False) -> dict[str, Any] | None:
    """The row of the best peer among these."""
    peers = [row for row in rows if BASELINES[row["who"]].peer]
    return (max if largest else min)(peers, key=lambda row: row[value]) if peers else None


def tables(rows: list[dict[str, Any]]) -> Iterator[Table]:
    """One table for each dtype and batch."""
    for dtype, batch in dict.fromkeys((row["dtype"], row["batch"]) for row in rows):
        shown = Table(title=f"{dtype}, batch {batch}: whole steps, median over {PATHS} paths")
        shown.add_column("subject")
        for step in STEP_KINDS.values():
            for column in (f"{step} ms", "ours is", "peak MiB"):
                shown.add_column(column, justify="right")
        of = {(r["who"], r["step"]): r for r in rows if (r["dtype"], r["batch"]) == (dtype, batch)}
        for who in dict.fromkeys(who for who, _ in of):
            cells = []
            for step in STEP_KINDS.values():
                row, ours = of.get((who, step)), of.get(("ours", step))
                faster = f"{row['ms'] / ours['ms']:.2f} x faster" if row and ours and BASELINES[who].peer else ""
                cells += [f"{row['ms']:.2f}", faster, f"{row['peak_mib']:.0f}"] if row else ["", "", ""]
            shown.add_row(who, *cells)
        yield shown


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Ours against the best peer, at each dtype, step and batch."""
    for dtype, step, batch in dict.fromkeys((r["dtype"], r["step"], r["batch"]) for r in rows):
        here = [r for r in rows if (r["dtype"], r["step"], r["batch"]) == (dtype, step, batch)]
        peer, ours = best_peer(here, "ms"), next((r for r in here if r["who"] == "ours"), None)
        if peer and ours:
            yield (
                f"{dtype} {step} step, batch {batch}: {peer['ms'] / ours['ms']:.2f}x as fast as the best peer, "
                f"{peer['who']}, in {ours['peak_mib'] / peer['peak_mib']:.2f} of its memory"
            )


def official_clone(path: str | None) -> str | None:
    """What is wrong with a path given as the official code's clone; None: nothing."""
    if path is not None and not (Path(path) / "search/models/super_nets").is_dir():
        return f"argument --official: {path!r} holds no search/models/super_nets of proxylessnas"
    return None
