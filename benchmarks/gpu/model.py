"""A model, not a measurement: bytes and FLOPs of a step on a GPU, and the roofline time that they allow.

The composition runs on meta tensors, and its passes are counted as traffic.py says; eager PyTorch is counted in the
same way, call by call. Left out on both sides: residual additions, optimizers, launch gaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn

import proxyless_fast as pf
from proxyless_fast.ops.gpu.host import launch, stencils

from .launches import backward, forward, gate, move_running, probe, recording
from .shapes import CANDIDATES, BlockShape, imagenet
from .traffic import CARDS, Card, Count, Pass, launch_pass


@contextmanager
def cuda_part(card: Card) -> Iterator[None]:
    """The composition inside takes the ops of csrc/cuda, as it does on that card where they are built."""
    with (
        mock.patch.object(stencils, "can_take", lambda x, kernels, stride: len(set(kernels)) == 1),
        mock.patch.object(launch, "architecture", lambda x: card.arch),
    ):
        yield


def ours(
    shape: BlockShape, dtype: torch.dtype, step: str, policy: str = "fast", card: Card | None = None
) -> list[Pass]:
    """Passes of one layer whose active candidate is `shape`: "weight", or "arch" with every other candidate probed.

    card: with the CUDA C++ part, as on that card; else Triton alone.
    """
    with cuda_part(card) if card else nullcontext(), recording() as launches, Count() as count:
        move_running(shape, forward(shape, dtype, policy)[-1])
        if step == "arch":
            gate(shape, dtype)
            probe(shape.others(), dtype)
        backward(shape, dtype, policy, weights=step == "weight")
    return [launch_pass(launched) for launched in launches] + count.passes


class _Eager(nn.Module):
    def __init__(self, shape: BlockShape, dtype: torch.dtype):
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


def eager(shape: BlockShape, dtype: torch.dtype, step: str) -> list[Pass]:
    """The same work in eager PyTorch, the weights frozen in an arch step."""
    x, grad = shape.x(dtype).requires_grad_(), shape.output(dtype)
    net = _Eager(shape, dtype)
    if step == "arch":
        net.requires_grad_(False)
    with Count() as count:
        out = net(x)
        if step == "arch":
            with torch.no_grad():
                for candidate in shape.layer():
                    value = out if candidate == shape else _Eager(candidate, dtype)(x)
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


def saved(shape: BlockShape, dtype: torch.dtype, policy: str) -> int:
    """Bytes kept for backward by a weight step: policy "eager", "fast" or "lean"."""
    x = shape.x(dtype).requires_grad_()
    if policy == "eager":
        net = _Eager(shape, dtype)
        return kept(net, x, [*net.parameters(), *net.buffers()])
    params = [p.requires_grad_() for p in shape.params(dtype)]
    return kept(lambda t: pf.ops.mbconv.mbconv(t, params, stride=shape.stride, training=True, policy=policy), x, params)


@dataclass
class Row:
    """Means over the candidates of a layer, each taken as the active one."""

    layer: str
    bytes: dict[tuple[str, str], float]  # (step, "eager" | "out of place" | "fast" | "lean")
    flops: dict[tuple[str, str], float]
    seconds: dict[tuple[str, str, str], float]  # (step, who, card)
    kept: dict[str, float]


def row(shape: BlockShape, dtype: torch.dtype) -> Row:
    bytes_, flops, seconds, kept_ = {}, {}, {}, {}
    candidates = shape.layer()
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
    known: dict[BlockShape, Row] = {}
    return [known.setdefault(s, None) or known.__setitem__(s, row(s, dtype)) or known[s] for s in imagenet(batch)]


def totals(batch: int, dtype: torch.dtype, card: Card, cuda: bool) -> dict[tuple[str, str], tuple[float, float]]:
    """(bytes, seconds on the card) of (step, policy): sums over all layers of the means over their candidates."""
    sums = {(step, policy): (0.0, 0.0) for step in ("weight", "arch") for policy in ("fast", "lean")}
    layers = imagenet(batch)
    for shape in dict.fromkeys(layers):
        share = layers.count(shape) / len(CANDIDATES)
        for (step, policy), (moved, seconds) in sums.items():
            counted = [p for c in shape.layer() for p in ours(c, dtype, step, policy, card if cuda else None)]
            moved += share * sum(p.bytes for p in counted)
            sums[step, policy] = moved, seconds + share * sum(p.seconds(card, dtype) for p in counted)
    return sums


def ratio(counted: list[Row], step: str, who: str, peer: str = "eager") -> float:
    """Bytes of a step over all layers, of the peer's; "out of place" is eager without the clones of in-place ReLU6."""
    return sum(r.bytes[step, who] for r in counted) / sum(r.bytes[step, peer] for r in counted)


def kept_ratio(counted: list[Row], who: str) -> float:
    return sum(r.kept[who] for r in counted) / sum(r.kept["eager"] for r in counted)


def main() -> None:
    """Prints the ratios to eager's bytes, and of the CUDA C++ part to Triton alone."""
    for dtype in (torch.bfloat16, torch.float32):
        counted = rows(64, dtype)
        print(dtype, {(s, w): round(ratio(counted, s, w), 3) for s in ("weight", "arch") for w in ("fast", "lean")},
              {w: round(kept_ratio(counted, w), 3) for w in ("fast", "lean")})  # fmt: skip
        for card in CARDS:
            alone, cuda = (totals(64, dtype, card, part) for part in (False, True))
            print(card.name, "with the CUDA C++ part, of Triton alone (bytes, roofline time):",
                  {k: tuple(round(b / a, 3) for a, b in zip(alone[k], cuda[k], strict=True)) for k in cuda},
                  "ms:", {k: round(v[1] * 1e3, 2) for k, v in cuda.items()})  # fmt: skip


if __name__ == "__main__":
    main()
