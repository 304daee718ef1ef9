"""A checkpoint of a search or of a training: what it holds, and of what kind. Whether it fits a net is seen when it is
filled in."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from torch import Tensor

from .common import Strict, Whole

Count = Annotated[Whole, Field(ge=0)]


class Optimizer(Strict):
    """What an optimizer's state_dict() gives."""

    state: dict[Count, dict[str, Any]]
    param_groups: list[dict[str, Any]]


class Session(Strict):
    """What every run of steps keeps. sums: of each name, the total and the count of its values since the last epoch.

    log: bytes of each file of the log. loaders: what the loaders said of themselves. rng: states of the generators of
    torch, numpy, python and the accelerator.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    step: Count
    seed: Count = 0
    config: dict[str, Any]
    net: dict[str, Any]
    scaler: dict[str, Any] = Field(default_factory=dict)
    average: dict[str, Any] | None = None
    history: list[dict[str, float]]
    sums: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)]]
    log: dict[str, Count] | None = None
    loaders: dict[str, dict[str, int]] = Field(default_factory=dict)


class Generators(Strict):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    torch: Tensor
    numpy: tuple[str, list[int], int, int, float]
    python: tuple[int, list[int], float | None]
    cuda: Tensor | None


class Search(Session):
    """Of a search. Format 1, of the versions before 0.3.0, has neither log nor loaders, and of rng only torch's."""

    kind: Literal["search"] = "search"
    weight_optimizer: Optimizer
    arch_optimizer: Optimizer
    baseline: Tensor | None
    rng: Generators | Tensor


class Training(Session):
    """Of the training of a derived net."""

    kind: Literal["train"]
    optimizer: Optimizer
    rng: Generators
