"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)
LOCK = "run.lock"

_UMASK = os.umask(0o077)  # it can only be read by setting it
os.umask(_UMASK)


class InUse(OSError):
    """A folder that another process writes into."""


@contextmanager
def atomic(path: str | Path, rename: Callable[[], Path] | None = None) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well and removed when it does not.

    rename: gives another name for the file, in the same folder, once its content is known.

    The content is on the disk before the name is, and the name before this returns. The file may be read by whom a
    file of `open` may be, however the library that wrote it made it. Raises OSError (or its kind, such as
    PermissionError) with the errno and `path` where the system could not write it, in whatever words a library says so.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.chmod(0o666 & ~_UMASK)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path if rename is None else rename())
        _sync_folder(path.parent)
    except Exception as error:
        number = errno_of(error)
        own = (None, str(temporary), str(path), str(path.parent))
        if number is None or (isinstance(error, OSError) and error.filename not in own):
            raise
        raise OSError(number, f"cannot be written: {os.strerror(number)}", str(path)) from error
    finally:
        with suppress(OSError):  # why there is none was said
            temporary.unlink(missing_ok=True)


_held: dict[tuple[int, Path], int] = {}  # by process and folder: how many blocks hold it


@contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """Within, no other process holds the folder, which is made where it is not there; blocks of one process may nest.

    What processes that were killed left of `atomic` is cleared first. The system lets go of the lock when a process
    dies. Raises InUse, which names the folder and the process that holds it.
    """
    folder = Path(folder)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    key = os.getpid(), folder.resolve()
    if key in _held:
        _held[key] += 1
        try:
            yield
        finally:
            _held[key] -= 1
        return
    file = _locked(folder)
    _held[key] = 1
    try:
        for place in (folder, *(sub for sub in folder.iterdir() if sub.is_dir() and not sub.is_symlink())):
            clear_temporaries(place)
        yield
    finally:
        del _held[key]
        if made and [path.name for path in folder.iterdir()] == [LOCK]:  # nothing came of it
            with suppress(OSError):
                (folder / LOCK).unlink()
                folder.rmdir()
        with suppress(OSError):
            file.truncate(0)
        file.close()


def _locked(folder: Path) -> IO[bytes]:
    """The lock's file; closing it, of any descriptor of this process, lets go of the lock."""
    file = open(folder / LOCK, "ab+", buffering=0)  # noqa: SIM115  (closed by `held`)
    try:
        # A record lock: unlike flock's, it is not inherited by workers, who outlive a killed process for a while.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            process = file.read(32).decode("ascii", "replace").strip() or "another one"
            file.close()
            message = f"{folder}: process {process} writes into it, expected a folder of its own for each"
            raise InUse(message) from None
        log.warning("%s cannot be locked (%s): see that no other process writes into it", folder, error.strerror)
        return file
    with suppress(OSError):  # a full disk; the number is only told to who comes second
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
    return file


def clear_temporaries(folder: Path) -> None:
    """Removes what processes that were killed left in a folder; to be called by who holds it."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            with suppress(OSError):
                path.unlink()


def _sync_folder(folder: Path) -> None:
    """The names in a folder are on the disk; some file systems have no such order to give."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def require_writable(folder: str | Path) -> None:
    """Raises OSError where files of a run could not be written into a folder, which may not be there yet."""
    folder = Path(folder)
    above = folder
    while not os.path.lexists(above) and above != above.parent:
        above = above.parent
    if not above.is_dir():
        raise NotADirectoryError(f"{above}: is no folder, expected one to write into")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"{above}: cannot be written into, expected a folder that can")


def errno_of(error: BaseException) -> int | None:
    """The system's number of an error: torch hides it in the context, safetensors (Rust) in the text."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.errno
        cause = cause.__cause__ or cause.__context__
    said = re.search(r"\(os error (\d+)\)", str(error))
    return int(said[1]) if said else None
