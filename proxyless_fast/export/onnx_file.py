"""ONNX files, written only after ONNX Runtime and torch agree on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from onnx import helper
from torch import nn

from ..checks import unwrapped
from ..io.files import atomic
from ..supernet import mixed_ops
from .described import description, to_texts
from .onnx_graph import build, example_output, input_shape_of, plain_copy

TOLERANCE = 1e-3  # of the largest output: float32 through some hundred layers, summed in another order
FLOOR = 1e-6


def onnx(net: nn.Module, path: str | Path, input_shape: Sequence[int] | None = None) -> float:
    """Write a plain net in evaluation as ONNX: float32, `input` (batch, C, H, W), `output`, any batch size.

    input_shape: (C, H, W); by default the net's own in_channels and resolution. The model is run by ONNX Runtime on the
    CPU on batches of 1 and 3 and compared with torch before the file appears. Returns the largest absolute error.
    A net of this package's blocks is written in opset 11, which old runtimes read and converters bring to newer ones;
    one with other modules as torch's exporter does it, in opset 18, and a warning names the module. Its
    metadata_props have, as JSON, the `classes` and `preprocessing` that `describe` said of the net.
    Raises ValueError for wrong arguments or a net that has no ONNX form, and RuntimeError when the two disagree.
    """
    import onnxruntime

    net = unwrapped(net)
    if mixed_ops(net):
        raise ValueError("net must be derived before it is exported: it still holds mixed ops")
    shape = input_shape_of(net, input_shape)
    plain = plain_copy(net)
    examples = [example_output(plain, shape, batch) for batch in (1, 3)]
    model = build(plain, shape, dynamic_batch=True)
    known = description(net)
    if len(known.get("classes", ())) not in (0, examples[0][1].shape[-1]):
        raise ValueError(
            f"classes must be {examples[0][1].shape[-1]}, as the outputs of the net are, got {len(known['classes'])}"
        )
    helper.set_model_props(model, to_texts(known))
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    error = 0.0
    for x, expected in examples:
        found = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
        if found.shape != expected.shape:
            raise RuntimeError(
                f"the ONNX model gives {tuple(found.shape)}, the net {tuple(expected.shape)}; {path} was not written"
            )
        error = max(error, float((found - expected).abs().max()))
        if not error <= TOLERANCE * float(expected.abs().max()) + FLOOR:
            raise RuntimeError(f"the ONNX model differs from the net by {error:.3g}; {path} was not written")
    with atomic(path) as temporary:
        temporary.write_bytes(content)
    return error
