"""What all spaces share: the first weights of their nets, and their layers as costs see them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..costs import Layer, cost_of
from ..mixed import MixedOp


def describe_layer(name: str, op: nn.Module, size: tuple[int, ...], idskip: int) -> Layer:
    """The layer of one operation, or of the candidates of a mixed op, at input (height, width, channels)."""
    mixed = op if isinstance(op, MixedOp) else None
    modules: tuple[Any, ...] = (op,) if mixed is None else tuple(mixed.candidates)
    places = [name] if mixed is None else [f"{name}, candidate {candidate!r}" for candidate in mixed.names]
    costs = tuple(cost_of(place, m, size, idskip=idskip) for place, m in zip(places, modules, strict=True))
    return Layer(name, costs, modules, mixed)


def attribute_of(module: nn.Module, place: str, name: str) -> Any:
    """An attribute that a module has or does not have. Raises ValueError, which names the place."""
    try:
        return getattr(module, name)
    except AttributeError:
        raise ValueError(f"{place} is a {type(module).__name__}, which has no {name}") from None
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def initialise(net: nn.Module) -> None:
    """He initialisation by fan-out for convolutions, uniform for the classifier (official init_model "he_fout")."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)
