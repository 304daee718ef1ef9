"""One image file as 8-bit RGB, the right way up, or one sentence why not; its cost is bounded before it is decoded."""

from __future__ import annotations

import functools
import io
import os
import stat
import warnings
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ..io.text import printable

# Decoded within this process, from what the file holds and not from its name. Others (EPS, say) start programs.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 2**30 // 12  # where Pillow begins to warn of decompression bombs; reading takes up to 12 bytes a pixel
MAX_SIDE = 2**16  # Pillow keeps a pointer for each row, so that a column would cost more than its pixels
BLOCK = 2**20  # pixels of a wide image that are scaled at a time

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_T = Image.Transpose
# By the EXIF orientation: what turns the stored pixels into the picture that was taken.
_TURNS = {
    2: _T.FLIP_LEFT_RIGHT,
    3: _T.ROTATE_180,
    4: _T.FLIP_TOP_BOTTOM,
    5: _T.TRANSPOSE,
    6: _T.ROTATE_270,
    7: _T.TRANSVERSE,
    8: _T.ROTATE_90,
}


class UnreadableImage(ValueError):
    """An image file that cannot be read; the message names it."""


def read(path: str) -> Image.Image:
    """The image in a file, in RGB, turned as its EXIF orientation says; of several frames, the first.

    16-bit grey is scaled from its own range and floating grey from 0 to 1. Alpha is dropped. Raises UnreadableImage for
    anything else: a damaged file, an integer type without a known range, a side above MAX_SIDE or more than MAX_PIXELS.
    """
    try:
        _check_file(path)
        return _decode(path)
    except Exception as error:  # whatever type: Pillow's decoders raise some of every kind for damaged files
        raise UnreadableImage(f"{printable(path)} cannot be read as an image: {_why(error)}") from error


def decode(content: bytes, name: str) -> Image.Image:
    """The image in a file's content, as `read` gives it; `name` is for the message."""
    try:
        if not content:
            raise ValueError("it is empty")
        return _decode(io.BytesIO(content))
    except Exception as error:  # as above
        raise UnreadableImage(f"{printable(name)} cannot be read as an image: {_why(error)}") from error


def _decode(file: str | BinaryIO) -> Image.Image:
    with _open(file) as image:
        _check_size(image)
        image.load()
        turn = _TURNS.get(_orientation(image))
        rgb = _to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def _open(file: str | BinaryIO) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound follows, and is a sentence
        return Image.open(file, formats=_formats())


def _why(error: Exception) -> str:
    """An error as the end of a sentence, without the path that some name again."""
    if isinstance(error, UnidentifiedImageError):
        return f"its format is none of {', '.join(_formats())}"
    if isinstance(error, Image.DecompressionBombError):  # Pillow's message has another limit
        return f"it has more than {MAX_PIXELS:,} pixels"
    plain = error.strerror if isinstance(error, OSError) and error.strerror else error
    return " ".join(printable(plain).split()) or type(error).__name__


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_file(path: str) -> None:
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
        raise ValueError("it is not a regular file")
    if not found.st_size:
        raise ValueError("it is empty")


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE and width * height <= MAX_PIXELS):
        raise ValueError(
            f"it has {width}x{height} pixels, expected sides of 1 to {MAX_SIDE:,} and at most {MAX_PIXELS:,} pixels"
        )


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1 where nothing is said or the EXIF data are damaged, as viewers take it."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever type, as in `read`
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT, (1,))[0] == 2:
        raise ValueError("it holds signed integers, whose range is not known; expected 8 or 16 bits without a sign")
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    # Pillow converts these by a step between: premultiplied alpha, and (else with a warning) palettes with alpha.
    between = {"La": "LA", "RGBa": "RGBA", "P": "RGBA" if "transparency" in image.info else "P"}.get(image.mode)
    if between not in (None, image.mode):
        return image.convert(between).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """uint8 (H, W) of a grey image of mode F or I, in blocks of rows."""
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I" and tags:
        raise ValueError("it holds 32-bit integers, whose range is not known; expected 8 or 16 bits")
    bits = (
        tags.get(_BITS, (16,))[0] if tags else 16
    )  # 12-bit TIFF comes in 16 bits, all other formats in their full range
    width, height = image.size
    grey, rows = np.empty((height, width), np.uint8), max(1, BLOCK // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        block = np.asarray(image.crop((0, top, width, bottom)))
        if image.mode == "F":
            if not (block.min() >= 0 and block.max() <= 1):  # false for NaN
                raise ValueError("it holds floating-point values outside 0 to 1, whose range is not known")
            grey[top:bottom] = block * 255 + 0.5
        else:
            grey[top:bottom] = block >> (bits - 8)  # the high byte, as Pillow takes it of 16-bit colour
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero: Pillow heeds that in 8 bits only
        np.subtract(255, grey, out=grey)
    return grey
