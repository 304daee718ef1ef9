"""Peak memory of an arch step against the number of candidates, with the DARTS weighted sum beside it.

    python -m proxyless_fast.bench.memory     # exit code 1 where mode "full" grows by 2 % or more from 2 to 12

Each figure is the peak resident memory that one step adds to a fresh process: parameters, gradients, optimizer state
and buffers were there before and do not count.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import proxyless_fast as pf

from .baselines import Paths, Subject, WeightedSum
from .measure import machine, machine_line, peak_bytes

COUNTS = (2, 4, 8, 12)
MODES = (
    "full",
    "full-generic",
    "darts",
)  # of this project as it comes, of PyTorch layers, and the weighted sum of these
CHANNELS, SIDE, BLOCKS, CLASSES = 32, 56, 3, 10
ALLOWED = 0.02


def supernet(candidates: int) -> nn.Module:
    """A stem and three mixed ops of equal candidates at 56 x 56, where activations outweigh parameters by far."""
    mixed = [[pf.candidate("5x5_MBConv6", CHANNELS, CHANNELS) for _ in range(candidates)] for _ in range(BLOCKS)]
    blocks = [pf.blocks.ResidualBlock(pf.MixedOp(ops), shortcut=True) for ops in mixed]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, CLASSES))
    return nn.Sequential(pf.blocks.ConvLayer(3, CHANNELS), *blocks, *head)


def fresh_arch_step(mode: str, candidates: int, batch: int, threads: int) -> tuple[Callable, Callable]:
    """For peak_bytes: an arch step at batch 2 to warm up, and the step itself."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = supernet(candidates)
    pf.set_policy(net, "fast" if mode == "full" else "off")
    subject = (WeightedSum if mode == "darts" else Subject)(net)
    images, labels = subject.images(torch.randn(batch, 3, SIDE, SIDE)), torch.randint(0, CLASSES, (batch,))
    paths: Paths = [(0, 1)] * BLOCKS
    few = subject.images(images[:2])
    return (
        lambda: subject.step(few, labels[:2], paths, "full"),
        lambda: subject.step(images, labels, paths, "full"),
    )


def measure(batch: int = 16, threads: int = 2, counts: tuple[int, ...] = COUNTS) -> list[dict[str, Any]]:
    """One row for each mode and number of candidates."""
    return [
        {
            "kind": "memory",
            "case": str(count),
            "baseline": mode,
            "batch": batch,
            "resolution": SIDE,
            "peak_bytes": peak_bytes(
                "proxyless_fast.bench.memory:fresh_arch_step", mode=mode, candidates=count, batch=batch, threads=threads
            ),
        }
        for mode in MODES
        for count in counts
    ]


def growth(rows: list[dict[str, Any]], mode: str) -> float:
    """Growth of the peak from the fewest to the most candidates, over the peak with the fewest."""
    peaks = {int(row["case"]): row["peak_bytes"] for row in rows if row["kind"] == "memory" and row["baseline"] == mode}
    return peaks[max(peaks)] / peaks[min(peaks)] - 1


def table(rows: list[dict[str, Any]]) -> Table:
    """The peaks by number of candidates, and their growth."""
    rows = [row for row in rows if row["kind"] == "memory"]
    counts = sorted({int(row["case"]) for row in rows})
    shown = Table("mode", *(f"{n} candidates" for n in counts), "growth", title="arch step, peak memory, MB")
    for mode in dict.fromkeys(row["baseline"] for row in rows):
        peaks = {int(row["case"]): row["peak_bytes"] for row in rows if row["baseline"] == mode}
        shown.add_row(mode, *(f"{peaks[n] / 1e6:.1f}" for n in counts), f"{growth(rows, mode):+.2%}")
    return shown


def main() -> int:
    """Measure, print, and say by the exit code whether memory is flat."""
    console = Console()
    rows = measure(threads=torch.get_num_threads())
    console.print(table(rows))
    console.print(machine_line(machine()))
    return 0 if growth(rows, "full") < ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
