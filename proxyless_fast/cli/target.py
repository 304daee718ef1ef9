"""The target latency, and the path that meets it."""

from torch import nn

from ..latency import ExpectedLatency
from ..search import most_probable_path
from ..supernet import mixed_ops
from . import defaults


def parse_target(text: str | None, latency: ExpectedLatency | None) -> tuple[float | None, str]:
    """Target in ms, and where it comes from."""
    if latency is None:
        if text is not None:
            raise ValueError(f"--target: got {text} with --no-latency, expected one of the two")
        return None, ""
    text, source = (defaults.TARGET, "by default ") if text is None else (text, "")
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        raise ValueError(f"--target: got {text!r}, expected milliseconds or a percentage such as 50%") from None
    if text.endswith("%"):
        if not 0 <= number <= 100:
            raise ValueError(f"--target: got {text}, expected 0% to 100%")
        target = latency.fastest + (latency.slowest - latency.fastest) * number / 100
        return target, f"{source}{text} of the way from the fastest path to the slowest"
    if not number >= latency.fastest:
        raise ValueError(f"--target: got {text} ms, expected at least the fastest path's {latency.fastest:.4g} ms")
    return number, "as given"


def choose(
    net: nn.Module, latency: ExpectedLatency | None, target: float | None, error: float
) -> tuple[dict[str, int], str]:
    """The path to keep, and a sentence on why. error: relative, of the latencies that the table predicts."""
    ops = mixed_ops(net)
    if latency is None or target is None:
        return most_probable_path(ops, None, None), "The most likely path was kept."
    if target < latency.fastest:
        raise ValueError(
            f"--target: got {target:.4g} ms, expected at least the fastest path's {latency.fastest:.4g} ms"
        )
    most_likely = latency.most_likely()
    # A path predicted just below the target may take a little more.
    budget = max(target / (1 + error), latency.fastest)
    choices = most_probable_path(ops, latency, budget)
    if most_likely <= budget:
        return choices, f"The most likely path was kept: {most_likely:.4g} ms, within the target of {target:.4g} ms."
    return choices, (
        f"The most likely path would take {most_likely:.4g} ms; the table errs by up to {error:.1%}, so the most "
        f"probable path within {budget:.4g} ms was kept: {latency.of_choices(choices):.4g} ms."
    )
