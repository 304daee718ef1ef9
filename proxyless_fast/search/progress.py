"""One progress line with the time left."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False, markup=False, emoji=False)  # names of files and classes are printed as they are


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
    )
    return progress, progress.add_task(description, total=total, completed=completed, note="")


def note(newest: dict[str, float]) -> str:
    """What fits beside the bar."""
    shown = ("weight_loss", "train_loss", "weight_top1", "train_top1", "arch_latency", "arch_entropy")
    return summary({name.split("_")[1]: newest[name] for name in shown if name in newest})


def summary(values: dict[str, float]) -> str:
    """Names and values in their shortest useful form."""
    return "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())


def report_epoch(means: dict[str, float], epochs: int) -> None:
    """Prints one line of an epoch's means; means["epoch"] counts from 0."""
    rest = {name: value for name, value in means.items() if name != "epoch"}
    console.print(f"epoch {means['epoch'] + 1:.0f} of {epochs}: {summary(rest)}", soft_wrap=True)
