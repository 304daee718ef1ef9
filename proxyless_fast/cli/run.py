"""A run folder: each stage reads what the earlier ones wrote, and notes its own figures in report.json."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..distributed.ranks import Ranks
from ..io import documents
from ..io.schemas import Report, check

STAGES = ("search", "derive", "train", "eval", "export", "total")


class Run:
    """Paths and report of one run. Of several processes the first alone writes."""

    def __init__(self, folder: str | Path, ranks: Ranks | None = None) -> None:
        self.folder, self.ranks = Path(folder), Ranks.current() if ranks is None else ranks
        self.latency = self.folder / "latency.yaml"
        self.architecture = self.folder / "arch.json"
        self.weights = self.folder / "weights.safetensors"
        self.onnx = self.folder / "net.onnx"
        self.report_file = self.folder / "report.json"

    @property
    def writes(self) -> bool:
        return self.ranks.first

    def alone(self, stage: Callable, *arguments: Any) -> None:
        """Runs a stage in the process that writes, while the others wait for the files."""
        if self.writes:
            stage(*arguments)
        self.ranks.wait()

    def need(self, path: Path, command: str) -> Path:
        """path, if it is there. Raises FileNotFoundError that names the command which writes it.

        ValueError for a folder, a pipe or a device under its name.
        """
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: is no regular file, expected what `proxyless-fast {command}` writes")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, expected what `proxyless-fast {command}` writes")
        return path

    def report(self) -> dict[str, Any]:
        """Figures of the stages that have run, by stage. Raises ValueError where report.json is damaged."""
        if not self.report_file.exists():
            return {}
        report = dict(documents.read(self.report_file, "a report"))
        check(Report, report, str(self.report_file))
        return report

    def stage(self, name: str) -> dict[str, Any]:
        """Figures of one stage. Raises FileNotFoundError where it has not run."""
        report = self.report()
        if name not in report:
            command = name if name in STAGES else "search"
            raise FileNotFoundError(
                f"{self.report_file}: has no {name}, expected what `proxyless-fast {command}` writes"
            )
        return report[name]

    def record(self, stage: str, values: dict[str, Any]) -> None:
        """Replaces the figures of one stage, and drops those of later stages, which no longer hold."""
        if not self.writes:
            return
        later = STAGES[STAGES.index(stage) + 1 :] if stage in STAGES else ()
        kept = {name: figures for name, figures in self.report().items() if name not in later}
        documents.write({**kept, stage: values}, self.report_file)

    @contextmanager
    def timed(self, stage: str) -> Iterator[dict[str, Any]]:
        """Records what the block puts into the dict it is given, with its wall time."""
        values: dict[str, Any] = {}
        start = time.perf_counter()
        yield values
        self.record(stage, {**values, "seconds": round(time.perf_counter() - start, 2)})
