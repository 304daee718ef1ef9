"""The device and the run, which every part of the GPU benchmark is handed; tests put a device of their own in place."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from proxyless_fast.bench.baselines import Settings
from proxyless_fast.ops.triton import configs

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KINDS = {"weight": "weight", "full": "arch"}  # step kinds of the registry, and what they are called here
# Shares of the time budget. What a part does not need goes to those after it.
SHARES = {"correctness": 0.2, "steps": 0.35, "largest": 0.15, "passes": 0.2, "blocks": 0.1}


class Cuda:
    """Time by events, memory by the caching allocator."""

    name = "cuda"

    def __init__(self) -> None:
        self._flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")  # larger than any second-level cache

    def describe(self) -> dict[str, Any]:
        return {
            "card": torch.cuda.get_device_name(),
            "capability": self.capability(),
            "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30,
            "torch": torch.__version__,
        }

    def capability(self) -> int:
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor

    def table_architecture(self) -> int:
        """Whose rows of the table of configurations serve this device."""
        return configs.architecture(torch.cuda.current_device())

    def time(self, call: Callable[[], Any], cold: bool = False) -> float:
        """Seconds of one call. cold: its data is not in the caches, and the host's part is hidden behind other work."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if cold:
            self._flush.zero_()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def peak(self, call: Callable[[], Any]) -> int:
        """The most bytes allocated while a call runs, with what was allocated before."""
        self.clear()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def free(self) -> int:
        """Bytes that this process could have."""
        self.clear()
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()

    @contextmanager
    def limited(self, limit: int) -> Iterator[None]:
        """Within, the allocator takes at most so many bytes of the device."""
        total = torch.cuda.get_device_properties(0).total_memory
        self.clear()
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    def clear(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class Run:
    """Settings, budget, progress and report of one run.

    settings: of the supernet; each part replaces batch and autocast. seconds: the budget, shared among `parts`. report:
    what is written to `out` after every part.
    """

    def __init__(
        self, device: Any, settings: Settings, parts: list[str], seconds: float, out: Path,
        console: Console | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.device, self.settings, self.out, self.clock = device, settings, out, clock
        self.console = console or Console(highlight=False)
        self.start, self.seconds = clock(), seconds
        total, used = sum(SHARES[part] for part in parts), 0.0
        self._ends = {}
        for part in parts:
            used += SHARES[part]
            self._ends[part] = self.start + seconds * used / total
        self._end = self.start + seconds
        self.report: dict[str, Any] = {"left_out": []}
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
        self._progress = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self._task = self._progress.add_task("", total=seconds, left="")

    def __enter__(self) -> Run:
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within, `over` is about this part's share; afterwards the report so far is written."""
        self._end = self._ends[name]
        self.now(name)
        self.console.print(f"{name}: at most about {max(0.0, self._end - self.clock()):.0f} s")
        try:
            yield
        finally:
            self.save()

    def now(self, text: str) -> None:
        """Show what is being done, and the time left."""
        passed = self.clock() - self.start
        left = f"{max(0, self.seconds - passed):.0f} s left"
        self._progress.update(self._task, description=text, completed=passed, left=left)

    def over(self, what: str) -> bool:
        """Whether the part's time is up; then it is said that `what` is left out."""
        if self.clock() < self._end:
            self.now(what)
            return False
        self.leave_out(what, "out of time")
        return True

    def leave_out(self, what: str, why: str) -> None:
        self.report["left_out"].append(f"{what}: {why}")
        self.console.print(f"left out: {what}: {why}")

    @contextmanager
    def surviving(self, what: str) -> Iterator[None]:
        """Where one subject fails, say so and let the others go on."""
        self.device.clear()  # here, when nothing holds what the one before has left
        try:
            yield
        except torch.OutOfMemoryError:
            self.leave_out(what, "out of memory")
        except Exception as error:  # PyTorch, Triton and the compilers raise all kinds
            self.leave_out(what, first_line(error))

    def net(self) -> Any:
        """The supernet on the CPU, to read shapes and draw paths from."""
        return replace(self.settings, device="cpu").net()

    def of(self, dtype: str, batch: int) -> Settings:
        autocast = None if dtype == "fp32" else str(DTYPES[dtype]).removeprefix("torch.")
        return replace(self.settings, batch=batch, autocast=autocast)

    def median(self, call: Callable[[], Any], seconds: float, cold: bool = False) -> float:
        """Median seconds of a call that has been warmed up, from as many, 3 to 50, as fit into about `seconds`."""
        times: list[float] = []
        end = self.clock() + seconds
        while len(times) < 3 or (self.clock() < end and len(times) < 50):
            times.append(self.device.time(call, cold))
        return statistics.median(times)

    def save(self) -> None:
        """Write the report; whoever reads the file meanwhile finds the old one or the new one, whole."""
        self.report["seconds"] = self.clock() - self.start
        self.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.out.with_name(self.out.name + ".part")
        temporary.write_text(json.dumps(self.report, indent=1, default=str) + "\n")
        temporary.replace(self.out)


def ceilings(run: Run) -> dict[str, float]:
    """What this device does at best: bytes/s of a copy (read and write), FLOP/s of bf16 and of float32 products."""
    words, side = (1 << 28, 8192) if run.device.name == "cuda" else (1 << 16, 64)
    a = torch.randn(words, device=run.settings.device)
    a.clone()
    found = {"copy_bytes_s": 2 * a.nbytes / run.median(a.clone, 0.5)}
    del a
    for name in ("bf16", "fp32"):
        m = torch.randn(side, side, device=run.settings.device).to(DTYPES[name])
        m @ m
        found[f"{name}_flop_s"] = 2 * side**3 / run.median(lambda m=m: m @ m, 0.5)
    run.device.clear()
    return found
