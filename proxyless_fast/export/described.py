"""What the outputs of a net are called and what its images went through: carried by every format, read from each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from torch import nn

from ..checks import told, unwrapped
from ..io import documents
from ..io.schemas import Description, check
from ..io.state import read_safetensors
from ..io.text import said, short
from .onnx_graph import example_output, input_shape_of, plain_copy

KEYS = ("classes", "preprocessing")
WEIGHTS_KEY = "proxyless_fast"  # one alone: safetensors writes several in an order of chance
_HELD = "_description"  # on the net, so that its copies have it too


def describe(net: nn.Module, classes: Any = None, preprocessing: Mapping[str, Any] | None = None) -> None:
    """Say what a net's outputs are called and what its images must go through, in place of what was said before.

    Kept with the net and its copies; `save_architecture`, `save_weights`, `onnx` and `timm` write it, loading brings it
    back, and `description` reads it from a net or a file. classes: the distinct names of all outputs, in order.
    preprocessing: as `data.Splits.preprocessing`: `channels`, `resolution`, `short_side`, `interpolation`, `mean`
    and `std`; also `channel_order` ("RGB" of three channels and "gray" of one, if not given) and `value_range`, what
    pixels are scaled to before mean and std ([0, 1], if not given). None: not known.
    Raises ValueError for what is no such description, or one of another net.
    """
    given = {key: value for key, value in zip(KEYS, (classes, preprocessing), strict=True) if value is not None}
    if isinstance(given.get("classes"), str):
        raise ValueError(f"classes must be a list of names, got {short(classes)}")
    net = unwrapped(net)
    setattr(net, _HELD, checked({key: _plain(value, key) for key, value in given.items()}, net, "description"))


def description(source: nn.Module | str | Path) -> dict[str, Any]:
    """What `describe` said of a net, or what a file of it says: `classes` and `preprocessing`, those that are known.

    source: a net, or the path of a .json (architecture), .safetensors or .onnx file. Raises FileNotFoundError, or
    ValueError for a description that does not fit the net (its classifier was changed since) or a file that is damaged.
    """
    if isinstance(source, nn.Module):
        net = unwrapped(source)
        return checked(getattr(net, _HELD, {}), net, "description")
    path = Path(source)
    if path.suffix == ".json":
        content = documents.read(path, "architecture file")
        return checked(content, None, str(path))
    if path.suffix == ".safetensors":
        return checked(notes_of_weights(read_safetensors(path)[1], str(path)), None, str(path))
    if path.suffix == ".onnx":
        texts = _onnx_texts(path)
        return checked({k: documents.parse(texts[k], k, str(path)) for k in KEYS if k in texts}, None, str(path))
    raise ValueError(f"source must be a net or a .json, .safetensors or .onnx file, got {path}")


def to_texts(found: Mapping[str, Any]) -> dict[str, str]:
    """A description as the metadata of a file: JSON by key."""
    return {key: json.dumps(value) for key, value in found.items()}


def notes_of_weights(texts: Mapping[str, str], source: str) -> dict[str, Any]:
    """What is noted in the metadata of a safetensors file of ours. Raises ValueError, which names the file."""
    noted = documents.parse(texts[WEIGHTS_KEY], f"metadata {WEIGHTS_KEY}", source) if WEIGHTS_KEY in texts else {}
    if not isinstance(noted, dict):
        raise ValueError(f"{source}: metadata {WEIGHTS_KEY} must be an object, got {short(noted)}")
    return noted


def checked(found: Mapping[str, Any], net: nn.Module | None, source: str) -> dict[str, Any]:
    """The description in a mapping, what else is in it apart. Raises ValueError where it is none, or not the net's."""
    found = {key: found[key] for key in KEYS if found.get(key) is not None}
    read = check(Description, found, source).model_dump(exclude_none=True)
    preprocessing = read.get("preprocessing")
    if preprocessing is not None:
        order = {1: "gray", 3: "RGB"}.get(preprocessing["channels"])
        if order is not None:
            preprocessing.setdefault("channel_order", order)
        preprocessing.setdefault("short_side", None)
    if net is not None and read:
        _require_fit(read, net)
    return read


def _require_fit(found: Mapping[str, Any], net: nn.Module) -> None:
    """Raises ValueError where a description speaks of another number of outputs or channels than the net has."""
    if "classes" in found:
        outputs = _outputs(net)
        if outputs is not None and len(found["classes"]) != outputs:
            raise ValueError(f"classes must be {outputs}, as the outputs of the net are, got {len(found['classes'])}")
    channels = told(net, "in_channels")
    if "preprocessing" in found and channels not in (None, found["preprocessing"]["channels"]):
        got = found["preprocessing"]["channels"]
        raise ValueError(f"preprocessing.channels must be {channels}, as the channels of the net's images, got {got}")


def _outputs(net: nn.Module) -> int | None:
    """As the net tells, else as it gives when run; None where it can do neither."""
    count = told(net, "num_classes")
    if count is not None:
        return count
    try:
        return example_output(plain_copy(net), input_shape_of(net))[1].shape[-1]
    except ValueError:
        return None


def _plain(value: Any, key: str) -> Any:
    """The value as JSON gives it back: tuples are lists."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key} must be plain values that JSON can hold: {said(error)}") from error


def _onnx_texts(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise FileNotFoundError(f"no ONNX file at {path}")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf raises its own
        raise ValueError(f"{path} cannot be read as ONNX: {said(error)}") from error
    return {entry.key: entry.value for entry in model.metadata_props}
