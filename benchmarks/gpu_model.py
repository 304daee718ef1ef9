"""A model, not a measurement: bytes and FLOPs of every pass of a step on a GPU, and the roofline time they allow.

Counted, not estimated: the composition runs on meta tensors, every launch reads each tensor it is given once and writes
each it is given to write once (what a second tile reads again is taken to come from the caches), and every PyTorch call
in between reads its inputs and writes its outputs. Eager PyTorch is counted in the same way, call by call; a batch norm
in training reads its input twice forward, and its input and gradient twice backward; a convolution's backward reads the
gradient once for each gradient it computes. Left out on both sides: residual additions, optimizers, launch gaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar
from unittest import mock

import torch
from gpu_launches import CANDIDATES, Launch, Shape, backward, forward, gate, imagenet, launch, probe, recording, running
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import proxyless_fast as pf
from proxyless_fast.ops.triton import passes


@dataclass(frozen=True)
class Card:
    """Peak rates, dense: bytes/s of memory, FLOP/s of bf16 matrix products and of float32 without tensor cores."""

    name: str
    memory: float
    half: float
    single: float
    arch: int = 90


# NVIDIA's data sheets: "A100 80GB SXM" (2021) and "H100 SXM" (2023), the figures without sparsity.
CARDS = (Card("A100", 2.039e12, 312e12, 19.5e12, 80), Card("H100", 3.35e12, 989e12, 67e12, 90))

_FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "split", "split_with_sizes", "unbind"),
    *("slice", "select", "view", "_unsafe_view", "permute", "transpose", "t", "expand", "unsqueeze", "squeeze"),
    *("reshape", "as_strided", "lift_fresh", "promote_types"),
}


def nbytes(values: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(values) if isinstance(t, Tensor))


@dataclass
class Pass:
    name: str
    bytes: int
    flops: int
    matrix: bool  # on tensor cores, where the dtype has them
    products: int = 0  # FLOPs on tensor cores beside and not at the same time as the others

    def seconds(self, card: Card, dtype: torch.dtype) -> float:
        rate = card.half if self.matrix and dtype != torch.float32 else card.single
        return max(self.bytes / card.memory, self.flops / rate + self.products / card.half)


@dataclass
class Count(TorchDispatchMode):
    """Collects the PyTorch calls made inside."""

    passes: list[Pass] = field(default_factory=list)
    partial_sums: ClassVar[bool] = True  # of the C++ ops' blocks, too: at most, since how many there are is theirs

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "proxyless_fast" and "depthwise" in name:
            named = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
            self.passes.append(_stencil_pass(name, named, out, self.partial_sums))
        if func.namespace != "aten" or name in _FREE:
            return out
        moved, flops = nbytes(args) + nbytes(out), 0
        if "batch_norm" in name:
            read = (args[0], args[1]) if "backward" in name else args[0]
            moved += nbytes(read)
        elif name == "convolution":
            flops = 2 * out.numel() * args[1][0].numel()
        elif name == "convolution_backward":
            gradient, x, weight = args[:3]
            wanted = sum(args[-1][:2])
            moved = wanted * nbytes(gradient) + nbytes(out)
            moved += (nbytes(weight) if args[-1][0] else 0) + (nbytes(x) if args[-1][1] else 0)
            flops = wanted * 2 * gradient.numel() * weight[0].numel()
        elif name == "mm":
            flops = 2 * args[0].numel() * args[1].shape[1]
        matrix = name == "mm" or ("convolution" in name and args[1 + ("backward" in name)].shape[1] > 1)
        self.passes.append(Pass(name, moved, flops, matrix))
        return out


def halo(height: int, width: int, kernel: int, stride: int) -> float:
    """How often a pixel is expanded, none outside the image: an upper bound, that of tiles of 7 x 7 outputs.

    Those are the smallest that the host chooses.
    """

    def axis(size: int) -> float:
        starts = range(-(kernel // 2), size, 7 * stride)
        seen = [min(size, i + 6 * stride + kernel) - max(0, i) for i in starts if i + kernel // 2 < size]
        return sum(seen) / size

    return axis(height) * axis(width)


def _stencil_pass(name: str, args: dict[str, Any], out: Any, partial_sums: bool) -> Pass:
    """A CUDA C++ op. With its partial sums, written and read once, for as many blocks as there may be."""
    forward, weight, x = "forward" in name, args["weight"], args["x"]
    taps, chunk = weight[0].numel(), 64 // x.element_size()
    moved = nbytes(list(args.values())) + nbytes(out)
    gradients = 1 if forward or isinstance(out, Tensor) else 2
    if not forward and gradients == 1:
        moved -= nbytes(x)  # without mask only its shape is used
    elif partial_sums:
        moved += 2 * 4 * chunk * (1024 * 3 if forward else 512 * taps)
    outputs, products = (out[0] if forward else args["dz"]).numel(), 0
    if "w1" in args:
        again = halo(*x.shape[2:], weight.shape[-1], args["stride"]) if forward else 1.0
        products = int(2 * x.numel() * args["w1"].shape[0] * again)
    return Pass(name, moved, 2 * outputs * taps * gradients, False, products)


@contextmanager
def cuda_part(card: Card) -> Iterator[None]:
    """The composition inside takes the ops of csrc/cuda, as it does on that card where they are built."""
    with (
        mock.patch.object(passes, "stencils", lambda x, kernels, stride: len(set(kernels)) == 1),
        mock.patch.object(launch, "architecture", lambda x: card.arch),
    ):
        yield


def _launch_pass(launched: Launch) -> Pass:
    c = launched.constants | launched.config.tile
    name, args = launched.name, dict(zip(launched.kernel.arg_names, launched.args, strict=False))
    pixels = args.get("pixels", 0)
    products = {
        "gram_partial": lambda: c["C"] ** 2,
        "expand": lambda: c["CI"] * c["CH"],
        "project": lambda: c["CO"] * c["CH"],
        "project_backward": lambda: c["CO"] * c["CH"] * (1 + (args["dweight"] is not None)),
        "expand_backward": lambda: c["CI"] * c["CH"] * (1 + (args["dx"] is not None) + (args["dweight"] is not None)),
        "expand_input": lambda: 2 * c["CI"] * c["CH"],
        "finish_input": lambda: c["CI"] ** 2,
    }
    if name in products:
        return Pass(name, nbytes(launched.args), 2 * pixels * products[name](), True)
    flops = 0
    if name.startswith("depthwise"):
        outputs = args["d"].shape[0]
        flops = (
            2 * outputs * c["C"] * c["K"] ** 2 * (1 if "backward" not in name else 1 + (args["partial"] is not None))
        )
    return Pass(name, nbytes(launched.args), flops, False)


def ours(shape: Shape, dtype: torch.dtype, step: str, policy: str = "fast", card: Card | None = None) -> list[Pass]:
    """Passes of one layer whose active candidate is `shape`: "weight", or "arch" with every other candidate probed.

    card: with the CUDA C++ part, as on that card; else Triton alone.
    """
    with cuda_part(card) if card else nullcontext(), recording() as launches, Count() as count:
        running(shape, forward(shape, dtype, policy)[-1])
        if step == "arch":
            gate(shape, dtype)
            others = [
                Shape(shape.batch, shape.ci, shape.co, shape.size, k, shape.stride, e)
                for k, e in CANDIDATES
                if (k, e) != (shape.kernel, shape.expand)
            ]
            probe(others, dtype)
        backward(shape, dtype, policy, weights=step == "weight")
    return [_launch_pass(launched) for launched in launches] + count.passes


class _Eager(nn.Module):
    def __init__(self, shape: Shape, dtype: torch.dtype):
        super().__init__()

        def conv(i, o, k=1, s=1, groups=1):
            return nn.Conv2d(i, o, k, s, k // 2, groups=groups, bias=False)

        ch = shape.ch
        layers: list[nn.Module] = []
        if shape.expand > 1:
            layers += [conv(shape.ci, ch), nn.BatchNorm2d(ch), nn.ReLU6(inplace=True)]
        layers += [conv(ch, ch, shape.kernel, shape.stride, ch), nn.BatchNorm2d(ch), nn.ReLU6(inplace=True)]
        self.layers = nn.Sequential(*layers, conv(ch, shape.co), nn.BatchNorm2d(shape.co))
        self.to("meta", dtype)

    def forward(self, x):
        return self.layers(x)


def eager(shape: Shape, dtype: torch.dtype, step: str) -> list[Pass]:
    """The same work in eager PyTorch, the weights frozen in an arch step."""
    x, grad = shape.x(dtype).requires_grad_(), shape.output(dtype)
    net = _Eager(shape, dtype)
    if step == "arch":
        net.requires_grad_(False)
    with Count() as count:
        out = net(x)
        if step == "arch":
            with torch.no_grad():
                for k, e in CANDIDATES:
                    other = Shape(shape.batch, shape.ci, shape.co, shape.size, k, shape.stride, e)
                    value = out if (k, e) == (shape.kernel, shape.expand) else _Eager(other, dtype)(x)
                    (value * grad).sum()
        out.backward(grad)
    return count.passes


def kept(run, x: Tensor, parameters: list[Tensor]) -> int:
    """Bytes that autograd keeps for backward while run(x) is computed, parameters apart."""
    seen: dict[int, int] = {}
    ignored = {id(p.untyped_storage()) for p in parameters}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if id(storage) not in ignored:
            seen[storage._cdata] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run(x)
    del out
    return sum(seen.values())


def saved(shape: Shape, dtype: torch.dtype, policy: str) -> int:
    """Bytes kept for backward by a weight step: policy "eager", "fast" or "lean"."""
    x = shape.x(dtype).requires_grad_()
    if policy == "eager":
        net = _Eager(shape, dtype)
        return kept(net, x, [*net.parameters(), *net.buffers()])
    params = [p.requires_grad_() for p in shape.params(dtype)]
    return kept(lambda t: pf.ops.mbconv(t, params, stride=shape.stride, training=True, policy=policy), x, params)


def layer(shape: Shape) -> list[Shape]:
    """Every MBConv candidate of a mixed layer."""
    return [Shape(shape.batch, shape.ci, shape.co, shape.size, k, shape.stride, e) for k, e in CANDIDATES]


@dataclass
class Row:
    """Means over the candidates of a layer, each taken as the active one."""

    layer: str
    bytes: dict[tuple[str, str], float]  # (step, "eager" | "out of place" | "fast" | "lean")
    flops: dict[tuple[str, str], float]
    seconds: dict[tuple[str, str, str], float]  # (step, who, card)
    kept: dict[str, float]


def row(shape: Shape, dtype: torch.dtype) -> Row:
    bytes_, flops, seconds, kept_ = {}, {}, {}, {}
    candidates = layer(shape)
    n = len(candidates)
    for step in ("weight", "arch"):
        for who in ("eager", "fast", "lean"):
            counted = [eager(c, dtype, step) if who == "eager" else ours(c, dtype, step, who) for c in candidates]
            passes = [p for ps in counted for p in ps]
            bytes_[step, who] = sum(p.bytes for p in passes) / n
            flops[step, who] = sum(p.flops for p in passes) / n
            if who == "eager":
                bytes_[step, "out of place"] = sum(p.bytes for p in passes if p.name != "clone") / n
            for card in CARDS:
                seconds[step, who, card.name] = sum(p.seconds(card, dtype) for p in passes) / n
    for who in ("eager", "fast", "lean"):
        kept_[who] = sum(saved(c, dtype, who) for c in candidates) / n
    name = f"{shape.ci} → {shape.co}, {shape.size}², s{shape.stride}"
    return Row(name, bytes_, flops, seconds, kept_)


def rows(batch: int, dtype: torch.dtype) -> list[Row]:
    """One row for each of the mixed layers of the ImageNet space; equal layers are counted once and repeated."""
    known: dict[Shape, Row] = {}
    return [known.setdefault(s, None) or known.__setitem__(s, row(s, dtype)) or known[s] for s in imagenet(batch)]


def totals(batch: int, dtype: torch.dtype, card: Card, cuda: bool) -> dict[tuple[str, str], tuple[float, float]]:
    """(bytes, seconds on the card) of (step, policy): sums over all layers of the means over their candidates."""
    sums = {(step, policy): (0.0, 0.0) for step in ("weight", "arch") for policy in ("fast", "lean")}
    layers = imagenet(batch)
    for shape in dict.fromkeys(layers):
        share = layers.count(shape) / len(CANDIDATES)
        for (step, policy), (moved, seconds) in sums.items():
            counted = [p for c in layer(shape) for p in ours(c, dtype, step, policy, card if cuda else None)]
            moved += share * sum(p.bytes for p in counted)
            sums[step, policy] = moved, seconds + share * sum(p.seconds(card, dtype) for p in counted)
    return sums


def ratio(counted: list[Row], step: str, who: str, peer: str = "eager") -> float:
    """Bytes of a step over all layers, of the peer's; "out of place" is eager without the clones of in-place ReLU6."""
    return sum(r.bytes[step, who] for r in counted) / sum(r.bytes[step, peer] for r in counted)


def kept_ratio(counted: list[Row], who: str) -> float:
    return sum(r.kept[who] for r in counted) / sum(r.kept["eager"] for r in counted)


if __name__ == "__main__":
    for dtype in (torch.bfloat16, torch.float32):
        counted = rows(64, dtype)
        print(dtype, {(s, w): round(ratio(counted, s, w), 3) for s in ("weight", "arch") for w in ("fast", "lean")},
              {w: round(kept_ratio(counted, w), 3) for w in ("fast", "lean")})  # fmt: skip
        for card in CARDS:
            alone, cuda = (totals(64, dtype, card, part) for part in (False, True))
            print(card.name, "with the CUDA C++ part, of Triton alone (bytes, roofline time):",
                  {k: tuple(round(b / a, 3) for a, b in zip(alone[k], cuda[k], strict=True)) for k in cuda},
                  "ms:", {k: round(v[1] * 1e3, 2) for k, v in cuda.items()})  # fmt: skip
