"""Builds the emulation driver and speaks to it."""

import os
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tests.csrc.emulation.compile import ROOT, executable

HERE = Path(__file__).resolve().parent
ACTIVATIONS = ("relu6", "relu", "silu", "hardswish", "identity")  # csrc/cuda/kernels.h, Activation
TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


class Tiling(NamedTuple):
    """csrc/cuda/kernels.h, Tiling."""

    height: int
    width: int
    down: int
    across: int
    groups: int
    chunks: int
    threads: int
    shared_bytes: int


def tilings(shapes: list[tuple[int, ...]]) -> list[Tiling]:
    """The host's tilings for (backward, type, batch, channels, height, width, kernel, stride, expand)."""
    binary = executable("tilings", [HERE / "tilings.cpp", ROOT / "csrc/cuda/tiling.cpp"], ["-O1"])
    lines = "\n".join(" ".join(map(str, shape)) for shape in shapes)
    run = subprocess.run([binary], input=lines, capture_output=True, text=True, check=True)
    return [Tiling(*map(int, line.split())) for line in run.stdout.splitlines()]


class Emulated:
    """The kernels, run by a driver built with one sanitizer."""

    def __init__(self, sanitizer: str):
        flags = [
            "-O1",
            "-g1",
            f"-fsanitize={sanitizer}",
            "-fno-sanitize-recover=all",
            "-pthread",
            "-Wno-unknown-pragmas",
        ]
        kernels = ("depthwise_forward", "depthwise_backward", "expand_depthwise")
        sources = [*(HERE / f"{name}.cpp" for name in (*kernels, "driver")), ROOT / "csrc/cuda/tiling.cpp"]
        self.binary = executable(f"driver-{sanitizer.split(',')[0]}", sources, flags)

    def _call(
        self, x, weight, stride, scale, shift, gradient, mask, wanted, skew, groups, expand=(None, None, "identity")
    ) -> bytes:
        (b, ci, h, w), (c, _, _, k) = x.shape, weight.shape
        w1, norm1, activation = expand
        dz, d, affine = gradient
        flags = [scale is not None, affine is not None, mask, *wanted, weight.dtype != x.dtype]
        header = [dz is not None, TYPES[x.dtype], b, c, h, w, k, stride, *flags, skew, groups]
        header += [0 if w1 is None else ci, ACTIVATIONS.index(activation)]
        pieces = [x, weight, scale, shift, w1, norm1, dz, d, affine]
        data = b"".join(_raw(piece) for piece in pieces if piece is not None)
        run = self.run(struct.pack("18i", *map(int, header)) + data)
        assert run.returncode == 0, run.stderr.decode()[:4000]
        return run.stdout

    def run(self, request: bytes = b"") -> subprocess.CompletedProcess:
        """The driver on raw requests; on none it only starts, which a sanitizer may already refuse."""
        # Leaks are not what is looked for, and looking for them fails where ptrace is forbidden.
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        return subprocess.run([self.binary], input=request, capture_output=True, env=environment, timeout=300)

    def forward(self, x, weight, scale, shift, stride, skew=0, groups=0) -> tuple[Tensor, Tensor, Tensor]:
        """As ops.depthwise_forward. skew: bytes off alignment; groups: at most so many, 0 for the host's choice."""
        answer = self._call(x, weight, stride, scale, shift, (None, None, None), False, (False, False), skew, groups)
        b, c, h, w = x.shape
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        out = (b, (h - 1) // stride + 1, (w - 1) // stride + 1, c)
        d, mean, var = _split(answer, [(out, x.dtype), ((c,), wide), ((c,), wide)])
        return d.permute(0, 3, 1, 2), mean, var

    def backward(
        self, dz, d, affine, x, scale, shift, weight, stride, mask, wanted=(True, True), skew=0, groups=0
    ) -> list[Tensor]:
        """As ops.depthwise_backward; of q and dw, those wanted."""
        answer = self._call(x, weight, stride, scale, shift, (dz, d, affine), mask, wanted, skew, groups)
        b, c, h, w = x.shape
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        parts = [((b, h, w, c), x.dtype), (tuple(weight.shape), wide)]
        values = _split(answer, [part for part, want in zip(parts, wanted, strict=True) if want])
        return [values[0].permute(0, 3, 1, 2), *values[1:]] if wanted[0] else values

    def expand_forward(
        self, x, w1, norm1, weight, stride, activation, skew=0, groups=0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ops.expand_depthwise_forward."""
        nothing = (None, None)
        answer = self._call(
            x, weight, stride, *nothing, (None, *nothing), False, (False, False), skew, groups, (w1, norm1, activation)
        )
        (b, _, h, w), c = x.shape, w1.shape[0]
        out = (b, (h - 1) // stride + 1, (w - 1) // stride + 1, c)
        d, mean, var = _split(answer, [(out, x.dtype), ((c,), torch.float32), ((c,), torch.float32)])
        return d.permute(0, 3, 1, 2), mean, var

    def expand_backward(
        self, dz, d, affine, x, w1, norm1, weight, stride, activation, skew=0, groups=0
    ) -> tuple[Tensor, Tensor]:
        """As ops.expand_depthwise_backward."""
        answer = self._call(
            x, weight, stride, None, None, (dz, d, affine), False, (True, True), skew, groups, (w1, norm1, activation)
        )
        (b, _, h, w), c = x.shape, w1.shape[0]
        q, dw = _split(answer, [((b, h, w, c), x.dtype), (tuple(weight.shape), torch.float32)])
        return q.permute(0, 3, 1, 2), dw


def _raw(t: Tensor) -> bytes:
    pixels = t.dim() == 4 and t.shape[1] != 1  # the weights are (C, 1, k, k)
    return (t.permute(0, 2, 3, 1) if pixels else t).contiguous().view(torch.uint8).numpy().tobytes()


def _split(data: bytes, parts: list[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
    values, at = [], 0
    for shape, dtype in parts:
        size = torch.Size(shape).numel() * dtype.itemsize
        values.append(torch.frombuffer(bytearray(data[at : at + size]), dtype=dtype).view(shape))
        at += size
    assert at == len(data)
    return values
