"""The gates of a mixed op: the gradient of each gate, from the active output and from probes, and from them alpha's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ._C import versions_of  # type: ignore[import-not-found]  # compiled
from .candidates import GateTerm, defined_with_forward, offered
from .ops.statistics import dot


class GatedStep(NamedTuple):
    """What the gates need to know of one call of a mixed op.

    indices, names, candidates: of the candidates whose gates get a gradient, the active one first. pair: whether p is
    a softmax over these alone (mode "two"). args, kwargs: of the call, for the probes.
    """

    indices: tuple[int, ...]
    names: tuple[str, ...]
    candidates: tuple[nn.Module, ...]
    pair: bool
    args: tuple
    kwargs: dict[str, Any]


def input_versions(args: tuple, kwargs: dict[str, Any]) -> list[int]:
    """How often each tensor among the arguments was changed in place."""
    leaves = args if not kwargs and all(type(a) is Tensor for a in args) else pytree.tree_leaves((args, kwargs))
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]


def require_unchanged(name: str, before: list[int], args: tuple, kwargs: dict[str, Any]) -> None:
    """Raises ValueError where candidate `name` changed an argument in place, which the other candidates read too."""
    if input_versions(args, kwargs) != before:
        raise ValueError(f"candidate {name!r} must not change its input in place, which the other candidates read too")


def attach_gates(step: GatedStep, alpha: Tensor, output: Any, term: GateTerm | None) -> Any:
    """The active candidate's output, with the gates' backward attached to its floating-point tensors.

    alpha: (N,), -inf where pruned, gets the gradient of eq. 4. term: what the active candidate handed out in place of
    its output, if it did. Raises ValueError where the output holds no floating-point tensor.
    """
    leaves, spec = pytree.tree_flatten(output)
    places = [i for i, leaf in enumerate(leaves) if _is_float(leaf)]
    if not places:
        raise ValueError(f"candidate {step.names[0]!r} must output a floating-point tensor, got none")
    inputs, input_spec = pytree.tree_flatten((step.args, step.kwargs))
    probes = [_settle(candidate, step.args, step.kwargs) for candidate in step.candidates[1:]]
    # The tensors among the arguments are autograd's to keep.
    step = step._replace(args=(), kwargs={})
    gated = _Gates.apply(step, probes, inputs, input_spec, term, alpha, *(leaves[i] for i in places))
    for place, tensor in zip(places, gated, strict=True):
        leaves[place] = tensor
    return pytree.tree_unflatten(leaves, spec)


class _Probe(NamedTuple):
    """How a candidate is to be probed in backward, settled in forward: it is that network whose gates are wanted.

    joint: probes several of its kind together, from their plans; None where it is run by itself. weights, versions:
    what must not change until then, and how often it had been changed in place.
    """

    joint: Callable | None
    plan: Any
    weights: Sequence[Tensor]
    versions: Sequence[int]

    def same_weights(self, candidate: nn.Module) -> bool:
        if self.joint is None:
            return versions_of(candidate) == self.versions
        return [weight._version for weight in self.weights] == self.versions


def _settle(candidate: nn.Module, args: tuple, kwargs: dict[str, Any]) -> _Probe:
    prepare = offered(candidate, "probe_plan")
    found = None if prepare is None else prepare(*args, **kwargs)
    if found is None:
        return _Probe(None, None, (), versions_of(candidate))
    plan, weights = found
    joint: Any = candidate.joint_probe
    return _Probe(joint, plan, weights, [weight._version for weight in weights])


class _Gates(torch.autograd.Function):
    """Identity on the active path's outputs; its backward computes the gates' gradients, and from them alpha's.

    The active path itself stays in ordinary autograd: only the tensors it keeps anyway are held here.
    """

    @staticmethod
    def forward(
        ctx,
        step: GatedStep,
        probes: list[_Probe],
        inputs: list,
        input_spec: Any,
        term: GateTerm | None,
        alpha: Tensor,
        *outputs: Tensor,
    ):
        tensors = [leaf if isinstance(leaf, Tensor) else None for leaf in inputs]
        ctx.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in inputs]
        ctx.step, ctx.probes, ctx.input_spec = step, probes, input_spec
        device = outputs[0].device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.set_materialize_grads(False)
        ctx.dot, ctx.shared = (None, None) if term is None else (term.dot, term.shared)
        own = outputs if term is None else term.tensors
        ctx.own = len(own)
        ctx.save_for_backward(alpha, *own, *tensors)
        return tuple(y.view_as(y) for y in outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor | None):
        alpha, *saved = ctx.saved_tensors
        own, tensors = saved[: ctx.own], saved[ctx.own :]
        if all(g is None for g in grads) or not ctx.needs_input_grad[5]:
            return None, None, None, None, None, None, *grads
        _require_same_weights(ctx.step, ctx.probes)
        inputs = [c if t is None else t for t, c in zip(tensors, ctx.constants, strict=True)]
        args, kwargs = pytree.tree_unflatten(inputs, ctx.input_spec)
        step: GatedStep = ctx.step._replace(args=args, kwargs=kwargs)
        device, dtype, enabled = ctx.autocast
        with torch.no_grad(), torch.autocast(device, dtype, enabled=enabled):
            term = ctx.dot is not None and grads[0] is not None
            gates = [ctx.dot(grads[0], own) if term else _gate(grads, own)]
            gates += _run_probes(step, ctx.probes, grads, ctx.shared)
        gradient = _alpha_gradient(alpha, dict(zip(step.indices, gates, strict=True)), step.pair)
        return None, None, None, None, None, gradient, *grads


def _require_same_weights(step: GatedStep, probes: Sequence[_Probe]) -> None:
    """Raises RuntimeError, as autograd does, where a weight of a probe is not what it was in forward."""
    for name, candidate, probe in zip(step.names[1:], step.candidates[1:], probes, strict=True):
        if not probe.same_weights(candidate):
            raise RuntimeError(
                f"a weight of candidate {name!r} was changed or replaced between forward and backward, where it is "
                "probed; call backward before the weights change"
            )


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _alpha_gradient(alpha: Tensor, gates: dict[int, Tensor], pair: bool) -> Tensor:
    """sum_j dL/dg_j p_j (delta_ij - p_i) = p_i (g_i - <p, g>), (N,); p over the gated candidates alone if a pair.

    Candidates are addressed by Python numbers, not by an index tensor that a GPU would have to wait for.
    """
    zero = alpha.new_zeros(())
    out = alpha.new_full((), -torch.inf)
    gate = torch.stack([gates[i].to(alpha.device, alpha.dtype) if i in gates else zero for i in range(len(alpha))])
    logits = torch.stack([alpha[i] if i in gates else out for i in range(len(alpha))]) if pair else alpha
    p = torch.softmax(logits, 0)
    return p * (gate - (p * gate).sum())


def _gate(grads: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> Tensor:
    """dL/dg = <dL/d output, o>, summed over the output's tensors."""
    return torch.stack([dot(o.detach(), g) for g, o in zip(grads, outputs, strict=True) if g is not None]).sum()


def _run_probes(step: GatedStep, probes: Sequence[_Probe], grads: Sequence[Tensor | None], shared: Any) -> list[Tensor]:
    """The gate gradients of all candidates but the active one: those that offer it together, the others one at a time.

    shared: what the active candidate hands to probes of its own family.
    """
    device = next(g.device for g in grads if g is not None)
    gates: list[Tensor | None] = [None] * len(probes)
    families: dict[Callable, list[int]] = {}
    for place, (candidate, probe) in enumerate(zip(step.candidates[1:], probes, strict=True)):
        if defined_with_forward(type(candidate), "outputs_zeros"):
            gates[place] = torch.zeros((), device=device)  # <G, 0>, without a copy from the host
        elif probe.joint is not None:
            families.setdefault(probe.joint, []).append(place)
    for joint, places in families.items():
        own = shared if offered(step.candidates[0], "joint_probe") is joint else None
        found = joint([probes[i].plan for i in places], step.args, step.kwargs, grads, own)
        for place, gate in zip(places, found, strict=True):
            gates[place] = gate
    return [_probe(step, place + 1, grads) if gate is None else gate for place, gate in enumerate(gates)]


def _probe(step: GatedStep, place: int, grads: Sequence[Tensor | None]) -> Tensor:
    """The gate gradient of one candidate, run without autograd and dropped at once."""
    run: Callable = step.candidates[place]
    before = input_versions(step.args, step.kwargs)
    outputs = [leaf for leaf in pytree.tree_leaves(run(*step.args, **step.kwargs)) if _is_float(leaf)]
    require_unchanged(step.names[place], before, step.args, step.kwargs)
    shapes = [tuple(o.shape) for o in outputs]
    wanted = [None if g is None else tuple(g.shape) for g in grads]
    if len(shapes) != len(wanted) or any(w is not None and w != s for w, s in zip(wanted, shapes, strict=True)):
        raise ValueError(
            f"candidate {step.names[place]!r} must give outputs of the active candidate's shapes {wanted}, got {shapes}"
        )
    return _gate(grads, outputs)
