"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_UMASK = os.umask(0o077)  # it can only be read by setting it
os.umask(_UMASK)


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well and removed when it does not.

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
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except Exception as error:
        number = _errno(error)
        own = (None, str(temporary), str(path), str(path.parent))
        if number is None or (isinstance(error, OSError) and error.filename not in own):
            raise
        raise OSError(number, f"cannot be written: {os.strerror(number)}", str(path)) from error
    finally:
        with suppress(OSError):  # why there is none was said
            temporary.unlink(missing_ok=True)


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


def _errno(error: BaseException) -> int | None:
    """The system's number of an error: torch hides it in the context, safetensors (Rust) in the text."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.errno
        cause = cause.__cause__ or cause.__context__
    said = re.search(r"\(os error (\d+)\)", str(error))
    return int(said[1]) if said else None
