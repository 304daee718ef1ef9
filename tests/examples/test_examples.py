"""Every example runs from end to end, fits on a screen, and prints what it promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"
SAID = {
    "readme_loop.py": ("'k3':", "Sequential("),
    "mixed_op_in_your_network.py": ("'mix':", "Net("),
    "search_with_your_loaders.py": ("predicted", "top-1"),
    "benchmark_two_methods.py": ("ours ", "darts "),
    "detection.py": ("MBConv3", "mean IoU"),
    "segmentation.py": ("'block 0':", "mIoU"),
    "distillation.py": ("'blocks.1':", "they agree on"),
}


def test_all_are_tried():
    assert {path.name for path in FOLDER.glob("*.py")} == set(SAID)


@pytest.mark.parametrize("name", SAID)
def test_example(name, tmp_path):
    path = FOLDER / name
    assert len(path.read_text().splitlines()) < 80
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(text in done.stdout for text in SAID[name]), done.stdout


def test_the_readme_s_loop_is_the_example():
    lines = [line.strip() for line in (FOLDER / "readme_loop.py").read_text().splitlines()]
    loop = lines[lines.index("for step in range(steps):") + 1 : lines.index("alphas.step()") + 1]
    readme = [line.strip() for line in (FOLDER.parent / "README.md").read_text().splitlines()]
    assert loop and all(line in readme for line in loop if line)
