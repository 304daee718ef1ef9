"""Signals that ask for an end, heeded between steps and never inside one."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

# What clusters and schedulers send some time before they kill; not every system has all.
PREEMPTIONS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))


class Preempted(SystemExit):
    """The work was saved and ended because the system asked for it: exit code 0, since it can be gone on with."""

    def __init__(self, message: str) -> None:
        super().__init__(0)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Interrupt:
    """Context: Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 set `requested`; a second Ctrl-C raises KeyboardInterrupt at once.

    Outside the main thread, where Python delivers no signals, it changes nothing; nor does it take up what the process
    was started to ignore (nohup).
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._in_main_thread = threading.current_thread() is threading.main_thread()

    def _request(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number)

    def requests(self) -> list[float]:
        """What this process asks of all others, as numbers that can be added up: whether to stop, and by Ctrl-C."""
        return [float(self.requested is not None), float(self.requested == signal.SIGINT)]

    def heed(self, requests: Sequence[float], several: bool) -> bool:
        """Whether to stop after this step; of several processes all stop at the same, by the sums of `requests`."""
        if not several:
            return self.requested is not None
        if self.requested is None and requests[0]:
            self.requested = signal.SIGINT if requests[1] else signal.SIGTERM
        return bool(requests[0])

    def stop(self, message: str) -> BaseException:
        """What to raise once all is saved: KeyboardInterrupt after Ctrl-C, else Preempted."""
        if self.requested is None or self.requested == signal.SIGINT:
            return KeyboardInterrupt(message)
        return Preempted(f"{message} ({self.requested.name})")

    @contextmanager
    def whole_step(self) -> Iterator[None]:
        """Within, a worker's end raises nothing: torch's handler, which would, is asked when the step is done."""
        if not self._in_main_thread:
            yield
            return
        ended: list[int] = []
        handler = signal.signal(signal.SIGCHLD, lambda number, frame: ended.append(number))
        try:
            yield
        finally:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)
        if ended and callable(handler):
            handler(signal.SIGCHLD, None)

    def __enter__(self) -> "Interrupt":
        if self._in_main_thread:
            for number in (signal.SIGINT, *PREEMPTIONS):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
