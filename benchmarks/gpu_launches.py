"""What a step would launch on a GPU, seen without one: the composition runs on meta tensors, its launches recorded.

Used by the table of compiled kernels (gpu_table.py), the traffic model (gpu_model.py) and the tests.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from proxyless_fast.ops.triton import compose, configs, launch

_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
}


@dataclass(frozen=True)
class Launch:
    """One recorded launch: everything the compiler needs, and the tensors it touches."""

    kernel: Any
    grid: tuple[int, ...]
    config: configs.Config
    args: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

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
def recording(arch: int = 90) -> Iterator[list[Launch]]:
    """Launches of the composition inside are collected instead of run."""
    launches: list[Launch] = []

    def record(kernel, grid, config, *args, **constants):
        launches.append(Launch(kernel, grid, config, args, constants))

    def config(kernel, x, width, **at_most):
        return configs.config(kernel, x.dtype, width, arch, **at_most)

    with mock.patch.object(launch, "run", record), mock.patch.object(launch, "config", config):
        yield launches


def _values(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Normal random numbers, where there is something to hold them."""
    empty = torch.empty(shape, dtype=dtype, device=device)
    return empty if device == "meta" else empty.normal_()


@dataclass(frozen=True)
class Shape:
    """A candidate MBConv at its place in a network."""

    batch: int
    ci: int
    co: int
    size: int
    kernel: int
    stride: int
    expand: int

    def __str__(self) -> str:
        return f"{self.ci}-{self.co} {self.size}² k{self.kernel} s{self.stride} e{self.expand}"

    @property
    def ch(self) -> int:
        return self.ci * self.expand

    @property
    def out(self) -> int:
        return (self.size - 1) // self.stride + 1

    def params(self, dtype: torch.dtype = torch.float32, device: str = "meta") -> list[Tensor]:
        wide, narrow = [(self.ch,)] * 2, [(self.co,)] * 2
        shapes = [(self.ch, self.ci, 1, 1), *wide] if self.expand > 1 else []
        shapes += [(self.ch, 1, self.kernel, self.kernel), *wide, (self.co, self.ch, 1, 1), *narrow]
        return [_values(shape, dtype, device) for shape in shapes]

    def running(self, device: str = "meta") -> list[Tensor]:
        """Mean and variance buffers of the norms."""
        widths = [self.ch] * (2 if self.expand > 1 else 1) + [self.co]
        return [_values((c,), torch.float32, device) for c in widths for _ in range(2)]

    def x(self, dtype: torch.dtype, device: str = "meta") -> Tensor:
        return _values((self.batch, self.size, self.size, self.ci), dtype, device).permute(0, 3, 1, 2)

    def output(self, dtype: torch.dtype, device: str = "meta") -> Tensor:
        out = (self.size - 1) // self.stride + 1
        return _values((self.batch, out, out, self.co), dtype, device).permute(0, 3, 1, 2)


def imagenet(batch: int) -> list[Shape]:
    """The mixed layers of the paper's ImageNet space at 224x224, each with its widest candidate (7x7, e = 6)."""
    shapes, width, size = [], 16, 112
    for out, count, stride in ((24, 4, 2), (40, 4, 2), (80, 4, 2), (96, 4, 1), (192, 4, 2), (320, 1, 1)):
        for i in range(count):
            s = stride if i == 0 else 1
            shapes.append(Shape(batch, width, out, size, 7, s, 6))
            width, size = out, (size - 1) // s + 1
    return shapes


CANDIDATES = tuple((kernel, expand) for kernel in (3, 5, 7) for expand in (3, 6))


def forward(shape: Shape, dtype: torch.dtype, policy: str) -> tuple[Tensor, ...]:
    keep = {"none": 0, "lean": 1, "fast": 2}[policy]
    return compose.mbconv(shape.x(dtype), shape.params(), [], None, None, shape.stride, "relu6", True, 1e-3, keep)


def backward(shape: Shape, dtype: torch.dtype, policy: str, weights: bool) -> None:
    params, x, y = shape.params(), shape.x(dtype), shape.output(dtype)
    out = (shape.size - 1) // shape.stride + 1
    d = torch.empty(shape.batch, out, out, shape.ch, dtype=dtype, device="meta").permute(0, 3, 1, 2)
    d = d if policy == "fast" else d.new_empty(0)
    width = shape.ch * (2 if shape.expand > 1 else 1) + shape.co
    statistics = torch.empty(2 * width, dtype=torch.float64, device="meta")
    mean = torch.empty(shape.ci, device="meta") if shape.expand > 1 else None
    cov = torch.empty(shape.ci, shape.ci, device="meta") if shape.expand > 1 else None
    compose.mbconv_backward(y, x, y, d, statistics, params, mean, cov, shape.stride, "relu6", True, 1e-3, True, weights)


def running(shape: Shape, statistics: Tensor) -> None:
    """The running statistics of a block's norms move."""
    pixels = shape.batch * shape.size**2, shape.batch * shape.out**2
    compose.update_running(statistics, shape.running(), *pixels, 0.1)


def gate(shape: Shape, dtype: torch.dtype) -> None:
    """The gate gradient of the active path."""
    y, gamma = shape.output(dtype), torch.empty(shape.co, device="meta")
    compose.norm_dot(y, y, torch.empty(2 * shape.co, dtype=torch.float64, device="meta"), gamma, gamma, 1e-3)


def probe(shapes: list[Shape], dtype: torch.dtype) -> None:
    """The inactive candidates of a layer, which share x (and its Gram matrix, already known)."""
    ci = shapes[0].ci
    params = [s.params() for s in shapes]
    buffers = [t for shape in shapes for t in shape.running()]
    mean, cov = torch.empty(ci, device="meta"), torch.empty(ci, ci, device="meta")
    compose.mbconv_probe(
        shapes[0].x(dtype), shapes[0].output(dtype), [t for p in params for t in p], buffers, [len(p) for p in params],
        mean, cov, shapes[0].stride, "relu6", True, 0.1, 1e-3,
    )  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    registers: int
    stack: int  # bytes per thread in local memory: 0 means no spills
    shared: int  # bytes per block
    warps: int
    arch: int

    @property
    def occupancy(self) -> float:
        """Resident warps over the 64 that a multiprocessor of sm_80 or sm_90 holds, by registers and shared memory."""
        shared_total = {80: 164, 90: 228}[self.arch] * 1024
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        blocks = min(65536 // registers, shared_total // (self.shared + 1024), 32, 64 // self.warps)
        return blocks * self.warps / 64


_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_launch(launched: Launch, arch: int, scratch: Path) -> Compiled:
    """Machine code for sm_`arch`, and what the assembler says of it; `scratch` is a folder for the binary."""
    options = {"num_warps": launched.config.warps, "num_stages": launched.config.stages}
    binary = triton.compile(launched.source(), target=GPUTarget("cuda", arch, 32), options=options)
    path = scratch / f"{launched.name}.cubin"
    path.write_bytes(binary.asm["cubin"])
    usage = subprocess.run(
        [str(_CUOBJDUMP), "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
    ).stdout
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(found["REG"], found["STACK"] + found["LOCAL"], binary.metadata.shared, launched.config.warps, arch)


def distinct(launches: list[Launch], key: Callable[[Launch], Any] = lambda launched: launched.key) -> list[Launch]:
    """The first launch of each kind, in order."""
    return list({key(launched): launched for launched in reversed(launches)}.values())[::-1]


def every_launch(batch: int, dtype: torch.dtype, arch: int = 90, shapes: list[Shape] | None = None) -> list[Launch]:
    """All launches of weight and arch steps, in both policies, over the given layers (default: the ImageNet space)."""
    with recording(arch) as launches:
        for layer in shapes if shapes is not None else imagenet(batch):
            all_candidates = [
                Shape(batch, layer.ci, layer.co, layer.size, kernel, layer.stride, e) for kernel, e in CANDIDATES
            ]
            for shape in all_candidates:
                running(shape, forward(shape, dtype, "fast")[-1])
                gate(shape, dtype)
                for policy, weights in (("fast", True), ("lean", True), ("fast", False)):
                    backward(shape, dtype, policy, weights)
            probe(all_candidates, dtype)
    return launches


__all__ = [
    "CANDIDATES",
    "Compiled",
    "Launch",
    "Shape",
    "backward",
    "compile_launch",
    "distinct",
    "every_launch",
    "forward",
    "gate",
    "imagenet",
    "launch",
    "probe",
    "recording",
    "running",
]
