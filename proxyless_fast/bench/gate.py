"""The correctness gate: no figure of a baseline before its loss and its gradients are those of the definition."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import proxyless_fast as pf

from .baselines import Paths, Settings, Subject

# An error against float64 may be FACTOR times that of plain float32 PyTorch (the worse of its two layouts), plus FLOOR.
FACTOR, FLOOR = 4, 1e-5
SIZE_ERROR = 1e-5  # of float32 PyTorch's loss, where there is no float64 to measure it by
SIDE, BATCH = 64, 8  # at most, for what runs in float64, where PyTorch's depthwise convolutions are slow
LAYOUTS = (torch.contiguous_format, torch.channels_last)
Gradients = dict[str, Tensor]


class GateError(AssertionError):
    """A baseline does not compute what the definition gives."""


class Definition(nn.Module):
    """A mixed op by its definition, sum_j g_j o_j(x), in plain autograd: g is one-hot (paper eq. 2), or p for DARTS."""

    def __init__(self, op: pf.MixedOp, path: tuple[int, int | None], kind: str, weighted: bool) -> None:
        super().__init__()
        self.candidates, self.alpha = op.candidates, op.alpha
        self.active, self.weighted = path[0], weighted
        self.gated = [j for j in path if j is not None] if kind == "two" else list(range(len(op)))
        if weighted:
            self.gated = list(range(len(op)))
        elif kind == "weight":
            self.gated = [self.active]

    def forward(self, x: Tensor) -> Tensor:
        p = torch.softmax(self.alpha[self.gated], 0)
        one_hot = torch.tensor([float(j == self.active) for j in self.gated], dtype=p.dtype, device=p.device)
        gates = p if self.weighted else one_hot + p - p.detach()
        total = x.new_zeros(())
        for gate, j in zip(gates, self.gated, strict=True):
            with torch.set_grad_enabled(self.weighted or j == self.active):  # a closed gate gives x no gradient
                output = self.candidates[j](x)
            total = total + gate * output
        return total


def by_definition(
    net: Any, data: tuple[Tensor, Tensor], paths: Paths, kind: str, weighted: bool, dtype: torch.dtype,
    layout: torch.memory_format = torch.contiguous_format,
) -> tuple[Tensor, Gradients]:  # fmt: skip
    """Loss, and gradients of the weights (kind "weight") or of the alphas, of a supernet of `spaces`."""
    net = copy.deepcopy(net).to(dtype).to(memory_format=layout)
    pf.set_policy(net, "off")
    remaining = iter(paths)
    for block in net.blocks:
        if isinstance(block.mobile_inverted_conv, pf.MixedOp):
            block.mobile_inverted_conv = Definition(block.mobile_inverted_conv, next(remaining), kind, weighted)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.endswith(".alpha") == (kind != "weight"))
    images, labels = data
    loss = cross_entropy(net(images.to(dtype).contiguous(memory_format=layout)), labels)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def distance(found: Gradients, truth: Gradients, names: Iterable[str]) -> float:
    """Norm of the difference over norm of the truth, of the tensors of these names taken together."""
    names = list(names)
    difference = torch.stack([(found[name].double() - truth[name]).norm() for name in names]).norm()
    return float(difference / torch.stack([truth[name].norm() for name in names]).norm())


def check(subjects: dict[str, Subject], settings: Settings, kinds: Iterable[str], paths: Paths) -> None:
    """Run steps with every baseline, from the same weights and paths, and compare with the definition.

    One step of each kind on small images against float64: loss and gradients. One weight step of the run's own size
    against float32: the loss. Raises GateError naming the baseline, the step kind and what disagrees.
    """
    net = settings.net()
    state = copy.deepcopy(net.state_dict())
    data = replace(settings, resolution=min(settings.resolution, SIDE)).data(min(settings.batch, BATCH))
    for kind in kinds:
        for weighted in sorted({subject.weighted for subject in subjects.values()}):
            loss, truth = by_definition(net, data, paths, kind, weighted, torch.float64)
            plain = [by_definition(net, data, paths, kind, weighted, torch.float32, at) for at in LAYOUTS]
            for name, subject in subjects.items():
                if subject.weighted != weighted:
                    continue
                subject.load(state)
                found_loss = subject.differentiate(subject.images(data[0]), data[1], paths, kind)
                found = subject.gradients(kind)
                names = set(truth) - subject.without_gradient(paths, kind)
                if not names <= set(found):
                    raise GateError(f"{name}, {kind} step: no gradient for {min(names - set(found))}")
                losses = [_relative(value, loss) for value in (found_loss, *(p[0] for p in plain))]
                errors = [distance(grads, truth, names) for grads in (found, *(p[1] for p in plain))]
                _compare(f"{name}, {kind} step: the loss", *losses)
                moved = "weights" if kind == "weight" else "alphas"
                _compare(f"{name}, {kind} step: the gradients of the {moved}", *errors)
                subject.update(kind)
                subject.load(state)
    data = settings.data()
    loss, _ = by_definition(net, data, paths, "weight", False, torch.float32, torch.channels_last)
    for name, subject in subjects.items():
        if not subject.weighted:
            found_loss = subject.differentiate(subject.images(data[0]), data[1], paths, "weight")
            _compare(
                f"{name}, weight step of batch {settings.batch}: the loss", _relative(found_loss, loss), SIZE_ERROR
            )
            subject.update("weight")
            subject.load(state)


def _relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).abs() / truth.abs())


def _compare(what: str, error: float, *plain: float) -> None:
    allowed = FACTOR * max(plain) + FLOOR
    if not error <= allowed:  # neither is a NaN
        raise GateError(f"{what}: relative error against float64 is {error:.1e}, allowed is {allowed:.1e}")
