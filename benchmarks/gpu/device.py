"""The GPU as the benchmark sees it; tests put a device of their own in its place."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from proxyless_fast.ops.gpu.host import configs

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Cuda:
    """Time by events, memory by the caching allocator."""

    name = "cuda"

    def __init__(self) -> None:
        self._flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")  # larger than any second-level cache

    def describe(self) -> dict[str, Any]:
        return {
            "card": torch.cuda.get_device_name(),
            "capability": self.capability(),
            "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30,
            "torch": torch.__version__,
        }

    def capability(self) -> int:
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor

    def table_architecture(self) -> int:
        """Whose rows of the table of configurations serve this device."""
        return configs.architecture(torch.cuda.current_device())

    def time(self, call: Callable[[], Any], cold: bool = False) -> float:
        """Seconds of one call. cold: its data is not in the caches, and the host's part is hidden behind other work."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if cold:
            self._flush.zero_()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def peak(self, call: Callable[[], Any]) -> int:
        """The most bytes allocated while a call runs, with what was allocated before."""
        self.clear()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def free(self) -> int:
        """Bytes that this process could have."""
        self.clear()
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()

    @contextmanager
    def limited(self, limit: int) -> Iterator[None]:
        """Within, the allocator takes at most so many bytes of the device."""
        total = torch.cuda.get_device_properties(0).total_memory
        self.clear()
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    def clear(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
