"""Machine code of a launch, and what the assembler says of it; no GPU is needed."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from .launches import RecordedLaunch

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


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


def compile_launch(launched: RecordedLaunch, arch: int, scratch: Path) -> Compiled:
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
