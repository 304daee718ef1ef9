"""Compiles what tests run, once per content: the results are kept in build/tests, for every test and session."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "build" / "tests"


def compiler() -> list[str]:
    """The C++ compiler of the build as a command's start: $CXX, or the first of c++, g++, clang++."""
    found = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), "c++")
    return found.split()


def sources_of(*folders: Path) -> list[Path]:
    """Every file under the folders that a compilation may read."""
    suffixes = {".cpp", ".h", ".cu", ".cuh"}
    return sorted(file for folder in folders for file in folder.rglob("*") if file.suffix in suffixes)


def run(command: Sequence[str | Path]) -> str:
    """What a compiler says; its last words are the failure's message."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command[0]}: {done.stderr[-4000:]}"
    return done.stderr


def cached(name: str, reads: list[Path], command: Sequence[str], make: Callable[[Path], None]) -> Path:
    """The folder that `make` has filled, once for one content of the files it reads, its command and its compiler."""
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True).stdout
    content = b"".join(str(file.relative_to(ROOT)).encode() + file.read_bytes() for file in reads)
    digest = hashlib.sha256(version.encode() + " ".join(command).encode() + content).hexdigest()[:16]
    output = FOLDER / f"{name}-{digest}"
    if not output.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        for old in FOLDER.glob(f"{name}-*"):
            shutil.rmtree(old)
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            make(Path(folder) / "made")
            try:
                (Path(folder) / "made").rename(output)
            except OSError:
                if not output.exists():  # else another session was faster
                    raise
    return output


def compile_all(command: Sequence[str], sources: list[Path], folder: Path) -> dict[Path, str]:
    """Objects of the sources in `folder`, as many at a time as there are cores; what the compiler says of each."""
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = pool.map(lambda s: run([*command, "-c", s, "-o", folder / f"{s.stem}.o"]), sources)
        return dict(zip(sources, said, strict=True))


def executable(name: str, sources: list[Path], flags: list[str]) -> Path:
    """An executable of csrc/cuda and this folder's files, their objects compiled side by side."""
    command = [*compiler(), "-std=c++20", *flags, "-I", str(ROOT / "csrc"), "-I", str(Path(__file__).parent)]

    def make(folder: Path) -> None:
        compile_all(command, sources, folder)
        run([*command, *sorted(folder.glob("*.o")), "-o", folder / name])

    return cached(name, sources_of(ROOT / "csrc/cuda", Path(__file__).parent), command, make) / name
