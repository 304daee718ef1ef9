"""proxyless_fast: ProxylessNAS (Cai, Zhu, Han, ICLR 2019) as a fast engine with a thin search loop."""

import torch  # noqa: F401  (loads libtorch, which the extension links against)

from . import _C, ops, spaces  # type: ignore[attr-defined]  # _C is compiled
from .blocks import Identity, MBConv, Zero, candidate
from .gates import activate_most_likely, arch_parameters, derive, mixed_ops, rescale, sample, weight_parameters
from .mixed import MixedOp
from .shapes import macs, parameters

__version__ = "0.1.0"
build_info = _C.build_info
instruction_set = _C.instruction_set

__all__ = [
    "Identity",
    "MBConv",
    "MixedOp",
    "Zero",
    "activate_most_likely",
    "arch_parameters",
    "build_info",
    "candidate",
    "derive",
    "instruction_set",
    "macs",
    "mixed_ops",
    "ops",
    "parameters",
    "rescale",
    "sample",
    "spaces",
    "weight_parameters",
]
