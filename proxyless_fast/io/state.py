"""State dicts: into a net with one sentence where they do not fit, and as safetensors, from which no code runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .files import atomic
from .text import plain, said, short

WRAPPERS = ("state_dict", "model", "net")  # where checkpoints keep the net's own
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile


def write_weights(state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write tensors and texts as safetensors; the file appears only when it is complete.

    Raises ValueError for what `load_state` would not take: NaN and infinities, negative variances, sparse tensors.
    """
    from safetensors.torch import save_file

    values = {}
    for name, value in state.items():
        value = _tensor(value, name, "net")
        _cast(value, value, name, "net")
        values[name] = value.cpu().contiguous().clone()
    with atomic(path) as temporary:
        save_file(values, temporary, dict(metadata))


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; FileNotFoundError, or ValueError when it is none."""
    return read_safetensors(path)[0]


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the texts of a safetensors file; FileNotFoundError, or ValueError when it is none."""
    from safetensors import safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            raise ValueError(
                f"{path} cannot be read as safetensors: it is what torch.save writes; give what "
                "torch.load(path, weights_only=True) returns to net.load_state_dict, then save_weights(net, path)"
            )
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # the library raises its own, and KeyError, TypeError, ... for what a header may say
        raise ValueError(f"{path} cannot be read as safetensors: {said(error)}") from error


def load_state(net: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """load_state_dict, strict, with one sentence that names the first of what does not fit.

    state: tensors or arrays by name, of any floating type for floating parameters; also a checkpoint that keeps them
    under "state_dict", "model" or "net", and names that all begin with "module." or "_orig_mod.". Raises ValueError for
    names and shapes that do not fit, NaN and infinities, and types that cannot be the parameter's.
    """
    own = net.state_dict()
    state = _without_prefixes(_unwrapped(state, own, source), own)
    counters = {name for name in own if name.endswith("num_batches_tracked")}  # old checkpoints have none
    masks = {name for name in own if name.rpartition(".")[2] == "pruned"}  # as alphas of -inf, which MixedOp reads
    missing = sorted(own.keys() - state.keys() - counters - masks)
    unexpected = sorted(plain(str(name)) for name in state.keys() - own.keys())
    tensors = {name: _tensor(state[name], name, source) for name in own if name in state}
    shapes = [
        f"{name} has shape {tuple(value.shape)}, the net's has {tuple(own[name].shape)}"
        for name, value in tensors.items()
        if value.shape != own[name].shape
    ]
    for wrong, what in ((missing, "lacks"), (unexpected, "has what the net lacks:"), (sorted(shapes), "differs:")):
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise ValueError(f"{source} does not fit the net: it {what} {wrong[0]}{more}")
    fitting = {name: _cast(value, own[name], name, source) for name, value in tensors.items()}
    net.load_state_dict({**{name: own[name] for name in counters}, **fitting})


def _unwrapped(state: Mapping[str, Any], own: Mapping[str, Tensor], source: str) -> Mapping[str, Any]:
    """The state dict inside a checkpoint; ValueError where there is none, or where several could be meant."""
    for _ in range(len(WRAPPERS)):
        if not isinstance(state, Mapping):
            raise ValueError(f"{source} is no state dict: expected tensors by name, got {type(state).__name__}")
        found = [key for key in WRAPPERS if key not in own and isinstance(state.get(key), Mapping)]
        if len(found) > 1:
            raise ValueError(f"{source} has {' and '.join(found)}, expected one state dict: give the one that is meant")
        if not found:
            break
        state = state[found[0]]
    return state


def _without_prefixes(state: Mapping[str, Any], own: Mapping[str, Tensor]) -> Mapping[str, Any]:
    while state:
        prefix = next((p for p in PREFIXES if all(isinstance(n, str) and n.startswith(p) for n in state)), None)
        if prefix is None or all(name.startswith(prefix) for name in own):
            break
        state = {name[len(prefix) :]: value for name, value in state.items()}
    return state


def _tensor(value: Any, name: str, source: str) -> Tensor:
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind not in "fiub":
            raise ValueError(f"{source}: {name} must hold numbers, got an array of {value.dtype}")
        wide = value.dtype.kind == "f" and value.dtype.itemsize > 8  # a long double, which torch does not have
        value = torch.from_numpy(np.array(value, dtype=np.float64 if wide else value.dtype.newbyteorder("=")))
    if not isinstance(value, Tensor):
        raise ValueError(f"{source}: {name} must be a tensor or an array, got {short(value)}")
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        kind = "quantized" if value.is_quantized else "meta" if value.is_meta else str(value.layout)
        raise ValueError(f"{source}: {name} must be a dense tensor with values, got a {kind} one")
    return value.detach()


def _cast(value: Tensor, own: Tensor, name: str, source: str) -> Tensor:
    """The value in the net's own type; ValueError where it would not be what it was."""
    if (
        not own.is_floating_point()
        and value.is_floating_point()
        and bool((value.double() == value.double().round()).all())
    ):
        value = value.to(torch.int64)  # a counter that went to half precision with the rest
    if own.is_floating_point() != value.is_floating_point() or own.is_complex() != value.is_complex():
        raise ValueError(f"{source}: {name} must be of a type like {own.dtype}, got {value.dtype}")
    if not own.is_floating_point():
        return value
    cast = value.to(own.dtype)
    finite = torch.isfinite(cast)
    if name.rpartition(".")[2] == "alpha":  # a pruned candidate's is -inf
        finite |= cast == -torch.inf
    if not finite.all():
        first = cast[~finite].flatten()[0].item()
        raise ValueError(f"{source}: {name} must be finite in {own.dtype}, got {first}")
    if name.endswith("running_var") and bool((cast < 0).any()):
        raise ValueError(f"{source}: {name} must not be negative, got {cast.min().item():.4g}")
    return cast
