"""Damaged checkpoints: the one before is used, with a warning that names it, or one sentence says that none is left.

`python -m tests.fuzz.checkpoints [--seconds N] [--seed S] [--cases N]`: bits flipped, bytes replaced, cut, grown and
emptied, of the newest checkpoint or of all. Prints the failing case, keeps its folder and exits with 1.
"""

from __future__ import annotations

import logging
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from proxyless_fast.search import Checkpoints, Search, checkpoint, progress
from tests.fuzz._command import from_command_line
from tests.search.test_search import ToyNet, config, toy_loaders, toy_times


class Said(logging.Handler):
    """Keeps what is warned of."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def damage(path: Path, draw: random.Random) -> str:
    """Changes a file; returns how."""
    data = bytearray(path.read_bytes())
    kind = draw.choice(("flip", "flip", "flip", "cut", "cut", "block", "grow", "empty"))
    place = draw.randrange(len(data))
    if kind == "flip":
        data[place] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[place:]
    elif kind == "block":  # what a disk gives for a page that was never written
        data[place : place + 4096] = bytes(len(data[place : place + 4096]))
    elif kind == "grow":
        data += draw.randbytes(1 + place % 100)
    else:
        data.clear()
    if data == path.read_bytes():  # zeros that were zeros
        data[place] ^= 1
    path.write_bytes(data)
    return f"{kind} at {place}"


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def try_one(folder: Path, damaged: list[Path], wanted: dict[str, Any] | None, said: Said) -> str | None:
    """What is wrong with how a folder is read, of which some checkpoints are damaged, or None."""
    said.lines.clear()
    net = ToyNet()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    try:
        state, _ = checkpoint.load(folder)
        search = Search.resume(folder, net, *toy_loaders(), table=toy_times(net))
    except ValueError as error:
        if wanted is not None:
            return f"refused: {error}"
        if str(damaged[0]) not in str(error) or "\n" in str(error):
            return f"a sentence that does not name {damaged[0].name}: {error}"
        return None if same(before, dict(net.state_dict())) else "refused, and the net is another"
    if wanted is None:
        return "no checkpoint was whole, and one was taken"
    if not same(state, wanted) or search.step != wanted["step"] or not same(dict(net.state_dict()), wanted["net"]):
        return "another state"
    missed = [path.name for path in damaged if not any(path.name in line for line in said.lines)]
    return f"no warning of {missed}" if missed else None


def main(seconds: float = 60.0, seed: int = 0, cases: int = sys.maxsize) -> int:
    """Tries damages for so many seconds or cases; 1 where one was not taken as it should be, else 0."""
    draw, above, said = random.Random(seed), Path(tempfile.mkdtemp(prefix="fuzz_checkpoints_")), Said()
    progress.console.quiet = True
    net = ToyNet()
    every = Checkpoints(steps=5)
    Search(net, *toy_loaders(), config(), toy_times(net), above / "run", checkpoints=every).fit()
    logger, tried, end = logging.getLogger("proxyless_fast.search.checkpoint"), 0, time.monotonic() + seconds
    logger.addHandler(said)
    logger.propagate = False
    try:
        while tried < cases and time.monotonic() < end:
            folder, tried = shutil.copytree(above / "run", above / str(tried)), tried + 1
            found = checkpoint.paths(folder / "checkpoints")
            damaged = found[: draw.choice((1, 1, 1, 2, len(found)))]
            how = [damage(path, draw) for path in damaged]
            left = found[len(damaged) :]
            wrong = try_one(folder, damaged, checkpoint.read(left[0]) if left else None, said)
            if wrong:
                print(f"seed {seed}, case {tried} in {folder}: {how}: {wrong}")
                return 1
            shutil.rmtree(folder)
    finally:
        logger.removeHandler(said)
        logger.propagate = True
        progress.console.quiet = False
    shutil.rmtree(above)
    print(f"seed {seed}: {tried:,} damages")
    return 0


if __name__ == "__main__":
    from_command_line(main, __doc__)
