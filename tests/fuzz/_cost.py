"""What reading one damaged file may cost."""

from __future__ import annotations

import resource
import time

SECOND = 1.0


class Cost:
    """Processor time and peak memory of this process from here on."""

    def __init__(self) -> None:
        self._start, self._before = time.process_time(), _peak()

    def too_much(self, most_bytes: int) -> str | None:
        """In words, where it was more than a second or so many bytes."""
        seconds, grown = time.process_time() - self._start, _peak() - self._before
        if seconds > SECOND:
            return f"took {seconds:.1f} s"
        return f"took {grown / 2**20:.0f} MB" if grown > most_bytes else None


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
