"""What the tests of the GPU benchmark share: a quick clock, no launches, subjects of their own, one Triton cache."""

import pytest
import torch

import proxyless_fast.bench.baselines as baselines
from benchmarks.gpu import blocks, steps
from proxyless_fast.ops.gpu.host import launch
from tests.ops.gpu.triton_cache import triton_cache  # noqa: F401  (a fixture)


@pytest.fixture(autouse=True)
def one_thread():
    """What runs here is so small that a second thread only waits, for long where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def quick(monkeypatch):
    """As few timed runs as there may be."""
    monkeypatch.setattr(steps, "SECONDS", 0)
    monkeypatch.setattr(blocks, "SECONDS", 0)
    monkeypatch.setattr(steps, "PATHS", 2)


@pytest.fixture
def no_launches(monkeypatch):
    """Triton's launches do nothing: their tensors are meta tensors, or nobody reads them."""
    monkeypatch.setattr(launch, "run", lambda *args, **constants: None)


@pytest.fixture
def registry(monkeypatch):
    """Enter a subject for this test: its name, class, and whether it counts as slow to make."""

    def enter(name, subject, slow=False):
        def build(settings):
            return subject(settings.net(), True, settings)

        monkeypatch.setitem(baselines.BASELINES, name, baselines.Baseline(name, "", build, slow=slow))

    return enter
