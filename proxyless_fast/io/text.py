"""Text files of others: read whole, within a limit, with errors in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def read_text(path: str | Path, what: str, limit: int) -> str:
    """The text of a UTF-8 file of at most `limit` bytes, without a byte order mark.

    what: the kind of file, for the messages. Raises FileNotFoundError where there is none, and ValueError for a
    directory, a device, a file above the limit, or one that is no UTF-8.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a named pipe would be waited for, a device never ends
            raise ValueError(f"{path} cannot be read as {what}: it is no regular file")
        with path.open("rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise ValueError(f"{path} cannot be read as {what}: expected at most {limit:,} bytes, got more")
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"no {what} at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as {what}: {said(error)}") from error


def short(value: object, limit: int = 60) -> str:
    """repr of a value from a file, cut to a length that fits a sentence."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, dict | list | tuple):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else text[:limit] + "..."


def printable(path: Any) -> str:
    """A path or name for a message of one line: what a terminal could not show is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))


def plain(name: str, limit: int = 120) -> str:
    """A name from a file as it is, if it is printable and of a length that fits a sentence; else its repr, cut."""
    return name if name.isprintable() and 0 < len(name) <= limit else short(name, limit)


def said(error: Exception, limit: int = 300) -> str:
    """What a library says of a file, on one printable line: it quotes from the file."""
    text = "".join(c if c.isprintable() else " " for c in str(error))
    return " ".join(text.split())[:limit]
