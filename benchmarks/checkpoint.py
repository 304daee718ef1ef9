"""What a checkpoint of `spaces.mobile` costs the step loop: `python -m benchmarks.checkpoint`.

A search of small images (the weights are those of any size) saves every few steps. Printed: how long the loop stood
still for each save, and the steps while the thread was writing beside those while it was not.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from proxyless_fast import spaces
from proxyless_fast.bench.measure import machine, machine_line
from proxyless_fast.data.memory import MemoryLoader
from proxyless_fast.search import Checkpoints, Search, SearchConfig

SIDE, BATCH, EVERY = 64, 8, 8


class Watched(Search):
    """A search that notes how long each save stops it, and each step by whether a write was under way."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.saves: list[float] = []
        self.steps: dict[bool, list[float]] = {True: [], False: []}

    def run_step(self, batches: Any, requests: Any) -> list[float]:
        writing, start = self._writer is not None and self._writer.busy(), time.perf_counter()
        found = super().run_step(batches, requests)
        self.steps[writing].append(1e3 * (time.perf_counter() - start))
        return found

    def _save_soon(self) -> None:
        start = time.perf_counter()
        super()._save_soon()
        self.saves.append(1e3 * (time.perf_counter() - start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=20, help="default: %(default)s")
    saves = parser.parse_args().saves
    torch.manual_seed(0)
    images, labels = (
        torch.randint(0, 255, (EVERY * saves * BATCH, 3, SIDE, SIDE), dtype=torch.uint8),
        torch.arange(EVERY * saves * BATCH) % 1000,
    )
    half = torch.full((3,), 0.5)
    train, valid = (MemoryLoader(images, labels, BATCH, mean=half, std=half, num_classes=1000) for _ in range(2))
    config = SearchConfig(epochs=1, warmup_epochs=0, arch_every=5, target_ms=None, log_every=1000)
    with tempfile.TemporaryDirectory() as folder:
        every = Checkpoints(steps=EVERY, keep=1)
        search = Watched(
            spaces.mobile(resolution=SIDE).to(memory_format=torch.channels_last),
            train,
            valid,
            config,
            None,
            Path(folder) / "run",
            checkpoints=every,
        )
        search.fit()
    stopped = sorted(search.saves[2:])  # the first fault their memory in
    median, least, most = statistics.median(stopped), stopped[0], stopped[-1]
    print(f"stopped for {median:.1f} ms a save (least {least:.1f}, most {most:.1f}; {len(stopped)} saves)")
    for writing, name in ((False, "without a write"), (True, "beside a write")):
        steps = search.steps[writing]
        print(f"steps {name}: median {statistics.median(steps):.1f} ms ({len(steps)})" if steps else f"no steps {name}")
    print(machine_line(machine()))


if __name__ == "__main__":
    main()
