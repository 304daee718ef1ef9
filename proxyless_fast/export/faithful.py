"""Whether a net built again from its description is the net that was described: what cannot be written is refused."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import nn

from ..candidates import has_hooks

# Where an activation keeps its memory does not change what it computes.
_IN_PLACE = re.compile(r",? ?inplace=(True|False)")


def require_same(net: nn.Module, build: Callable[[], nn.Module], what: str) -> None:
    """Raises ValueError, naming the first place, where build() gives another net than `net`, weights apart.

    build: makes the net from its description; called on the meta device. what: the format's name, for the message.
    """
    with torch.device("meta"):
        again = build()
    own, theirs = dict(net.named_modules()), dict(again.named_modules())
    for place in [*own, *(name for name in theirs if name not in own)]:
        mine, other = own.get(place), theirs.get(place)
        if mine is None or other is None or _says(mine) != _says(other):
            raise ValueError(
                f"{place or 'the net'} is {_shown(mine)}, and {what} can only say {_shown(other)}: what is read back "
                "would compute something else"
            )
        if has_hooks(mine) or "forward" in mine.__dict__:
            raise ValueError(f"{place or 'the net'} has hooks or a forward of its own, which {what} cannot say")
    shapes, wanted = ({k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (net, again))
    for name in [*shapes, *wanted]:
        if shapes.get(name) != wanted.get(name):
            raise ValueError(f"{name} has shape {shapes.get(name)}, and {what} can only say {wanted.get(name)}")


def _says(module: nn.Module) -> tuple[type, str]:
    return type(module), _IN_PLACE.sub("", module.extra_repr())


def _shown(module: nn.Module | None) -> str:
    if module is None:
        return "nothing"
    text = _says(module)[1]
    return f"{type(module).__name__}({text})" if text else type(module).__name__
