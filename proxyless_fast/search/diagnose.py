"""Where a loss stopped being finite."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class NonFiniteLoss(ValueError):
    """A loss is NaN or infinite; the message names the step and the first layer whose output is not finite."""


def first_non_finite(net: nn.Module, inputs: Any) -> str | None:
    """Name of the first module, in order of execution, whose output has a NaN or infinity; "the input"; or None.

    Runs the active paths once more, so batch-norm statistics move.
    """
    if not _finite(inputs):
        return "the input"
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            if not found and not _finite(output):
                found.append(name or type(net).__name__)

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in net.named_modules()]
    try:
        with torch.no_grad():
            net(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def require_finite(loss: Tensor, net: nn.Module, inputs: Any, step: int, kind: str) -> None:
    """Raises NonFiniteLoss where loss (a scalar; this waits for the device) is not finite."""
    value = loss.item()
    if torch.isfinite(torch.tensor(value)):
        return
    layer = first_non_finite(net, inputs)
    where = f"the first output that is not finite is that of {layer}" if layer else "every layer's output is finite"
    raise NonFiniteLoss(f"loss: got {value} at {kind} step {step}, expected a finite number; {where}")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)


def _finite(value: Any) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in _tensors(value))
