"""Single blocks on a GPU: the widest candidate of each distinct layer, in every baseline that has blocks of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from rich.table import Table

import proxyless_fast as pf
from proxyless_fast.bench.baselines import BASELINES
from proxyless_fast.bench.blocks import KINDS, Case, Runner, cases

from .device import DTYPES
from .session import Session
from .steps import best_peer

SECONDS = 0.1  # about, for each figure


def widest(net: Any) -> list[Case]:
    """The last MBConv of each distinct layer, which in the spaces is the widest."""
    found = {}
    for case in cases(net):
        if isinstance(case.module, pf.MBConv):
            found[case.name.rsplit(" ", 1)[0]] = case
    return list(found.values())


def milliseconds(session: Session, runner: Runner, kind: str, settings: Any) -> float:
    def call() -> Any:
        with settings.forward_context():
            return timed()

    with settings.forward_context():
        timed = runner.prepare(kind)
    call()
    times = []
    end = session.clock() + SECONDS
    while len(times) < 3 or (session.clock() < end and len(times) < 50):
        with settings.forward_context():
            timed = runner.prepare(kind)  # backward consumes the graph
        times.append(1e3 * session.device.time(call))
    return float(torch.tensor(times).median())


def measure(session: Session, names: list[str], batch: int, dtypes: list[str]) -> list[dict[str, Any]]:
    """One row for each dtype, layer, baseline and kind; those that compile come last."""
    rows = session.report.setdefault("blocks", [])
    names = [name for name in names if BASELINES[name].block is not None]
    every = widest(session.settings.net())
    for slow in (False, True):
        for dtype in dtypes:
            settings = session.of(dtype, batch)
            for case in every:
                for name in (name for name in names if BASELINES[name].slow == slow):
                    what = f"block, {dtype} {case.name} {name}"
                    if session.over(what):
                        continue
                    with session.surviving(what):
                        rows += _rows(session, case, name, settings, dtype)
    return rows


def _rows(session: Session, case: Case, name: str, settings: Any, dtype: str) -> list[dict[str, Any]]:
    (h, w, c), (ho, wo, co) = case.shape.input, case.shape.output
    device, of = settings.device, torch.float32 if settings.autocast is None else DTYPES[dtype]
    values = torch.Generator(device).manual_seed(settings.seed)
    x = torch.randn(settings.batch, c, h, w, generator=values, device=device).to(of)
    grad = torch.randn(settings.batch, co, ho, wo, generator=values, device=device).to(of)
    runner = Runner(case.module, x, grad, BASELINES[name])
    row = {"dtype": dtype, "case": case.name, "who": name, "batch": settings.batch}
    return [row | {"kind": kind, "ms": milliseconds(session, runner, kind, settings)} for kind in KINDS]


def tables(rows: list[dict[str, Any]]) -> Iterator[Table]:
    """By dtype: milliseconds of ours, and how many times faster than the best peer that was measured."""
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        shown = Table(title=f"blocks, {dtype}: ms of ours, times faster than the best peer")
        shown.add_column("block")
        for kind in KINDS:
            shown.add_column(kind, justify="right")
        for case in dict.fromkeys(row["case"] for row in rows):
            cells = []
            for kind in KINDS:
                here = [r for r in rows if (r["dtype"], r["case"], r["kind"]) == (dtype, case, kind)]
                ours, peer = next((r for r in here if r["who"] == "ours"), None), best_peer(here, "ms")
                cells.append(f"{ours['ms']:.3f}  {peer['ms'] / ours['ms']:.2f}x {peer['who']}" if ours and peer else "")
            shown.add_row(case, *cells)
        yield shown
