"""What every test shares: the golden data beside the checkout, small nets, seeds."""

import os
from pathlib import Path

import pytest
import torch

from tests.csrc.emulation import emulate


def _find_shared() -> Path | None:
    wanted = os.environ.get("PROXYLESS_SHARED")
    places = [Path(wanted)] if wanted else [Path(__file__).resolve().parents[1].parent / "shared"]
    return next((place for place in places if (place / "golden").is_dir()), None)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with what the official code computed; it is not part of the repository."""
    place = _find_shared()
    if place is None:
        message = "golden data not found: set PROXYLESS_SHARED, or put the folder shared/ beside the checkout"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return place


@pytest.fixture(scope="session")
def checked() -> emulate.Emulated:
    """CUDA kernels on the CPU, stop at a read or write outside a tensor or shared memory, misaligned or overflowing."""
    return emulate.Emulated("address,alignment,bounds,shift,signed-integer-overflow")


# What compiles, emulates, interprets or runs a whole program; `make test-quick` leaves it out.
SLOW = ("bench", "benchmarks", "csrc", "distributed", "examples", "ops/gpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        place = item.path.relative_to(Path(__file__).parent).as_posix()
        if place.startswith(tuple(f"{folder}/" for folder in SLOW)):
            item.add_marker(pytest.mark.slow)
    # The longest first, so that two processes end together.
    items.sort(key=lambda item: "test_in_the_interpreter" not in item.name)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
