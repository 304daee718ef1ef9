"""What the compiled CUDA kernels need on a card: registers, spills, shared memory, occupancy.

`python -m tests.csrc.emulation.resources` prints the tables of docs/generated/gpu-stencils.md.
"""

import functools
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from tests.csrc.emulation.compile import ROOT, cached, compile_all, sources_of
from tests.csrc.emulation.emulate import Tiling, tilings

FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr"]  # as CMakeLists.txt has them
KERNEL = re.compile(r"\d((?:expand_)?depthwise_(?:forward|backward))I(6__half|13__nv_bfloat16|f)Li(\d)ELi(\d)E")
NAMES = {"6__half": "fp16", "13__nv_bfloat16": "bf16", "f": "fp32"}
TYPE = {"fp16": 0, "bf16": 1, "fp32": 2}
# Of a multiprocessor: shared memory in KiB, of which each block takes one more.
SHARED = {80: 164, 90: 228}


class Kernel(NamedTuple):
    """One line of ptxas -v. name: a stencil's with its dtype, kernel and stride, or a mangled name."""

    name: str
    dtype: str
    kernel: int
    stride: int
    registers: int
    stack: int
    spills: int


def nvcc() -> str | None:
    """nvcc of the PATH."""
    return shutil.which("nvcc")


def toolkit() -> Path:
    """The folder of nvcc's toolkit, as nvcc itself says it: nvcc in PATH may be a link or a script."""
    said = subprocess.run([str(nvcc()), "--dryrun", "none.cu"], capture_output=True, text=True).stderr
    return Path(re.search(r"TOP=(\S+)", said)[1]).resolve()


@functools.cache
def objects() -> Path:
    """A folder with the objects of csrc/cuda/kernels for sm_80 and sm_90, and in *.txt what ptxas says of each."""
    sources = sorted(ROOT.glob("csrc/cuda/kernels/*.cu"))
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in SHARED]
    command = [str(nvcc()), *FLAGS, *targets, "-Xptxas", "-v", "-Xcompiler", "-fPIC", "-I", str(ROOT / "csrc")]

    def make(folder: Path) -> None:
        for source, report in compile_all(command, sources, folder).items():
            (folder / f"{source.stem}.txt").write_text(report)

    return cached("machine-code", sources_of(ROOT / "csrc/cuda"), command, make)


def compile_kernels(architecture: int) -> list[Kernel]:
    """What ptxas says of every kernel in csrc/cuda for sm_<architecture>."""
    return sorted(k for report in objects().glob("*.txt") for k in parse(report.read_text(), architecture))


def parse(report: str, architecture: int) -> list[Kernel]:
    """The kernels for one architecture of a ptxas -v report."""
    pattern = re.compile(
        rf"Compiling entry function '(\S+)' for 'sm_{architecture}'.*?(\d+) bytes stack frame,"
        r" (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    kernels = []
    for name, stack, stores, loads, registers in pattern.findall(report):
        match = KERNEL.search(name)
        label = (match[1], NAMES[match[2]], int(match[3]), int(match[4])) if match else (name, "", 0, 0)
        kernels.append(Kernel(*label, int(registers), int(stack), int(stores) + int(loads)))
    return kernels


def resident_blocks(architecture: int, registers: int, threads: int, shared_bytes: int) -> int:
    """Blocks of one kernel that a multiprocessor holds: each of its four parts has 16384 registers for whole warps."""
    warps = threads // 32
    by_registers = 4 * (16384 // (-(-registers // 8) * 8 * 32)) // warps
    by_shared = SHARED[architecture] * 1024 // (shared_bytes + 1024)
    return min(by_registers, by_shared, 64 // warps, 32)


def rows(architecture: int, shape: tuple[int, int, int, int], expand: int) -> list[tuple[Kernel, Tiling, int]]:
    """Every depthwise kernel with its tiling for (batch, channels, height, width) and its resident blocks.

    expand: channels of x in the kernels that expand it.
    """
    kernels = [kernel for kernel in compile_kernels(architecture) if kernel.dtype]
    questions = [
        (int("backward" in k.name), TYPE[k.dtype], *shape, k.kernel, k.stride, expand * ("expand" in k.name))
        for k in kernels
    ]
    return [
        (k, t, resident_blocks(architecture, k.registers, t.threads, t.shared_bytes))
        for k, t in zip(kernels, tilings(questions), strict=True)
    ]


def table(shape: tuple[int, int, int, int] = (64, 144, 56, 56), expand: int = 24) -> str:
    """Markdown, one row per kernel, sm_80 and sm_90 side by side."""
    lines = [
        f"Tile, threads and shared memory as chosen for batch {shape[0]}, {shape[1]} channels, {shape[2]}x{shape[3]},"
        f" expanded from {expand}.",
        "",
        "| kernel | dtype | k | stride | tile | threads | shared KB | registers sm_80, sm_90 | spills |"
        " warps per SM sm_80, sm_90 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (a, t, on_a), (b, _, on_b) in zip(rows(80, shape, expand), rows(90, shape, expand), strict=True):
        warps = t.threads // 32
        lines.append(
            f"| `{a.name}` | {a.dtype} | {a.kernel} | {a.stride} | {t.height} x {t.width} | {t.threads} |"
            f" {t.shared_bytes / 1024:.1f} | {a.registers}, {b.registers} | {a.spills + b.spills} |"
            f" {on_a * warps}, {on_b * warps} of 64 |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
