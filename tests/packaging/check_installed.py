"""What an installed wheel must be able to do, without the repository: run by `make dist` in a clean environment."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np

import proxyless_fast as pf

COMMAND = str(Path(sysconfig.get_path("scripts")) / "proxyless-fast")


def write_idx(folder: Path, images: int = 256, side: int = 12) -> None:
    """Small random images in Fashion-MNIST's files, each brighter in the rows that its label names."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for part, count in (("train", images), ("t10k", images // 2)):
        labels = random.integers(0, 4, count, dtype=np.uint8)
        pixels = random.integers(0, 100, (count, side, side), dtype=np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            image[3 * label : 3 * label + 3] += 120
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = b"\0\0\x08" + bytes([array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())


def run(*arguments: str) -> str:
    done = subprocess.run([COMMAND, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def main() -> None:
    home = Path(pf.__file__).parent
    assert home.is_relative_to(sysconfig.get_path("purelib")) or home.is_relative_to(sysconfig.get_path("platlib")), (
        home
    )
    assert (home / "py.typed").is_file(), "the wheel lacks py.typed"
    assert pf.__version__ == importlib.metadata.version("proxyless-fast")
    data = Path("data")
    write_idx(data)
    printed = run(
        "search", "--all", "--data", str(data), "--candidates", "3x3_MBConv3", "5x5_MBConv3", "--batch-size", "32",
        "--epochs", "1", "--warmup-epochs", "1", "--train-epochs", "1", "--repeats", "3", "--workers", "0",
    )  # fmt: skip
    assert "test accuracy" in printed, printed
    report = json.loads(Path("runs/default/report.json").read_text())
    assert report["export"]["difference"] < 1e-3
    assert "--baselines" in run("bench", "--help")
    run("bench", "--quick", "--kinds", "weight", "--baselines", "ours", "generic", "--steps", "1", "--out", "bench")
    assert Path("bench/bench.json").is_file()
    shutil.rmtree("runs")
    print(
        f"proxyless_fast {pf.__version__} from a wheel: search --all, bench and py.typed are there; Python "
        f"{sys.version.split()[0]}"
    )


if __name__ == "__main__":
    main()
