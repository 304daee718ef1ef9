"""What a process knows of the others that it shares a search, a training or an evaluation with."""

from __future__ import annotations

import hashlib
import os
import re
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

OF_NETWORK = re.compile(r"gloo|nccl|c10d|connection (closed|reset)|broken pipe|socket", re.IGNORECASE)
TIMEOUT_S = 600  # for a process that does not answer: longer than any batch takes to load, or checkpoint to write


_current: list[Any] = []  # the default group and its Ranks


class LostRank(RuntimeError):
    """Another process of the group has ended or does not answer; what was saved is the way on."""


class Ranks:
    """The processes of torch.distributed's default group, or this one alone.

    rank, size: number of this process, and how many there are. norms: name of a group for what norms send in the middle
    of a forward and a backward. What is sent between hosts' memories (counts, requests to stop, checks) goes by a gloo
    group of its own, `control`: no GPU is waited for, and its order beside that of gradients is free.
    """

    def __init__(self) -> None:
        self.size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.size > 1 else 0
        self.norms = ""
        if self.size > 1:
            # Not kept alive: a group that outlives destroy_process_group takes the process down with it.
            self._control = weakref.ref(dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s())))
            norms: Any = dist.new_group()
            self.norms = norms.group_name

    @classmethod
    def current(cls) -> Ranks:
        """Those of the default group as it is now; all processes must ask first at the same point of their program."""
        group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        if group is None:
            if launched():
                raise ValueError(
                    f"WORLD_SIZE: got {os.environ['WORLD_SIZE']} processes that know nothing of each other, expected "
                    "torch.distributed.init_process_group before"
                )
            return cls()
        if not _current or _current[0]() is not group:
            _current[:] = [weakref.ref(group), cls()]
        return _current[1]

    @property
    def control(self) -> Any:
        group = self._control()
        if group is None:
            raise LostRank("the process group was destroyed, expected it to live as long as what runs in it")
        return group

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.size > 1

    def start_sum(self, values: Sequence[float]) -> Sum:
        """Begins to add up some numbers over the processes; `Sum.wait()` gives the sums."""
        return Sum(self, values)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a CPU tensor over the processes."""
        if not self.several:
            return values
        values = values.clone()
        with lost_rank_named(self):
            dist.all_reduce(values, group=self.control)
        return values / self.size

    def gather(self, value: Any) -> list[Any]:
        """A small plain value of each process, by rank. All are processes of one program: pickle is safe here."""
        if not self.several:
            return [value]
        found: list[Any] = [None] * self.size
        with lost_rank_named(self):
            dist.all_gather_object(found, value, group=self.control)
        return found

    def wait(self) -> None:
        """Until all processes are here."""
        if self.several:
            with lost_rank_named(self):
                dist.barrier(group=self.control)

    def require_same(self, what: str, value: Any, step: int | None = None) -> None:
        """Raises ValueError on every process, naming the first rank whose value is not rank 0's, and the step."""
        found = self.gather(value)
        for rank, other in enumerate(found):
            if other != found[0]:
                at = "" if step is None else f" at step {step}"
                raise ValueError(f"rank {rank}: {what}{at} is {other}, expected {found[0]} as of rank 0")

    @torch.no_grad()
    def broadcast(self, net: nn.Module) -> None:
        """Parameters and buffers of rank 0's net into those of the others, a few large messages."""
        if not self.several:
            return
        kinds: dict[tuple, list[Tensor]] = {}
        for tensor in [*net.parameters(), *net.buffers()]:
            kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor.detach())
        for tensors in kinds.values():
            flat = torch.cat([t.reshape(-1) for t in tensors])
            with lost_rank_named(self):
                dist.broadcast(flat, 0)
            for tensor, values in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(values.view_as(tensor))


class Sum:
    """Numbers that are being added up over the processes while the step goes on."""

    def __init__(self, ranks: Ranks, values: Sequence[float]) -> None:
        self._ranks, self._values = ranks, torch.tensor(values, dtype=torch.float64)
        self._work: Any = None
        if ranks.several:
            with lost_rank_named(ranks):
                self._work = dist.all_reduce(self._values, group=ranks.control, async_op=True)

    def wait(self) -> list[float]:
        if self._work is not None:
            with lost_rank_named(self._ranks):
                self._work.wait()
            self._work = None
        return self._values.tolist()


@contextmanager
def lost_rank_named(ranks: Ranks, only: re.Pattern | None = None) -> Iterator[None]:
    """A collective that fails says which process could not reach the others, and what to do, in one sentence.

    only: of RuntimeErrors, those whose message has this.
    """
    try:
        yield
    except RuntimeError as error:  # DistBackendError, DistNetworkError and what gloo raises are kinds of it
        if isinstance(error, LostRank) or (only is not None and not only.search(str(error))):
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LostRank(
            f"rank {ranks.rank} of {ranks.size}: another process has ended or did not answer within {timeout_s()} s "
            f"({first[:160]}); start again from the last checkpoint"
        ) from error


def timeout_s() -> int:
    """Seconds after which a process that does not answer counts as lost: PROXYLESS_TIMEOUT_S, or ten minutes."""
    given = os.environ.get("PROXYLESS_TIMEOUT_S", "")
    if given and not (given.isdecimal() and int(given) > 0):
        raise ValueError(f"PROXYLESS_TIMEOUT_S: got {given!r}, expected a whole number of seconds above 0")
    return int(given) if given else TIMEOUT_S


def launched() -> bool:
    """Whether a launcher (torchrun) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def restarted() -> bool:
    """Whether torchrun starts the processes again, after one of them was lost (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def joined() -> Iterator[None]:
    """Within, the processes of a launcher are the default group of torch.distributed: gloo, or with a GPU each NCCL,
    which was never run."""
    if not launched() or dist.is_initialized():
        yield
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    with_gpu = torch.cuda.is_available() and local < torch.cuda.device_count()
    if with_gpu:
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if with_gpu else "gloo"
    timeout = timedelta(seconds=timeout_s())
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    # torchrun's store outlives a restart, with the addresses of the processes that were.
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def digest(values: Iterable[Any]) -> str:
    """16 hexadecimal digits of plain values and tensors: equal for equal ones, bit by bit."""
    found = hashlib.blake2b(digest_size=8)
    for value in values:
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        found.update(value if isinstance(value, bytes) else repr(value).encode())
    return found.hexdigest()
