"""Damaged image and IDX files through the readers: an image, a tensor or a documented error, soon and within memory.

`python -m tests.fuzz.images [--seconds N] [--seed S] [--cases N]`. Prints the failing case, keeps its
file and exits with 1.
"""

from __future__ import annotations

import gzip
import io
import random
import struct
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from proxyless_fast.data import UnreadableImage, idx, images
from tests.fuzz._command import from_command_line
from tests.fuzz._cost import Cost

# What reading may add to the process, as images.py states it for the largest image.
MEMORY = 12 * images.MAX_PIXELS


def seeds() -> list[tuple[str, bytes]]:
    """Whole files, small, of every format and several modes."""
    pixels = np.random.default_rng(0).integers(0, 256, (23, 31, 4), dtype=np.uint8)
    pixels[:, :, 3] |= 128
    colour = Image.fromarray(pixels)
    grey16 = Image.fromarray(pixels[..., :2].copy().view("<u2")[..., 0])
    real = Image.fromarray(pixels[..., 0].astype(np.float32) / 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [
        ("jpg", colour.convert("RGB"), {"exif": exif.tobytes()}), ("jpg", colour.convert("CMYK"), {}),
        ("jpg", colour.convert("L"), {"progressive": True}), ("png", grey16, {}),
        ("png", colour, {"exif": exif.tobytes()}),
        ("png", colour.convert("P"), {"transparency": bytes(range(256))}), ("png", colour.convert("1"), {}),
        ("png", colour.convert("RGB"), {"save_all": True, "append_images": [colour.convert("RGB").rotate(90)]}),
        ("gif", colour.convert("P"), {"save_all": True, "append_images": [colour.convert("P").rotate(9)]}),
        ("bmp", colour.convert("RGB"), {}), ("bmp", colour.convert("P"), {}), ("ppm", colour.convert("RGB"), {}),
        ("pgm", grey16, {}), ("webp", colour, {"exif": exif.tobytes()}), ("webp", colour, {"lossless": True}),
        ("tif", colour, {"exif": exif.tobytes()}), ("tif", grey16, {"compression": "tiff_lzw"}), ("tif", real, {}),
        ("tif", colour.convert("RGB"), {"compression": "jpeg"}),
        ("tif", colour.convert("1"), {"compression": "group4"}),
        ("tif", colour.convert("CMYK"), {"compression": "tiff_deflate"}), ("jp2", colour.convert("RGB"), {}),
        ("avif", colour.convert("RGB"), {}),
    ]  # fmt: skip
    found = []
    for extension, image, options in kinds:
        buffer = io.BytesIO()
        try:
            image.save(buffer, Image.registered_extensions()[f".{extension}"], **options)
        except (KeyError, OSError):  # a Pillow without this format
            continue
        found.append((extension, buffer.getvalue()))
    body = bytes([0, 0, 8, 3]) + struct.pack(">III", 40, 6, 5) + bytes(range(240)) * 5
    return [*found, ("idx", body), ("idx", body), ("idx.gz", gzip.compress(body)), ("idx.gz", gzip.compress(body, 0))]


def damaged(extension: str, content: bytes, draw: random.Random, other: bytes) -> bytes:
    """A mutated file; of a gzipped one half of the time what is inside, which its checksum would else give away."""
    if extension.endswith(".gz") and draw.random() < 0.5:
        inside = mutated(gzip.decompress(content), draw, other)
        return gzip.compress(inside + bytes(draw.choice((0, 0, 0, 2**22))), 1)
    return mutated(content, draw, other)


def mutated(content: bytes, draw: random.Random, other: bytes) -> bytes:
    """The content with up to four faults: bits turned, numbers made extreme, a part cut, doubled or of another file."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        # headers are at the start, and TIFF's at the end: half of the changes go there
        edge = min(len(data), 64)
        place = draw.choice(
            (draw.randrange(edge), len(data) - 1 - draw.randrange(edge), *[draw.randrange(len(data))] * 2)
        )
        kind = draw.randrange(7)
        if kind == 0:
            data[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[place] = draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))
        elif kind == 2:
            value = draw.choice((0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, draw.randrange(2**32)))
            data[place : place + 4] = struct.pack(draw.choice("<>") + "I", value)
        elif kind == 3:
            data = data[: max(place, 1)]
        elif kind == 4:
            data[place:place] = data[place : place + draw.randrange(1, 200)]
        elif kind == 5:
            del data[place : place + draw.randrange(1, 40)]
        else:
            data[place : place + 16] = other[:16]
        data = data or bytearray(b"\0")
    return bytes(data)


def try_one(path: Path) -> str | None:
    """What is wrong with how a file is read, or None."""
    cost = Cost()
    try:
        if "idx" in path.name:
            found = idx.read(path, 3)
            wrong = found.numel() > max(idx.MAX_RATIO * path.stat().st_size, idx.ALWAYS)
        else:
            image = images.read(str(path))
            wrong = image.mode != "RGB" or not 0 < image.width * image.height <= images.MAX_PIXELS
        if wrong:
            return "read something out of its bounds"
    except UnreadableImage as error:
        if not (str(error).startswith(str(path)) and str(error).isprintable()):
            return f"a message that is not one line about the file: {error!r}"
    except ValueError as error:
        if path.name not in str(error) or "idx" not in path.name:
            return f"{error!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return cost.too_much(MEMORY)


def main(seconds: float = 60.0, seed: int = 0, cases: int = sys.maxsize) -> int:
    """Tries files for so many seconds or cases; 1 where one was not read as it should be, else 0."""
    warnings.simplefilter("ignore")
    draw, whole = random.Random(seed), seeds()
    folder = Path(tempfile.mkdtemp(prefix="fuzz_images_"))
    end, tried, slowest = time.monotonic() + seconds, 0, 0.0
    while tried < cases and time.monotonic() < end:
        extension, content = draw.choice(whole)
        path = folder / f"x.{extension}"
        path.write_bytes(damaged(extension, content, draw, draw.choice(whole)[1]))
        start = time.monotonic()
        wrong = try_one(path)
        slowest, tried = max(slowest, time.monotonic() - start), tried + 1
        if wrong:
            print(f"seed {seed}, case {tried}: {path}: {wrong}")
            return 1
        path.unlink()
    folder.rmdir()
    print(f"seed {seed}: {tried:,} files, the slowest {slowest:.2f} s")
    return 0


if __name__ == "__main__":
    from_command_line(main, __doc__)
