"""Where a loss stopped being finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..supernet import mixed_ops

IGNORED = -100  # the label that torch's cross entropy leaves out


class NonFiniteLoss(ValueError):
    """A loss is NaN or infinite; the message names the step and the first thing that is not finite, or why there is
    nothing to take a mean of."""


def require_finite(
    loss: Tensor, net: nn.Module, batch: Any, step: int, kind: str, latency: Tensor | None = None
) -> None:
    """Raises NonFiniteLoss where loss (a scalar; this waits for the device) is not finite.

    latency: the other term of the loss, where it has one.
    """
    value = loss.item()
    if not torch.isfinite(torch.tensor(value)):
        cause = _cause(net, *_pair(batch), latency)
        raise NonFiniteLoss(f"loss: got {value} at {kind} step {step}, expected a finite number; {cause}")


def require_finite_gradients(net: nn.Module, parameters: Iterable[nn.Parameter], step: int, kind: str) -> None:
    """Raises NonFiniteLoss, which names the first weight, where one of the parameters' gradients is not finite.

    To be asked before the optimizer would carry it into the weights. Waits for the device.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads or bool(torch.isfinite(torch.stack(torch._foreach_norm(grads)).sum())):
        return
    for name, p in net.named_parameters():  # a norm may overflow where no gradient does
        if p.grad is not None and not _finite(p.grad):
            raise NonFiniteLoss(
                f"gradient: that of {name} at {kind} step {step} is not finite; the weights are as before"
            )


def _pair(batch: Any) -> tuple[Any, Any]:
    """Inputs and labels of a batch, where it is of the two."""
    return tuple(batch) if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)  # type: ignore[return-value]


def _cause(net: nn.Module, inputs: Any, labels: Any, latency: Tensor | None) -> str:
    if isinstance(labels, Tensor) and labels.numel() == 0:
        return "the batch is empty"
    if isinstance(labels, Tensor) and not labels.is_floating_point() and bool((labels == IGNORED).all()):
        return f"every label of the batch is {IGNORED}, which the cross entropy leaves out"
    for label, op in mixed_ops(net).items():
        if not (op.logits() < torch.inf).all():  # -inf is a pruned candidate's
            return f"alpha of {label} is not finite"
    layer = first_non_finite(net, inputs)
    if layer is not None:
        return f"the first output that is not finite is that of {layer}{_weights_of(net, layer)}"
    if latency is not None and not _finite(latency):
        return f"the latency is {latency.item()}, and every layer's output is finite"
    return "every layer's output is finite, and the cross entropy of the last is not"


def _weights_of(net: nn.Module, layer: str) -> str:
    module = dict(net.named_modules()).get(layer, nn.Module())
    odd = [name for name, value in module.state_dict().items() if not _finite(value) and not name.endswith("alpha")]
    return f", whose {odd[0]} is not finite" if odd else ""


def first_non_finite(net: nn.Module, inputs: Any) -> str | None:
    """Name of the first module, in order of execution, whose output has a NaN or infinity; "the input"; or None.

    Runs the active paths again, once as they ran and once with hooks, which see inside what runs as one op but keep it
    from running so: its own sums may overflow where those of its parts do not. Batch-norm statistics move.
    """
    if not _finite(inputs):
        return "the input"
    as_it_runs = _first(net, inputs, _calls_watched)
    inside = None if as_it_runs is None else _first(net, inputs, _hooked)
    return inside if inside is not None and as_it_runs is not None and inside.startswith(as_it_runs) else as_it_runs


def _first(net: nn.Module, inputs: Any, watched: Callable) -> str | None:
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        if not found and not _finite(output):
            found.append(name or type(net).__name__)

    with watched(net, look), torch.no_grad(), suppress(Exception):  # a step of the user's may call it otherwise
        net(inputs)
    return found[0] if found else None


@contextmanager
def _calls_watched(net: nn.Module, look: Callable[[str, Any], None]) -> Iterator[None]:
    """Look at what each call of a module gives; hooks, or forwards replaced, would keep blocks from running fused."""
    names = {id(module): name for name, module in net.named_modules()}
    call = nn.Module.__call__

    def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = call(module, *args, **kwargs)
        if id(module) in names:
            look(names[id(module)], output)
        return output

    nn.Module.__call__ = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = call  # type: ignore[method-assign]


@contextmanager
def _hooked(net: nn.Module, look: Callable[[str, Any], None]) -> Iterator[None]:
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: look(name, output))
        for name, module in net.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
