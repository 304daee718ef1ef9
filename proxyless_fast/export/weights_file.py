"""A net's weights as safetensors, with what decides what they compute: the architecture, the classes, the images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..checks import unwrapped
from ..io.schemas import Architecture, check
from ..io.state import load_state, read_safetensors, write_weights
from ..io.text import short
from .architecture_json import architecture
from .described import KEYS, WEIGHTS_KEY, checked, describe, description, notes_of_weights

# What the outputs in evaluation do not depend on, of what an architecture says of a net.
_APART = {"resolution", "dropout"}


def save_weights(net: nn.Module, path: str | Path) -> None:
    """Write the net's state dict as safetensors, for `load_weights`; the file appears only when it is complete.

    Its metadata has, as JSON under "proxyless_fast", the `classes` and `preprocessing` that `describe` said of the net,
    and its `architecture` where it has one. Raises ValueError for what could not be loaded again: NaN and infinities.
    """
    net = unwrapped(net)
    noted: dict[str, Any] = description(net)
    told = _architecture(net)
    if told is not None:
        noted["architecture"] = {key: value for key, value in told.items() if key not in KEYS}
    write_weights(net.state_dict(), path, {WEIGHTS_KEY: json.dumps(noted)} if noted else {})


def load_weights(net: nn.Module, path: str | Path) -> None:
    """Fill the net from a safetensors file, and take over what it says of classes and images.

    Raises FileNotFoundError, or ValueError when the file does not fit the net: other names, shapes, activations or
    epsilons, and other classes or preprocessing than `describe` said of it.
    """
    net = unwrapped(net)
    state, texts = read_safetensors(path)
    noted = notes_of_weights(texts, str(path))
    theirs, own, told = checked(noted, None, str(path)), description(net), _architecture(net)
    differences = [_difference(theirs[key], own[key], key) for key in KEYS if key in theirs and key in own]
    if "architecture" in noted and told is not None:
        differences.append(_difference(_decisive(noted["architecture"], str(path)), _decisive(told, "net"), ""))
    for difference in differences:
        if difference is not None:
            raise ValueError(f"{path} does not fit the net: {difference}")
    load_state(net, state, str(path))
    describe(net, **{**own, **theirs})


def _architecture(net: nn.Module) -> dict[str, Any] | None:
    """The net's architecture, None where it has none: supernets, nets of a user, and changed ones."""
    try:
        return architecture(net)
    except ValueError:
        return None


def _decisive(document: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What outputs in evaluation depend on, of an architecture. Raises ValueError where it is none."""
    read = check(Architecture, document, source).model_dump()
    eps = [entry["eps"] for entry in read["bn"]]
    return {**read["net"], "bn.eps": eps[0] if len(set(eps)) == 1 else eps}


def _difference(theirs: Any, own: Any, place: str) -> str | None:
    """The first place where two JSON values differ, in words."""
    pairs: list[tuple[str, Any, Any]] = []
    if isinstance(theirs, dict) and isinstance(own, dict):
        keys = [key for key in [*own, *(key for key in theirs if key not in own)] if key not in _APART]
        pairs = [(f"{place}.{key}" if place else key, theirs.get(key), own.get(key)) for key in keys]
    elif isinstance(theirs, list) and isinstance(own, list) and len(theirs) == len(own):
        pairs = [(f"{place}.{i}", *pair) for i, pair in enumerate(zip(theirs, own, strict=True))]
    elif theirs != own:
        return f"{place} is {short(theirs)} there, and {short(own)} here"
    return next((found for name, a, b in pairs if (found := _difference(a, b, name)) is not None), None)
