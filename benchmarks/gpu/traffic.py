"""Bytes and FLOPs of passes: Triton's launches, the CUDA C++ ops, and PyTorch's calls.

Counted, not estimated: every launch reads each tensor it is given once and writes each it is given to write once (what
a second tile reads again is taken to come from the caches), and every PyTorch call in between reads its inputs and
writes its outputs. A batch norm in training reads its input twice forward, and its input and gradient twice backward;
a convolution's backward reads the gradient once for each gradient it computes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .launches import RecordedLaunch


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


def launch_pass(launched: RecordedLaunch) -> Pass:
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
