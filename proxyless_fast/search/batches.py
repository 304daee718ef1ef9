"""Batches in an order that a resume can repeat."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

DRAWS = ("weight", "arch")


def generator(seed: int, step: int, draw: str, rank: int = 0) -> torch.Generator:
    """CPU generator that is a function of the run's seed, the step and what is drawn ("weight" or "arch").

    rank: of the process, where each draws for itself; all else is drawn alike in all.
    """
    state = np.random.SeedSequence((seed, step, DRAWS.index(draw), rank)).generate_state(1, np.uint32)
    return torch.Generator().manual_seed(int(state[0]))


def epoch_batches(loader: Iterable[Any], epoch: int, skip: int = 0) -> Iterator[Any]:
    """The batches of one epoch from number `skip` on; `set_epoch` of the loader or of its sampler fixes their order.

    A loader of this package (`batches_from`) starts there; of any other the batches before are taken and dropped.
    """
    batches_from = getattr(loader, "batches_from", None)
    if batches_from is not None:
        return batches_from(epoch, skip)
    set_epoch = getattr(loader, "set_epoch", None) or getattr(getattr(loader, "sampler", None), "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)
    return itertools.islice(iter(loader), skip, None)


def endless_batches(loader: Any, first_epoch: int, skip: int = 0) -> Iterator[Any]:
    """Epoch after epoch of a loader, from batch number `skip` on."""
    epochs, skip = divmod(skip, len(loader))
    for epoch in itertools.count(first_epoch + epochs):
        yield from epoch_batches(loader, epoch, skip)
        skip = 0
