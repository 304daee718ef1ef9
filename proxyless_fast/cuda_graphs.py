"""CUDA graphs of a sampled step: one for each mixed op and candidate, replayed by path.

In late layers a GPU is done sooner than the host has launched the kernels. A graph holds all launches of a mixed op's
forward, or of its backward, and is one launch itself. Which path is active is decided by choosing the graph; the
weights, the alphas and the running statistics are data, read where they lie.

Memory. The graphs of one mixed op share a pool, because only one of its candidates is between forward and backward at a
time: it holds what the largest of them needs, or half as much again where smaller ones were recorded first. All
backward passes share one pool, because none outlives its replay. So a net costs about what one path costs in eager
mode, and the scratch space of each op's forward.

Not yet run on a GPU: the tests replay by running again, on the CPU, into the same memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .candidates import has_hooks, offered
from .mixed import MixedOp
from .supernet import mixed_ops

Run = Callable[[], Sequence[Tensor]]


class Recorder(Protocol):
    """What records launches and replays them: CUDA, or a stand-in of the tests."""

    device: str

    def pool(self) -> Any:
        """A name for memory that recordings share."""

    def record(self, run: Run, pool: Any) -> tuple[list[Tensor], Callable[[], None]]:
        """The memory that holds run's results after each replay, and the replay. Nothing keeps that memory alive."""

    @contextmanager
    def warm(self) -> Iterator[None]:
        """Where to run once, for real, what will be recorded, and where to record it."""


class _Pool:
    """A private pool of torch's allocator, which lives as long as a graph in it does: so all are kept."""

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self.graphs: list[torch.cuda.CUDAGraph] = []


class Cuda:
    """Records on a stream of its own, into private pools of torch's allocator. gpu: with its index."""

    device = "cuda"

    def __init__(self, gpu: torch.device) -> None:
        backend = torch.cuda.get_allocator_backend()
        if backend != "native":
            raise ValueError(
                f"set_graphs: torch's allocator is {backend!r}, expected 'native', whose pools graphs share"
            )
        self.gpu, self.stream = gpu, torch.cuda.Stream(gpu)

    def pool(self) -> _Pool:
        return _Pool()

    @contextmanager
    def warm(self) -> Iterator[None]:
        self.stream.wait_stream(torch.cuda.current_stream(self.gpu))
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            torch.cuda.current_stream(self.gpu).wait_stream(self.stream)

    def record(self, run: Run, pool: _Pool) -> tuple[list[Tensor], Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.gpu)
        torch.cuda.empty_cache()  # a recording cannot take back what the warm-up left in the cache
        try:
            # A loader's thread may pin memory meanwhile; that must not spoil the recording.
            graph.capture_begin(pool=pool.handle, capture_error_mode="thread_local")
            try:
                results = run()
            except BaseException:
                with suppress(RuntimeError):  # it would hide what went wrong
                    graph.capture_end()
                raise
            graph.capture_end()
        except BaseException:
            if not pool.graphs:
                pool.handle = torch.cuda.graph_pool_handle()
            raise
        pool.graphs.append(graph)
        return [_borrowed(result) for result in results], graph.replay


class _Memory:
    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def _borrowed(t: Tensor) -> Tensor:
    """A tensor in t's memory that does not own it: the pool has it, for this graph and for those of other paths."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    raw = torch.as_tensor(_Memory(t.data_ptr(), span * t.element_size()), device=t.device)
    return raw.view(t.dtype).as_strided(t.shape, t.stride())


def set_graphs(net: nn.Module, enabled: bool = True, recorder: Recorder | None = None) -> None:
    """Replay the mixed ops of a net on a GPU from CUDA graphs in weight and arch steps, or stop doing so.

    A path is recorded when it is first sampled, with the shapes of that step; another shape, dtype or mode is recorded
    anew, and what no graph holds (`op.graphs.why_not(op, x)` says why) runs as before, with the same results. An op's
    output stays valid until the op runs again, and its backward must come before that: RuntimeError otherwise. Call it
    again after changing the net's modules. What cannot be recorded runs as before, after a warning that says why.
    Raises ValueError where the net has no MixedOp or is not on a GPU. Not yet run on a GPU.
    """
    ops = mixed_ops(net)
    if not ops:
        raise ValueError(f"net: {type(net).__name__} has no MixedOp, expected at least one to replay")
    device = next(iter(ops.values())).alpha.device
    if enabled and recorder is None and device.type != "cuda":
        raise ValueError(f"net: its parameters are on '{device}', expected a GPU: CUDA graphs record nothing else")
    shared = (recorder or Cuda(device)) if enabled else None
    backward = None if shared is None else shared.pool()
    for op in ops.values():
        op.graphs = None if shared is None else RecordedPaths(op, shared, backward)


class RecordedPaths:
    """The recorded paths of one mixed op."""

    def __init__(self, op: MixedOp, recorder: Recorder, backward_pool: Any) -> None:
        self.recorder, self.backward_pool, self.pool = recorder, backward_pool, recorder.pool()
        self.paths: dict[tuple, _Path | str] = {}  # a string: why there is no graph
        self.buffers: dict[tuple, Tensor] = {}
        self.forwards = 0
        self.modules = [[*candidate.modules()] for candidate in op.candidates]
        self.norms = [m for modules in self.modules for m in modules if isinstance(m, nn.BatchNorm2d)]

    def __deepcopy__(self, memo: dict) -> None:
        return None  # graphs hold addresses: a copy of the net is without them

    def __reduce__(self) -> tuple:
        return type(None), ()

    def __call__(self, op: MixedOp, args: tuple, kwargs: dict, shortcut: bool) -> Tensor | None:
        """The op's output by replay, or None where no graph is used."""
        if self._unfit(op, args, kwargs):
            return None
        (x,) = args
        wanted = self._wanted(op)
        key = self._key(op, x, shortcut, wanted)
        path = self.paths.get(key)
        if path is None or (isinstance(path, _Path) and path.addresses != self.addresses(op)):
            path = self.paths[key] = self._not_recorded(op, x) or self._record(op, x, shortcut, wanted)
        return None if isinstance(path, str) else _Replay.apply(self, path, x, *wanted)

    def _record(self, op: MixedOp, x: Tensor, shortcut: bool, wanted: list[Tensor]) -> _Path | str:
        try:
            with _unmoved(op):
                return _Path(self, op, x, shortcut, wanted)
        except torch.OutOfMemoryError:  # for the caller, who may try a smaller batch
            raise
        except RuntimeError as error:
            reason = f"recording failed: {str(error).partition(chr(10))[0]}"
            warnings.warn(f"set_graphs: {op.label or type(op).__name__} runs without a graph; {reason}", stacklevel=4)
            return reason

    def why_not(self, op: MixedOp, *args: Any, **kwargs: Any) -> str:
        """Why a call of the op with these arguments is not replayed, in words; empty if it is."""
        reason = self._unfit(op, args, kwargs)
        if reason:
            return reason
        keys = (self._key(op, args[0], shortcut, self._wanted(op)) for shortcut in (False, True))
        met = next((path for path in map(self.paths.get, keys) if isinstance(path, str)), "")
        return met or self._not_recorded(op, args[0])

    def _unfit(self, op: MixedOp, args: tuple, kwargs: dict) -> str:
        device = self.recorder.device
        if torch.is_anomaly_enabled():
            return "anomaly detection reads values on the host"
        if op.mode not in ("path", "full"):
            return f"the mode is {op.mode!r}, and paths of the modes 'path' and 'full' are recorded"
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            return "the op was not given one tensor"
        if args[0].device.type != device or args[0].device != op.alpha.device:
            return f"the tensor is on '{args[0].device}' and alpha on '{op.alpha.device}', not both on one {device!r}"
        if not torch.is_grad_enabled() or not (args[0].requires_grad or self._wanted(op)):
            return "nothing wants a gradient, and steps are recorded that have a backward"
        if torch.compiler.is_compiling():
            return "torch.compile is at work"
        if op.mode == "path" and getattr(op.candidates[op.active], "launches_nothing", False):
            return f"the active candidate {op.names[op.active]!r} launches nothing"
        for j in op.gated_indices:
            candidate, name = op.candidates[j], op.names[j]
            if has_hooks(*self.modules[j]):
                return f"candidate {name!r} has hooks"
            if offered(candidate, "why_not_recorded") is None:
                return f"candidate {name!r}, a {type(candidate).__name__}, offers no recording of its forward"
        return ""

    def _not_recorded(self, op: MixedOp, x: Tensor) -> str:
        candidates: list[Any] = [op.candidates[j] for j in op.gated_indices]
        return next((reason for reason in (c.why_not_recorded(x) for c in candidates) if reason), "")

    def _wanted(self, op: MixedOp) -> list[Tensor]:
        """The tensors besides x that get a gradient."""
        own = [p for m in self.modules[op.active] for p in m._parameters.values() if p is not None]
        return [t for t in ([*own, op.alpha] if op.mode == "full" else own) if t.requires_grad]

    def addresses(self, op: MixedOp) -> tuple[int, ...]:
        """Where the weights and statistics lie that a recording reads."""
        modules = [m for j in op.gated_indices for m in self.modules[j]]
        held = [t for m in modules for group in (m._parameters, m._buffers) for t in group.values()]
        return (op.alpha.data_ptr(), op.pruned.data_ptr(), *(t.data_ptr() for t in held if t is not None))

    def _key(self, op: MixedOp, x: Tensor, shortcut: bool, wanted: Sequence[Tensor]) -> tuple:
        device = x.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        norms = tuple((bn.training, bn.momentum, bn.eps) for bn in self.norms)
        layout = (x.shape, x.stride(), x.dtype, x.requires_grad)
        needs = tuple(id(t) for t in wanted)
        policies = tuple(getattr(c, "policy", None) for c in op.candidates)
        return op.mode, op.gated_indices, shortcut, layout, autocast, norms, needs, policies

    def buffer(self, name: str, like: Tensor) -> Tensor:
        """Memory for tensors of this shape and layout, one for all paths."""
        key = (name, like.shape, like.stride(), like.dtype)
        if key not in self.buffers:
            self.buffers[key] = torch.empty_like(like.detach())
        return self.buffers[key]


@contextmanager
def _unmoved(op: MixedOp) -> Iterator[None]:
    """The op's statistics are what they were after what happens inside."""
    buffers = list(op.buffers())
    before = [b.clone() for b in buffers]
    try:
        yield
    finally:
        if buffers:
            with torch.no_grad():
                torch._foreach_copy_(buffers, before)


def _run(op: MixedOp, x: Tensor, shortcut: bool, leaves: dict[int, Tensor]) -> Tensor:
    """The op itself, without graphs and hooks, its parameters replaced by `leaves` (by id), which share their memory.

    A parameter's own place in autograd has a stream and hooks of the user that have no business in a recording.
    """
    places = [(m._parameters, name, p) for m in op.modules() for name, p in m._parameters.items() if id(p) in leaves]
    graphs, op.graphs = op.graphs, None
    try:
        for parameters, name, p in places:
            parameters[name] = leaves[id(p)]  # type: ignore[assignment]
        return op.with_shortcut(x) if shortcut else MixedOp.forward(op, x)
    finally:
        op.graphs = graphs
        for parameters, name, p in places:
            parameters[name] = p


class _Path:
    """One path of an op, recorded: forward and backward."""

    def __init__(self, graphs: RecordedPaths, op: MixedOp, x: Tensor, shortcut: bool, wanted: list[Tensor]) -> None:
        self.x = graphs.buffer("x", x)
        self.addresses = graphs.addresses(op)
        self.shapes = [t.shape for t in wanted]
        recorder = graphs.recorder
        leaves = [t.detach().requires_grad_() for t in wanted]
        by_id = {id(t): leaf for t, leaf in zip(wanted, leaves, strict=True)}
        root: list[Tensor] = []

        def forward() -> list[Tensor]:
            leaf = self.x.detach().requires_grad_(x.requires_grad)
            root[:] = [_run(op, leaf, shortcut, by_id), leaf]
            return [root[0].detach()]

        def backward() -> list[Tensor]:
            output, leaf = root
            root.clear()
            sources = [leaf, *leaves] if leaf.requires_grad else leaves
            found = list(torch.autograd.grad(output, sources, self.grad, materialize_grads=True))
            dx = [found.pop(0)] if leaf.requires_grad else []
            # The rest in one piece, so that one copy makes it the caller's.
            return [*dx, torch.cat([g.reshape(-1) for g in found])] if found else dx

        with recorder.warm():
            with torch.no_grad():
                self.x.copy_(x)
            (output,) = forward()
            self.grad = graphs.buffer("grad", output).zero_()
            backward()
            (self.output,), self.forward = recorder.record(forward, graphs.pool)
            results, self.backward = recorder.record(backward, graphs.backward_pool)
        self.dx = results[0] if x.requires_grad else None
        self.flat = results[-1] if wanted else None

    def gradients(self) -> list[Tensor | None]:
        """What the last replay of backward found, in memory of its own: of x, and of the tensors wanted."""
        dx = None if self.dx is None else self.dx.clone()
        if self.flat is None:
            return [dx]
        pieces = self.flat.clone().split([shape.numel() for shape in self.shapes])
        return [dx, *(piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True))]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graphs: RecordedPaths, path: _Path, x: Tensor, *wanted: Tensor) -> Tensor:
        graphs.forwards += 1
        ctx.graphs, ctx.path, ctx.forwards = graphs, path, graphs.forwards
        ctx.set_materialize_grads(False)
        path.x.copy_(x)
        path.forward()
        return path.output.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor | None):
        if ctx.forwards != ctx.graphs.forwards:
            raise RuntimeError(
                "set_graphs: a mixed op ran again before this backward, and its graphs share the memory of one step; "
                "expected each forward's backward to come before the next forward"
            )
        if grad is None:
            return (None,) * (3 + len(ctx.path.shapes))
        ctx.path.grad.copy_(grad)
        ctx.path.backward()
        return None, None, *ctx.path.gradients()
