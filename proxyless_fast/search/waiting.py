"""How long steps wait for their batches: measured, told where it is much, and ended where no batch comes."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..data.workers import ENDED, steady, told

log = logging.getLogger(__name__)

TIMEOUT_S = 600.0  # for one batch
MUCH = 0.3  # of the time, from which on the loader is named


class Waiting:
    """The host's waiting for batches of some loaders, as a share of the time that passes.

    loaders: by name, for the words. timeout: seconds for one batch, after which TimeoutError names the loader: in the
    main thread, where the system can interrupt what hangs, and unless someone else uses SIGALRM. speaks: whether this
    process says that a loader binds.
    """

    def __init__(
        self, loaders: Mapping[str, Any] | None = None, timeout: float | None = None, speaks: bool = True
    ) -> None:
        self._loaders, self._timeout, self._speaks = dict(loaders or {}), timeout or TIMEOUT_S, speaks
        self._since: float | None = None
        self._waited, self._images, self._starts = 0.0, 0, True

    def over(self, batches: Iterable[Any], name: str = "loader") -> Iterator[Any]:
        """The same batches. Raises TimeoutError where one does not come, ChildProcessError where a worker is gone."""
        with steady():
            source = iter(batches)
        while True:
            start = time.perf_counter()
            if self._since is None:
                self._since = start
            try:
                with steady(), _alarm(name, self._timeout):
                    batch = next(source)
            except StopIteration:
                return
            except ENDED as error:
                raise told(error, getattr(self._loaders.get(name), "workers", None)) from error.__cause__
            self._waited += time.perf_counter() - start
            self._images += _images(batch)
            yield batch

    def take(self) -> float:
        """The share, 0 to 1, of the time since the last call; says once where the loader is what steps wait for."""
        now = time.perf_counter()
        seconds = now - self._since if self._since is not None else 0.0
        share = min(1.0, self._waited / seconds) if seconds else 0.0
        if share > MUCH and self._speaks and not self._starts:  # the first batches wait for the workers to start
            self._speaks = False  # once
            workers = [
                f"{name} has {loader.workers}" for name, loader in self._loaders.items() if hasattr(loader, "workers")
            ]
            more = f"more --workers ({', '.join(workers)})" if workers else "a faster loader"
            log.warning(
                "the loader is what the steps wait for, %.0f %% of the time: it gives %.0f images/s; %s, or smaller "
                "images, would help",
                100 * share,
                self._images / seconds,
                more,
            )
        self._since, self._waited, self._images, self._starts = now, 0.0, 0, False
        return share


def _images(batch: Any) -> int:
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    return len(first) if isinstance(first, Tensor) and first.dim() else 1


@contextmanager
def _alarm(name: str, seconds: float) -> Iterator[None]:
    """TimeoutError is raised within after so many seconds, whatever waits there, as long as signals interrupt it."""
    ours = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    if not ours or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise TimeoutError(f"{name}: the loader gave no batch for {seconds:g} s, expected one")

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # again, where a loader catches the first
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
