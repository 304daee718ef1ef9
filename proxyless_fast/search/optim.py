"""Optimizers and the learning rate, the same for a supernet and for a derived net."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


def sgd(parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD with Nesterov momentum. Vectors (batch norms, biases) are not decayed.

    Parameters whose grad is None are skipped: with `zero_grad(set_to_none=True)` an inactive path gets neither momentum
    nor decay.
    """
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [g for g in groups if g["params"]], lr=lr, momentum=momentum, nesterov=momentum > 0, foreach=True
    )


def adam(alphas: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Adam:
    """Adam without first moment: an alpha that was not sampled has no gradient and must not drift."""
    return torch.optim.Adam(alphas, lr=lr, betas=(0.0, 0.999), weight_decay=weight_decay, foreach=True)


def set_cosine_lr(optimizer: torch.optim.Optimizer, lr: float, step: int, total: int) -> float:
    """Half a cosine from lr at step 0 to 0 at step total; returns the value set."""
    value = 0.5 * lr * (1 + math.cos(math.pi * step / total))
    for group in optimizer.param_groups:
        group["lr"] = value
    return value


@contextmanager
def frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within, autograd computes no gradient of these parameters; afterwards each is as it was."""
    thawed = [p for p in parameters if p.requires_grad]
    for p in thawed:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in thawed:
            p.requires_grad_(True)
