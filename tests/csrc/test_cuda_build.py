"""The whole CUDA part, host entries included, compiles without a warning and links, on a machine without a GPU."""

import os
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from tests.csrc.emulation import resources
from tests.csrc.emulation.compile import ROOT, cached, compiler, run, sources_of

pytestmark = [
    pytest.mark.skipif(resources.nvcc() is None, reason="no nvcc in PATH to compile the CUDA kernels with"),
    pytest.mark.skipif(torch.version.cuda is None, reason="host entries need the headers of a torch built for CUDA"),
]


def test_host_entries_compile_and_link():
    """Nothing they call is missing: kernels, tilings, the ops for every device, torch, c10_cuda, the CUDA runtime."""
    home = resources.toolkit()
    sources = [*sorted(ROOT.glob("csrc/cuda/**/*.cpp")), *sorted(ROOT.glob("csrc/generic/*.cpp"))]
    includes = [*cpp_extension.include_paths(), str(home / "include")]
    flags = ["-std=c++20", "-O0", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-I", str(ROOT / "csrc")]
    command = [*compiler(), *flags, *(part for path in includes for part in ("-isystem", path))]
    # The rest of the link line: what CMakeLists.txt names.
    paths = [*cpp_extension.library_paths(), *cpp_extension.library_paths("cuda"), str(home / "lib64")]
    libraries = [*(f"-L{path}" for path in paths), "-lc10", "-lc10_cuda", "-ltorch_cpu", "-ltorch", "-lcudart"]

    def make(folder: Path) -> None:
        folder.mkdir()
        unit = folder / "host.cpp"  # torch's headers are most of each file's time
        unit.write_text("".join(f'#include "{os.path.relpath(source, ROOT / "csrc")}"\n' for source in sources))
        objects = sorted(resources.objects().glob("*.o"))
        run([*command, unit, *objects, "-Wl,--no-undefined", *libraries, "-o", folder / "host.so"])

    reads = sources_of(ROOT / "csrc/cuda", ROOT / "csrc/generic")
    assert (cached("cuda-host", reads, [*command, torch.__version__], make) / "host.so").exists()
