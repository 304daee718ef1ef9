"""A derived net's architecture as JSON: enough to build the net again, and what a reader wants to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..costs import count_macs, count_parameters
from ..io import documents
from ..io.schemas import Architecture, check
from ..spaces import from_config
from . import batchnorm
from .faithful import require_same

FORMAT = "proxyless_fast.architecture"


def architecture(net: nn.Module) -> dict[str, Any]:
    """A JSON-ready description of a derived net of `proxyless_fast.spaces`, with its parameters and MACs.

    Raises ValueError for another net, one that still holds mixed ops, or one whose modules were changed into what the
    description cannot say.
    """
    describe = getattr(net, "config", None)
    if not callable(describe):
        raise ValueError(f"net must be derived from one of proxyless_fast.spaces, got {type(net).__name__}")
    document = {
        "format": FORMAT,
        "net": describe(),
        "bn": batchnorm.settings(net),
        "parameters": count_parameters(net),
        "macs": count_macs(net),
    }
    require_same(net, lambda: from_architecture(document), "an architecture file")
    return document


def from_architecture(document: Mapping[str, Any]) -> nn.Module:
    """The net that `architecture` described, with fresh weights; ValueError when the document is not one."""
    read = check(Architecture, document, "architecture").model_dump()
    net = from_config(read["net"])
    batchnorm.apply(net, read["bn"])
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
