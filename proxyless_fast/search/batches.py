"""Batches in an order that a resume can repeat."""

import itertools
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..data.seeds import seed_of

DRAWS = ("weight", "arch")


def generator(seed: int, step: int, draw: str, rank: int = 0) -> torch.Generator:
    """CPU generator that is a function of the run's seed, the step and what is drawn ("weight" or "arch").

    rank: of the process, where each draws for itself; all else is drawn alike in all.
    """
    state = np.random.SeedSequence((seed, step, DRAWS.index(draw), rank)).generate_state(1, np.uint32)
    return torch.Generator().manual_seed(int(state[0]))


def epoch_batches(loader: Iterable[Any], epoch: int, skip: int = 0, seed: int = 0) -> Iterator[Any]:
    """The batches of one epoch from number `skip` on; `set_epoch` of the loader or of its sampler fixes their order.

    A loader of this package (`batches_from`) starts there; of any other the batches before are taken and dropped. One
    that draws its order from the process's generators, or from its own (torch's DataLoader does), finds them at a
    function of seed and epoch when it begins, so that its order can be repeated too; the process's are then put back.
    """
    batches_from = getattr(loader, "batches_from", None)
    if batches_from is not None:
        yield from batches_from(epoch, skip)
        return
    set_epoch = getattr(loader, "set_epoch", None) or getattr(getattr(loader, "sampler", None), "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)
    with _seeded(loader, seed_of(seed, epoch)):
        batches = itertools.islice(iter(loader), skip, None)
        first = list(itertools.islice(batches, 1))
    yield from first
    del first  # a batch may be large
    yield from batches


def endless_batches(loader: Any, first_epoch: int, skip: int = 0, seed: int = 0) -> Iterator[Any]:
    """Epoch after epoch of a loader, from batch number `skip` on."""
    epochs, skip = divmod(skip, len(loader))
    for epoch in itertools.count(first_epoch + epochs):
        yield from epoch_batches(loader, epoch, skip, seed)
        skip = 0


@contextmanager
def _seeded(loader: Any, seed: int) -> Iterator[None]:
    """Within, the generators of torch, numpy and Python, and of the loader, begin at a seed; only the last stays."""
    for owner in (loader, getattr(loader, "sampler", None)):
        if isinstance(own := getattr(owner, "generator", None), torch.Generator):
            own.manual_seed(seed)
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
