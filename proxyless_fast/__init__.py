"""proxyless_fast: ProxylessNAS (Cai, Zhu, Han, ICLR 2019) as a fast engine with a thin search loop."""

import torch  # noqa: F401  (loads libtorch, which the extension links against)

from . import _C

__version__ = "0.1.0"
build_info = _C.build_info
instruction_set = _C.instruction_set
