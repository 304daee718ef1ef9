"""What a candidate may offer a mixed op beyond `forward`: the one protocol by which mixed ops know their candidates.

Any nn.Module is a candidate. One that does more than run may offer any of what stands below; a mixed op, its gates
and its CUDA graphs ask for nothing else, and know no candidate by name. Whoever overrides `forward` must override these
too: `offered` passes over what a parent class defines for another forward, and over modules with a user's hooks.

    with_shortcut(x) -> Tensor
        forward(x) + x, for less than both.
    run_gated(x, shortcut=False) -> (output, GateTerm or None)
        forward(x), plus x with `shortcut`, and what the gate's gradient needs in place of the output. None: the output
        itself will do, and it comes without the shortcut.
    probe_plan(*args, **kwargs) -> (plan, weights), or None
        Called in forward of the mixed op, of a candidate that will be probed: all that `joint_probe` will need of it,
        and the weights among that, which must not change before backward. None if it has to be run by itself.
    joint_probe(plans, args, kwargs, grads, shared) -> list of (Tensor or None)
        A static method, called in backward. <G, o_j(args)> for each of the candidates that gave these plans, by one
        call, without autograd; None for one that has to be run by itself after all. grads: dL/d output of the active
        candidate's tensors, None where one has no gradient. shared: `GateTerm.shared` of the active candidate, if it
        offers this function too.
    why_not_recorded(x) -> str
        Why the launches of forward and backward at x cannot be recorded and replayed, in words; empty if they can.
        `launches_nothing = True` on the class says that by itself it is not worth a recording.
    outputs_zeros = True
        On the class: <G, output> is 0 whatever comes in, so that the module is never run as a probe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class GateTerm(NamedTuple):
    """What dL/dg of an active candidate is computed from, where that is not the output itself.

    tensors: kept until backward, under autograd's check for changes in place. dot: of G = dL/d output and these
    tensors, <G, output>. shared: what probes of the same family may use, such as statistics of the input.
    """

    tensors: tuple[Tensor, ...]
    dot: Callable[[Tensor, Sequence[Tensor]], Tensor]
    shared: Any = None


def has_hooks(*modules: Any) -> bool:
    """Whether calling one of the modules would run hooks of a user."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)


def offered(module: nn.Module, name: str) -> Any:
    """module's method `name` of the protocol, or None where it offers none for the forward that it runs."""
    kind = type(module)
    # Always an instance: but what torch.compile makes of this alone holds for one type only where the type was asked.
    if not isinstance(module, kind) or not defined_with_forward(kind, name):
        return None
    if has_hooks(module) or "forward" in module.__dict__:
        return None
    return getattr(module, name)


@torch.compiler.assume_constant_result
def defined_with_forward(kind: type, name: str) -> bool:
    """Whether the class that defines `name` is the one that defines forward, or inherits from it."""
    found = _KNOWN.get((kind, name))
    if found is None:
        definers = [base.__dict__ for base in kind.__mro__ if name in base.__dict__ or "forward" in base.__dict__]
        found = _KNOWN[kind, name] = bool(definers) and name in definers[0]
    return found


_KNOWN: dict[tuple[type, str], bool] = {}  # a step asks it of every mixed op, several times
