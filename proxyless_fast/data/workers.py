"""The processes that read images: what they heed, and how their end is told."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def subordinate(worker: int) -> None:
    """Make a worker leave words and ends to the main process (a DataLoader's `worker_init_fn`).

    What Pillow warns of has no reader there: what matters comes back as the sentence about the file. And what a
    terminal or a scheduler sends to all processes of a run must not end the workers of a step that is to be finished.
    """
    warnings.simplefilter("ignore")
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        _heed_sigterm_of(os.getppid())


def _heed_sigterm_of(parent: int) -> None:
    """SIGTERM ends this process where the parent sent it, as Python does when it ends, and else nothing.

    Ignored altogether it would leave the parent waiting for ever for workers that it has told to end. A worker whose
    parent is gone ends by torch's own watchdog.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # and so in every thread that starts from here on

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, name="sigterm", daemon=True).start()


@contextmanager
def starting() -> Iterator[None]:
    """Workers that start within are born with SIGTERM held back, until `subordinate` heeds it."""
    if not hasattr(signal, "sigwaitinfo"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def steady() -> Iterator[None]:
    """After DataLoaders that start within, the end of a worker is told by the loader, within 5 s, and nowhere else.

    Left alone, torch raises it wherever the main process is at that moment: in the middle of an optimizer's step, say.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if _is_torchs(signal.getsignal(signal.SIGCHLD)):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None or _is_torchs(before) else before)


def _is_torchs(handler: Any) -> bool:
    return getattr(handler, "__module__", None) == "torch.utils.data._utils.signal_handling"


# What reading from a worker raises where it is gone; EOFError and ConnectionError while it goes.
ENDED = (RuntimeError, EOFError, ConnectionError)


def told(error: Exception, workers: Any = None) -> Exception:
    """What torch says of a worker that is gone, as a ChildProcessError of one sentence; any other error as it is."""
    # "(pid": else it is what a data set raised in a worker
    if not ("DataLoader worker (pid" in str(error) if isinstance(error, RuntimeError) else _is_of_sharing(error)):
        return error
    ended = f"a process that reads images was ended by the system ({str(error).strip().rstrip('.') or 'it is gone'})"
    return ChildProcessError(f"{ended}: expected memory for {'it' if workers is None else f'workers={workers}'}")


def _is_of_sharing(error: Exception) -> bool:
    """Whether an error comes from taking over the memory of a batch from the worker that made it."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == "multiprocessing.resource_sharer":
            return True
        trace = trace.tb_next
    return False
