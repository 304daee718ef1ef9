"""State dicts: into a net with one sentence where they do not fit, and as safetensors, from which no code runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from .files import atomic


def save_weights(net: nn.Module, path: str | Path) -> None:
    """Write the net's state dict as safetensors; the file appears only when it is complete."""
    from safetensors.torch import save_file

    state = {name: value.detach().cpu().contiguous().clone() for name, value in net.state_dict().items()}
    with atomic(path) as temporary:
        save_file(state, temporary)


def load_weights(net: nn.Module, path: str | Path) -> None:
    """Fill the net from a safetensors file; FileNotFoundError, or ValueError when the file does not fit the net."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    load_state(net, state, str(path))


def load_state(net: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """load_state_dict, strict, with one sentence that names the first of what does not fit."""
    own = net.state_dict()
    counters = {name for name in own if name.endswith("num_batches_tracked")}  # old checkpoints have none
    missing = sorted(own.keys() - state.keys() - counters)
    unexpected = sorted(state.keys() - own.keys())
    shapes = [
        f"{name} has shape {tuple(state[name].shape)}, the net's has {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    ]
    for wrong, what in ((missing, "lacks"), (unexpected, "has what the net lacks:"), (sorted(shapes), "differs:")):
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise ValueError(f"{source} does not fit the net: it {what} {wrong[0]}{more}")
    net.load_state_dict({**{name: own[name] for name in counters}, **state})
