"""Gradients of the parameters that took part, added up over the processes while backward still runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .ranks import Ranks, lost_rank_named

BUCKET_BYTES = 4 << 20  # of one message: large enough for the wire, small enough that most of it goes during backward


class _Bucket:
    """Part of the flat buffer: whose gradients it holds, how many are still missing, and the message on its way."""

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []
        self.missing = 0
        self.values: Any = None
        self.work: Any = None


class GradientSum:
    """Adds up the gradients of some parameters over the processes, in flat messages, in one order on all.

    DistributedDataParallel reduces every parameter of a net, or looks for the unused ones in each graph; of a supernet
    one candidate of each layer takes part, and all processes know which. Before a backward, `expect` says which
    parameters take part; as soon as the gradients of one message are there it is sent; `finish` waits, and leaves each
    parameter's `grad` as the sum over all processes, a view of a buffer that the next step uses again.

    parameters: all that may ever be expected. bytes_sent: of gradients that were handed to torch.distributed so far.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], ranks: Ranks, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.ranks, self.bucket_bytes, self.bytes_sent = ranks, bucket_bytes, 0
        self._buffers: dict[tuple, Tensor] = {}
        self._buckets: list[_Bucket] = []
        self._places: dict[int, tuple[_Bucket, Tensor]] = {}  # by id of the parameter: what it still has to fill
        self._next = 0  # the bucket to be sent: all processes send in one order
        for p in parameters if ranks.several else ():
            p.register_post_accumulate_grad_hook(self._take)

    def expect(self, parameters: Sequence[nn.Parameter], own: set[int] | None = None) -> None:
        """These take part in the next backward, on all processes alike; the last of them is ready first, about.

        own: ids of those that take part in this process, where not all do: the others count as zeros.
        """
        if not self.ranks.several:
            return
        self._buckets, self._places, self._next = [], {}, 0
        kinds: dict[tuple, list[nn.Parameter]] = {}
        for p in reversed(parameters):
            kinds.setdefault((p.device, p.dtype), []).append(p)
        for kind, alike in kinds.items():
            self._lay_out(kind, alike, own)

    def _lay_out(self, kind: tuple, parameters: list[nn.Parameter], own: set[int] | None) -> None:
        device, dtype = kind
        total = sum(p.numel() for p in parameters)
        buffer = self._buffers.get(kind)
        if buffer is None or buffer.numel() < total:
            buffer = self._buffers[kind] = torch.empty(total, dtype=dtype, device=device)
        start = first = 0
        bucket = _Bucket()
        for p in parameters:
            end = start + p.numel()
            values = buffer[start:end].view_as(p)
            bucket.parameters.append(p)
            if own is None or id(p) in own:
                self._places[id(p)] = bucket, values
                bucket.missing += 1
            else:
                p.grad = values.zero_()
            start = end
            if (end - first) * buffer.element_size() >= self.bucket_bytes or end == total:
                bucket.values = buffer[first:end]
                self._buckets.append(bucket)
                bucket, first = _Bucket(), end

    def _take(self, parameter: nn.Parameter) -> None:
        """A gradient is there: into its place, and away with the message where it was the last."""
        place = self._places.pop(id(parameter), None)
        if place is None:
            return
        bucket, values = place
        values.copy_(parameter.grad)  # type: ignore[arg-type]
        parameter.grad = values
        bucket.missing -= 1
        self._send()

    def _send(self) -> None:
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            bucket = self._buckets[self._next]
            with lost_rank_named(self.ranks):
                bucket.work = dist.all_reduce(bucket.values, async_op=True)
            self.bytes_sent += bucket.values.numel() * bucket.values.element_size()
            self._next += 1

    def finish(self, divisor: float = 1.0) -> None:
        """Waits; each expected parameter's grad is then the sum over all processes, divided.

        One that had no gradient in any process has none.
        """
        unused: list[nn.Parameter] = []
        for bucket in self._buckets:
            for p in bucket.parameters:
                if id(p) in self._places:  # expected, and not met in backward
                    _, values = self._places.pop(id(p))
                    p.grad = values.zero_()
                    unused.append(p)
            bucket.missing = 0
        self._send()
        for bucket in self._buckets:
            with lost_rank_named(self.ranks):
                bucket.work.wait()
            if divisor != 1:
                bucket.values.div_(divisor)
        for p in unused:
            if p.grad is not None and not bool(p.grad.any()):
                p.grad = None
        self._buckets = []


@torch.no_grad()
def sum_vector(parameters: Sequence[nn.Parameter], ranks: Ranks, divisor: float = 1.0) -> int:
    """Adds up the gradients of a few small parameters (alphas) as one vector; returns the bytes that were sent.

    One that has no gradient in this process counts as zeros, and has none where it has none in any.
    """
    if not ranks.several or not parameters:
        return 0
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([g.reshape(-1) for g in grads])
    with lost_rank_named(ranks):
        dist.all_reduce(flat)
    flat.div_(divisor)
    for p, values in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        if p.grad is not None or bool(values.any()):
            p.grad = values.view_as(p)
    return flat.numel() * flat.element_size()
