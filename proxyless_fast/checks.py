"""Checks of arguments that several packages share, with messages of one form."""

from __future__ import annotations

from typing import Any

from torch import nn

# What runs a net as it is, by type: of torch._dynamo even the import takes seconds.
_WRAPPERS = {
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
}


def is_integer(value: Any, least: int) -> bool:
    """Whether value is an integer of at least `least`; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_positive(**values: Any) -> None:
    """Raises ValueError, which names the argument, where a value is no positive integer."""
    for name, value in values.items():
        if not is_integer(value, 1):
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def told(source: Any, name: str) -> int | None:
    """An integer that a net or a loader says of itself; None where it does not, or its modules were changed."""
    try:
        value = getattr(source, name, None)
    except ValueError:
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def unwrapped(net: nn.Module) -> nn.Module:
    """The net inside DataParallel, DistributedDataParallel, AveragedModel and what torch.compile returns, else itself.

    Only torch's own types, exactly: a subclass, or a user's module that has a `module`, may compute something else.
    Raises ValueError for a wrapper with hooks, which the net inside would not run.
    """
    while (name := _WRAPPERS.get(f"{type(net).__module__}.{type(net).__qualname__}")) is not None:
        if net._forward_hooks or net._forward_pre_hooks:
            raise ValueError(f"net is a {type(net).__name__} with hooks of its own: give the net inside, its .{name}")
        net = net._modules[name]  # type: ignore[assignment]
    return net
