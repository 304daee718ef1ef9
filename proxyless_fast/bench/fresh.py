"""The peak resident memory of one call, in a process made for it.

python -m proxyless_fast.bench.fresh module:function '{"argument": ...}'
"""

import ctypes
import gc
import importlib
import json
import sys
from pathlib import Path

from .measure import status_bytes


def main(target: str, arguments: str) -> None:
    """Print how many bytes the call adds to the resident memory at its peak."""
    module, function = target.split(":")
    warm, call = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    warm()  # brings in code, threads, gradients and optimizer state, so that they are not counted
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now
    before = status_bytes("VmRSS")
    call()
    print(status_bytes("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
