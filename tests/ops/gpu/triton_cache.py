"""One Triton cache for all tests, in build/ and kept between runs: no kernel is compiled twice.

Triton names an entry by the kernel's source with all that it calls, its arguments and options, the compiler and its own
sources, so that an entry can be missing but not stale. `make clean` removes them all.
"""

from pathlib import Path

import pytest

CACHE = Path(__file__).resolve().parents[3] / "build" / "triton"


@pytest.fixture(scope="session", autouse=True)
def triton_cache():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(CACHE))
        patch.setenv("TRITON_STORE_BINARY_ONLY", "1")  # a tenth of the space
        yield
