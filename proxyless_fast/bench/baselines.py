"""The registry of baselines: each builds the same supernet in its own way, behind one face.

A baseline is a function from `Settings` to a `Subject`, registered with its name and what it is. All subjects of a run
start from the same weights and alphas and are told the same paths.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import proxyless_fast as pf

from ..mixed import Mode
from ..search.optim import adam, sgd
from ..supernet import frozen

Paths = list[tuple[int, int | None]]  # the active index and the partner of each mixed op
MODES: dict[str, Mode] = {
    "weight": "path",
    "full": "full",
    "two": "two",
}  # a step kind, and the mode in which paths are sampled
LR, MOMENTUM, DECAY, ARCH_LR = 1e-3, 0.9, 4e-5, 1e-3


@dataclass(frozen=True)
class Settings:
    """What all baselines of a run share: the space ("mobile" or "small"), sizes, threads, the official code's clone.

    device: where nets and data are. autocast: name of the torch dtype that forward passes run in under autocast.
    """

    space: str = "mobile"
    resolution: int = 112
    batch: int = 16
    threads: int = 2
    official: str | None = None
    seed: int = 0
    device: str = "cpu"
    autocast: str | None = None

    @property
    def classes(self) -> int:
        return 1000 if self.space == "mobile" else 10

    def net(self) -> pf.spaces.ChainNet:
        """The supernet, with the weights that every baseline starts from; alphas are zero, all paths equally likely."""
        torch.manual_seed(self.seed)
        build = getattr(pf.spaces, self.space)
        return build(num_classes=self.classes, in_channels=3, resolution=self.resolution).to(self.device)

    def data(self, batch: int | None = None) -> tuple[Tensor, Tensor]:
        """Images and labels of one batch."""
        random = torch.Generator(self.device).manual_seed(self.seed + 1)
        count = batch or self.batch
        images = torch.randn(count, 3, self.resolution, self.resolution, generator=random, device=self.device)
        return images, torch.randint(0, self.classes, (count,), generator=random, device=self.device)

    def forward_context(self) -> AbstractContextManager:
        """Autocast, where the settings ask for it."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, getattr(torch, self.autocast))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Subject:
    """A supernet with its optimizers, and the steps of a search on it."""

    weighted = False  # whether all paths run, weighted by softmax(alpha)

    def __init__(self, net: nn.Module, channels_last: bool = True, settings: Settings | None = None) -> None:
        self.forward_context = (settings or Settings()).forward_context
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.net: Any = net.to(memory_format=self.layout).train()  # type: ignore[call-overload]
        self.weights, self.alphas = self._parameters()
        self.weight_optimizer, self.arch_optimizer = self._optimizers()

    def _parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        return list(pf.weight_parameters(self.net)), list(pf.arch_parameters(self.net))

    def _optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        return sgd(self.weights, LR, MOMENTUM, DECAY), adam(self.alphas, ARCH_LR, 0.0)

    def load(self, state: dict[str, Tensor]) -> None:
        """Weights, alphas and running statistics, by this project's names."""
        self.net.load_state_dict(state)

    def images(self, x: Tensor) -> Tensor:
        """The batch in the memory format in which this baseline takes it."""
        return x.contiguous(memory_format=self.layout)

    def sample(self, paths: Paths, kind: str) -> None:
        """Sample as a search does, then put the given paths in place of the sampled ones."""
        pf.sample(self.net, MODES[kind])
        for op, (active, partner) in zip(pf.mixed_ops(self.net).values(), paths, strict=True):
            op.activate(active, MODES[kind], partner if kind == "two" else None)

    def differentiate(
        self, x: Tensor, labels: Tensor, paths: Paths, kind: str, watch: AbstractContextManager | None = None
    ) -> Tensor:
        """A step up to its gradients; returns the loss. watch: a context around the forward pass."""
        self._optimizer(kind).zero_grad(set_to_none=True)
        with frozen(self.alphas if kind == "weight" else self.weights):
            self.sample(paths, kind)
            with watch or nullcontext(), self.forward_context():
                loss = cross_entropy(self.net(x), labels)
            loss.backward()
        return loss.detach()

    def update(self, kind: str) -> None:
        """The rest of a step: the optimizer's part."""
        self._optimizer(kind).step()
        if kind == "two" and not self.weighted:
            pf.rescale(self.net)

    def step(self, x: Tensor, labels: Tensor, paths: Paths, kind: str) -> None:
        """One whole step: what is timed."""
        self.differentiate(x, labels, paths, kind)
        self.update(kind)

    def _optimizer(self, kind: str) -> torch.optim.Optimizer:
        return self.weight_optimizer if kind == "weight" else self.arch_optimizer

    def without_gradient(self, paths: Paths, kind: str) -> set[str]:
        """Names of the parameters to which this baseline gives no gradient although the definition has one."""
        return set()

    def gradients(self, kind: str) -> dict[str, Tensor]:
        """What the last step of this kind left: the weights' or the alphas' gradients, by this project's names."""
        wanted = {id(p) for p in (self.weights if kind == "weight" else self.alphas)}
        found = {name: p.grad for name, p in self.net.named_parameters() if id(p) in wanted}
        return {name: grad for name, grad in found.items() if grad is not None}


class WeightedSum(Subject):
    """DARTS: every candidate runs, in weight and in arch steps; there are no paths to sample."""

    weighted = True

    def sample(self, paths: Paths, kind: str) -> None:
        for op in pf.mixed_ops(self.net).values():
            op.activate(mode="softmax")


class Official(Subject):
    """The official supernet (search/models/super_nets/super_proxyless.py of mit-han-lab/proxylessnas), from a clone.

    Arch steps run in its default mode "full_v2", or in "two". Its active Zero skips the whole block: such an op is not
    probed and its alpha gets no gradient, which the gate allows and which makes its arch steps a little shorter. It
    probes in backward by calling modules, which therefore runs under autocast too where there is one.
    """

    def __init__(self, settings: Settings, channels_last: bool) -> None:
        self._module = _official_module(settings.official)
        super().__init__(self._build(settings).to(settings.device), channels_last, settings)
        self.edges = self.net.redundant_modules

    def _build(self, settings: Settings) -> nn.Module:
        mobile = pf.spaces.mobile.__globals__
        return self._module.SuperProxylessNASNets(
            width_stages=list(mobile["WIDTHS"]),
            n_cell_stages=list(mobile["BLOCKS"]),
            stride_stages=list(mobile["STRIDES"]),
            conv_candidates=list(mobile["MBCONVS"]),
            n_classes=settings.classes,
        )

    def _parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        return list(self.net.weight_parameters()), list(self.net.architecture_parameters())

    def _optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        weights = torch.optim.SGD(self.weights, LR, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY)
        return weights, torch.optim.Adam(self.alphas, ARCH_LR, betas=(0.0, 0.999))

    def load(self, state: dict[str, Tensor]) -> None:
        theirs = {_official_name(name): value for name, value in state.items() if not name.endswith(".pruned")}
        result = self.net.load_state_dict(theirs, strict=False)
        wrong = [*result.unexpected_keys, *(name for name in result.missing_keys if "AP_path_wb" not in name)]
        if wrong:
            raise RuntimeError(f"official: its state dict differs from this project's in {', '.join(wrong[:5])}")

    def sample(self, paths: Paths, kind: str) -> None:
        self._module.MixedEdge.MODE = {"weight": None, "full": "full_v2", "two": "two"}[kind]
        self.net.reset_binary_gates()
        for edge, (active, partner) in zip(self.edges, paths, strict=True):
            edge.active_index = [active]
            others = [i for i in range(edge.n_choices) if i != active]
            edge.inactive_index = [partner] if kind == "two" else others
            edge.AP_path_wb.data.zero_()
            edge.AP_path_wb.data[active] = 1.0

    def differentiate(
        self, x: Tensor, labels: Tensor, paths: Paths, kind: str, watch: AbstractContextManager | None = None
    ) -> Tensor:
        self.sample(paths, kind)
        self.net.unused_modules_off()
        with self.forward_context():
            with watch or nullcontext():
                loss = cross_entropy(self.net(x), labels)
            self.net.zero_grad()
            loss.backward()
        if kind != "weight":
            # It takes the missing gate gradient of an active Zero for a module without gates, and prints so.
            with contextlib.redirect_stdout(io.StringIO()):
                self.net.set_arch_param_grad()
        return loss.detach()

    def update(self, kind: str) -> None:
        self._optimizer(kind).step()
        if kind == "two":
            self.net.rescale_updated_arch_param()
        self.net.unused_modules_back()
        self._module.MixedEdge.MODE = None

    def without_gradient(self, paths: Paths, kind: str) -> set[str]:
        if kind == "weight":
            return set()
        names = [name for name in self.net.state_dict() if name.endswith("AP_path_alpha")]
        active = [edge.candidate_ops[path[0]] for edge, path in zip(self.edges, paths, strict=True)]
        return {_our_name(name) for name, op in zip(names, active, strict=True) if op.is_zero_layer()}

    def gradients(self, kind: str) -> dict[str, Tensor]:
        return {_our_name(name): grad for name, grad in super().gradients(kind).items()}


def _official_name(name: str) -> str:
    return name.replace(".candidates.", ".candidate_ops.").replace(".alpha", ".AP_path_alpha")


def _our_name(name: str) -> str:
    return name.replace(".candidate_ops.", ".candidates.").replace(".AP_path_alpha", ".alpha")


@functools.cache
def _official_module(clone: str | None) -> Any:
    folder = Path(clone or "") / "search"
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("models.super_nets.super_proxyless")
    finally:
        sys.path.remove(str(folder))


def _policy(module: nn.Module, policy: str) -> Any:
    pf.set_policy(module, policy)
    return module


def _compile(module: nn.Module) -> nn.Module:
    # All blocks share a few code objects, and each shape is one more entry in their caches.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000
    for part in _policy(module, "off").modules():
        if isinstance(part, pf.MBConv | pf.blocks.ConvLayer):
            part.compile(dynamic=False)
    return module


def _checkpoint(net: Any) -> nn.Module:
    for block in _policy(net, "off").blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    return net


@dataclass(frozen=True)
class Baseline:
    """An entry of the registry.

    build: makes the subject. block: makes of an MBConv or ConvLayer what this baseline runs, where its blocks are its
    own. official: needs a clone. slow: left out unless named. gpu: runs on a GPU only (benchmarks/gpu).
    """

    name: str
    description: str
    build: Callable[[Settings], Subject]
    block: Callable[[nn.Module], nn.Module] | None = None
    channels_last: bool = True
    official: bool = False
    slow: bool = False
    gpu: bool = False

    @property
    def peer(self) -> bool:
        """Whether it is something for this project to be faster than."""
        return not self.name.startswith("ours")


BASELINES: dict[str, Baseline] = {}


def register(baseline: Baseline) -> None:
    """Enter a baseline into the registry, under its name."""
    BASELINES[baseline.name] = baseline


def _register_own(
    name: str, description: str, change: Callable[[nn.Module], nn.Module], channels_last: bool = True,
    subject: type[Subject] = Subject, blocks: bool = True, slow: bool = False, gpu: bool = False,
) -> None:  # fmt: skip
    def build(settings: Settings) -> Subject:
        return subject(change(settings.net()), channels_last, settings)

    register(Baseline(name, description, build, change if blocks else None, channels_last, slow=slow, gpu=gpu))


def _graphed(net: nn.Module) -> nn.Module:
    pf.set_graphs(net)
    return net


_off = functools.partial(_policy, policy="off")
_lean = functools.partial(_policy, policy="lean")

_register_own("ours", "this project as it comes, channels_last", lambda net: net)
_register_own("ours-lean", 'this project with policy "lean", channels_last', _lean)
_register_own(
    "ours-graphed", "this project with CUDA graphs, replayed by path, channels_last; on a GPU", _graphed, blocks=False,
    gpu=True,
)  # fmt: skip
_register_own("generic-nchw", "this project's generic path (PyTorch layers), NCHW", _off, channels_last=False)
_register_own("generic", "this project's generic path (PyTorch layers), channels_last", _off)
_register_own("compiled-nchw", "the generic path, each candidate under torch.compile, NCHW", _compile, False, slow=True)
_register_own("compiled", "the generic path, each candidate under torch.compile, channels_last", _compile, slow=True)
_register_own(
    "darts", "DARTS: the softmax-weighted sum of all candidates, channels_last", _off, subject=WeightedSum, blocks=False
)
_register_own(
    "checkpoint", "the generic path, torch.utils.checkpoint around each block, channels_last", _checkpoint, blocks=False
)
register(
    Baseline(
        "official",
        "the official supernet as shipped (NCHW, full_v2)",
        lambda settings: Official(settings, channels_last=False),
        channels_last=False,
        official=True,
    )
)
register(
    Baseline(
        "official-channels-last",
        "the official supernet in channels_last",
        lambda settings: Official(settings, channels_last=True),
        official=True,
    )
)
