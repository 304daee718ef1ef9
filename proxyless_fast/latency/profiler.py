"""Measure this machine: every distinct block of a space, and some whole paths, through ONNX Runtime on the CPU."""

from __future__ import annotations

import datetime
import platform
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from ..blocks import LinearLayer, ResidualBlock, Zero
from ..checks import check_positive, unwrapped
from ..costs import OpShape, describe_layers
from ..export.onnx_graph import build, example_output, input_shape_of, plain_copy
from ..io.text import said
from ..supernet import derive, mixed_ops
from .runtimes import Runtime, Session, find_runtime
from .table import LatencyTable

BURST_MS = 0.5  # long beside the clock's own cost, short beside the time slices of other processes
BURSTS = 5  # per graph and round, of which the best counts: the others met an interruption
WHOLE_BURSTS = 20  # where one net alone is measured, so that its rounds too are spread over some time
PATHS = 12  # whole paths measured beside the blocks
FRAME_CHANNELS = 8  # input channels of the convolution before a block

Progress = Callable[[int, int], None]


def profile(
    net: nn.Module,
    runtime: str = "onnxruntime",
    threads: int = 1,
    repeats: int = 30,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure each distinct operation of `net` on this machine's CPU: batch 1, float32, `threads` threads.

    net: a supernet, or a net derived from one. A block alone pays for a call and for bringing its input and output into
    the runtime's own memory layout, which inside a net it does not; so each is measured between a small convolution
    and a pooling, and their time without it is taken off. All graphs run in turn, in a new order in each of `repeats`
    rounds, so that a slow phase of the machine meets all alike, and in short bursts of which the best counts, so that
    an interruption meets none; the figure is the median over the rounds. Whole paths measured in the same rounds set
    right what the blocks of a net take together. The header has `overhead` (ms, a call's own cost), `scale` (what the
    blocks' times were multiplied by) and `path_error` (the largest relative error of those paths, predicted against
    measured). progress: called with (rounds done, rounds in all). Raises ValueError for wrong arguments.
    """
    found = find_runtime(runtime)
    check_positive(threads=threads, repeats=repeats)
    net = unwrapped(net)
    blocks = _distinct(net)
    channels_first = input_shape_of(net)
    image = (*channels_first[1:], channels_first[0])
    frames = {shape.input: _frame(shape.input, image) for shape, _ in blocks.values()}
    paths = _paths(net)

    models = {"empty": build(nn.Sequential(nn.Identity()), (1, 1, 1))}
    models |= {f"frame {size}": _model(frame, size, image) for size, frame in frames.items()}
    models |= {key: _model([*frames[shape.input], op], shape.input, image) for key, (shape, op) in blocks.items()}
    models |= {f"path {i}": build(derive(net, path), channels_first) for i, path in enumerate(paths)}
    ms = dict(
        zip(models, _rounds([found.Session(m, threads) for m in models.values()], repeats, progress).T, strict=True)
    )

    call = float(np.median(ms["empty"]))
    bare = {size: np.median(ms[f"frame {size}"]) if frame else call for size, frame in frames.items()}
    samples = {key: np.maximum(ms[key] - bare[shape.input], 0) for key, (shape, _) in blocks.items()}
    sums = np.array([sum(np.median(samples[key]) for key in _keys(net, path)) for path in paths])
    whole = np.array([np.median(ms[f"path {i}"]) for i in range(len(paths))])
    scale = float(np.median((whole - call) / sums))
    error = float(np.abs((call + scale * sums) / whole - 1).max())

    table = LatencyTable(_header(found, threads))
    table.header.update(overhead=call, scale=scale, path_error=error, paths=len(paths))
    for key, figures in samples.items():
        figures = scale * figures
        table.add(key, float(figures.mean()), repeats, float(figures.var()), float(np.median(figures)))
    return table


def measure(
    net: nn.Module | str | Path, threads: int = 1, repeats: int = 30, input_shape: Sequence[int] | None = None
) -> float:
    """Milliseconds of one image through a whole net in ONNX Runtime on this CPU: the median of the rounds' best bursts.

    net: a plain net, or the path of an ONNX file with one float32 input. input_shape: (C, H, W); by default the net's
    own in_channels and resolution, or what the file says. Raises ValueError for wrong arguments and FileNotFoundError.
    """
    check_positive(threads=threads, repeats=repeats)
    if isinstance(net, nn.Module):
        net = unwrapped(net)
        if mixed_ops(net):
            raise ValueError("net must be derived before it is measured: it still holds mixed ops")
        shape, net = input_shape_of(net, input_shape), plain_copy(net)
        example_output(net, shape)  # raises for a net that takes or gives something else
        model = build(net, shape)
    else:
        if not Path(net).is_file():
            raise FileNotFoundError(f"no ONNX file at {net}")
        try:
            model = onnx.load(str(net))
        except Exception as error:  # protobuf raises its own
            raise ValueError(f"{net} cannot be read as ONNX: {said(error)}") from error
    return float(
        np.median(
            _rounds([find_runtime("onnxruntime").Session(model, threads, input_shape)], repeats, bursts=WHOLE_BURSTS)
        )
    )


def _rounds(
    sessions: Sequence[Session], repeats: int, progress: Progress | None = None, bursts: int = BURSTS
) -> np.ndarray:
    """Milliseconds (repeats, sessions): in each round every session once, in random order, the best of its bursts."""
    calls = [max(1, round(BURST_MS / max(_burst(s, 3), 1e-4))) for s in sessions]
    order = random.Random(0)
    ms = np.empty((repeats, len(sessions)))
    for r in range(repeats):
        for i in order.sample(range(len(sessions)), len(sessions)):
            sessions[i].run()  # warms the caches that other sessions have used
            ms[r, i] = min(_burst(sessions[i], calls[i]) for _ in range(bursts))
        if progress is not None:
            progress(r + 1, repeats)
    return ms


def _burst(session: Session, calls: int) -> float:
    """Milliseconds a call, over `calls` calls."""
    start = time.perf_counter()
    for _ in range(calls):
        session.run()
    return (time.perf_counter() - start) / calls * 1e3


def _distinct(net: nn.Module) -> dict[str, tuple[OpShape, nn.Module]]:
    """The operations to measure, by key, each as a net runs it: with the addition where it has a shortcut."""
    found: dict[str, tuple[OpShape, nn.Module]] = {}
    for layer in describe_layers(net):
        for shape, module in zip(layer.choices, layer.modules, strict=True):
            if shape is not None and shape.key not in found:
                added = bool(dict(shape.attributes).get("idskip"))
                found[shape.key] = shape, ResidualBlock(module, shortcut=True) if added else module
    return found


def _frame(size: tuple[int, ...], image: tuple[int, ...]) -> list[nn.Module]:
    """What stands before a block when it is measured: nothing before the first layer, else a small convolution."""
    return [] if size == image else [nn.Conv2d(FRAME_CHANNELS, size[2], 1)]


def _model(modules: list[nn.Module], size: tuple[int, ...], image: tuple[int, ...]) -> onnx.ModelProto:
    """A framed block: `modules` in order, then global pooling (for the classifier, before it)."""
    last = len(modules) - isinstance(modules[-1] if modules else None, LinearLayer)
    pooling = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    channels = size[2] if size == image else FRAME_CHANNELS
    return build(nn.Sequential(*modules[:last], *pooling, *modules[last:]), (channels, *size[:2]))


def _paths(net: nn.Module) -> list[dict[str, int]]:
    """Random paths of the net, label to index; for a net without mixed ops, itself."""
    ops = mixed_ops(net)
    if not ops:
        return [{}]
    draw = random.Random(0)
    # no Zero: in a cell it cuts off operations before and behind it, whose times then do not count
    open_ = {label: [i for i, c in enumerate(op.candidates) if not isinstance(c, Zero)] for label, op in ops.items()}
    return [{label: draw.choice(indices) for label, indices in open_.items()} for _ in range(PATHS)]


def _keys(net: nn.Module, choices: dict[str, int]) -> list[str]:
    labels = {id(op): label for label, op in mixed_ops(net).items()}
    shapes = (
        layer.choices[0 if layer.mixed is None else choices[labels[id(layer.mixed)]]] for layer in describe_layers(net)
    )
    return [shape.key for shape in shapes if shape is not None]


def _header(runtime: Runtime, threads: int) -> dict[str, Any]:
    return {
        "device": _processor(),
        "runtime": runtime.name,
        "threads": threads,
        "dtype": "float32",
        "batch": 1,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "torch": str(torch.__version__),
        **runtime.versions(),
    }


def _processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
