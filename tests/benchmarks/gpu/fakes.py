"""A device that is not there: this CPU in place of a GPU, and sessions on it."""

import time
from contextlib import contextmanager
from io import StringIO

import torch
from rich.console import Console

import proxyless_fast.bench.baselines as baselines
from benchmarks.gpu.session import SHARES, Session
from benchmarks.gpu.shapes import BlockShape
from proxyless_fast.bench.measure import SavedBytes

LAYER = BlockShape(64, 24, 24, 56, 7, 1, 6)


class _Within(SavedBytes):
    """Runs out of memory where more is kept for backward than `limit`."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def _pack(self, tensor):
        kept = super()._pack(tensor)
        if self.total > self.limit:
            raise torch.OutOfMemoryError("more than the limit")
        return kept


class Host:
    """This CPU in place of a GPU: memory is what autograd keeps, the card's is 2 GiB."""

    name = "cpu"
    within = None

    def time(self, call, cold=False):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def peak(self, call):
        with SavedBytes() as kept:
            call()
        return kept.total

    def free(self):
        return 2 << 30

    @contextmanager
    def limited(self, limit):
        with _Within(limit) as self.within:
            yield

    def describe(self):
        return {"card": "a CPU"}

    def capability(self):
        return 90

    def table_architecture(self):
        return 90

    def clear(self):
        if self.within is not None:
            self.within._storages.clear()


class Steady(Host):
    """Every call takes as long as is said, and is not made."""

    def __init__(self, seconds):
        self.seconds = seconds

    def time(self, call, cold=False):
        return self.seconds


def make_session(tmp_path, host=None, parts=tuple(SHARES), seconds=1e9, clock=time.monotonic, **settings):
    of = {"space": "small", "resolution": 16, "batch": 4, "threads": 1} | settings
    console = Console(file=StringIO(), width=200)
    return Session(
        host or Host(), baselines.Settings(**of), list(parts), seconds, tmp_path / "gpu.json", console, clock
    )


def printed(session):
    return session.console.file.getvalue()


class Spy(baselines.Subject):
    """Notes what it is told to run."""

    seen: list = []  # noqa: RUF012

    def step(self, x, labels, paths, kind):
        self.seen.append((len(x), kind, tuple(paths)))
        super().step(x, labels, paths, kind)
