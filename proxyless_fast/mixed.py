"""MixedOp: N candidates behind binary gates, of which a step runs one (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ._deprecated import warn_renamed
from .candidates import offered
from .gates import GatedStep, attach_gates, input_versions, require_unchanged

Mode = Literal["path", "full", "two", "sum", "softmax"]
MODES: tuple[Mode, ...] = ("path", "full", "two", "sum", "softmax")


class MixedOp(nn.Module):
    """A mixed operation over candidates, one of which is active (paper eq. 1 to 5).

    candidates: a dict of name to nn.Module, or a sequence (then the names are "0", "1", ...). All must take the same
    arguments and give outputs of one structure and shape: tensors, or tuples, lists and dicts of them. label: the name
    of this op in `mixed_ops`, tables and logs; by default its place in the net.

    alpha: nn.Parameter (N,), the architecture parameters, zero at first. pruned: buffer (N,), bool; a pruned candidate
    keeps its alpha, has probability 0 and is neither sampled nor probed (an alpha of -inf counts as pruned). Modes, set
    by `activate` or by `proxyless_fast.sample`:

    * "path": the active candidate runs, and nothing else; alpha gets no gradient (a weight step, or evaluation).
    * "full": the active candidate's output; backward probes the others one at a time, without autograd, and gives
      alpha the gradient of eq. 4: sum_j dL/dg_j p_j (delta_ij - p_i), with dL/dg_j = <dL/d output, o_j(x)>.
    * "two": the same over the active candidate and one partner (section 3.2.1, "two paths").
    * "sum", "softmax": every candidate runs (One-Shot, DARTS): to compare with.

    gated_indices: of the candidates whose gates get a gradient in this step, the active one first. What candidates may
    offer beyond `forward` is in `proxyless_fast.candidates`.

    The output of modes "full" and "two" must not be changed in place: backward reads it; autograd says so if it is.
    Raises ValueError for wrong candidates, and when called, outside mode "path", where one changes its input in place.
    """

    alpha: nn.Parameter
    pruned: Tensor

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
        # A mask beside alpha, not an alpha of -inf: averages of weights (EMA) would make NaN of that.
        self.register_buffer("pruned", torch.zeros(len(named), dtype=torch.bool))
        self.mode: Mode = "path"
        self.active = 0
        self.partner: int | None = None
        self.graphs: Callable | None = None  # proxyless_fast.set_graphs
        self.gated_indices: tuple[int, ...] = (0,)
        self._pair_mass: Tensor | None = None
        self._intact: tuple[Tensor, int] | None = None  # the mask, and its version, in which nothing was pruned

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

    def logits(self) -> Tensor:
        """alpha, with -inf for the pruned candidates, (N,), differentiable: what p is the softmax of.

        alpha itself where sampling has found that nothing is pruned.
        """
        if self._intact is not None and self._intact[0] is self.pruned and self._intact[1] == self.pruned._version:
            return self.alpha
        return self.alpha.masked_fill(self.pruned, -torch.inf)

    def probabilities(self) -> Tensor:
        """p = softmax(alpha) over the candidates that are not pruned, (N,), differentiable."""
        return torch.softmax(self.logits(), 0)

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
        """Index of the largest alpha of those not pruned; the lower index where several are equal."""
        return int(torch.argmax(self.logits().detach().cpu()))

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
        alive = (self.logits() > -torch.inf).tolist()
        if mode == "two" and other is None and sum(alive) > 1:
            raise ValueError("partner must be given in mode 'two', got None")
        self.set_path(active, mode, other, alive)

    def set_path(self, active: int, mode: Mode, partner: int | None, alive: Sequence[bool]) -> None:
        """`activate` with checked arguments; alive: which candidates are not pruned, so that none is read again."""
        self.active, self.mode, self.partner = active, mode, partner
        self._intact = (self.pruned, self.pruned._version) if all(alive) else None
        if mode == "full":
            self.gated_indices = (active, *(i for i in range(len(self)) if alive[i] and i != active))
        else:
            self.gated_indices = (active,) if partner is None else (active, partner)
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
        for i in self.gated_indices:
            self.alpha[i] += shift

    @torch.no_grad()
    def prune(self, threshold: float) -> list[str]:
        """Prune where p < threshold, for good, and return those names; the most likely candidate always stays."""
        p = self.probabilities().cpu()
        gone = (p < threshold) & (p > 0)
        gone[self.most_likely] = False
        self.pruned |= gone.to(self.pruned.device)
        return [name for name, pruned in zip(self.names, gone.tolist(), strict=True) if pruned]

    # The index of the active path is data to a compiled graph around this op, which would otherwise be compiled anew
    # for every path: the graph breaks here. A candidate that is to be compiled is so by its own `compile()`: candidates
    # share a few forwards, whose caches would be full after eight of them.
    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        replayed = None if self.graphs is None else self.graphs(self, args, kwargs, False)
        if replayed is not None:
            return replayed
        if self.mode in ("sum", "softmax"):
            return self._all_paths(args, kwargs)
        candidate = self.candidates[self.active]
        if not self._gates_wanted:
            return candidate(*args, **kwargs)
        run = offered(candidate, "run_gated") if len(args) == 1 and not kwargs else None
        before = input_versions(args, kwargs)
        output, term = (candidate(*args, **kwargs), None) if run is None else run(args[0])
        require_unchanged(self.names[self.active], before, args, kwargs)
        return attach_gates(self._gated_step(args, kwargs), self.logits(), output, term)

    @torch.compiler.disable
    def with_shortcut(self, x: Tensor) -> Tensor:
        """self(x) + x, with the sum where the output is written anyway if the active candidate offers that."""
        replayed = None if self.graphs is None else self.graphs(self, (x,), {}, True)
        if replayed is not None:
            return replayed
        if self.mode in ("sum", "softmax"):
            return self(x) + x
        candidate, gated = self.candidates[self.active], self._gates_wanted
        run = offered(candidate, "run_gated" if gated else "with_shortcut")
        if run is None:
            return self(x) + x
        if not gated:
            return run(x)
        before = input_versions((x,), {})
        output, term = run(x, shortcut=True)
        require_unchanged(self.names[self.active], before, (x,), {})
        summed = attach_gates(self._gated_step((x,), {}), self.logits(), output, term)
        return summed + x if term is None else summed

    def _gated_step(self, args: tuple, kwargs: dict[str, Any]) -> GatedStep:
        names = tuple(self.names[i] for i in self.gated_indices)
        candidates = tuple(self.candidates[i] for i in self.gated_indices)
        return GatedStep(self.gated_indices, names, candidates, self.mode == "two", args, kwargs)

    @property
    def _gates_wanted(self) -> bool:
        return self.mode in ("full", "two") and torch.is_grad_enabled() and self.alpha.requires_grad

    def _all_paths(self, args: tuple, kwargs: dict) -> Any:
        weights = self.probabilities() if self.mode == "softmax" else [1] * len(self)
        live = (self.logits().detach() > -torch.inf).tolist()
        total: list[Tensor] | None = None
        spec = None
        before = input_versions(args, kwargs)
        for name, module, weight, alive in zip(self.names, self.candidates, weights, live, strict=True):
            if not alive:
                continue
            leaves, spec = pytree.tree_flatten(module(*args, **kwargs))
            require_unchanged(name, before, args, kwargs)
            scaled = [leaf * weight for leaf in leaves] if self.mode == "softmax" else leaves
            total = scaled if total is None else [a + b for a, b in zip(total, scaled, strict=True)]
        assert total is not None and spec is not None  # one candidate always stays
        return pytree.tree_unflatten(total, spec)

    def gated(self) -> list[int]:
        """Old name of `gated_indices`, as a list."""
        warn_renamed("MixedOp.gated()", "MixedOp.gated_indices")
        return list(self.gated_indices)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        """As nn.Module's; what was pruned before there was a mask had an alpha of -inf."""
        alpha = state_dict.get(f"{prefix}alpha")
        if alpha is not None and f"{prefix}pruned" not in state_dict and alpha.shape == self.alpha.shape:
            pruned = alpha.detach() == -torch.inf
            finite = torch.where(pruned, torch.finfo(alpha.dtype).max, alpha.detach()).min()
            state_dict[f"{prefix}pruned"] = pruned
            state_dict[f"{prefix}alpha"] = torch.where(pruned, finite, alpha.detach())
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        label = f"{self.label}: " if self.label else ""
        return f"{label}{', '.join(self.names)}; mode {self.mode}, active {self.names[self.active]}"
