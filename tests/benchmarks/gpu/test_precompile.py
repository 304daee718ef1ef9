"""Compiling ahead: what is compiled is what will be launched."""

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import driver

from benchmarks.gpu import precompile
from benchmarks.gpu.launches import distinct


def test_kernels_compiled_ahead_are_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    checked = (2, 5, 7, 6, 5, 3, 1, 1)
    work = {"batch": 2, "layers": [], "dtypes": [], "checked": [checked], "checked_dtypes": [torch.bfloat16]}
    count = precompile.precompile(90, 90, 2, depthwise=False, **work)
    binaries = set(tmp_path.rglob("*.cubin"))
    assert len(binaries) == count > 5
    monkeypatch.setattr(driver, "_active", None)
    driver.set_active(precompile._Target(90))
    again = precompile.block_launches(checked, torch.bfloat16, 90)
    for launched in distinct([one for one in again if not one.name.startswith("depthwise")]):
        launched.kernel.device_caches.clear()  # as in a process that has compiled nothing yet
        precompile.compile_as_jit(launched)
    assert set(tmp_path.rglob("*.cubin")) == binaries
