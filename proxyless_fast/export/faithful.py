"""Whether a net built again from its description is the net that was described: what cannot be written is refused."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import nn

from ..candidates import has_hooks

# What a block keeps for backward, and the mode of its norms, are not what a net is.
_APART = {"training", "policy"}
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
        odd = "" if mine is None or other is None else _differing(mine, other)
        if mine is None or type(mine) is not type(other) or odd:
            raise ValueError(
                f"{place or 'the net'} is {_shown(mine, odd)}, and {what} can only say {_shown(other, odd)}: "
                "what is read back would compute something else"
            )
        if has_hooks(mine) or "forward" in mine.__dict__:
            raise ValueError(f"{place or 'the net'} has hooks or a forward of its own, which {what} cannot say")
    shapes, wanted = ({k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (net, again))
    for name in [*shapes, *wanted]:
        if shapes.get(name) != wanted.get(name):
            raise ValueError(f"{name} has shape {shapes.get(name)}, and {what} can only say {wanted.get(name)}")


def _differing(mine: nn.Module, other: nn.Module) -> str:
    """The first plain attribute of the module built again that `mine` has with another value; empty if none.

    Not what modules print, which leaves some out: of an average pooling what it divides by, of a block its shortcut.
    """
    if type(mine) is not type(other):
        return ""
    own = vars(mine)
    for name, value in vars(other).items():
        if name[0] == "_" or name in _APART or own.get(name) == value:
            continue
        # A module built to write over its input may as well not; the other way, it writes over what others read.
        if name != "inplace" or own.get(name) is not False:
            return name
    return ""


def _shown(module: nn.Module | None, attribute: str) -> str:
    """A module in words: as it prints, and the attribute by which it was told apart."""
    if module is None:
        return "nothing"
    text = _IN_PLACE.sub("", module.extra_repr())
    shown = f"{type(module).__name__}({text})" if text else type(module).__name__
    return f"{shown} with {attribute} {getattr(module, attribute, None)!r}" if attribute else shown
