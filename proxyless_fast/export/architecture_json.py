"""A derived net's architecture as JSON: enough to build the net again, and what a reader wants to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..checks import unwrapped
from ..costs import count_macs, count_parameters
from ..io import documents
from ..io.schemas import Architecture, check
from ..spaces import from_config
from . import batchnorm
from .described import describe, description
from .faithful import require_same

FORMAT = "proxyless_fast.architecture"


def architecture(net: nn.Module) -> dict[str, Any]:
    """A JSON-ready description of a derived net of `proxyless_fast.spaces`, with its parameters and MACs, and the
    `classes` and `preprocessing` that `describe` said of it.

    Raises ValueError for another net, one that still holds mixed ops, or one whose modules were changed into what the
    description cannot say.
    """
    net = unwrapped(net)
    config = getattr(net, "config", None)
    if not callable(config):
        inside = "; give its .module" if isinstance(getattr(net, "module", None), nn.Module) else ""
        raise ValueError(f"net must be derived from one of proxyless_fast.spaces, got {type(net).__name__}{inside}")
    document = {"format": FORMAT, "net": config(), "bn": batchnorm.settings(net)}
    require_same(net, lambda: from_architecture(document), "an architecture file")
    return {**document, "parameters": count_parameters(net), "macs": count_macs(net), **description(net)}


def from_architecture(document: Mapping[str, Any]) -> nn.Module:
    """The net that `architecture` described, with fresh weights; `description(net)` has its classes and preprocessing.

    Raises ValueError when the document is not one, or says other parameters or MACs than the net has.
    """
    read = check(Architecture, document, "architecture").model_dump()
    net = from_config(read["net"])
    batchnorm.apply(net, read["bn"])
    for key, count in (("parameters", count_parameters), ("macs", count_macs)):
        if read[key] not in (None, count(net)):
            raise ValueError(f"architecture: {key} must be {count(net)}, as the net has, got {read[key]}")
    describe(net, read["classes"], read["preprocessing"])
    return net


def save_architecture(net: nn.Module, path: str | Path) -> None:
    """Write `architecture(net)` as JSON; the file appears only when it is complete."""
    documents.write(architecture(net), path)


def load_architecture(path: str | Path) -> nn.Module:
    """The net, with fresh weights, of an architecture file; FileNotFoundError or ValueError naming the file."""
    document = documents.read(path, "architecture file")
    try:
        return from_architecture(document)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
