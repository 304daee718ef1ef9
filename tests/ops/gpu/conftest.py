"""The GPU ops' tests share one Triton cache."""

from tests.ops.gpu.triton_cache import triton_cache  # noqa: F401  (a fixture)
