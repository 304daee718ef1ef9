"""ONNX files, written only after ONNX Runtime and torch agree on them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..io.files import atomic
from ..supernet import mixed_ops
from .onnx_graph import build, input_shape_of

TOLERANCE = 1e-3  # of the largest output: float32 through some hundred layers, summed in another order
FLOOR = 1e-6


def onnx(net: nn.Module, path: str | Path, input_shape: Sequence[int] | None = None) -> float:
    """Write a plain net in evaluation as ONNX: float32, `input` (batch, C, H, W), `output`, any batch size.

    input_shape: (C, H, W); by default the net's own in_channels and resolution. The model is run by ONNX Runtime on the
    CPU on batches of 1 and 3 and compared with torch before the file appears. Returns the largest absolute error.
    Raises ValueError for wrong arguments and RuntimeError when the two disagree.
    """
    import onnxruntime

    if mixed_ops(net):
        raise ValueError("net must be derived before it is exported: it still holds mixed ops")
    shape = input_shape_of(net, input_shape)
    plain = copy.deepcopy(net).cpu().float().eval()
    content = build(plain, shape, dynamic_batch=True).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    error = 0.0
    for batch in (1, 3):
        x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected: Tensor = plain(x)
        found = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
        error = max(error, float((found - expected).abs().max()))
        if not error <= TOLERANCE * float(expected.abs().max()) + FLOOR:
            raise RuntimeError(f"the ONNX model differs from the net by {error:.3g}; {path} was not written")
    with atomic(path) as temporary:
        temporary.write_bytes(content)
    return error
