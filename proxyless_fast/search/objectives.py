"""Cross-entropy and latency in one loss."""

import math
from typing import Any

from .config import OBJECTIVES


def objective(
    ce: Any, latency: Any, ref: float, kind: str = "mul_log", alpha: float = 0.2, beta: float = 0.3, weight: float = 0.1
) -> Any:
    """The loss of an arch step, differentiable in ce and latency (paper eq. 3; official nas_manager.py for "mul_log").

    "mul_log":    alpha · ce · (log latency / log ref)^beta, for latencies above 1 ms
    "add_linear": ce + weight · (latency − ref) / ref

    ce: scalar tensor or number; latency, ref: ms. Returns a scalar of the type of ce. Raises ValueError for another
    kind or a ref out of range.
    """
    if kind == "add_linear":
        if not ref > 0:
            raise ValueError(f"objective: ref is {ref} ms, expected a latency above 0")
        return ce + weight * (latency - ref) / ref
    if kind == "mul_log":
        if not ref > 1:
            raise ValueError(
                f"objective: ref is {ref} ms, expected more than 1 with kind 'mul_log' (or kind 'add_linear')"
            )
        log_latency = latency.log() if hasattr(latency, "log") else math.log(latency)
        return alpha * ce * (log_latency / math.log(ref)) ** beta
    raise ValueError(f"objective: kind is {kind!r}, expected one of {', '.join(OBJECTIVES)}")
