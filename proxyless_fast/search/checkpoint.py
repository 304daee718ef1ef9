"""Checkpoints: written whole or not at all, read without unpickling code, and held to what a search can go on from."""

import zipfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..io.files import atomic
from ..io.schemas import check
from ..io.schemas.checkpoint import Checkpoint
from ..io.text import short
from .config import RENAMED, SearchConfig

NAME = "checkpoint.pt"
FORMAT = 1
MOMENTS = {"SGD": {"momentum_buffer"}, "Adam": {"step", "exp_avg", "exp_avg_sq"}}  # what they keep of a parameter


def save(folder: Path, state: dict[str, Any]) -> Path:
    """Writes state (tensors and plain Python values) as folder/checkpoint.pt by an atomic rename."""
    path = folder / NAME
    with atomic(path) as partial, open(partial, "wb") as file:
        torch.save({"format": FORMAT, **state}, file)
    return path


def load(folder: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The state saved in a run folder.

    Raises FileNotFoundError without one, ValueError where it is not ours or damaged: the file, and the key where it has
    one, are named.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint, expected one written by a search into {Path(folder)}")
    _check_archive(path)
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not a checkpoint that torch can read ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of format {FORMAT} of this program")
    check(Checkpoint, state, str(path))
    return state


def config_of(state: Mapping[str, Any], path: Path) -> SearchConfig:
    """The settings of a state; ValueError, with path and key, where one is missing, unknown or out of range."""
    config = {RENAMED.get(name, name): value for name, value in state["config"].items()}
    for name in sorted({field.name for field in fields(SearchConfig)} ^ config.keys()):
        raise ValueError(f"{path}: config.{name} is {'unknown' if name in config else 'missing'}")
    try:
        return SearchConfig(**config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def restore(search: Any, state: Mapping[str, Any], path: Path) -> None:
    """Optimizers, step, history, means and random numbers of a state into a Search; ValueError where they do not fit.

    search: as it is built, with a net that has the state's weights.
    """
    for name in ("weight_optimizer", "arch_optimizer"):
        _load_optimizer(getattr(search, name), state[name], f"{path}: {name}")
    step, epochs, baseline = state["step"], len(state["history"]), state["baseline"]
    if step > search.total_steps or step // len(search.train) != epochs:
        raise ValueError(
            f"{path}: step {step} after {epochs} epochs does not fit a search of {search.total_steps} steps, "
            f"{len(search.train)} an epoch: expected the images and batches that it was started with"
        )
    if baseline is not None and (baseline.dim() or not bool(torch.isfinite(baseline))):
        raise ValueError(f"{path}: baseline must be one finite number, got a tensor of shape {tuple(baseline.shape)}")
    try:
        torch.set_rng_state(state["rng"])
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: rng must be a state of torch's generator ({error})") from error
    search.step, search.history = step, state["history"]
    search.baseline = None if baseline is None else baseline.to(search.device)
    search.journal.load_state_dict(state["sums"])


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], place: str) -> None:
    """What it has gathered; its settings are the config's, which the state has too."""
    fresh = optimizer.state_dict()["param_groups"]
    indices = [group.get("params") for group in saved["param_groups"]]
    if indices != [group["params"] for group in fresh]:
        raise ValueError(
            f"{place}.param_groups does not fit the net's {sum(len(g['params']) for g in fresh)} parameters"
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    expected = MOMENTS[type(optimizer).__name__]
    for index, values in saved["state"].items():
        if index >= len(parameters) or values.keys() != expected:
            names = ", ".join(sorted(expected))
            raise ValueError(f"{place}.state.{index} must hold {names} of one of {len(parameters)} parameters")
        for name, value in values.items():
            if value is None and name == "momentum_buffer":  # of SGD without momentum
                continue
            shape = () if name == "step" else tuple(parameters[index].shape)
            if not (isinstance(value, Tensor) and value.is_floating_point() and value.shape == shape):
                got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else short(value)
                raise ValueError(f"{place}.state.{index}.{name} must be floating, of shape {shape}, got {got}")
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{place}.state.{index}.{name} must be finite")
    optimizer.load_state_dict({"state": dict(saved["state"]), "param_groups": fresh})


def _check_archive(path: Path) -> None:
    """ValueError where the archive would unpack to more than it is (torch.save compresses nothing), or is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
            # torch does not compare the check sums, and reads nothing of a member that is marked as a folder
            marked = (member.filename for member in archive.infolist() if member.external_attr & 0x10)
            damaged = next(marked, None) or (archive.testzip() if unpacked <= path.stat().st_size else None)
    except Exception as error:  # zipfile's own, zlib's, and what a header may make of struct and decoders
        raise ValueError(f"{path}: not a checkpoint that torch can read ({type(error).__name__})") from error
    if unpacked > path.stat().st_size:
        raise ValueError(f"{path}: not a checkpoint that torch.save wrote: it would unpack to {unpacked:,} bytes")
    if damaged is not None:
        raise ValueError(f"{path}: damaged, {short(damaged)} is not what was written")
