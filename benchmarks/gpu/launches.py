"""What a step would launch on a GPU, seen without one: the composition runs on meta tensors, its launches recorded.

Used by the table of compiled kernels (table.py), the traffic model (model.py), the tuner (trials.py) and the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.compiler import ASTSource

from proxyless_fast.ops.gpu.host import configs, launch, ops

from .shapes import BlockShape, imagenet

_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
}


@dataclass(frozen=True)
class RecordedLaunch:
    """One recorded launch: everything the compiler needs, and the tensors it touches."""

    kernel: Any
    grid: tuple[int, ...]
    config: configs.Config
    args: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name without its ending."""
        return self.kernel.fn.__name__.removesuffix("_kernel")

    @property
    def tensors(self) -> list[Tensor]:
        return [a for a in self.args if isinstance(a, Tensor)]

    def source(self) -> ASTSource:
        """As triton.jit would specialise it: absent tensors and 1 are constants, and alignment to 16 is known."""
        names = self.kernel.arg_names
        values = dict(zip(names, self.args, strict=False)) | self.constants | self.config.tile
        signature, constants, attrs = {}, {}, {}
        for i, name in enumerate(names):
            value = values[name]
            if isinstance(value, Tensor):
                signature[name] = "*" + _TYPES[value.dtype]
                aligned = value.storage_offset() * value.element_size() % 16 == 0
            elif self.kernel.params[i].do_not_specialize and value is not None:
                signature[name], aligned = "i32", False
            elif isinstance(value, int) and value != 1 and not self.kernel.params[i].is_constexpr:
                signature[name] = "i32"
                aligned = value % 16 == 0
            else:
                signature[name] = "constexpr"
                constants[name] = value
                aligned = False
            if aligned:
                attrs[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attrs)

    @property
    def key(self) -> tuple:
        """Equal for launches that compile to the same machine code."""
        source = self.source()
        return (
            self.name,
            tuple(source.signature.items()),
            tuple(sorted((str(k), v) for k, v in source.constants.items())),
            tuple(sorted(source.attrs)),
            self.config.warps,
            self.config.stages,
        )


@contextmanager
def recording(arch: int = 90) -> Iterator[list[RecordedLaunch]]:
    """Launches of the composition inside are collected instead of run."""
    launches: list[RecordedLaunch] = []

    def record(kernel, grid, config, *args, **constants):
        launches.append(RecordedLaunch(kernel, grid, config, args, constants))

    def config(kernel, x, width, **at_most):
        return configs.config(kernel, x.dtype, width, arch, **at_most)

    with mock.patch.object(launch, "run", record), mock.patch.object(launch, "config", config):
        yield launches


def forward(shape: BlockShape, dtype: torch.dtype, policy: str) -> tuple[Tensor, ...]:
    keep = {"none": 0, "lean": 1, "fast": 2}[policy]
    return ops.mbconv(shape.x(dtype), shape.params(), [], None, None, shape.stride, "relu6", True, 1e-3, keep)


def backward(shape: BlockShape, dtype: torch.dtype, policy: str, weights: bool) -> None:
    params, x, y = shape.params(), shape.x(dtype), shape.output(dtype)
    d = torch.empty(shape.batch, shape.out, shape.out, shape.ch, dtype=dtype, device="meta").permute(0, 3, 1, 2)
    d = d if policy == "fast" else d.new_empty(0)
    width = shape.ch * (2 if shape.expand > 1 else 1) + shape.co
    statistics = torch.empty(2 * width, dtype=torch.float64, device="meta")
    mean = torch.empty(shape.ci, device="meta") if shape.expand > 1 else None
    cov = torch.empty(shape.ci, shape.ci, device="meta") if shape.expand > 1 else None
    ops.mbconv_backward(y, x, y, d, statistics, params, mean, cov, shape.stride, "relu6", True, 1e-3, True, weights)


def move_running(shape: BlockShape, statistics: Tensor) -> None:
    """The running statistics of a block's norms move."""
    pixels = shape.batch * shape.size**2, shape.batch * shape.out**2
    ops.update_running(statistics, shape.running(), *pixels, 0.1)


def gate(shape: BlockShape, dtype: torch.dtype) -> None:
    """The gate gradient of the active path."""
    y, gamma = shape.output(dtype), torch.empty(shape.co, device="meta")
    ops.norm_dot(y, y, torch.empty(2 * shape.co, dtype=torch.float64, device="meta"), gamma, gamma, 1e-3)


def probe(shapes: list[BlockShape], dtype: torch.dtype) -> None:
    """The inactive candidates of a layer, which share x (and its Gram matrix, already known)."""
    ci = shapes[0].ci
    params = [s.params() for s in shapes]
    buffers = [t for shape in shapes for t in shape.running()]
    mean, cov = torch.empty(ci, device="meta"), torch.empty(ci, ci, device="meta")
    ops.mbconv_probe(
        shapes[0].x(dtype), shapes[0].output(dtype), [t for p in params for t in p], buffers, [len(p) for p in params],
        mean, cov, shapes[0].stride, "relu6", True, 0.1, 1e-3,
    )  # fmt: skip


def distinct(
    launches: list[RecordedLaunch], key: Callable[[RecordedLaunch], Any] = lambda launched: launched.key
) -> list[RecordedLaunch]:
    """The first launch of each kind, in order."""
    return list({key(launched): launched for launched in reversed(launches)}.values())[::-1]


def every_launch(
    batch: int, dtype: torch.dtype, arch: int = 90, shapes: list[BlockShape] | None = None
) -> list[RecordedLaunch]:
    """All launches of weight and arch steps, in both policies, over the given layers (default: the ImageNet space)."""
    with recording(arch) as launches:
        for layer in shapes if shapes is not None else imagenet(batch):
            for shape in layer.layer():
                move_running(shape, forward(shape, dtype, "fast")[-1])
                gate(shape, dtype)
                for policy, weights in (("fast", True), ("lean", True), ("fast", False)):
                    backward(shape, dtype, policy, weights)
            probe(layer.layer(), dtype)
    return launches
