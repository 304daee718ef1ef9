"""All mixed ops of a net at once: sampling, rescaling, sorting parameters, and deriving the final net."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .mixed import MixedOp, Mode

Chain = tuple[tuple[int, int], ...]  # choices that lead to a module: (place of the op, index of its candidate)


def mixed_ops(net: nn.Module) -> dict[str, MixedOp]:
    """The mixed ops of a net (or of one MixedOp), by label, in the order in which they are registered.

    An op without a label goes by its place in the net. Raises ValueError when two ops have one label.
    """
    ops: dict[str, MixedOp] = {}
    for place, op in _mixed(net):
        label = op.label or place or "mixed"
        if label in ops:
            raise ValueError(f"label must be unique among the mixed ops of a net, got {label!r} twice")
        ops[label] = op
    return ops


def _mixed(net: nn.Module) -> list[tuple[str, MixedOp]]:
    """The mixed ops with their places, in the order of net.named_modules(), whose nested generators take milliseconds
    on a supernet of thousands of modules; this is asked several times a step."""
    found: list[tuple[str, MixedOp]] = []
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", net)]
    while waiting:
        place, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, MixedOp):
            found.append((place, module))
        prefix = f"{place}." if place else ""
        for name, child in reversed(module._modules.items()):
            if child is not None and child._modules:  # a mixed op holds modules: what holds none need not be looked at
                waiting.append((prefix + name, child))
    return found


def arch_parameters(net: nn.Module) -> Iterator[nn.Parameter]:
    """The alphas of a net's mixed ops."""
    return (op.alpha for _, op in _mixed(net))


def weight_parameters(net: nn.Module) -> Iterator[nn.Parameter]:
    """All parameters of a net but the alphas."""
    alphas = {id(op.alpha) for _, op in _mixed(net)}
    return (p for p in net.parameters() if id(p) not in alphas)


class ActiveParameters:
    """Which weights of a net take part, by what its mixed ops have active.

    net: as it is now; ops and candidates that are put in later are not known. A weight in several places takes part
    where one of them does. All weights of a net without mixed ops do.
    """

    def __init__(self, net: nn.Module) -> None:
        self.ops = list(mixed_ops(net).values())
        weights = {id(p): p for p in weight_parameters(net)}
        chains: dict[int, list[Chain]] = {}
        _find_chains(net, (), {id(op): place for place, op in enumerate(self.ops)}, chains)
        self._groups: dict[tuple[Chain, ...], list[nn.Parameter]] = {}
        for key, p in weights.items():
            self._groups.setdefault(tuple(chains[key]), []).append(p)

    def __call__(self, paths: Sequence[Sequence[int]] | None = None) -> list[nn.Parameter]:
        """The weights that take part, those of one place side by side, in the order in which they are registered.

        paths: active indices, one of each op in the order of `mixed_ops`; of several paths, what any of them needs.
        None: what is active now.
        """
        paths = [[op.active for op in self.ops]] if paths is None else paths
        found: list[nn.Parameter] = []
        for chains, parameters in self._groups.items():
            if any(all(path[op] == index for op, index in chain) for path in paths for chain in chains):
                found += parameters
        return found


def _find_chains(module: nn.Module, chain: Chain, places: dict[int, int], found: dict[int, list[Chain]]) -> None:
    """Of each parameter below module, by id: the choices, (op, index) from the outside in, that it takes part with."""
    for p in module._parameters.values():
        if p is not None:
            found.setdefault(id(p), []).append(chain)
    for child in module._modules.values():
        if child is None:
            continue
        if isinstance(module, MixedOp) and child is module.candidates:
            for index, candidate in enumerate(child.children()):
                _find_chains(candidate, (*chain, (places[id(module)], index)), places, found)
        else:
            _find_chains(child, chain, places, found)


@contextmanager
def frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within, autograd computes no gradient of these parameters; afterwards each is as it was."""
    thawed = [p for p in parameters if p.requires_grad]
    for p in thawed:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in thawed:
            p.requires_grad_(True)


def padded_alphas(ops: list[MixedOp]) -> Tensor:
    """(ops, most candidates): the alphas, differentiable, with -inf for pruned candidates and where an op has fewer."""
    return nn.utils.rnn.pad_sequence([op.logits() for op in ops], batch_first=True, padding_value=-torch.inf)


@torch.no_grad()
def sample(net: nn.Module, mode: Mode = "path", generator: torch.Generator | None = None) -> dict[str, int]:
    """Sample and activate a path in every mixed op of a net: label to active index.

    mode: "path" and "full" draw one index ~ Categorical(softmax(alpha)) per op; "two" draws two without replacement and
    makes one of them active by the pair's own softmax (paper section 3.2.1). generator: a CPU generator; equal seeds
    give equal paths on every device and rank. The whole net is one vectorised draw and one read by the host.
    Raises ValueError for another mode, or a net without mixed ops.
    """
    if mode not in ("path", "full", "two"):
        raise ValueError(f"mode must be one of path, full, two, got {mode!r}")
    labelled = mixed_ops(net)
    if not labelled:
        raise ValueError(f"net must hold at least one MixedOp, got {type(net).__name__} with none")
    ops = list(labelled.values())
    alphas = padded_alphas(ops).cpu().double()
    # alpha plus Gumbel noise: the largest is a categorical draw, the two largest are a draw without replacement. A
    # pruned or padded candidate stays at -inf. A softmax over rows would wake the thread pool for a few numbers.
    noisy = alphas - torch.empty_like(alphas).exponential_(generator=generator).log_()
    partners: list[int | None] = [None] * len(ops)
    if mode != "two" or noisy.shape[1] == 1:
        indices = torch.argmax(noisy, 1).tolist()
    else:
        pair = torch.topk(noisy, 2, dim=1).indices
        first, second = torch.gather(alphas, 1, pair).unbind(1)
        both = second > -torch.inf
        swap = both & (torch.rand(len(ops), generator=generator) >= torch.sigmoid(first - second))
        pair = torch.where(swap[:, None], pair.flip(1), pair)
        indices = pair[:, 0].tolist()
        partners = [b if ok else None for b, ok in zip(pair[:, 1].tolist(), both.tolist(), strict=True)]
    alive = (alphas > -torch.inf).tolist()
    for op, index, partner, live in zip(ops, indices, partners, alive, strict=True):
        op.set_path(index, mode, partner, live)
    return dict(zip(labelled, indices, strict=True))


def rescale(net: nn.Module) -> None:
    """`MixedOp.rescale` on every mixed op: call it after the optimizer step of mode "two"."""
    for _, op in _mixed(net):
        op.rescale()


def activate_most_likely(net: nn.Module) -> dict[str, int]:
    """Activate the most likely path of every mixed op, in mode "path": label to index."""
    labelled = mixed_ops(net)
    if not labelled:
        return {}
    alphas = padded_alphas(list(labelled.values())).detach().cpu()
    best = torch.argmax(alphas, 1).tolist()
    for op, index, live in zip(labelled.values(), best, (alphas > -torch.inf).tolist(), strict=True):
        op.set_path(index, "path", None, live)
    return dict(zip(labelled, best, strict=True))


def derive(net: nn.Module, choices: dict[str, int] | None = None) -> nn.Module:
    """A plain net: every mixed op replaced by its most likely candidate, weights kept (paper section 3.2, end).

    choices: label to index, where another path than the most likely one is wanted. Ties go to the lower index. The
    supernet is left as it is; the candidates that were not chosen are never copied. Raises KeyError for an unknown
    label, IndexError for a wrong index.
    """
    labelled = mixed_ops(net)
    unknown = set(choices or {}) - set(labelled)
    if unknown:
        raise KeyError(f"choices must name mixed ops of the net, got {', '.join(sorted(unknown))}")
    memo: dict[int, object] = {}
    # deepcopy looks up what it has copied already: an op that maps to its chosen candidate is never copied itself.
    # Inner ops come later in modules() than the ops around them, so they are replaced first.
    for label, op in reversed(labelled.items()):
        chosen = op.most_likely if choices is None or label not in choices else op.index(choices[label])
        memo[id(op)] = copy.deepcopy(op.candidates[chosen], memo)
    return copy.deepcopy(net, memo)
