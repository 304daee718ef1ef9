"""Random streams that depend on nothing but their names, so that a resumed run repeats them."""

from __future__ import annotations

import numpy as np
import torch


def seed_of(*parts: int) -> int:
    """A well-mixed 63-bit seed, a pure function of non-negative integers such as (seed, epoch)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def generator_of(*parts: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*parts))
