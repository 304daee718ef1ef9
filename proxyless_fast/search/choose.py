"""The most probable path within a latency."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..mixed import MixedOp


def choose_path(
    log_probabilities: Sequence[Sequence[float]], times: Sequence[Sequence[float]], budget: float
) -> list[int]:
    """One index per mixed op: the path of largest total log-probability whose total time is at most budget.

    log_probabilities[l][j], times[l][j]: of candidate j of mixed op l, times in ms; −inf marks a pruned candidate.
    Exact: op by op, it keeps the partial paths that no other beats in both time and probability (the dynamic
    programme of Nemhauser and Ullmann for the knapsack), and drops those that the fastest rest cannot bring home.
    Raises ValueError where even the fastest path takes longer.
    """
    scores = [np.asarray(row, dtype=np.float64) for row in log_probabilities]
    alive = [
        np.where(np.isfinite(s), np.asarray(t, dtype=np.float64), np.inf) for s, t in zip(scores, times, strict=True)
    ]
    fastest = math.fsum(t.min() for t in alive)
    # Sums of the same times in another order differ by roundings, which must not exclude a path.
    limit = budget + 1e-9 * math.fsum(np.abs(t[np.isfinite(t)]).max() for t in alive)
    if fastest > limit:
        raise ValueError(f"budget: got {budget:.4g} ms, expected at least the fastest path's {fastest:.4g} ms")
    slack = limit - fastest
    time, score = np.zeros(1), np.zeros(1)  # of each partial path, time beyond the fastest
    steps = []
    for s, t in zip(scores, alive, strict=True):
        times_now = np.add.outer(time, t - t.min()).ravel()
        scores_now = np.add.outer(score, s).ravel()
        order = np.lexsort((-scores_now, times_now))
        order = order[times_now[order] <= slack]
        best_before = np.maximum.accumulate(np.concatenate([[-np.inf], scores_now[order][:-1]]))
        kept = order[scores_now[order] > best_before]
        time, score = times_now[kept], scores_now[kept]
        steps.append(np.divmod(kept, len(t)))
    state, path = len(score) - 1, []  # the slowest of the undominated paths is the most probable one
    for parents, choices in reversed(steps):
        path.append(int(choices[state]))
        state = parents[state]
    return path[::-1]


def most_probable_path(ops: Mapping[str, MixedOp], latency: Any, target: float | None) -> dict[str, int]:
    """Label to index: the most likely path, or the most probable within target (ms) where that one takes longer.

    latency: an `ExpectedLatency`, or any object with `of_choices({label: index}) -> ms` that is a sum over mixed ops.
    Raises ValueError where even the fastest path takes longer.
    """
    path = {label: op.most_likely for label, op in ops.items()}
    if target is None or latency is None or latency.of_choices(path) <= target:
        return path
    base = {label: 0 for label in ops}
    fixed = latency.of_choices(base)
    extra = [[latency.of_choices({**base, label: j}) - fixed for j in range(len(op))] for label, op in ops.items()]
    scores = [op.logits().detach().double().log_softmax(0).tolist() for op in ops.values()]
    # Times are differences to the base path, so that the budget is too; the error below names whole paths.
    fastest = fixed + math.fsum(min(row) for row in extra)
    if fastest > target * (1 + 1e-9):
        raise ValueError(f"target: got {target:.4g} ms, expected at least the fastest path's {fastest:.4g} ms")
    return dict(zip(ops, choose_path(scores, extra, target - fixed), strict=True))
