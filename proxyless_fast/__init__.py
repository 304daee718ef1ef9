"""proxyless_fast: ProxylessNAS (Cai, Zhu, Han, ICLR 2019) as a fast engine with a thin search loop."""

from importlib import metadata

import torch  # noqa: F401  (loads libtorch, which the extension links against)

from . import _C, data, export, latency, ops, report, search, spaces  # type: ignore[attr-defined]  # _C is compiled
from ._deprecated import renamed_attributes
from .blocks import Identity, MBConv, Zero, candidate
from .costs import count_macs, count_parameters
from .cuda_graphs import set_graphs
from .export import from_official
from .fusion import set_policy
from .latency import LatencyTable, expected_latency, profile
from .mixed import MixedOp
from .planning import Plan, plan
from .search import Search, SearchConfig, objective
from .supernet import activate_most_likely, arch_parameters, derive, mixed_ops, rescale, sample, weight_parameters

__version__ = metadata.version("proxyless-fast")
build_info = _C.build_info
instruction_set = _C.instruction_set
release_memory = _C.release_memory

__all__ = [
    "Identity",
    "LatencyTable",
    "MBConv",
    "MixedOp",
    "Plan",
    "Search",
    "SearchConfig",
    "Zero",
    "activate_most_likely",
    "arch_parameters",
    "build_info",
    "candidate",
    "count_macs",
    "count_parameters",
    "data",
    "derive",
    "expected_latency",
    "export",
    "from_official",
    "instruction_set",
    "latency",
    "mixed_ops",
    "objective",
    "ops",
    "plan",
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

__getattr__ = renamed_attributes(
    __name__,
    {
        "macs": lambda: ("count_macs", count_macs),
        "parameters": lambda: ("count_parameters", count_parameters),
    },
)
