"""How a command ends: one sentence and an exit code, whatever its output goes to."""

from __future__ import annotations

import argparse
import functools
import io
import os
import re
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..distributed.ranks import LostRank
from ..io.files import atomic
from ..io.text import printable
from ..latency import MissingKey
from ..search.interrupt import Preempted

WRONG_INPUT, FAULT, TRY_AGAIN, INTERRUPTED = 2, 70, 75, 130  # 70, 75: EX_SOFTWARE, EX_TEMPFAIL of sysexits.h

# What the package raises on purpose, and what the machine lacks. A plain KeyError or IndexError is neither.
USERS = (ValueError, OSError, ImportError, MemoryError, MissingKey)
# By these words of RuntimeErrors torch says that the machine has no more, or that the system ended a worker.
_LIMITS = re.compile(
    r"out of memory|can't allocate memory|not enough memory|shared memory|can't start new thread|"
    r"too many open files|no space left on device|DataLoader worker \(pid|UnreadableImage: ",
    re.IGNORECASE,
)
_LONGEST = 1000  # characters of a sentence


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_INPUT, f"{self.prog}: {one_line(message)}\n")


def command_line(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Decorates a program's main: its output may be of any encoding, closed or full.

    What cannot be encoded is escaped. A reader that leaves ends nothing, since the files are the work. What could not
    be written for another reason (a full disk) is told at the end, with exit code 2.
    """

    @functools.wraps(main)
    def wrapped(arguments: Sequence[str] | None = None) -> int:
        with _standard_streams() as failure, _quiet_threads():
            try:
                code = main(arguments)
            except SystemExit as stop:  # argparse's
                if stop.code or failure() is None:
                    raise
                code = 0
            error = failure()
            if error is None or code:
                return code
            return say("proxyless-fast", f"stdout cannot be written: {error.strerror or error}", WRONG_INPUT)

    return wrapped


def ended(command: str, run: Callable[[], int | None], folder: str | Path | None = None) -> int:
    """The exit code of what run() does: what it returns, or 0; else one sentence on stderr, and its code.

    2 for wrong input and for what the machine lacks, 75 where another process was lost, 130 after Ctrl-C, 0 where the
    system asked for an end and all is saved, 70 for a fault of this program; the sentence then names the file, in the
    run's folder where that can be, that holds the traceback.
    """
    name = f"proxyless-fast {command}"
    try:
        return run() or 0
    except KeyboardInterrupt as error:
        return say(name, str(error) or "stopped", INTERRUPTED)
    except Preempted as error:
        return say(name, str(error), 0)
    except LostRank as error:
        return say(name, str(error), TRY_AGAIN)
    except USERS as error:
        return say(name, _sentence(error), WRONG_INPUT)
    except Exception as error:
        if isinstance(error, RuntimeError) and _LIMITS.search(str(error)):
            return say(name, _sentence(error), WRONG_INPUT)
        reason = f"{type(error).__name__}: {_sentence(error)}" if str(error) else type(error).__name__
        return say(name, f"a fault of this program: {reason}; {_write_traceback(error, folder)}", FAULT)


def say(name: str, sentence: str, code: int) -> int:
    """Prints one line on stderr; returns the code."""
    print(f"{name}: {one_line(sentence)}", file=sys.stderr)
    return code


def one_line(text: str) -> str:
    """The text on one printable line; spaces are left as they are, since names may have them."""
    text = printable(re.sub(r"\s*\n\s*", " ", text.strip()))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None and error.filename2 is None:
        return f"{printable(os.fsdecode(error.filename))}: {error.strerror}"
    if isinstance(error, MemoryError):
        return f"out of memory: {error}" if str(error) else "out of memory"
    text = str(error)
    if "Traceback (most recent call last)" in text:  # torch's message of what a worker raised: its last line says it
        return re.sub(r"^[\w.]+: ", "", text.strip().splitlines()[-1])
    return text


def _write_traceback(error: BaseException, folder: str | Path | None) -> str:
    """Where the traceback was written, as the end of a sentence."""
    argv = " ".join(map(printable, sys.argv))
    text = f"{argv}\nPython {sys.version}\ntorch {torch.__version__}\n\n{''.join(traceback.format_exception(error))}"
    content = text.encode(errors="backslashreplace")
    try:
        if folder is None or not Path(folder).is_dir():
            raise FileNotFoundError(folder)
        place = Path(folder) / "traceback.txt"
        with atomic(place) as temporary:
            temporary.write_bytes(content)
    except OSError:
        try:
            with tempfile.NamedTemporaryFile(prefix="proxyless_fast_", suffix=".txt", delete=False) as file:
                place = Path(file.name)
                file.write(content)
        except OSError as why:
            return f"the traceback cannot be written ({why})"
    return f"the traceback is in {printable(place)}"


class _Standard(io.FileIO):
    """A standard stream that takes everything, and keeps why something could not be written."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:  # who reads has what they wanted
            pass
        except OSError as error:
            self.failure = error
        return len(data)


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """What the system refused to a thread that writes a log is raised in the main thread too, and is told there."""
    before = threading.excepthook

    def hook(args: Any) -> None:
        if not isinstance(args.exc_value, OSError):
            before(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def _standard_streams() -> Iterator[Callable[[], OSError | None]]:
    """stdout and stderr that any text can be written to; gives why stdout could not be, so far, or None."""
    before = sys.stdout, sys.stderr
    opened: dict[str, tuple[_Standard, io.TextIOWrapper]] = {}
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream: Any = getattr(sys, name)
        if stream is None:
            # Closed: a file opened later would get its number, and what libraries print.
            number, stream = _hold(number), io.TextIOWrapper(io.BytesIO(), "utf-8")
        elif stream is not getattr(sys, f"__{name}__"):
            continue  # of whoever called this: a test, a notebook
        else:
            stream.flush()
        raw = _Standard(number, "w", closefd=False)
        text = io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, "backslashreplace", line_buffering=True)
        opened[name] = raw, text
        setattr(sys, name, text)

    def failure() -> OSError | None:
        for _, text in opened.values():
            text.flush()
        return opened["stdout"][0].failure if "stdout" in opened else None

    try:
        yield failure
    finally:
        failure()
        sys.stdout, sys.stderr = before


def _hold(number: int) -> int:
    """Opens the null device under a number, unless something has it."""
    try:
        os.fstat(number)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != number:
            os.dup2(null, number)
            os.close(null)
        return number
    return os.open(os.devnull, os.O_RDWR)
