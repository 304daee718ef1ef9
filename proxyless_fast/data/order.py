"""Which images make which batch: pure functions of (seed, epoch), whole or in the parts of several processes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..checks import is_integer
from .seeds import generator_of


class Order:
    """What the loaders share: batches of (images, labels), in an order that (seed, epoch) decides.

    Iterated, it gives the epoch that `set_epoch` chose; `batches_from` gives any epoch from any batch on, and reads
    nothing of those before. `len()` is the number of batches in an epoch.
    """

    def __init__(self, count: int, batch_size: int, seed: int, shuffle: bool, drop_last: bool) -> None:
        self.size, self.batch_size, self.seed = count, batch_size, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self.epoch, self.rank, self.world_size, self.repeat = 0, 0, 1, True

    def __len__(self) -> int:
        full, rest = divmod(self.size, self.batch_size)
        return full + bool(rest and not self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order and augmentation the next iteration follows."""
        self.epoch = epoch

    def shard(self, rank: int, world_size: int, repeat: bool = True) -> None:
        """From now on give of each batch the part of process `rank` of `world_size`, as `part` cuts it.

        `batch_size` and `len()` stay those of the whole batches; the parts of all ranks, in order, are bit for bit the
        batches of one process. repeat: where a batch has fewer images than there are ranks, the other ranks get some of
        them again, so that all take as many steps; else, as an evaluation wants it, they get no such batch.
        """
        if not (is_integer(world_size, 1) and is_integer(rank, 0) and rank < world_size):
            raise ValueError(f"rank: got {rank!r} of world_size {world_size!r}, expected 0 to world_size - 1")
        self.rank, self.world_size, self.repeat = rank, world_size, repeat

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.batches_from(self.epoch)

    def batches_from(self, epoch: int, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from number `skip` on."""
        raise NotImplementedError

    def _indices(self, epoch: int, skip: int) -> Iterator[tuple[int, Tensor, slice]]:
        """(number, indices of the whole batch, this rank's part of them), from batch number `skip` on."""
        generator = generator_of(self.seed, epoch)
        order = torch.randperm(self.size, generator=generator) if self.shuffle else torch.arange(self.size)
        for number in range(skip, len(self)):
            whole = order[number * self.batch_size : (number + 1) * self.batch_size]
            if self.rank >= len(whole) and not self.repeat:
                continue
            yield number, whole, part(len(whole), self.rank, self.world_size)


def part(count: int, rank: int, world_size: int) -> slice:
    """Where rank's part of `count` images lies: contiguous, as torch.tensor_split cuts, the first ones one larger.

    With fewer images than ranks each rank has something to do all the same: rank r gets image r % count, so that what
    ranks from `count` on get is there already.
    """
    if count < world_size:
        return slice(rank % count, rank % count + 1)
    least, larger = divmod(count, world_size)
    start = rank * least + min(rank, larger)
    return slice(start, start + least + (rank < larger))
