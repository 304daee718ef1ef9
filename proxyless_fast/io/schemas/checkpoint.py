"""checkpoint.pt of a search: what it holds, and of what kind. Whether it fits a net is seen when it is filled in."""

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


class Checkpoint(Strict):
    """A whole file. sums: of each name, the total and the count of its values since the last epoch."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    format: Literal[1]
    step: Count
    config: dict[str, Any]
    net: dict[str, Any]
    weight_optimizer: Optimizer
    arch_optimizer: Optimizer
    baseline: Tensor | None
    history: list[dict[str, float]]
    sums: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)]]
    rng: Tensor
