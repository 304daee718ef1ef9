"""One run of the benchmark, which every part is handed: settings, time budget, progress and report."""

from __future__ import annotations

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

from .device import DTYPES

STEP_KINDS = {"weight": "weight", "full": "arch"}  # step kinds of the registry, and what they are called here
# Shares of the time budget. What a part does not need goes to those after it.
SHARES = {"correctness": 0.2, "steps": 0.35, "largest": 0.15, "passes": 0.2, "blocks": 0.1}


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class Session:
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

    def __enter__(self) -> Session:
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


def ceilings(session: Session) -> dict[str, float]:
    """What this device does at best: bytes/s of a copy (read and write), FLOP/s of bf16 and of float32 products."""
    words, side = (1 << 28, 8192) if session.device.name == "cuda" else (1 << 16, 64)
    a = torch.randn(words, device=session.settings.device)
    a.clone()
    found = {"copy_bytes_s": 2 * a.nbytes / session.median(a.clone, 0.5)}
    del a
    for name in ("bf16", "fp32"):
        m = torch.randn(side, side, device=session.settings.device).to(DTYPES[name])
        m @ m
        found[f"{name}_flop_s"] = 2 * side**3 / session.median(lambda m=m: m @ m, 0.5)
    session.device.clear()
    return found
