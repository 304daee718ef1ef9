"""When the CUDA C++ stencils run the depthwise convolutions, and when they expand their input themselves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import launch
from .group import CandidateGroup


@lru_cache(maxsize=1)
def are_built() -> bool:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    ops = ("depthwise_forward", "depthwise_backward", "expand_depthwise_forward", "expand_depthwise_backward")
    return all(has(f"proxyless_fast::{op}", "CUDA") for op in ops)


def can_take(x: Tensor, kernels: Sequence[int], stride: int) -> bool:
    """Whether the stencils run convolutions of these sizes over x: built, on a GPU, of one size that they have."""
    return x.is_cuda and len(set(kernels)) == 1 and kernels[0] in (3, 5, 7) and stride in (1, 2) and are_built()


# Float32 operations in the time of one byte of memory, by the data sheets: A100 (and, below what they have, every card
# older than an H100), H100.
RIDGE = {80: 9.6, 90: 20.0}
WIDEST_EXPANDED = 96


def expansion_pays(ci: int, kernel: int, stride: int, arch: int) -> bool:
    """Whether expand and depthwise should be one launch, by the roofline of docs/gpu.md; half precision only.

    It saves writing and reading e and costs the halo's products and each element's norm and activation once more. That
    is time gained where the stencil waits for memory, which is where its 2 k^2 operations for each output are fewer
    than the ridge allows for the stride^2 values read and the one written, 2 bytes each. Beyond, it is level at best.
    And the chunks of 32 channels each read x again, from the second-level cache: with wide x that is as much as was
    saved.
    """
    ridge = RIDGE[90 if arch >= 90 else 80]
    return ci <= WIDEST_EXPANDED and 2 * kernel**2 <= ridge * 2 * (stride**2 + 1)


def can_expand(group: CandidateGroup) -> bool:
    """Whether e is made where it is used (`expand_depthwise_*`) and never stored."""
    kernels = [k for _, k, _ in group.taps]
    if group.w1 is None or group.x.dtype.itemsize != 2 or not can_take(group.x, kernels, group.stride):
        return False
    return expansion_pays(group.x.shape[1], kernels[0], group.stride, launch.architecture(group.x))
