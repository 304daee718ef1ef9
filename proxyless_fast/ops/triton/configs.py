"""Block sizes, warps and pipeline stages per architecture, kernel, element size and width: a table, nothing tuned here.

Chosen by the compiler's report (`benchmarks/gpu_table.py`: no spills, enough programs on a multiprocessor); not yet
measured on hardware. A row serves widths up to its first number, and the first row that fits is taken.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class Config(NamedTuple):
    """tile: compile-time block sizes by the kernel's names for them. programs: about how many a reduction has."""

    tile: dict[str, int]
    warps: int
    stages: int
    programs: int = 2048


WIDE = 1 << 30

# The width is the padded number of channels that decides a tile's size: of the output for expand, project and
# finish_input, of x for the Gram matrix and the backward of expand, of y for the backward of project.
_HOPPER: dict[str, dict[str, list[tuple[int, Config]]]] = {
    "gram": {
        "half": [(32, Config({"BM": 128, "BC": 32}, 4, 3)), (WIDE, Config({"BM": 64, "BC": 64}, 4, 3))],
        "float": [(WIDE, Config({"BM": 32, "BC": 32}, 4, 2))],
    },
    "expand": {
        "half": [
            (64, Config({"BM": 128, "BN": 64, "BK": 64}, 8, 2)),
            (WIDE, Config({"BM": 128, "BN": 128, "BK": 64}, 8, 3)),
        ],
        "float": [(WIDE, Config({"BM": 64, "BN": 64, "BK": 16}, 8, 2))],
    },
    "depthwise": {
        "half": [(WIDE, Config({"BM": 32, "BC": 64}, 4, 1))],
        "float": [(WIDE, Config({"BM": 16, "BC": 32}, 4, 1))],
    },
    "depthwise_backward": {
        "half": [(WIDE, Config({"BM": 16, "BC": 32}, 4, 1))],
        "float": [(WIDE, Config({"BM": 16, "BC": 32}, 4, 1))],
    },
    "project": {
        "half": [
            (32, Config({"BM": 64, "BN": 32, "BK": 64}, 4, 3)),
            (64, Config({"BM": 64, "BN": 64, "BK": 64}, 4, 3)),
            (WIDE, Config({"BM": 64, "BN": 128, "BK": 64}, 4, 3)),
        ],
        "float": [
            (32, Config({"BM": 64, "BN": 32, "BK": 16}, 4, 2)),
            (WIDE, Config({"BM": 64, "BN": 64, "BK": 16}, 8, 2)),
        ],
    },
    "project_backward": {
        "half": [
            (256, Config({"BM": 64, "BC": 64}, 8, 2)),
            (WIDE, Config({"BM": 16, "BC": 64}, 8, 2)),
        ],
        "float": [
            (128, Config({"BM": 32, "BC": 32}, 8, 2)),
            (256, Config({"BM": 16, "BC": 32}, 8, 1)),
            (WIDE, Config({"BM": 16, "BC": 16}, 8, 1)),
        ],
    },
    "expand_once": {
        "half": [(WIDE, Config({"BM": 32, "BC": 64}, 8, 2))],
        "float": [(WIDE, Config({"BM": 16, "BC": 64}, 8, 1))],
    },
    "expand_weight": {
        "half": [
            (64, Config({"BM": 64, "BC": 64}, 8, 2)),
            (256, Config({"BM": 32, "BC": 64}, 8, 2)),
            (WIDE, Config({"BM": 16, "BC": 64}, 8, 2)),
        ],
        "float": [
            (64, Config({"BM": 32, "BC": 32}, 4, 2)),
        ],
    },
    "expand_input": {
        "half": [
            (128, Config({"BM": 64, "BC": 64}, 8, 2)),
            (256, Config({"BM": 32, "BC": 64}, 8, 2)),
            (WIDE, Config({"BM": 32, "BC": 32}, 8, 2)),
        ],
        "float": [(128, Config({"BM": 32, "BC": 16}, 8, 1)), (WIDE, Config({"BM": 16, "BC": 16}, 8, 1))],
    },
    "finish_input": {
        "half": [(WIDE, Config({"BM": 64, "BN": 64, "BK": 64}, 4, 2))],
        "float": [(WIDE, Config({"BM": 64, "BN": 32, "BK": 16}, 4, 2))],
    },
    "rows": {  # narrow passes without a product
        "half": [(64, Config({"BM": 64}, 4, 2)), (256, Config({"BM": 16}, 4, 2)), (WIDE, Config({"BM": 8}, 4, 2))],
        "float": [(64, Config({"BM": 64}, 4, 2)), (256, Config({"BM": 16}, 4, 2)), (WIDE, Config({"BM": 8}, 4, 2))],
    },
}

# Where Ampere differs: its products keep more in registers.
_AMPERE: dict[str, dict[str, list[tuple[int, Config]]]] = {
    "project_backward": {
        "half": [
            (128, Config({"BM": 64, "BC": 64}, 8, 2)),
            (WIDE, Config({"BM": 16, "BC": 64}, 8, 2)),
        ],
        "float": _HOPPER["project_backward"]["float"],
    },
}

TABLE = {80: _HOPPER | _AMPERE, 90: _HOPPER}


@cache
def architecture(index: int) -> int:
    """The row of TABLE for CUDA device `index`: the newest architecture that is not newer than the device."""
    if torch.version.hip is not None:
        return 80
    major, minor = torch.cuda.get_device_capability(index)
    return max([row for row in TABLE if row <= 10 * major + minor], default=80)


def padded(channels: int) -> int:
    """The power of two, at least 16, that a tile of so many channels takes."""
    return max(16, 1 << (channels - 1).bit_length())


def config(kernel: str, dtype: torch.dtype, width: int, arch: int = 90, **at_most: int) -> Config:
    """The table's row for `kernel`; a block size named in `at_most` is cut to the padding of that many channels."""
    rows = TABLE[arch][kernel]["float" if dtype == torch.float32 else "half"]
    found = next(row for limit, row in rows if padded(width) <= limit)
    tile = {k: min(v, padded(at_most[k])) if k in at_most else v for k, v in found.tile.items()}
    return found._replace(tile=tile)
