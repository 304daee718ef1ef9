"""Image folders with random links, loops, hidden and odd names: each image once, in one part, or one sentence.

`python -m tests.fuzz.folders [--seconds N] [--seed S] [--cases N]`. Prints the failing case, keeps its folder and exits
with 1.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from proxyless_fast.data import loaders
from proxyless_fast.data.listing import EXTENSIONS, LITTER
from tests.fuzz._command import from_command_line

NAMES = ["a", "b", "c.png", ".hidden", "._b", "__MACOSX", "é", "e\u0301", "x y", "%s", "\udcff", "d\n"]
FILES = ["0.png", "1.PNG", "2.jpg", "._0.png", ".DS_Store", "notes.txt", "\udcfe.png", "3.tif"]


def hidden(name: str) -> bool:
    return name.startswith(".") or name in LITTER


def grow(root: Path, image: bytes, draw: random.Random) -> None:
    """Two classes in both parts, and then whatever comes."""
    folders = [root / part / name for part in ("train", "val") for name in "ab"]
    for folder in folders:
        folder.mkdir(parents=True)
        for i in range(draw.choice((1, 4, 4, 4))):
            (folder / f"{i}.png").write_bytes(image)
    folders += [root / "train", root / "val", root / "outside"]
    folders[-1].mkdir()
    places = list(folders)
    for _ in range(draw.randrange(8)):
        folder, kind = draw.choice(folders), draw.choice(["folder", "file", "file", "link", "link", "hard link"])
        path = folder / draw.choice(NAMES if kind in ("folder", "link") else FILES)
        if os.path.lexists(path):
            continue
        if kind == "folder":
            path.mkdir()
            folders.append(path)
        elif kind == "file":
            path.write_bytes(image)
        elif kind == "link":
            target = draw.choice([*places, root, root / "nowhere", path])
            os.symlink(target if draw.random() < 0.5 else os.path.relpath(target, folder), path)
        else:
            source = draw.choice([place for place in places if place.is_file()] or [root / "train" / "a" / "0.png"])
            os.link(source, path)
        places.append(path)


def shown(part: Path) -> set[tuple[int, int]]:
    """The image files in the class folders of a part that stand there without a link."""
    found = set()
    for folder, names, files in os.walk(part):
        names[:] = [name for name in names if not hidden(name)]
        if folder != str(part):
            images = (name for name in files if name.lower().endswith(EXTENSIONS) and not hidden(name))
            stats = [os.lstat(os.path.join(folder, name)) for name in images]
            found |= {(s.st_dev, s.st_ino) for s in stats if not os.path.stat.S_ISLNK(s.st_mode)}
    return found


def identities(loader) -> list[tuple[int, int]]:
    paths = map(loader.samples.name, range(loader.size))
    return [(s.st_dev, s.st_ino) for s in map(os.stat, filter(os.path.exists, paths))]


def try_one(root: Path, fraction: float) -> str | None:
    """What is wrong with how a folder is loaded, or None."""
    try:
        splits = loaders(root, 1, 8, fraction, workers=0)
    except (ValueError, FileNotFoundError) as error:
        return None if str(error).isprintable() else f"a message that is not one line: {error!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    train, valid, test = (identities(part) if part else [] for part in (splits.train, splits.valid, splits.test))
    if len(train + valid + test) != len({*train, *valid, *test}):
        return "an image was found twice"
    if shown(root / "train") - {*train, *valid} or shown(root / "val") - set(test):
        return "an image was not found"
    return None


@contextmanager
def silence() -> Iterator[None]:
    """Without the warnings of the package."""
    log = logging.getLogger("proxyless_fast")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def main(seconds: float = 60.0, seed: int = 0, cases: int = sys.maxsize) -> int:
    """Tries folders for so many seconds or cases; 1 where one was not loaded as it should be, else 0."""
    draw, above = random.Random(seed), Path(tempfile.mkdtemp(prefix="fuzz_folders_"))
    Image.new("RGB", (4, 4)).save(above / "x.png")
    image, end, tried = (above / "x.png").read_bytes(), time.monotonic() + seconds, 0
    while tried < cases and time.monotonic() < end:
        root, tried = above / str(tried), tried + 1
        grow(root, image, draw)
        with silence():
            wrong = try_one(root, draw.choice((0.0, 0.3, 0.5)))
        if wrong:
            print(f"seed {seed}, case {tried}: {root}: {wrong}")
            return 1
        shutil.rmtree(root)
    shutil.rmtree(above)
    print(f"seed {seed}: {tried:,} folders")
    return 0


if __name__ == "__main__":
    from_command_line(main, __doc__)
