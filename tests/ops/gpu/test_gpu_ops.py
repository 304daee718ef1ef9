"""The GPU ops without a GPU: kernels executed by Triton's interpreter, and nothing of Triton imported on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FILES = sorted(path.name for path in (HERE / "interpreted").glob("test_*.py"))
triton = pytest.importorskip("triton")


@pytest.mark.parametrize("name", FILES)
def test_in_the_interpreter(name):
    """A process of its own, because the interpreter is chosen when Triton is imported; it has one thread."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    path = HERE / "interpreted" / name
    done = subprocess.run([*command, path], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-7000:]


def test_triton_is_imported_when_a_gpu_asks_for_it_and_not_before():
    code = (
        "import sys, torch, proxyless_fast, proxyless_fast.ops.gpu;"
        "proxyless_fast.MBConv(4, 4)(torch.randn(2, 4, 5, 5)).sum().backward();"
        "ours = [m for m in sys.modules if m.startswith('proxyless_fast.ops.gpu.')];"
        "print(ours, [m for m in sys.modules if m == 'triton.runtime.interpreter'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[] []"


def test_the_ops_are_there_for_cuda():
    import proxyless_fast.ops.gpu  # noqa: F401

    for name in ("gram", "mbconv", "mbconv_backward", "mbconv_probe", "norm_dot", "update_running"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"proxyless_fast::{name}", "CUDA"), name


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, "no GPU"),
        ({"dtype": torch.float64}, "float64"),
        ({"channels": 600}, "600"),
        ({"activation": "gelu"}, "gelu"),
    ],
)
def test_the_predicate_says_why_not(change, reason):
    from proxyless_fast.ops.gpu import can_run

    channels = change.get("channels", 8)
    x = torch.empty(1, channels, 4, 4, dtype=change.get("dtype", torch.float32))
    taken, why = can_run(x, channels, 8, change.get("activation", "relu6"))
    assert not taken
    assert reason in why
