"""Single blocks at every shape of a space: forward, backward, the input's gradient alone, and probe."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import proxyless_fast as pf

from ..costs import OpShape
from .baselines import BASELINES, Baseline, Settings
from .gate import FACTOR, FLOOR, GateError
from .measure import MatmulRate, percentiles, seconds

KINDS = ("forward", "backward", "input-gradient", "probe")
PASSES = {"forward": 1, "backward": 2, "input-gradient": 1, "probe": 1}  # FLOPs, in forward passes


@dataclass(frozen=True)
class Case:
    """A block and the shape it is run at. name: channels, side of the input, stride and operation."""

    name: str
    module: nn.Module
    shape: OpShape


def cases(net: Any) -> Iterator[Case]:
    """Every distinct block of a net: stem, first block, and the candidates of each distinct layer."""
    seen = set()
    for layer in net.layers():
        for shape, module in zip(layer.choices, layer.modules, strict=True):
            if shape is None or shape.kind not in ("Conv", "Conv_1", "expanded_conv"):
                continue
            height, _, channels = shape.input
            kind = getattr(module, "name", "Conv" if shape.kind == "Conv" else "1x1_Conv")
            name = f"{channels}-{shape.output[-1]} {height} s{module.stride} {kind}"
            if name not in seen:
                seen.add(name)
                yield Case(name, module, shape)


class Runner:
    """One block as one baseline runs it. `prepare` builds what the timed call consumes."""

    def __init__(self, module: nn.Module, x: Tensor, grad: Tensor, baseline: Baseline) -> None:
        if baseline.block is None:
            raise ValueError(f"baseline must have blocks of its own, got {baseline.name!r}")
        layout = torch.channels_last if baseline.channels_last else torch.contiguous_format
        self.module = baseline.block(copy.deepcopy(module).to(memory_format=layout))
        self.x, self.grad = x.contiguous(memory_format=layout), grad.contiguous(memory_format=layout)
        # Next to a Zero that is active, the block is what an arch step probes.
        zero = pf.Zero(x.shape[2] // grad.shape[2], grad.shape[1])
        self.mixed = pf.MixedOp({"zero": zero, "block": self.module})
        self.mixed.activate("zero", "full")

    def prepare(self, kind: str) -> Callable[[], Any]:
        """The call of a kind, ready to be timed."""
        frozen = kind in ("input-gradient", "probe")
        for parameter in self.module.parameters():
            parameter.requires_grad_(not frozen).grad = None
        x = self.x.detach().requires_grad_()
        if kind == "forward":
            return lambda: self.module(x)
        self.mixed.alpha.grad = None
        output = self.mixed(x) if kind == "probe" else self.module(x)
        self.last = x
        return lambda: output.backward(self.grad)

    def results(self) -> dict[str, Tensor]:
        """Output, gradients of the input and the parameters, and the gate's gradient, for the gate of the benchmark."""
        found = {"output": self.prepare("forward")().detach()}
        self.prepare("backward")()
        found["the input's gradient"] = self.last.grad
        found |= {f"the gradient of {name}": p.grad for name, p in self.module.named_parameters()}
        self.prepare("input-gradient")()
        found["the input's gradient with frozen weights"] = self.last.grad
        self.prepare("probe")()
        found["the gate's gradient"] = 4 * self.mixed.alpha.grad[1]  # type: ignore[index]  # p = 1/2, and Zero's gate has gradient 0
        return found


def check(case: Case, runners: dict[str, Runner], x: Tensor, grad: Tensor) -> None:
    """Hold every baseline's results against float64. Raises GateError naming the block, baseline and result."""
    generic = [BASELINES["generic-nchw"], BASELINES["generic"]]
    truth = Runner(copy.deepcopy(case.module).double(), x.double(), grad.double(), generic[0]).results()
    scale = {name: value.norm() for name, value in truth.items()}
    scale["the gate's gradient"] = truth["output"].norm() * grad.double().norm()  # it is a dot product of the two
    plain = [Runner(case.module, x, grad, baseline).results() for baseline in generic]
    # A pre-activation within rounding of a bound may fall on either side of it, in any implementation, and then a whole
    # gradient value comes or goes: two of them at most, of as many as the widest tensor has.
    wide = max(p.shape[0] for p in case.module.parameters()) * grad.numel() / grad.shape[1]
    ties = 2 / wide**0.5
    for baseline, runner in runners.items():
        found = runner.results()
        for name, value in truth.items():
            allowed = FACTOR * max(float((p[name].double() - value).norm() / scale[name]) for p in plain) + FLOOR
            allowed += ties if name.startswith("the input's") or "gradient of" in name else 0
            error = float((found[name].double() - value).norm() / scale[name])
            if not error <= allowed:
                raise GateError(
                    f"{baseline}, block {case.name}: {name}: relative error against float64 is {error:.1e}, "
                    f"allowed is {allowed:.1e}"
                )


def measure(names: list[str], settings: Settings, rounds: int, rate: MatmulRate, note: Callable = print) -> list[dict]:
    """One row for each block, kind and baseline that has blocks of its own; all baselines in turns, round by round."""
    names = [name for name in names if BASELINES[name].block is not None]
    rows: list[dict[str, Any]] = []
    order, shuffle = list(names), random.Random(settings.seed)
    values = torch.Generator().manual_seed(settings.seed)
    for case in cases(settings.net()):
        note(case.name)
        rate.sample()
        (h, w, c), (ho, wo, co) = case.shape.input, case.shape.output
        x = torch.randn(settings.batch, c, h, w, generator=values)
        grad = torch.randn(settings.batch, co, ho, wo, generator=values)
        runners = {name: Runner(case.module, x, grad, BASELINES[name]) for name in names}
        few = slice(2)  # PyTorch's depthwise convolutions are slow in float64
        check(case, {n: Runner(case.module, x[few], grad[few], BASELINES[n]) for n in names}, x[few], grad[few])
        for kind in KINDS:
            times: dict[str, list[float]] = {name: [] for name in names}
            for done in range(rounds + 1):
                shuffle.shuffle(order)
                for name in order:
                    taken = seconds(runners[name].prepare(kind))
                    if done:  # the first round is the warm-up
                        times[name].append(taken)
            work = 2 * settings.batch * case.shape.macs * PASSES[kind]
            for name in names:
                figures = percentiles(times[name])
                rows.append(
                    {
                        "kind": kind,
                        "case": case.name,
                        "baseline": name,
                        "batch": settings.batch,
                        "resolution": settings.resolution,
                        "samples": rounds,
                        **figures,
                        "flops": work,
                        "limit_fraction": work / rate.flops_per_second / figures["p50"],
                    }
                )
    return rows
