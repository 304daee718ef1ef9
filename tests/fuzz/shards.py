"""Damaged and hostile tar files as shards: samples that lie in the file, or one sentence, soon, within memory, no file.

`python -m tests.fuzz.shards [--seconds N] [--seed S] [--cases N]`. Prints the failing case, keeps its folder and exits
with 1.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from proxyless_fast.data import UnreadableImage, shards
from tests.fuzz._command import from_command_line
from tests.fuzz._cost import Cost
from tests.fuzz.folders import silence
from tests.fuzz.images import mutated

MEMORY = 64 * 2**20
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
NAMES = (
    "/etc/x.png", "../../x.png", "a/../../x.png", "x\n.png", "\udcff.png", "é.png", ".png", "", ".", "..", "/", "a/",
    "x.seg.png", "x.PNG", "__MACOSX/x.png", "._x.png", "x" * 300 + ".png", "CON.png", "x.tar", "./x.png", "%s.png",
)  # fmt: skip
LABELS = (
    b"0",
    b"1\n",
    b"-1",
    b"",
    b"9" * 5000,
    b"1e9",
    b"NaN",
    b"[" * 5000,
    b'{"label": 3}',
    b'{"label": {}}',
    b"\xff",
)
KINDS = (
    tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE,
    tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, b"Z",
)  # fmt: skip
PAX = (b"12 size=-99\n", b"20 size=99999999999\n", b"9 path=\0\n", b"0 x=\n", b"25 GNU.sparse.major=1\n", b"\xff" * 40)


def header(draw: random.Random, name: str) -> bytes:
    """A header of any kind, of a size that may lie."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = draw.choice(KINDS), draw.choice(("/etc/passwd", "../x", name))
    info.size = draw.choice((0, 1, 512, 700, 2**20, 2**33 - 1, 2**33, 2**60))
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape"))
    if draw.random() < 0.2:  # a size below zero, as only GNU's numbers have
        block[-512 + 124 : -512 + 136] = b"\xff" * 11 + bytes([draw.randrange(256)])
    if draw.random() < 0.8:
        last = block[-512:]
        last[148:156] = b" " * 8
        last[148:156] = b"%06o\0 " % sum(last)
        block[-512:] = last
    return bytes(block)


def build(draw: random.Random, image: bytes) -> bytes:
    """A tar file of samples, some of them odd, with raw headers between them, and perhaps damage over all."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=draw.choice(FORMATS), errors="surrogateescape") as tar:
        for number in range(draw.choice((0, 1, 3, 120))):
            name = draw.choice(NAMES) if draw.random() < 0.1 else f"{number // draw.choice((1, 1, 9))}.png"
            label = draw.choice(LABELS) if draw.random() < 0.1 else b"%d" % draw.randrange(5)
            suffix = draw.choice(("cls", "cls", "cls", "json"))
            for what, content in ((name, image), (f"{name.rpartition('.')[0]}.{suffix}", label)):
                info = tarfile.TarInfo(what)
                info.size = len(content)
                try:
                    tar.addfile(info, io.BytesIO(content))
                except (ValueError, UnicodeError):  # this format has no such name
                    continue
            if draw.random() < 0.02:
                buffer.write(header(draw, draw.choice(NAMES)))
                buffer.write(draw.choice(PAX).ljust(512, b"\0"))
                tar.offset = buffer.tell()
    content = buffer.getvalue()
    if draw.random() < 0.5:
        content = mutated(content or b"\0", draw, header(draw, "y.png"))
    return content


def try_one(path: Path, load: Callable = shards.Shards) -> str | None:
    """What is wrong with how a shard is read, or None."""
    cost = Cost()
    size = path.stat().st_size
    try:
        with silence():
            found = load([str(path)])
        for index in range(len(found)):
            offset, length = int(found._offsets[index]), int(found._sizes[index])
            if not (
                offset >= 0 and length > 0 and offset + length <= size and 0 <= found.labels[index] < shards.CLASSES
            ):
                return "a sample that does not lie in the file"
        for index in range(0, len(found), 17):
            try:
                found.read(index)
            except UnreadableImage as error:
                if not str(error).isprintable():
                    return f"a message that is not one line: {error!r}"
    except ValueError as error:
        if not (str(error).startswith(str(path)) and str(error).isprintable()):
            return f"a message that is not one line about the file: {error!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return cost.too_much(MEMORY)


def main(seconds: float = 60.0, seed: int = 0, cases: int = sys.maxsize) -> int:
    """Tries files for so many seconds or cases; 1 where one was not read as it should be, else 0."""
    draw, folder = random.Random(seed), Path(tempfile.mkdtemp(prefix="fuzz_shards_"))
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    before, os.environ["XDG_CACHE_HOME"] = os.environ.get("XDG_CACHE_HOME"), str(folder / "cache")
    end, tried, path = time.monotonic() + seconds, 0, folder / "x.tar"
    try:
        while tried < cases and time.monotonic() < end:
            path.write_bytes(build(draw, buffer.getvalue()))
            wrong, tried = try_one(path), tried + 1
            shutil.rmtree(folder / "cache", ignore_errors=True)
            if wrong is None and [entry.name for entry in folder.iterdir()] != ["x.tar"]:
                wrong = "wrote a file"
            if wrong:
                print(f"seed {seed}, case {tried}: {path}: {wrong}")
                return 1
    finally:
        os.environ.pop("XDG_CACHE_HOME")
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before
    shutil.rmtree(folder)
    print(f"seed {seed}: {tried:,} shards")
    return 0


if __name__ == "__main__":
    from_command_line(main, __doc__)
