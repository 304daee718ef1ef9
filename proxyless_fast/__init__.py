"""proxyless_fast: ProxylessNAS (Cai, Zhu, Han, ICLR 2019) as a fast engine with a thin search loop."""

import torch  # noqa: F401  (loads libtorch, which the extension links against)

from . import _C, data, export, latency, ops, report, search, spaces  # type: ignore[attr-defined]  # _C is compiled
from .blocks import Identity, MBConv, Zero, candidate
from .export import from_official
from .gates import activate_most_likely, arch_parameters, derive, mixed_ops, rescale, sample, weight_parameters
from .graphs import set_graphs
from .latency import LatencyTable, expected_latency, profile
from .mixed import MixedOp
from .policy import set_policy
from .search import Search, SearchConfig, objective
from .shapes import macs, parameters

__version__ = "0.1.0"
build_info = _C.build_info
instruction_set = _C.instruction_set
release_memory = _C.release_memory

__all__ = [
    "Identity",
    "LatencyTable",
    "MBConv",
    "MixedOp",
    "Search",
    "SearchConfig",
    "Zero",
    "activate_most_likely",
    "arch_parameters",
    "build_info",
    "candidate",
    "data",
    "derive",
    "expected_latency",
    "export",
    "from_official",
    "instruction_set",
    "latency",
    "macs",
    "mixed_ops",
    "objective",
    "ops",
    "parameters",
    "profile",
    "release_memory",
    "report",
    "rescale",
    "sample",
    "search",
    "set_graphs",
    "set_policy",
    "spaces",
    "weight_parameters",
]
