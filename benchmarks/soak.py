"""A long search with checkpoints: `python -m benchmarks.soak [--steps N]` prints memory, descriptors and step time.

One line for every 500 steps; beside the first 500 the largest difference of each, in percent.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from proxyless_fast import spaces
from proxyless_fast.data.memory import MemoryLoader
from proxyless_fast.search import Checkpoints, Search, SearchConfig

WINDOW = 500


def resident() -> float:
    """Resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def loader(images: int, seed: int) -> MemoryLoader:
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (images,), generator=draws)
    pixels = torch.randint(0, 200, (images, 1, 12, 12), generator=draws) + 13 * labels[:, None, None, None]
    half = torch.full((1,), 0.5)
    return MemoryLoader(pixels.to(torch.uint8), labels, 16, mean=half, std=half, seed=seed, shuffle=True, num_classes=4)


class Watched(Search):
    """A search that prints a line for every window of steps."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.times: list[float] = []
        self.windows: list[tuple[float, int, float]] = []

    def run_step(self, batches: Any, requests: Any) -> list[float]:
        start = time.perf_counter()
        found = super().run_step(batches, requests)
        self.times.append(time.perf_counter() - start)
        if len(self.times) == WINDOW:
            window = resident(), len(os.listdir("/proc/self/fd")), 1e3 * statistics.median(self.times)
            self.times.clear()
            self.windows.append(window)
            print(f"step {self.step + 1:6}: {window[0]:8.1f} MB, {window[1]} descriptors, {window[2]:.3f} ms a step")
        return found


def main(steps: int) -> None:
    torch.manual_seed(0)
    net = spaces.small(num_classes=4, in_channels=1, resolution=12)
    train, valid = loader(1600, 1), loader(800, 2)
    config = SearchConfig(epochs=-(-steps // len(train)), warmup_epochs=0, lr=0.01, arch_every=2, log_every=50)
    with tempfile.TemporaryDirectory(prefix="soak_") as folder:
        search = Watched(net, train, valid, config, None, folder, checkpoints=Checkpoints(steps=50))
        search.fit()
    after = search.windows[1:]
    for name, of_all in zip(("memory", "descriptors", "step time"), zip(*after, strict=True), strict=True):
        most = max(abs(value - of_all[0]) / of_all[0] for value in of_all)
        print(f"{name}: at most {most:.2%} from that of steps {WINDOW + 1} to {2 * WINDOW}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    main(parser.parse_args().steps)
