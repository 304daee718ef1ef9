"""Block sizes, warps and pipeline stages per architecture, kernel, element size and width, from a table of rows.

The rows are in table.py; nothing is tuned when a program runs. A row serves widths up to its limit, and the first row
that fits is taken. How a reduction is cut into programs, and so every bit of its result, follows from the row.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch

from .. import has_little_shared_memory
from . import table


class Config(NamedTuple):
    """tile: compile-time block sizes by the kernel's names for them. programs: about how many a reduction has."""

    tile: dict[str, int]
    warps: int
    stages: int
    programs: int = 2048


WIDE = 1 << 30

# Rows by architecture, kernel ("rows": narrow passes without a product), and "half" or "float" operands. The width is
# the padded number of channels that decides a tile's size: of the output for expand, project and finish_input, of x for
# the Gram matrix and the backward of expand, of y for the backward of project.
Table = dict[int, dict[str, dict[str, list[tuple[int, Config]]]]]


def table_of(rows: Iterable[table.Row]) -> Table:
    """`rows` by architecture, kernel and operands.

    What an architecture has no rows for is as on the next older one; what the oldest has none for is as on sm_90.
    """
    found: Table = {}
    for arch, kernel, operands, limit, tile, warps, stages, programs in rows:
        here = found.setdefault(arch, {}).setdefault(kernel, {}).setdefault(operands, [])
        here.append((WIDE if limit is None else limit, Config(tile, warps, stages, programs)))
    older = 90
    for arch in sorted(found):
        for kernel, by_operands in found[older].items():
            for operands, listed in by_operands.items():
                found[arch].setdefault(kernel, {}).setdefault(operands, listed)
        older = arch
    return found


TABLE = table_of(table.ROWS)


@cache
def architecture(index: int) -> int:
    """The row of TABLE for CUDA device `index`: the newest architecture that is not newer than the device.

    The tiles of data-centre GPUs from sm_90 on do not fit where shared memory is little.
    """
    if torch.version.hip is not None:
        return 80
    major, minor = torch.cuda.get_device_capability(index)
    rows = [row for row in TABLE if row <= 10 * major + minor]
    if has_little_shared_memory(index):
        rows = [row for row in rows if not 90 <= row < 120]
    return max(rows, default=80)


def padded(channels: int) -> int:
    """The power of two, at least 16, that a tile of so many channels takes."""
    return max(16, 1 << (channels - 1).bit_length())


def operands(dtype: torch.dtype) -> str:
    """Which rows serve x's dtype."""
    return "float" if dtype == torch.float32 else "half"


def config(kernel: str, dtype: torch.dtype, width: int, arch: int = 90, **at_most: int) -> Config:
    """The table's row for `kernel`; a block size named in `at_most` is cut to the padding of that many channels."""
    rows = TABLE[arch][kernel][operands(dtype)]
    found = next(row for limit, row in rows if padded(width) <= limit)
    tile = {k: min(v, padded(at_most[k])) if k in at_most else v for k, v in found.tile.items()}
    return found._replace(tile=tile)
