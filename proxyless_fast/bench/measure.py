"""How things are measured: time, kept activations, resident memory of a fresh process, and the speed of torch.mm."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import proxyless_fast as pf


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def percentiles(times: Iterable[float]) -> dict[str, float]:
    """p20, p50 and p80 of the times, interpolated. Raises RuntimeError where there are none."""
    values = torch.tensor(list(times), dtype=torch.float64)
    return {f"p{q}": float(torch.quantile(values, q / 100)) for q in (20, 50, 80)}


class MatmulRate:
    """FLOP/s of torch.mm on two 2048 x 2048 float32 matrices: the limit that every figure is held against."""

    size = 2048

    def __init__(self) -> None:
        self._a, self._b = torch.rand(2, self.size, self.size).unbind()
        self._times: list[float] = []
        torch.mm(self._a, self._b)

    def sample(self) -> None:
        """Time one product; called between the steps, so that the machine's moods meet it as they meet them."""
        self._times.append(seconds(lambda: torch.mm(self._a, self._b)))

    @property
    def flops_per_second(self) -> float:
        if not self._times:
            self.sample()
        return 2 * self.size**3 / percentiles(self._times)["p50"]


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Within, counts the bytes that autograd keeps for backward: each storage once, without those of `owned` tensors.

    owned: what is in memory anyway (parameters, buffers). Custom ops count by what they save. `total` is in bytes.
    """

    def __init__(self, owned: Iterable[Tensor] = ()) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        self._owned = {tensor.untyped_storage().data_ptr() for tensor in owned}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def __enter__(self) -> SavedBytes:  # type: ignore[override]
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._owned:
            self._storages[storage.data_ptr()] = storage  # held, so that its address is not given out twice
        return tensor.detach()

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())


def status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS is resident now, VmHWM the most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(f"field {field!r} is not in /proc/self/status")


def available_bytes() -> int:
    """Memory that could be taken without swapping (MemAvailable)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise KeyError("field 'MemAvailable' is not in /proc/meminfo")


def peak_bytes(target: str, **arguments: Any) -> int:
    """Peak resident bytes that one call adds to a fresh process (see fresh.py).

    target: "module:function"; function(**arguments) prepares and returns (warm, call). Raises RuntimeError with what
    the process said where it failed.
    """
    environment = dict(os.environ)
    # glibc moves its threshold up as it goes, and memory below the threshold is not given back to the system.
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "proxyless_fast.bench.fresh", target, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{target} failed in a fresh process (exit code {done.returncode}): {last}")
    return int(done.stdout.split()[-1])


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": pf.instruction_set(),
        "torch": torch.__version__,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def machine_line(of: dict[str, Any]) -> str:
    """The machine in one line."""
    cores = f"{of['threads']} of {of['cores']} cores"
    return f"{of['cpu']}, {cores}, {of['instruction_set']}, torch {of['torch']}, {of['date']}"
