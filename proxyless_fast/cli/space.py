"""From settings to a supernet."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from .. import spaces

SPACES: dict[str, Callable[..., nn.Module]] = {"small": spaces.small, "cell": spaces.cell, "mobile": spaces.mobile}


def build(name: str, settings: dict[str, Any]) -> nn.Module:
    """The supernet of a space. settings: arguments of its function.

    Raises ValueError for an unknown space, an argument the space does not have, or one out of range.
    """
    if name not in SPACES:
        raise ValueError(f"--space: got {name!r}, expected one of {', '.join(SPACES)}")
    known = inspect.signature(SPACES[name]).parameters
    for argument, value in settings.items():
        if argument not in known:
            option = f"--{argument.replace('_', '-')}"
            raise ValueError(f"{option}: got {value!r}, expected no such option with space {name!r}")
    return SPACES[name](**settings)


def settings_of(name: str, given: dict[str, Any], net: nn.Module) -> dict[str, Any]:
    """What rebuilds net: the given arguments, and the sizes that the space filled in."""
    sizes = {key: getattr(net, key) for key in ("num_classes", "in_channels", "resolution")}
    return {"name": name, **given, **sizes}
