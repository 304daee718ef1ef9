"""What a step that ran out of memory is answered with: how many images would fit."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..fusion import Fusible
from ..planning import plan
from .parts import count_images

_OUT = re.compile(r"out of memory|can't allocate memory|not enough memory|bad_alloc", re.IGNORECASE)
POLICIES = ("fast", "lean")


@contextmanager
def told_how_many_fit(net: nn.Module, batch: Any, accumulate: int, device: torch.device) -> Iterator[None]:
    """Within, what an allocator raises becomes a MemoryError that says how many images fit, by policy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not (isinstance(error, MemoryError) or _OUT.search(str(error))):
            raise
        raise MemoryError(_answer(net, count_images(batch), accumulate, device)) from error


def _answer(net: nn.Module, images: int, accumulate: int, device: torch.device) -> str:
    """The sentence, with a figure where one can still be had."""
    said = f"a step of {images} images in {accumulate} part{'s' if accumulate > 1 else ''} does not fit"
    help = "a smaller --batch-size, or --accumulate in more parts, takes less"
    try:
        if device.type != "cpu":
            return f"{said}; {help}"  # what is planned for is the CPU's engine
        budget = available_bytes()
        own = copy.deepcopy(net).cpu()
        used = {module.policy for module in own.modules() if isinstance(module, Fusible)}
        found = plan(own, budget, policies=POLICIES).largest
    except Exception:  # no memory for that either, or no net that tells its images
        return f"{said}; {help}"
    fits = ", ".join(f"{most} with policy {name!r}" for name, most in found.items())
    return f"{said}: in {budget / 2**30:.1f} GiB fit at most {fits} (now {', '.join(sorted(used))}); {help}"


def available_bytes() -> int:
    """Memory of the host that is free, within this process's own limit (Linux)."""
    import resource

    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return free if limit == resource.RLIM_INFINITY else min(free, limit)
