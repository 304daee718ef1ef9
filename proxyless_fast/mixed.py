"""MixedOp: N candidates behind binary gates, of which a step runs one (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .blocks import Gram, Kept, MBConv, Zero, is_mbconv, probe_fused
from .engine import has_hooks
from .ops.batch_norm import norm_dot
from .ops.statistics import dot

Mode = Literal["path", "full", "two", "sum", "softmax"]
MODES: tuple[Mode, ...] = ("path", "full", "two", "sum", "softmax")


class MixedOp(nn.Module):
    """A mixed operation over candidates, one of which is active (paper eq. 1 to 5).

    candidates: a dict of name to nn.Module, or a sequence (then the names are "0", "1", ...). All must take the same
    arguments and give outputs of one structure and shape: tensors, or tuples, lists and dicts of them. label: the name
    of this op in `mixed_ops`, tables and logs; by default its place in the net.

    alpha: nn.Parameter (N,), the architecture parameters, zero at first; a candidate whose alpha is -inf is pruned and
    is neither sampled nor probed. Modes, set by `activate` or by `proxyless_fast.sample`:

    * "path": the active candidate runs, and nothing else; alpha gets no gradient (a weight step, or evaluation).
    * "full": the active candidate's output; backward probes the others one at a time, without autograd, and gives
      alpha the gradient of eq. 4: sum_j dL/dg_j p_j (delta_ij - p_i), with dL/dg_j = <dL/d output, o_j(x)>.
    * "two": the same over the active candidate and one partner (section 3.2.1, "two paths").
    * "sum", "softmax": every candidate runs (One-Shot, DARTS): to compare with.

    The output of modes "full" and "two" must not be changed in place: backward reads it; autograd says so if it is.
    Raises ValueError for wrong candidates.
    """

    alpha: nn.Parameter

    def __init__(self, candidates: Mapping[str, nn.Module] | Sequence[nn.Module], label: str | None = None):
        super().__init__()
        items = getattr(candidates, "items", None)  # dict and nn.ModuleDict alike
        named: list[tuple[Any, Any]] = (
            list(items()) if items is not None else [(str(i), c) for i, c in enumerate(candidates)]
        )
        if not named:
            raise ValueError("candidates must hold at least one module, got none")
        for name, module in named:
            if not isinstance(module, nn.Module):
                raise ValueError(f"candidate {name!r} must be an nn.Module, got {type(module).__name__}")
        self.names = [str(name) for name, _ in named]
        self.label = label
        self.candidates = nn.ModuleList([module for _, module in named])
        self.alpha = nn.Parameter(torch.zeros(len(named)))
        self.mode: Mode = "path"
        self.active = 0
        self.partner: int | None = None
        self.graphs: Callable | None = None  # proxyless_fast.set_graphs
        self._gated = [0]
        self._pair_mass: Tensor | None = None

    def __len__(self) -> int:
        return len(self.names)

    def index(self, candidate: int | str) -> int:
        """Index of a candidate given by index or name. Raises KeyError for an unknown name, IndexError for an index."""
        if isinstance(candidate, str):
            if candidate not in self.names:
                raise KeyError(f"candidate {candidate!r} is not one of {', '.join(self.names)}")
            return self.names.index(candidate)
        if not 0 <= candidate < len(self):
            raise IndexError(f"candidate index must be from 0 to {len(self) - 1}, got {candidate}")
        return int(candidate)

    def probabilities(self) -> Tensor:
        """p = softmax(alpha), (N,), differentiable."""
        return torch.softmax(self.alpha, 0)

    def gate_probabilities(self) -> Tensor:
        """The probabilities of the sampled gates, (N,), differentiable: in mode "two" softmax over the pair, else p."""
        pair = self._pair()
        if pair is None:
            return self.probabilities()
        p = torch.softmax(pair, 0)
        zero = p.new_zeros(())
        places = {self.active: p[0], self.partner: p[1]}
        return torch.stack([places.get(i, zero) for i in range(len(self))])

    @property
    def most_likely(self) -> int:
        """Index of the largest alpha; the lower index where several are equal."""
        return int(torch.argmax(self.alpha.detach().cpu()))

    @torch.no_grad()
    def activate(
        self, candidate: int | str | None = None, mode: Mode = "path", partner: int | str | None = None
    ) -> None:
        """Choose the active candidate, by index or name, and the mode; `partner` is the other one of mode "two".

        `candidate` may be left out in modes "sum" and "softmax", where all run.
        Raises ValueError for a wrong mode or partner, KeyError and IndexError for an unknown candidate.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if candidate is None and mode not in ("sum", "softmax"):
            raise ValueError(f"candidate must be an index or a name in mode {mode!r}, got None")
        active = self.active if candidate is None else self.index(candidate)
        other = None if partner is None else self.index(partner)
        if mode != "two" and other is not None:
            raise ValueError(f"partner belongs to mode 'two', got {partner!r} in mode {mode!r}")
        if other == active:
            raise ValueError(f"partner must differ from the active candidate, got {partner!r} for both")
        alive = (self.alpha > -torch.inf).tolist()
        if mode == "two" and other is None and sum(alive) > 1:
            raise ValueError("partner must be given in mode 'two', got None")
        self._activate(active, mode, other, alive)

    def _activate(self, active: int, mode: Mode, partner: int | None, alive: Sequence[bool]) -> None:
        """`activate` with checked arguments; alive: which candidates are not pruned, so that none is read again."""
        self.active, self.mode, self.partner = active, mode, partner
        if mode == "full":
            self._gated = [active] + [i for i in range(len(self)) if alive[i] and i != active]
        else:
            self._gated = [active] if partner is None else [active, partner]
        pair = self._pair()
        self._pair_mass = None if pair is None else torch.logsumexp(pair.detach(), 0)

    def _pair(self) -> Tensor | None:
        """(2,): alpha of the active candidate and of its partner; None where there is no partner."""
        return None if self.partner is None else torch.stack([self.alpha[self.active], self.alpha[self.partner]])

    @torch.no_grad()
    def rescale(self) -> None:
        """Shift the pair's alphas so that exp(alpha) of the pair sums to what it was when the pair was sampled.

        Call it after the optimizer step of mode "two": the pair's probability then stays, and the candidates that were
        not sampled keep theirs (paper section 3.2.1; official rescale_updated_arch_param). Does nothing in other modes.
        """
        pair = self._pair()
        if pair is None or self._pair_mass is None:
            return
        shift = self._pair_mass - torch.logsumexp(pair, 0)
        for i in self._gated:
            self.alpha[i] += shift

    @torch.no_grad()
    def prune(self, threshold: float) -> list[str]:
        """Set alpha to -inf where p < threshold, and return those names; the most likely candidate always stays."""
        p = self.probabilities().cpu()
        gone = (p < threshold) & (p > 0)
        gone[self.most_likely] = False
        self.alpha[gone.to(self.alpha.device)] = -torch.inf
        return [name for name, pruned in zip(self.names, gone.tolist(), strict=True) if pruned]

    # The index of the active path is data to a compiled graph around this op, which would otherwise be compiled anew
    # for every path: the graph breaks here, and the candidates are compiled each for itself.
    @torch.compiler.disable(recursive=False)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        replayed = None if self.graphs is None else self.graphs(self, args, kwargs, False)
        if replayed is not None:
            return replayed
        if self.mode in ("sum", "softmax"):
            return self._all_paths(args, kwargs)
        candidate = self.candidates[self.active]
        if not self._gates_wanted:
            return candidate(*args, **kwargs)
        if isinstance(candidate, MBConv) and is_mbconv(candidate) and len(args) == 1 and not kwargs:
            output, kept = candidate.gated(args[0])
            return _attach_gates(self, args, kwargs, output, kept)
        return _attach_gates(self, args, kwargs, candidate(*args, **kwargs), None)

    @torch.compiler.disable(recursive=False)
    def with_shortcut(self, x: Tensor) -> Tensor:
        """self(x) + x, with the sum where the output is written anyway if the active candidate is an MBConv."""
        replayed = None if self.graphs is None else self.graphs(self, (x,), {}, True)
        if replayed is not None:
            return replayed
        candidate = self.candidates[self.active]
        one = self.mode in ("path", "full", "two") and type(self).forward is MixedOp.forward
        if one and not self._gates_wanted and type(candidate) is Zero and not has_hooks(candidate):
            return x
        if not one or not isinstance(candidate, MBConv) or not is_mbconv(candidate):
            return self(x) + x
        if not self._gates_wanted:
            return candidate(x, shortcut=True)
        output, kept = candidate.gated(x, shortcut=True)
        output = _attach_gates(self, (x,), {}, output, kept)
        return output + x if kept is None else output

    @property
    def _gates_wanted(self) -> bool:
        return self.mode in ("full", "two") and torch.is_grad_enabled() and self.alpha.requires_grad

    def _all_paths(self, args: tuple, kwargs: dict) -> Any:
        weights = self.probabilities() if self.mode == "softmax" else [1] * len(self)
        live = (self.alpha.detach() > -torch.inf).tolist()
        total: list[Tensor] | None = None
        spec = None
        for module, weight, alive in zip(self.candidates, weights, live, strict=True):
            if not alive:
                continue
            leaves, spec = pytree.tree_flatten(module(*args, **kwargs))
            scaled = [leaf * weight for leaf in leaves] if self.mode == "softmax" else leaves
            total = scaled if total is None else [a + b for a, b in zip(total, scaled, strict=True)]
        assert total is not None and spec is not None  # one candidate always stays
        return pytree.tree_unflatten(total, spec)

    def gated(self) -> list[int]:
        """Indices of the candidates whose gates get a gradient in this step, the active one first."""
        return list(self._gated)

    def extra_repr(self) -> str:
        label = f"{self.label}: " if self.label else ""
        return f"{label}{', '.join(self.names)}; mode {self.mode}, active {self.names[self.active]}"


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _attach_gates(op: MixedOp, args: tuple, kwargs: dict, output: Any, kept: Kept | None) -> Any:
    """The output, with the gates' backward attached to its floating-point tensors; kept: see MBConv.gated."""
    leaves, spec = pytree.tree_flatten(output)
    places = [i for i, leaf in enumerate(leaves) if _is_float(leaf)]
    if not places:
        raise ValueError(f"candidate {op.names[op.active]!r} must output a floating-point tensor, got none")
    inputs, input_spec = pytree.tree_flatten((args, kwargs))
    gated = _Gates.apply(op, inputs, input_spec, kept, op.alpha, *(leaves[i] for i in places))
    for place, tensor in zip(places, gated, strict=True):
        leaves[place] = tensor
    return pytree.tree_unflatten(leaves, spec)


class _Gates(torch.autograd.Function):
    """Identity on the active path's outputs; its backward computes the gates' gradients, and from them alpha's.

    The active path itself stays in ordinary autograd: only the tensors it keeps anyway are held here.
    """

    @staticmethod
    def forward(ctx, op: MixedOp, inputs: list, input_spec: Any, kept: Kept | None, alpha: Tensor, *outputs: Tensor):
        tensors = [leaf if isinstance(leaf, Tensor) else None for leaf in inputs]
        ctx.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in inputs]
        ctx.op, ctx.input_spec = op, input_spec
        ctx.gated, ctx.pair = op.gated(), op.mode == "two"
        device = outputs[0].device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.gram = (None, None) if kept is None else (kept.eps, kept.gram)
        own = outputs if kept is None else (kept.y, kept.statistics, kept.gamma, kept.beta)
        ctx.own = len(own)
        ctx.save_for_backward(alpha, *own, *tensors)
        return tuple(y.view_as(y) for y in outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor | None):
        alpha, *saved = ctx.saved_tensors
        own, tensors = saved[: ctx.own], saved[ctx.own :]
        if all(g is None for g in grads) or not ctx.needs_input_grad[4]:
            return None, None, None, None, None, *grads
        inputs = [c if t is None else t for t, c in zip(tensors, ctx.constants, strict=True)]
        args, kwargs = pytree.tree_unflatten(inputs, ctx.input_spec)
        device, dtype, enabled = ctx.autocast
        with torch.no_grad(), torch.autocast(device, dtype, enabled=enabled):
            if ctx.eps is not None and grads[0] is not None:
                y, statistics, gamma, beta = own
                gates = [norm_dot(grads[0], y, statistics, gamma, beta, ctx.eps)]
            else:
                gates = [_gate(grads, own)]
            gates += _probes(ctx.op, ctx.gated[1:], args, kwargs, grads, ctx.gram)
        gradient = _alpha_gradient(alpha, dict(zip(ctx.gated, gates, strict=True)), ctx.pair)
        return None, None, None, None, gradient, *grads


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


def _probes(
    op: MixedOp,
    probed: Sequence[int],
    args: tuple,
    kwargs: dict,
    grads: Sequence[Tensor | None],
    gram: Gram | None,
) -> list[Tensor]:
    """The gate gradients of the probed candidates: those the engine takes in one call, the others one at a time."""
    fused: dict[int, Tensor] = {}
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and len(grads) == 1 and grads[0] is not None:
        fused = probe_fused([(j, op.candidates[j]) for j in probed], args[0], grads[0], gram)
    return [fused[j] if j in fused else _probe(op, j, args, kwargs, grads) for j in probed]


def _probe(op: MixedOp, j: int, args: tuple, kwargs: dict, grads: Sequence[Tensor | None]) -> Tensor:
    """The gate gradient of candidate j, run without autograd and dropped at once."""
    module: Callable = op.candidates[j]
    if isinstance(module, Zero):  # <G, 0> = 0 without running it, and without a copy from the host
        return torch.zeros((), device=next(g.device for g in grads if g is not None))
    outputs = [leaf for leaf in pytree.tree_leaves(module(*args, **kwargs)) if _is_float(leaf)]
    shapes = [tuple(o.shape) for o in outputs]
    wanted = [None if g is None else tuple(g.shape) for g in grads]
    if len(shapes) != len(wanted) or any(w is not None and w != s for w, s in zip(wanted, shapes, strict=True)):
        raise ValueError(
            f"candidate {op.names[j]!r} must give outputs of the active candidate's shapes {wanted}, got {shapes}"
        )
    return _gate(grads, outputs)
