"""Damaged run folders, for every stage: exit code 2 and a sentence that names the file, or the output as if undamaged.

`python -m tests.fuzz.run_folders [--seconds N] [--seed S] [--cases N]`. Prints the failing case, keeps its folder and
exits with 1.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from proxyless_fast.cli import main as command
from proxyless_fast.search import Search, checkpoint
from proxyless_fast.search.session import OF_LOADERS
from tests.fuzz._checkpoints import only, rewrite
from tests.fuzz._command import from_command_line

SEARCH = [
    "--candidates", "3x3_MBConv1", "5x5_MBConv1", "--batch-size", "8", "--epochs", "1", "--warmup-epochs", "1",
    "--arch-every", "2", "--log-every", "2",
]  # fmt: skip
STAGES: dict[str, list[str]] = {
    "derive": [], "train": ["--epochs", "1"], "eval": [], "export": ["--repeats", "1"], "report": [],
    "search": ["--resume"],
}  # fmt: skip
FILES = (
    "latency.yaml",
    "checkpoints/*.pt",
    "arch.json",
    "weights.safetensors",
    "net.onnx",
    "report.json",
    "search.jsonl",
)
VALUES: tuple[Any, ...] = (None, True, -1, 1.5, 10**30, "", "x", "é\ud800", [], {}, [[]], {"x": 1}, [1, 2, 3])


def write_data(folder: Path) -> None:
    """24 training and 8 test images of 12x12 pixels in two classes, as IDX files."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("t10k", 8)):
        labels = np.arange(count) % 2
        images = rng.integers(0, 99, (count, 12, 12)) + 99 * labels[:, None, None]
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / name).write_bytes(header + array.astype(np.uint8).tobytes())


def run(*arguments: str) -> tuple[Any, str, str]:
    """Exit code, stdout and stderr of a command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = command(list(arguments))
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def make(folder: Path) -> None:
    """A finished run, one that was interrupted, and the finished run of another net, as folders of `folder`."""
    write_data(folder / "data")
    search = ["--data", str(folder / "data"), "--repeats", "2", "--train-epochs", "1", *SEARCH]
    for name, more in (("finished", ()), ("other", ("--seed", "1", "--candidates", "7x7_MBConv2"))):
        assert run("search", "--all", "--run", str(folder / name), *search, *more)[0] == 0
        only(folder / name)
    (folder / "stopped").mkdir()
    shutil.copy(folder / "finished" / "latency.yaml", folder / "stopped")
    weight_step = Search.weight_step

    def pressing(self: Search, *arguments: Any) -> Any:
        sums = weight_step(self, *arguments)
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return sums

    Search.weight_step = pressing  # type: ignore[method-assign]
    try:
        assert run("search", "--run", str(folder / "stopped"), *search)[0] == 130
    finally:
        Search.weight_step = weight_step  # type: ignore[method-assign]


def output(stage: str, folder: Path, printed: str) -> Any:
    """What a stage is run for, without times and paths."""
    if stage == "report":
        return printed.replace(str(folder), "")
    if stage == "search":
        return {k: v.numpy().tobytes() for k, v in checkpoint.load(folder)[0]["net"].items()}
    weights = "weights.safetensors"
    written = {"derive": ("arch.json", weights), "train": (weights,), "export": ("net.onnx",)}
    figures = json.loads((folder / "report.json").read_text())[stage]
    for name in ("seconds", "measured", "files"):
        figures.pop(name, None)
    return figures, [(folder / name).read_bytes() for name in written.get(stage, ())]


class Damage:
    """Changes to a run folder; each returns what it did."""

    def __init__(self, draw: random.Random, other: Path) -> None:
        self.draw, self.other = draw, other

    def any(self, folder: Path, stage: str) -> tuple[str, str]:
        """The file that was damaged, and how."""
        path = self.draw.choice([path for name in FILES for path in folder.glob(name)])
        name = "checkpoints/" if path.suffix == ".pt" else path.name
        own = {"json": self.document, "yaml": self.table, "pt": self.state, "safetensors": self.header}
        changes: list[Callable] = [self.whole, self.whole, self.cut]
        changes += [own[suffix]] * 4 if (suffix := name.rpartition(".")[2]) in own else [self.lines]
        return name, self.draw.choice(changes)(path, stage)

    def whole(self, path: Path, stage: str) -> str:
        kind = self.draw.choice(("gone", "empty", "folder", "noise", "another kind", "another run", "pipe", "loop"))
        content = path.read_bytes()
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "loop":
            path.symlink_to(path.name)
        elif kind == "noise":
            path.write_bytes(self.draw.randbytes(200))
        elif kind == "another kind":
            others = [other for name in FILES for other in self.other.glob(name) if other.suffix != path.suffix]
            path.write_bytes(self.draw.choice(others).read_bytes())
        elif kind == "another run" and not (path.name == "report.json" and stage == "report"):
            # A whole and other table is no damage, nor are other weights that fit; "other" has another space.
            if path.suffix == ".pt":
                rewrite(path.parents[1], checkpoint.load(self.other)[0])
            else:
                path.write_bytes((self.other / path.name).read_bytes())
        elif kind != "gone":
            path.write_bytes(content if kind == "another run" else b"")
        return kind

    def cut(self, path: Path, stage: str) -> str:
        data = path.read_bytes().rstrip()
        path.write_bytes(data[: self.draw.randrange(len(data))])
        return "cut"

    def lines(self, path: Path, stage: str) -> str:
        if path.name != "search.jsonl":
            return "nothing"
        lines = path.read_text().splitlines()
        index = self.draw.randrange(len(lines))
        lines[index] = self.draw.choice(('{"step": -1}', '{"step": "x"}', "[]", "{}", "{", "\0", "[" * 9999, "é"))
        path.write_text("\n".join(lines) + "\n")
        return f"line {index}: {lines[index][:20]}"

    def document(self, path: Path, stage: str) -> str:
        content = json.loads(path.read_text())
        # What a stage noted can be gone with it: it is as if it had not run. A search that runs has no files yet.
        done = self.change(content, keep={"files", *content} if path.name == "report.json" else set())
        path.write_text(json.dumps(content))
        return done

    def table(self, path: Path, stage: str) -> str:
        content = yaml.safe_load(path.read_text())
        done = self.change(content, keep={"header", "median", *content["header"]})
        path.write_text(yaml.safe_dump(content))
        return done

    def state(self, path: Path, stage: str) -> str:
        if self.draw.random() < 0.4:
            data = bytearray(path.read_bytes())
            place = self.draw.randrange(len(data))
            data[place] ^= 1 << self.draw.randrange(8)
            path.write_bytes(data)
            return f"a bit of byte {place}"
        content = checkpoint.read(path)
        # No one can know that moments or means were there, and old files have no counters.
        indices = {*content["weight_optimizer"]["state"], *content["arch_optimizer"]["state"]}
        counters = {name for name in content["net"] if name.endswith("num_batches_tracked")}
        more = {"log", "loaders", "seed", "kind", *content["log"], *content["loaders"], "batches", *OF_LOADERS}
        done = self.change(content, keep={*content["sums"], *indices, *counters, *more})
        rewrite(path.parents[1], content)
        return done

    def header(self, path: Path, stage: str) -> str:
        data = path.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        done = self.change(header, keep=set())
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
        return done

    def change(self, content: Any, keep: set[Any]) -> str:
        """A key taken away, unless it is one of `keep`, or a value of another type, somewhere inside."""
        node, place = content, []
        while True:
            key = self.draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
            place.append(str(key))
            if not (isinstance(node[key], dict | list) and node[key] and self.draw.random() < 0.8):
                break
            node = node[key]
        if isinstance(node, dict) and key not in keep and self.draw.random() < 0.5:
            del node[key]
            return f"{'.'.join(place)} is gone"
        numbers = (int, float)
        old = node[key]
        same = numbers if isinstance(old, numbers) and not isinstance(old, bool) else type(old)
        others = [v for v in VALUES if isinstance(v, bool) or not isinstance(v, same)]
        node[key] = copy.deepcopy(self.draw.choice(others))
        return f"{'.'.join(place)} is {node[key]!r}"


def try_one(stage: str, folder: Path, name: str, how: str, wanted: Any) -> str | None:
    """What is wrong with how a stage takes a damaged folder, or None."""
    code, out, err = run(stage, "--run", str(folder), *STAGES[stage])
    if code == 0:
        if err:
            return f"exit code 0, and on stderr {err!r}"
        return None if output(stage, folder, out) == wanted else "another output, and exit code 0"
    lines = err.splitlines()
    if code != 2 or len(lines) != 1 or not lines[0].startswith(f"proxyless-fast {stage}: "):
        return f"exit code {code}, and on stderr {err!r}"
    if (how != "gone" and name not in lines[0]) or not lines[0].isprintable():
        return f"a sentence that does not name {name}: {lines[0]}"
    left = [path.name for path in folder.glob(".*.tmp")]
    return f"left behind: {left}" if left else None


def main(seconds: float = 60.0, seed: int = 0, cases: int = sys.maxsize) -> int:
    """Tries folders for so many seconds or cases; 1 where one was not taken as it should be, else 0."""
    draw, above = random.Random(seed), Path(tempfile.mkdtemp(prefix="fuzz_run_folders_"))
    make(above)
    damage, tried = Damage(draw, above / "other"), 0
    wanted = {}
    for stage, options in STAGES.items():
        folder = shutil.copytree(above / ("stopped" if stage == "search" else "finished"), above / stage)
        code, out, _ = run(stage, "--run", str(folder), *options)
        assert code == 0
        wanted[stage] = output(stage, folder, out)
    end = time.monotonic() + seconds
    while tried < cases and time.monotonic() < end:
        stage = draw.choice(list(STAGES))
        source = above / ("stopped" if stage == "search" else "finished")
        folder, tried = shutil.copytree(source, above / str(tried), symlinks=True), tried + 1
        name, how = damage.any(folder, stage)
        wrong = try_one(stage, folder, name, how, wanted[stage])
        if wrong:
            print(f"seed {seed}, case {tried}: {stage} of {folder}: {name}: {how}: {wrong}")
            return 1
        shutil.rmtree(folder)
    shutil.rmtree(above)
    print(f"seed {seed}: {tried:,} folders")
    return 0


if __name__ == "__main__":
    from_command_line(main, __doc__)
