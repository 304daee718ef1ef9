"""What an operation costs, from shapes alone: nothing is run, so no batch-norm statistic moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from .candidates import defined_with_forward
from .checks import unwrapped


@dataclass(frozen=True)
class OpShape:
    """One operation at one resolution: the identity of a latency-table row, with its multiply-accumulates.

    kind: the table's name for it ("Conv", "expanded_conv", "Conv_1", "Logits", ...). input, output: (height, width,
    channels), or (features,). attributes: pairs such as ("expand", 3), ("kernel", 5), ("stride", 1), ("idskip", 1), in
    the order in which the key names them. macs: multiply-accumulates of one image. parameters: weights and biases.
    """

    kind: str
    input: tuple[int, ...]
    output: tuple[int, ...]
    attributes: tuple[tuple[str, int | str], ...] = ()
    macs: int = 0
    parameters: int = 0

    @property
    def key(self) -> str:
        """The key of the official latency table (official search/utils/latency_estimator.py)."""
        parts = [self.kind, f"input:{_by(self.input)}", f"output:{_by(self.output)}"]
        return "-".join(parts + [f"{name}:{value}" for name, value in self.attributes])


class Choice(Protocol):
    """What costs ask of a mixed op: the index of its active candidate, their names and probabilities."""

    active: int
    names: list[str]

    def probabilities(self) -> Any: ...


@dataclass(frozen=True)
class Layer:
    """A layer of a net: one choice where it is fixed, one per candidate where it is a mixed op.

    choices: None for a candidate that costs nothing (Zero, Identity). modules: the runnable module of each choice, in
    the same order; where a choice has idskip 1, the block around it adds its input.
    """

    name: str
    choices: tuple[OpShape | None, ...]
    modules: tuple[nn.Module, ...]
    mixed: Choice | None = None

    @property
    def output(self) -> tuple[int, ...] | None:
        """(height, width, channels) of the first choice that has a cost; None where no choice has one."""
        return next((shape.output for shape in self.choices if shape is not None), None)


def cost_of(place: str, module: nn.Module, input: tuple[int, ...], **options: Any) -> OpShape | None:
    """What a module says it costs at input (height, width, channels), by its method `shape(input, ...)`; None: nothing.

    Raises ValueError, which names the place, for a module that says nothing, or that cannot take this input.
    """
    shape = getattr(module, "shape", None)
    own = "shape" in vars(module) or (defined_with_forward(type(module), "shape") and "forward" not in vars(module))
    if not callable(shape) or not own:
        what = (
            "runs another forward than its shape was written for" if callable(shape) else "does not say what it costs"
        )
        raise ValueError(
            f"{place} is a {type(module).__name__}, which {what}; give it a method shape(input, idskip=0) that returns "
            "an OpShape, or None where it costs nothing (proxyless_fast.costs)"
        )
    try:
        found = shape(input, **options)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if found is not None and not isinstance(found, OpShape):
        raise ValueError(f"{place}: shape(input) must return an OpShape or None, got a {type(found).__name__}")
    return found


def require_cost(place: str, module: nn.Module, input: tuple[int, ...], **options: Any) -> OpShape:
    """`cost_of` of a layer that every net has. Raises ValueError where it costs nothing too."""
    found = cost_of(place, module, input, **options)
    if found is None:
        raise ValueError(f"{place} is a {type(module).__name__} that costs nothing, expected a layer with a cost")
    return found


def conv_output(size: int, stride: int) -> int:
    """Side of the output of a "same"-padded convolution with an odd kernel."""
    return (size - 1) // stride + 1


def count_elements(module: nn.Module) -> int:
    """Number of a module's weights and biases, all of them: what `OpShape.parameters` counts."""
    return sum(p.numel() for p in module.parameters())


def count_parameters(net: nn.Module) -> int:
    """Number of weights and biases of a net; in a supernet, those of the active paths (alphas are not counted).

    The net is one of `proxyless_fast.spaces`, or derived from one. Raises ValueError for a net that cannot tell its
    layers.
    """
    return sum(shape.parameters for shape in _active(net))


def count_macs(net: nn.Module) -> int:
    """Multiply-accumulates of one image (convolutions and the classifier, as the official code counts them).

    In a supernet: of the active paths. The net is one of `proxyless_fast.spaces`, or derived from one.
    Raises ValueError for a net that cannot tell its layers.
    """
    return sum(shape.macs for shape in _active(net))


def describe_layers(net: nn.Module) -> list[Layer]:
    """Every layer of a net of `proxyless_fast.spaces`, or derived from one, with the cost of each of its choices.

    Raises ValueError for a net that cannot tell its layers.
    """
    net = unwrapped(net)
    describe: Callable[[], list[Layer]] | None = getattr(net, "layers", None)
    if not callable(describe):
        inside = "; give its .module" if isinstance(getattr(net, "module", None), nn.Module) else ""
        raise ValueError(
            f"net must be one of proxyless_fast.spaces or derived from one, got {type(net).__name__}{inside}"
        )
    return describe()


def _active(net: nn.Module) -> Sequence[OpShape]:
    choices = (layer.choices[layer.mixed.active if layer.mixed is not None else 0] for layer in describe_layers(net))
    return [shape for shape in choices if shape is not None]


def _by(shape: Sequence[int]) -> str:
    return "x".join(str(size) for size in shape)
