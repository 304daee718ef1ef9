"""E[latency] of a supernet: one dot product of all gate probabilities with all times (paper section 3.3, eq. 2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..checks import unwrapped
from ..costs import describe_layers
from ..mixed import MixedOp
from ..supernet import mixed_ops
from .table import LatencyTable


class ExpectedLatency:
    """The expected latency of a net by a table; built once, then called at every arch step.

    E[lat] = fixed + sum over mixed ops of p · t in ms, where p are the gates' probabilities (in mode "two" the pair's,
    as in the official code) and a candidate without cost (Zero, Identity) has t = 0. Raises ValueError for a net that
    cannot tell its layers, and MissingKey naming every key that the table lacks.
    """

    def __init__(self, net: nn.Module, table: LatencyTable) -> None:
        net = unwrapped(net)
        found = describe_layers(net)
        shapes = [shape for layer in found for shape in layer.choices if shape is not None]
        ms = dict(zip((shape.key for shape in shapes), table.lookup_all(shapes), strict=True))
        ops = mixed_ops(net)
        labels = {id(op): label for label, op in ops.items()}
        self.fixed = table.overhead
        self._ops: dict[str, MixedOp] = {}
        self._times: dict[str, list[float]] = {}
        for layer in found:
            times = [0.0 if shape is None else ms[shape.key] for shape in layer.choices]
            if layer.mixed is None:
                self.fixed += times[0]
            else:
                label = labels[id(layer.mixed)]
                self._ops[label], self._times[label] = ops[label], times
        self._vector = torch.tensor([t for row in self._times.values() for t in row])

    def __call__(self) -> Tensor:
        """The expected latency in ms, a scalar, differentiable in the alphas."""
        if not self._ops:
            return torch.tensor(self.fixed)
        p = torch.cat([op.gate_probabilities() for op in self._ops.values()])
        if self._vector.device != p.device or self._vector.dtype != p.dtype:
            self._vector = self._vector.to(p)
        return p @ self._vector + self.fixed

    def of_choices(self, choices: Mapping[str, int | str]) -> float:
        """Milliseconds of the path that takes `choices`: label to index or name, one for every mixed op.

        Raises ValueError when a mixed op has no choice, KeyError or IndexError for an unknown label or candidate.
        """
        unknown = sorted(set(choices) - set(self._ops))
        if unknown:
            raise KeyError(f"choices must name mixed ops of the net, got {', '.join(unknown)}")
        absent = [label for label in self._ops if label not in choices]
        if absent:
            raise ValueError(f"choices must name every mixed op of the net; got none for {', '.join(absent)}")
        return self.fixed + sum(t[self._ops[label].index(choices[label])] for label, t in self._times.items())

    def most_likely(self) -> float:
        """Milliseconds of the path of the largest alphas, which `derive` keeps."""
        return self.fixed + sum(t[self._ops[label].most_likely] for label, t in self._times.items())

    def is_of(self, net: nn.Module) -> bool:
        """Whether these are the times of this very net's mixed ops: of a copy's, alpha would get no gradient."""
        ops = mixed_ops(unwrapped(net))
        return ops.keys() == self._ops.keys() and all(ops[label] is op for label, op in self._ops.items())

    @property
    def fastest(self) -> float:
        """Milliseconds of the fastest path."""
        return self.fixed + sum(min(t) for t in self._times.values())

    @property
    def slowest(self) -> float:
        """Milliseconds of the slowest path."""
        return self.fixed + sum(max(t) for t in self._times.values())


def expected_latency(net: nn.Module, table: LatencyTable) -> Tensor:
    """The expected latency of `net` by `table` in ms, a differentiable scalar; see `ExpectedLatency`."""
    return ExpectedLatency(net, table)()
