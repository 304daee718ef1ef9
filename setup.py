"""Builds proxyless_fast._C with CMake and ninja against the torch of the running environment."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def _require(module: str):
    try:
        return __import__(module)
    except ImportError:
        sys.exit(
            f"proxyless_fast: the build needs the package {module!r} in this environment; install it and run "
            "`pip install --no-build-isolation .`"
        )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def _cuda_architectures(torch) -> tuple[list[str], str]:
    """The architectures to build CUDA kernels for, as CMake takes them, none for a build without; and why."""
    architectures = []
    for entry in os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if match is None:
            sys.exit(f"proxyless_fast: TORCH_CUDA_ARCH_LIST has {entry!r}; entries look like 8.0, 9.0a or 10.0+PTX.")
        architectures.append("".join(part or "" for part in match.groups()))
    if architectures:
        return architectures, "TORCH_CUDA_ARCH_LIST says so"
    if _is_set("FORCE_CUDA"):
        return ["all"], "FORCE_CUDA is set"
    if torch.version.cuda is None:  # ROCm builds have torch.version.hip: the GPU path there is Triton alone
        return [], f"torch {torch.__version__} is not a CUDA build"
    if not torch.cuda.is_available():
        return [], "no GPU was found, and neither FORCE_CUDA nor TORCH_CUDA_ARCH_LIST is set"
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"{major}{minor}" for major, minor in sorted(found)], "of the GPUs of this machine"


def _cuda_options(torch) -> list[str]:
    architectures, why = _cuda_architectures(torch)
    home = os.environ.get("CUDA_HOME")
    if home and "CUDACXX" not in os.environ:
        os.environ["CUDACXX"] = str(Path(home) / "bin" / "nvcc")
    return [
        f"-DTORCH_CUDA_VERSION={(torch.version.cuda or '').split('.')[0]}",
        f"-DCUDA_ARCHITECTURES={';'.join(architectures)}",
        f"-DCUDA_REASON={why}",
        f"-DFORCE_CUDA={'ON' if _is_set('FORCE_CUDA') else 'OFF'}",
    ]


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch, pybind11 = _require("torch"), _require("pybind11")
        from torch.utils import cpp_extension

        compiler = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
        if compiler is None or shutil.which(compiler.split()[0]) is None:
            sys.exit(
                f"proxyless_fast: no C++ compiler found ({compiler or 'c++, g++, clang++'}); install one "
                "(Debian, Ubuntu: `apt-get install g++`) or name it in the environment variable CXX."
            )
        # The environment's own CMake first: an activated environment is not a given, and the system's may be old.
        here = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        cmake = shutil.which("cmake", path=here)
        if cmake is None:
            sys.exit("proxyless_fast: cmake not found; `pip install cmake ninja` brings it.")

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        standard = 20 if tuple(int(v) for v in torch.__version__.split(".")[:2]) >= (2, 12) else 17
        subprocess.run(
            [
                cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
                f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=here) or 'ninja'}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DCMAKE_CXX_COMPILER={compiler}",
                f"-DTORCH_INCLUDE_DIRS={';'.join(cpp_extension.include_paths())}",
                f"-DTORCH_LIBRARY_DIR={cpp_extension.library_paths()[0]}",
                f"-DTORCH_CXX_STANDARD={standard}",
                f"-DTORCH_VERSION={torch.__version__}",
                f"-DWARNINGS_AS_ERRORS={'ON' if _is_set('PROXYLESS_FAST_WERROR') else 'OFF'}",
                *_cuda_options(torch),
            ],
            check=True,
        )  # fmt: skip
        subprocess.run([cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a process that runs with the old library keeps it.
        fresh = output.with_name(output.name + ".new")
        shutil.copy2(build / output.name, fresh)
        fresh.replace(output)


try:
    setup(ext_modules=[Extension("proxyless_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
except subprocess.CalledProcessError:
    sys.exit("proxyless_fast: the extension was not built; the first error above says why.")
