"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from ...io.text import plain, said

name = "onnxruntime"


def versions() -> dict[str, str]:
    """What a table's header says of the runtime."""
    import onnxruntime

    return {"onnxruntime": onnxruntime.__version__}


class Session:
    """One ONNX model ready to run on the CPU, with a fixed random input of batch 1."""

    def __init__(self, model: onnx.ModelProto, threads: int, input_shape: Sequence[int] | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the library raises its own, of no common type
            raise ValueError(f"the ONNX model does not run in ONNX Runtime: {said(error)}") from error
        inputs = self._session.get_inputs()
        if [i.type for i in inputs] != ["tensor(float)"]:
            got = ", ".join(f"{plain(i.name)} of {i.type}" for i in inputs) or "none"
            raise ValueError(f"the ONNX model must have one input, a tensor(float), got {got}")
        declared = inputs[0]
        sizes = [1, *(input_shape or declared.shape[1:])]
        if not all(isinstance(size, int) for size in sizes):
            raise ValueError(f"input_shape must be given for an ONNX model with input {declared.shape}")
        array = np.random.default_rng(0).standard_normal(sizes).astype(np.float32)
        self._feed = {declared.name: array}

    def run(self) -> list[np.ndarray]:
        return self._session.run(None, self._feed)
