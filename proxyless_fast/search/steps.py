"""What a step computes: forward and loss of a batch in parts, gradients over parts and processes, one update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..distributed.gradients import GradientSum, sum_vector
from ..distributed.norms import synchronised
from ..distributed.ranks import OF_NETWORK, Ranks, lost_rank_named
from .parts import count_images, split_batch, to_device

Measured = dict[str, Any]
LOGGED = ("step", "kind", "loss", "ce", "latency", "lr", "entropy", "reward")  # names that records have anyway
# Forward and loss of one batch: (net, batch) -> (loss, what is measured by name; the first of it is the score).
Step = Callable[[nn.Module, Any], tuple[Tensor, Measured]]


def score_dtype(device: torch.device) -> torch.dtype:
    """Of scores: parts of a batch and the whole then agree to a rounding that Adam takes for nothing."""
    return torch.float32 if device.type == "mps" else torch.float64


def top1(logits: Tensor, labels: Tensor) -> Tensor:
    """Fraction of images whose label has the largest logit; of soft labels, (B, classes), the largest."""
    labels = labels.argmax(1) if labels.dim() > 1 else labels
    return (logits.detach().argmax(1) == labels).to(score_dtype(logits.device)).mean()


class Supervised:
    """The step of (inputs, targets) batches: outputs of net(inputs), and a loss and a metric of outputs and targets.

    loss: (outputs, targets) -> scalar, a mean over images. metric: (outputs, targets) -> scalar, the larger the better,
    which is logged under its name and is the accuracy in REINFORCE's reward.
    """

    def __init__(self, loss: Callable = cross_entropy, metric: Callable = top1) -> None:
        self.loss, self.metric, self.name = loss, metric, getattr(metric, "__name__", "metric")

    def __call__(self, net: nn.Module, batch: Any) -> tuple[Tensor, Measured]:
        inputs, targets = batch
        outputs = net(inputs)
        return self.loss(outputs, targets), {self.name: self.metric(outputs, targets)}


def step_of(step: Step | None, loss: Callable | None, metric: Callable | None, label_smoothing: float = 0.0) -> Step:
    """The step that a user gave, or that of their loss and metric; cross-entropy without. ValueError for both."""
    if step is not None and (loss is not None or metric is not None):
        raise ValueError("step: got it with a loss or a metric, expected a step, which has both, or these")
    smoothed = partial(cross_entropy, label_smoothing=label_smoothing)
    if step is None and loss is None and metric is None:
        return Supervised(smoothed)
    return _checked(step or Supervised(loss or smoothed, metric or top1))


def _checked(step: Step) -> Step:
    """A user's step, which raises ValueError where it returns something else than a step should."""

    def checked(net: nn.Module, batch: Any) -> tuple[Tensor, Measured]:
        found = step(net, batch)
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict) and found[1]):
            raise ValueError(f"step: returned a {type(found).__name__}, expected (loss, {{name: scalar, ...}})")
        loss, measured = found
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(f"loss: got {_kind(loss)}, expected a tensor of one number, a mean over images")
        for name, value in measured.items():
            if name in LOGGED:
                raise ValueError(f"step: measured {name!r}, which the log has of its own, expected another name")
            if not (value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, Real)):
                raise ValueError(f"{name}: got {_kind(value)}, expected one number, a mean over images")
        return loss, measured

    return checked


def _kind(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def shared_norms(net: nn.Module, ranks: Ranks, wanted: bool) -> AbstractContextManager:
    """Within, batch norms see the images of all processes, where there are several and that is wanted."""
    return synchronised(net, ranks.norms) if ranks.several and wanted else nullcontext()


class Backward:
    """Gradients of one batch: in parts, under autocast, added up over parts and processes.

    accumulate: parts that a batch goes through in, one after the other, so that memory is that of one part; paths and
    weights stay the same within. precision: "float32", or "bfloat16" or "float16" for autocast, the latter with a
    gradient scaler. weights: those that may get gradients, alphas aside.
    """

    def __init__(
        self, weights: Iterable[nn.Parameter], ranks: Ranks, device: torch.device, precision: str, accumulate: int
    ) -> None:
        self.ranks, self.device, self.accumulate = ranks, device, accumulate
        self.autocast = None if precision == "float32" else getattr(torch, precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
        self.gradients = GradientSum(weights, ranks)
        self.requested: list[float] = []

    def __call__(
        self,
        batch: Any,
        forward: Callable[[Any], tuple[Tensor, Measured]],
        weights: Sequence[nn.Parameter] = (),
        own: set[int] | None = None,
        alphas: Sequence[nn.Parameter] = (),
        requests: Sequence[float] = (),
    ) -> Measured:
        """Leaves the gradients of the mean loss over all images, of all processes; returns the means of what forward
        measured in this one.

        weights: those that take part; own: ids of those in this process. alphas: those that take part. requests:
        numbers that are added up over the processes beside the images, into `requested`.
        """
        parts = self._parts(batch)
        counts = [count_images(part) for part in parts]
        total = self.ranks.start_sum([sum(counts), *requests])
        measured: Measured = {}
        for place, (part, images) in enumerate(zip(parts, counts, strict=True)):
            if place == len(parts) - 1:  # the others only add to what this one sends
                self.gradients.expect(weights, own)
            share = images / max(sum(counts), 1)
            weight = float(images if self.ranks.several else share)
            # Norms send in the middle of a forward and a backward.
            with lost_rank_named(self.ranks, OF_NETWORK) if self.ranks.several else nullcontext():
                with self.in_precision():
                    loss, found = forward(to_device(part, self.device))
                self.scaler.scale(loss if weight == 1 else loss * weight).backward()
            for name, value in found.items():
                value = value.detach() if isinstance(value, Tensor) else value
                measured[name] = measured.get(name, 0.0) + value * share if len(parts) > 1 else value
        of_all, *self.requested = total.wait()
        divisor = of_all if self.ranks.several else 1.0
        self.gradients.finish(divisor)
        sum_vector(alphas, self.ranks, divisor)
        return measured

    def _parts(self, batch: Any) -> list[Any]:
        """As many in each process, since norms wait for one another in each: a batch may have fewer images in some."""
        parts = split_batch(batch, self.accumulate)
        if self.accumulate == 1 or not self.ranks.several:
            return parts
        fewest = min(self.ranks.gather(len(parts)))
        return parts if len(parts) == fewest else split_batch(batch, fewest)

    def in_precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    def update(self, optimizer: torch.optim.Optimizer, clip_norm: float | None = None) -> None:
        """One step of an optimizer, the gradients clipped to a norm; under float16 none, where they overflowed."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(optimizer)
        if clip_norm is not None:
            given = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            nn.utils.clip_grad_norm_(given, clip_norm)
        self.scaler.step(optimizer)
        self.scaler.update()
