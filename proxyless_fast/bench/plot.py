"""Pictures of a run: python -m proxyless_fast.bench.plot runs/bench writes PNGs beside bench.json."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from . import blocks
from .baselines import MODES
from .measure import machine_line

Rows = list[dict[str, Any]]


def steps(rows: Rows) -> Any:
    """Bars of time and of peak memory of each step kind, p20 to p80 as whiskers."""
    rows = [row for row in rows if row["kind"] in MODES]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    if not kinds:
        return None
    figure, axes = plt.subplots(2, len(kinds), figsize=(4.5 * len(kinds), 7), squeeze=False)
    for column, kind in enumerate(kinds):
        of = [row for row in rows if row["kind"] == kind][::-1]
        names, middle = [row["baseline"] for row in of], [row["p50"] for row in of]
        whiskers = [[row["p50"] - row["p20"] for row in of], [row["p80"] - row["p50"] for row in of]]
        colours = ["C1" if name == "ours" else "C0" for name in names]
        axes[0][column].barh(names, middle, xerr=whiskers, color=colours)
        axes[0][column].set(title=f"{kind} step", xlabel="seconds")
        axes[1][column].barh(names, [row["peak_bytes"] / 1e6 for row in of], color=colours)
        axes[1][column].set(xlabel="peak memory, MB")
    return figure


def by_block(rows: Rows) -> Any:
    """Fraction of the limit reached by each block, kind by kind."""
    rows = [row for row in rows if row["kind"] in blocks.KINDS]
    if not rows:
        return None
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = plt.subplots(len(blocks.KINDS), 1, figsize=(14, 12), sharex=True)
    for axis, kind in zip(axes, blocks.KINDS, strict=True):
        for name in dict.fromkeys(row["baseline"] for row in rows):
            reached = {r["case"]: r["limit_fraction"] for r in rows if (r["kind"], r["baseline"]) == (kind, name)}
            axis.plot(cases, [reached.get(case) for case in cases], ".-", label=name)
        axis.set(ylabel=f"{kind}, of the limit", ylim=(0, None))
    axes[0].legend()
    axes[-1].tick_params(axis="x", rotation=90, labelsize=6)
    return figure


def memory(rows: Rows) -> Any:
    """Peak memory of an arch step against the number of candidates."""
    rows = [row for row in rows if row["kind"] == "memory"]
    if not rows:
        return None
    figure, axis = plt.subplots(figsize=(5, 4))
    for name in dict.fromkeys(row["baseline"] for row in rows):
        of = [row for row in rows if row["baseline"] == name]
        axis.plot([int(row["case"]) for row in of], [row["peak_bytes"] / 1e6 for row in of], "o-", label=name)
    axis.set(xlabel="candidates", ylabel="peak memory of an arch step, MB", ylim=(0, None))
    axis.legend()
    return figure


def batches(rows: Rows) -> Any:
    """Time of a step against the batch."""
    rows = [row for row in rows if row["kind"] == "linear"]
    if not rows:
        return None
    figure, axis = plt.subplots(figsize=(5, 4))
    for name, case in dict.fromkeys((row["baseline"], row["case"]) for row in rows):
        of = [row for row in rows if (row["baseline"], row["case"]) == (name, case)]
        axis.plot([row["batch"] for row in of], [row["p50"] for row in of], "o-", label=f"{name}, {case}")
    axis.set(xlabel="batch", ylabel="seconds", xlim=(0, None), ylim=(0, None))
    axis.legend()
    return figure


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """One PNG for each kind of figure that the report has rows for."""
    paths = []
    for name, draw in (("steps", steps), ("blocks", by_block), ("memory", memory), ("batches", batches)):
        figure = draw(report["rows"])
        if figure is None:
            continue
        figure.suptitle(machine_line(report["machine"]), fontsize=8)
        figure.tight_layout()
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
        plt.close(figure)
    return paths


def main(argv: list[str] | None = None) -> int:
    """Read bench.json of a run's folder and write the pictures into it."""
    parser = argparse.ArgumentParser("python -m proxyless_fast.bench.plot", description=__doc__)
    parser.add_argument("folder", nargs="?", default="runs/bench", help="of a benchmark run (default: runs/bench)")
    folder = Path(parser.parse_args(argv).folder)
    if not (folder / "bench.json").is_file():
        parser.error(f"argument folder: {str(folder)!r} holds no bench.json")
    for path in write(json.loads((folder / "bench.json").read_text()), folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
