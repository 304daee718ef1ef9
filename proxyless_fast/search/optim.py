"""Optimizers and the learning rate, the same for a supernet and for a derived net."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..distributed.ranks import Ranks
from .agreement import global_batch
from .config import WeightConfig


def decayed(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: vectors (batch norms, biases) are not decayed."""
    parameters = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def sgd(parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD with Nesterov momentum.

    Parameters whose grad is None are skipped: with `zero_grad(set_to_none=True)` an inactive path gets neither momentum
    nor decay.
    """
    groups = decayed(parameters, weight_decay)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, foreach=True)


def optimizer_of(config: WeightConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of weights that a config names: `sgd`, or timm's for large batches, which skip alike.

    "lars": You, Gitman, Ginsburg 2017; "lamb": You et al., ICLR 2020, momentum is its beta1. Neither scales vectors.
    Raises ValueError for these where timm is not installed.
    """
    if config.optimizer == "sgd":
        return sgd(parameters, config.lr, config.momentum, config.weight_decay)
    try:
        from timm import optim
    except ImportError as error:
        raise ValueError(
            f"optimizer: got {config.optimizer!r}, which is timm's and needs it: `pip install timm`"
        ) from error
    groups, momentum = decayed(parameters, config.weight_decay), config.momentum
    if config.optimizer == "lars":
        return optim.Lars(groups, lr=config.lr, momentum=momentum, nesterov=momentum > 0)
    return optim.Lamb(groups, lr=config.lr, betas=(momentum, 0.999))


def adam(alphas: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Adam:
    """Adam without first moment: an alpha that was not sampled has no gradient and must not drift."""
    return torch.optim.Adam(alphas, lr=lr, betas=(0.0, 0.999), weight_decay=weight_decay, foreach=True)


def cosine_lr(lr: float, step: int, total: int, warmup: int = 0, start: float = 0.0) -> float:
    """Half a cosine from lr to 0 at step total, after `warmup` steps on a line from `start` to lr.

    For large batches: Goyal et al. 2017, section 2.2, with the learning rate of the small batch as the start.
    """
    if step < warmup:
        return start + (lr - start) * step / warmup
    return 0.5 * lr * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def cosine_of(config: WeightConfig, loader: Any, ranks: Ranks) -> Callable[[int, int], float]:
    """(step, total steps) -> learning rate, by a config and the images of a global batch."""
    grown = config.lr
    if config.lr_batch is not None:
        grown *= global_batch(loader, ranks) / config.lr_batch
    warmup = config.lr_warmup_epochs * len(loader)

    def schedule(step: int, total: int) -> float:
        if not (total > warmup or config.lr_warmup_epochs == 0):
            raise ValueError(
                f"lr_warmup_epochs: got {config.lr_warmup_epochs}, {warmup} steps, expected less than all {total} steps"
            )
        return cosine_lr(grown, step, total, warmup, config.lr if config.lr_batch is not None else 0.0)

    return schedule


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
