"""Compiles what the benchmark will launch, on all cores, into Triton's cache: one by one it would take minutes.

Launches are seen on meta tensors and go through triton.jit's own path, with a driver that only knows the target, so
that the cache finds them again. What is not foreseen here is compiled when it is launched.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from proxyless_fast.ops.gpu.host import ops

from .launches import RecordedLaunch, distinct, every_launch, recording
from .shapes import BlockShape

Checked = tuple[int, int, int, int, int, int, int, int]  # batch, in, out, height, width, kernel, stride, expand


class _Target:
    """As much of a driver as compiling takes."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Argument:
    """A tensor as triton.jit looks at it."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self._address = tensor.dtype, tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self._address


def compile_as_jit(launched: RecordedLaunch) -> Any:
    """What triton.jit makes of a launch, without launching it."""
    args = [_Argument(a) if isinstance(a, Tensor) else a for a in launched.args]
    options = {"num_warps": launched.config.warps, "num_stages": launched.config.stages}
    return launched.kernel.warmup(*args, grid=(1,), **launched.config.tile, **launched.constants, **options)


def block_launches(shape: Checked, dtype: torch.dtype, arch: int) -> list[RecordedLaunch]:
    """What the correctness check of one block launches."""
    b, ci, co, h, w, k, s, e = shape
    params = BlockShape(b, ci, co, h, k, s, e).params(dtype)
    x = torch.empty(b, h, w, ci, dtype=dtype, device="meta").permute(0, 3, 1, 2)
    with recording(arch) as launches:
        mean, cov = ops.gram(x) if e > 1 else (None, None)
        for keep in (2, 1, 0):
            y, _, d, statistics = ops.mbconv(x, params, [], mean, cov, s, "relu6", True, 1e-3, keep)
            for weights in (True, False) if keep else ():
                ops.mbconv_backward(y, x, y, d, statistics, params, mean, cov, s, "relu6", True, 1e-3, True, weights)
        ops.mbconv_probe(x, y, params * 2, [], [len(params)] * 2, mean, cov, s, "relu6", True, 0.1, 1e-3)
    return launches


def _share(index: int, of: int, arch: int, capability: int, work: dict[str, Any]) -> int:
    """Every `of`-th of the launches, in a process of its own; returns how many."""
    driver.set_active(_Target(capability))
    launches = [
        one for dtype in work["checked_dtypes"] for s in work["checked"] for one in block_launches(s, dtype, arch)
    ]
    for dtype in work["dtypes"]:
        launches += every_launch(work["batch"], dtype, arch, work["layers"])
    mine = [one for one in distinct(launches) if work["depthwise"] or not one.name.startswith("depthwise")][index::of]
    for launched in mine:
        compile_as_jit(launched)
    return len(mine)


def precompile(arch: int, capability: int, processes: int = os.cpu_count() or 1, **work: Any) -> int:
    """Compile for rows `arch` of the table and a card of `capability`; returns the number of kernels.

    work: batch, layers (None: the ImageNet space), dtypes; checked blocks and their dtypes; depthwise: whether Triton's
    depthwise kernels are used.
    """
    # Processes are started afresh: CUDA does not survive a fork.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        shares = [pool.submit(_share, i, processes, arch, capability, work) for i in range(processes)]
        return sum(share.result() for share in shares)
