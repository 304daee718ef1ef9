"""The score-function gradient of a reward that need not be differentiable (paper section 3.3.2, eq. 5)."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..mixed import MixedOp


def log_probability(ops: Iterable[MixedOp]) -> Tensor:
    """Log of the probability of the path that is active now: scalar, differentiable in alphas."""
    return torch.stack([op.logits().log_softmax(0)[op.active] for op in ops]).sum()


def reward(accuracy: Tensor, latency: float | None, ref: float | None, exponent: float) -> Tensor:
    """accuracy · (ref / latency)^exponent; the accuracy alone without a latency. Latencies in ms."""
    return accuracy if latency is None or ref is None else accuracy * (ref / latency) ** exponent


def surrogate(log_probabilities: Tensor, rewards: Tensor, baseline: Tensor | None) -> Tensor:
    """Mean over samples of −(R − baseline) · log p: its gradient is an unbiased estimate of that of −E[reward].

    log_probabilities, rewards: (M,). The baseline must not depend on these samples; None takes for each sample the mean
    of the others (0 if it is alone), which keeps the first step unbiased too.
    """
    rewards = rewards.detach()
    if baseline is None:
        baseline = (rewards.sum() - rewards) / max(len(rewards) - 1, 1)
    return -((rewards - baseline) * log_probabilities).mean()


def update_baseline(baseline: Tensor | None, rewards: Tensor, momentum: float) -> Tensor:
    """Moving average of the mean reward; call it after `surrogate`, so that the baseline knows only earlier steps."""
    mean = rewards.detach().mean()
    return mean if baseline is None else momentum * baseline + (1 - momentum) * mean
