"""One progress line with the time left."""

from __future__ import annotations

import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False, markup=False, emoji=False)  # names of files and classes are printed as they are

REFRESH = 0.1  # seconds between two moves of the bar
FIRST_LINE, LINES = 10.0, 60.0  # seconds until the first line, and between lines, where there is no terminal


def say(text: str) -> None:
    """Prints a line; a reader that left, or a full disk behind the output, is no reason to end a run."""
    with suppress(OSError, ValueError):  # ValueError: a closed file
        console.print(text, soft_wrap=True)


def progress_bar(description: str, total: int, completed: int = 0, shown: bool = True) -> tuple[Progress, Any]:
    """A rich progress context and its one task, with a free text field `note`."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not (shown and console.is_terminal),
        speed_estimate_period=3600,  # of the last 1,000 moves of the bar, also where steps take half a minute
    )
    return progress, progress.add_task(description, total=total, completed=completed, note="")


class StepProgress:
    """Context: how far a run of steps is. On a terminal a bar, elsewhere a line now and then; both with the time left,
    from the second step on. shown: False in a process that is not the one that prints.
    """

    def __init__(self, description: str, total: int, completed: int, shown: bool = True) -> None:
        self.description, self.total, self.shown = description, total, shown
        self._bar, self._task = progress_bar(description, total, completed, shown)
        self._first: tuple[int, float] | None = None  # step and time: the first step of a process is slower
        self._note, self._shown, self._next_line = "", 0.0, time.monotonic() + FIRST_LINE

    def __enter__(self) -> StepProgress:
        self._bar.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(OSError, ValueError):
            self._bar.__exit__(kind, error, trace)  # type: ignore[arg-type]

    def update(self, completed: int, newest: dict[str, float] | None = None) -> None:
        """A step is done; newest: values to show, where they were fetched. Waits for no device."""
        now = time.monotonic()
        if self._first is None:
            self._first = completed, now
        if newest or now - self._shown >= REFRESH:
            if newest:
                self._note = note(newest)
            with suppress(OSError, ValueError):
                self._bar.update(self._task, completed=completed, note=self._note)
            self._shown = now
        if self.shown and self._bar.disable and now >= self._next_line and completed > self._first[0]:
            self._next_line = now + LINES
            left = (self.total - completed) * (now - self._first[1]) / (completed - self._first[0])
            say(f"{self.description}: step {completed:,} of {self.total:,}, {duration(left)} left")


def duration(seconds: float) -> str:
    """Seconds in the largest unit that fits."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def note(newest: dict[str, float]) -> str:
    """What fits beside the bar."""
    shown = ("weight_loss", "train_loss", "weight_top1", "train_top1", "arch_latency", "arch_entropy")
    return summary({name.split("_")[1]: newest[name] for name in (*shown, "data_wait") if name in newest})


def summary(values: dict[str, float]) -> str:
    """Names and values in their shortest useful form."""
    return "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())


def epoch_line(means: dict[str, float], epochs: int) -> str:
    """One line of an epoch's means; means["epoch"] counts from 0."""
    rest = {name: value for name, value in means.items() if name != "epoch"}
    return f"epoch {means['epoch'] + 1:.0f} of {epochs}: {summary(rest)}"
