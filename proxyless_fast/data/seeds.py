"""Random streams that depend on nothing but their names, so that a resumed run repeats them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*parts: int) -> int:
    """A well-mixed 63-bit seed, a pure function of non-negative integers such as (seed, epoch)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def generator_of(*parts: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*parts))


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """The global generators of torch (on the CPU), numpy and Python are seeded within, and after it as before."""
    seed = seed_of(*parts)
    plain, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed & 0xFFFFFFFF)
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(arrays)
