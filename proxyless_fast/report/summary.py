"""The final table."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..io.text import printable
from .architecture import block_lines

STAGES = ("profile", "search", "derive", "train", "eval", "export")


def print_report(report: dict[str, Any], folder: Path, console: Console | None = None) -> None:
    """Prints what is known of a run: latencies, accuracy, size, the architecture, files and times."""
    console, name = console or Console(highlight=False, markup=False, emoji=False), printable(folder)
    console.print(name, soft_wrap=True)  # as a table's title it would be folded
    table = Table(show_header=False)
    for row in _rows(report):
        table.add_row(*row)
    console.print(table)
    if "derive" in report:
        for line in block_lines(report["derive"]["blocks"], console.options.ascii_only):
            console.print(line, soft_wrap=True)
        console.print(report["derive"]["note"], soft_wrap=True)
    seconds = {stage: report[stage]["seconds"] for stage in STAGES if stage in report}
    times = "  ".join(f"{stage} {_time(s)}" for stage, s in seconds.items())
    total = report.get("total", {}).get("seconds", sum(seconds.values()))
    console.print(f"time: {times}  total {_time(total)}", soft_wrap=True)
    files = [stage_file for stage in STAGES for stage_file in report.get(stage, {}).get("files", ())]
    console.print(f"files in {name}: {', '.join(dict.fromkeys([*files, 'report.json']))}", soft_wrap=True)


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    profile, derive = report.get("profile", {}), report.get("derive", {})
    evaluation, export = report.get("eval", {}), report.get("export", {})
    rows = []
    if derive.get("target") is not None:
        rows.append(("target latency", f"{derive['target']:.4f} ms  ({report['search']['target_source']})"))
    if derive.get("predicted") is not None:
        rows.append(("predicted latency", f"{derive['predicted']:.4f} ms"))
    if "measured" in export:
        verdict = ""
        if derive.get("target") is not None:
            verdict = ", within the target" if export["measured"] <= derive["target"] else ", MISSES the target"
        threads = f"{export['threads']} thread{'s' if export['threads'] > 1 else ''}"
        rows.append(("measured latency", f"{export['measured']:.4f} ms  (ONNX Runtime, {threads}{verdict})"))
    if "fastest" in profile:
        rows.append(("space", f"fastest path {profile['fastest']:.4f} ms, slowest {profile['slowest']:.4f} ms"))
    if "top1" in evaluation:
        rows.append(("test accuracy", f"top-1 {evaluation['top1']:.2%}, top-5 {evaluation['top5']:.2%}"))
    if derive:
        rows.append(("parameters", f"{derive['parameters']:,}"))
        rows.append(("MACs", f"{derive['macs']:,}"))
    return rows


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
