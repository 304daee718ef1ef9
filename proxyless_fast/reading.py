"""What a block's modules compute, read off the modules as they are: the one description that the fused path, costs and
exports go by. Whatever is not read here with certainty is no description but a reason, in words.

A step reads a hundred blocks. `Snapshot` therefore keeps what was read with everything it was read from, object by
object: as long as each is the very same object, nothing was set, added, registered or replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from ._C import has_objects, objects_of  # type: ignore[import-not-found]  # compiled
from .candidates import has_hooks
from .distributed.norms import SyncBatchNorm2d


class Unreadable(Exception):
    """Modules that do something else than the description can say; the message says what, without its subject."""


class Norm(NamedTuple):
    """How batch norms run."""

    training: bool
    momentum: float
    eps: float
    group: str = ""  # of the processes whose images share the statistics; empty: this process alone


class Convolution(NamedTuple):
    """A plain convolution: "same"-padded, without bias."""

    module: nn.Conv2d
    out_channels: int
    inputs: int  # channels that one output channel sees
    kernel_size: int
    stride: int
    groups: int
    dilation: int


class Stage(NamedTuple):
    """A convolution, its batch norm, and the name of its activation ("identity" where there is none)."""

    conv: Convolution
    norm: nn.BatchNorm2d
    activation: str


# What each type's forward is, so that one that was replaced on the class is noticed too.
_FORWARDS: dict[type, tuple[Any, ...]] = {
    kind: (kind.forward, getattr(kind, "_conv_forward", None))
    for kind in (
        nn.Sequential,
        nn.Conv2d,
        nn.BatchNorm2d,
        SyncBatchNorm2d,
        nn.ReLU6,
        nn.ReLU,
        nn.SiLU,
        nn.Hardswish,
        nn.Identity,
    )
}
_ACTIVATIONS: dict[type, str] = {
    nn.ReLU6: "relu6", nn.ReLU: "relu", nn.SiLU: "silu", nn.Hardswish: "hardswish", nn.Identity: "identity",
}  # fmt: skip


def require_plain(module: Any, kind: type, place: str) -> None:
    """Raises Unreadable where calling the module is not just `kind.forward` as torch defines it."""
    if type(module) is not kind:
        raise Unreadable(f"{place} is a {type(module).__name__}, not an nn.{kind.__name__}")
    if "forward" in module.__dict__ or (kind.forward, getattr(kind, "_conv_forward", None)) != _FORWARDS[kind]:
        raise Unreadable(f"{place} has a forward of its own")


def require_unhooked(modules: Iterable[nn.Module]) -> None:
    """Raises Unreadable where calling one of the modules would run hooks."""
    if torch_module._has_any_global_hook() or has_hooks(*modules):
        raise Unreadable("a module inside has hooks, which the fused op would not run")


def read_convolution(conv: Any, place: str, dilated: bool = False) -> Convolution:
    """A plain convolution, not dilated unless that is wanted. Raises Unreadable for anything that it is not."""
    require_plain(conv, nn.Conv2d, place)
    weight = conv._parameters.get("weight")
    if weight is None or weight.dim() != 4 or 0 in weight.shape:
        raise Unreadable(f"{place} has no weight of four dimensions, or an empty one")
    if conv._parameters.get("bias") is not None:
        raise Unreadable(f"{place} has a bias")
    out, inputs, kernel, across = weight.shape
    square = kernel == across and kernel % 2 == 1
    stride, padding, (apart, apart_across) = (_pair(v, place) for v in (conv.stride, conv.padding, conv.dilation))
    same = padding == (apart * (kernel // 2),) * 2 and conv.padding_mode == "zeros" and apart == apart_across
    if not square or not same or (apart != 1 and not dilated):
        raise Unreadable(
            f"{place} has kernel {kernel}x{across}, padding {conv.padding} ({conv.padding_mode}) and dilation "
            f"{conv.dilation}, which is no plain convolution that keeps the image's size"
        )
    if stride[0] != stride[1]:
        raise Unreadable(f"{place} has stride {stride}, another down than across")
    return Convolution(conv, out, inputs, kernel, stride[0], conv.groups, apart)


def read_norm(norm: Any, place: str) -> nn.BatchNorm2d:
    """A plain batch norm with weights and running statistics. Raises Unreadable for anything else."""
    require_plain(norm, SyncBatchNorm2d if type(norm) is SyncBatchNorm2d else nn.BatchNorm2d, place)
    tensors = [norm._parameters.get(name) for name in ("weight", "bias")]
    tensors += [norm._buffers.get(name) for name in ("running_mean", "running_var", "num_batches_tracked")]
    if any(t is None for t in tensors) or not norm.track_running_stats:
        raise Unreadable(f"{place} lacks weights or running statistics")
    if not all(isinstance(value, (int, float)) for value in (norm.momentum, norm.eps)):
        raise Unreadable(f"{place} has momentum {norm.momentum} and eps {norm.eps}, which are no fixed numbers")
    return norm


def read_activation(module: Any, place: str) -> str:
    """The name of an activation the engine knows. Raises Unreadable for another one, or other bounds."""
    name = _ACTIVATIONS.get(type(module))
    if name is None:
        raise Unreadable(
            f"{place} is a {type(module).__name__}, and the engine knows {', '.join(_ACTIVATIONS.values())}"
        )
    require_plain(module, type(module), place)
    if name == "relu6" and (module.min_val, module.max_val) != (0, 6):
        raise Unreadable(f"{place} is bounded by {module.min_val} and {module.max_val}, not by 0 and 6")
    return name


def read_stage(group: Any, place: str) -> Stage:
    """An nn.Sequential of convolution, batch norm and at most one activation. Raises Unreadable for anything else."""
    require_plain(group, nn.Sequential, place)
    return read_children(group, place)


def read_children(group: nn.Module, place: str) -> Stage:
    """`read_stage` of the children alone, whatever the group's own type is."""
    children = list(group._modules.items())
    if len(children) not in (2, 3):
        names = ", ".join(name for name, _ in children)
        raise Unreadable(f"{place} holds {len(children)} modules ({names}), not convolution, norm and activation")
    places = [f"{place}.{name}" for name, _ in children]
    act = "identity" if len(children) == 2 else read_activation(children[2][1], places[2])
    return Stage(read_convolution(children[0][1], places[0]), read_norm(children[1][1], places[1]), act)


def common_norm(norms: Sequence[nn.BatchNorm2d]) -> Norm:
    """The one setting of some batch norms. Raises Unreadable where they differ, or eps is not above 0."""
    settings = {(bn.training, bn.momentum, bn.eps, getattr(bn, "group", "")) for bn in norms}
    if len(settings) > 1:
        raise Unreadable("the batch norms of the block differ in mode, momentum, eps or group")
    training, momentum, eps, group = settings.pop()
    if eps <= 0:
        raise Unreadable(f"eps is {eps}, not above 0")
    assert momentum is not None  # read_norm
    return Norm(training, momentum, eps, group if training else "")


class Snapshot:
    """What was read off some modules, valid for as long as they are the very objects that it was read from."""

    def __init__(self, seen: tuple[tuple, bytes], beside: tuple, value: Any) -> None:
        self._seen, self._beside, self._value = seen, beside, value

    def __deepcopy__(self, memo: dict) -> None:
        return None  # a copy of the modules is read anew

    def __reduce__(self) -> tuple:
        return type(None), ()

    @staticmethod
    def of(module: nn.Module, read: Callable[[], Any]) -> Any:
        """What read() gives, or gave the last time, if module and all in it are as they were then.

        read: may raise Unreadable, which is then returned: a step asks it of blocks that run module by module too.
        """
        if torch.compiler.is_compiling():
            return _or_reason(read)
        kept = module.__dict__.get("_snapshot")
        # What lies beside the modules: hooks on all of them, and what forward of torch's own convolution goes by.
        beside = bool(torch_module._has_any_global_hook()), nn.Conv2d._conv_forward
        if kept is None or kept._beside != beside or not has_objects(module, *kept._seen):
            # What is read is what is there now: the objects are taken before.
            seen = objects_of(module)
            kept = module.__dict__["_snapshot"] = Snapshot(seen, beside, _or_reason(read))
        return kept._value


def _or_reason(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Unreadable as reason:
        return reason.with_traceback(None)


def _pair(value: Any, place: str) -> tuple[Any, Any]:
    """(down, across). Raises Unreadable for a list, which could be changed without a trace, or anything else."""
    pair = value if isinstance(value, tuple) else (value, value)
    if len(pair) != 2 or not all(isinstance(number, int) for number in pair):
        raise Unreadable(f"{place} has {value!r}, expected an integer or a tuple of two")
    return pair
