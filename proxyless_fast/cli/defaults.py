"""Defaults of the command line, by search space. What is not here is as in SearchConfig and TrainConfig."""

from dataclasses import fields
from typing import Any

from ..search import SearchConfig

DATA = {"small": "fashion-mnist", "cell": "fashion-mnist", "mobile": None}

# A net of small images takes well under 1 ms, where the logarithm of "mul_log" has no sense: hence "add_linear".
SEARCH: dict[str, dict[str, Any]] = {
    "small": {
        "epochs": 2, "warmup_epochs": 1, "lr": 0.1, "arch_every": 2, "arch_lr": 0.03, "label_smoothing": 0.0,
        "objective": "add_linear", "add_linear_weight": 0.1,
    },
    "cell": {
        "epochs": 40, "warmup_epochs": 10, "lr": 0.1, "arch_every": 2, "arch_lr": 0.01, "label_smoothing": 0.0,
        "objective": "add_linear", "add_linear_weight": 0.1,
    },
    "mobile": {},
}  # fmt: skip

TRAIN: dict[str, dict[str, Any]] = {
    "small": {"epochs": 5, "lr": 0.1, "label_smoothing": 0.0},
    "cell": {"epochs": 100, "lr": 0.1, "label_smoothing": 0.0},
    "mobile": {},
}

LOADER: dict[str, dict[str, Any]] = {
    # In a few epochs, augmented images cost more accuracy than they bring.
    "small": {"batch_size": 128, "valid_fraction": 0.2, "shift": 0},
    "cell": {"batch_size": 128, "valid_fraction": 0.5, "shift": 2},
    "mobile": {"batch_size": 256, "valid_fraction": 0.04, "shift": 2},
}

# --target: how far from the space's fastest path to its slowest.
TARGET = "50%"


def of_space(space: str, kind: type) -> dict[str, Any]:
    """All fields of SearchConfig or TrainConfig with the defaults of a space."""
    own = (SEARCH if kind is SearchConfig else TRAIN)[space]
    return {field.name: own.get(field.name, field.default) for field in fields(kind)}


def describe(values: dict[str, Any]) -> str:
    """One default, or one per space where they differ."""
    if len(set(values.values())) == 1:
        return f"default: {_text(next(iter(values.values())))}"
    return "default: " + ", ".join(f"{space} {_text(value)}" for space, value in values.items())


def _text(value: Any) -> str:
    return "none" if value is None else f"{value}"
