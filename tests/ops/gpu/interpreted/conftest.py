"""Tests that execute the Triton kernels on the CPU, in Triton's interpreter; test_gpu_ops.py starts them.

The interpreter must be chosen before Triton is imported, so these files are collected only where the environment has
chosen it. Two of its gaps are closed here, as the hardware does: bfloat16 rounds to nearest even, and a product of
bfloat16 operands multiplies their values (the interpreter keeps them as integers).
"""

import os

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETING else ["*.py"]

if INTERPRETING:
    import gc

    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def _to_bfloat16(values: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)

    def _from_bfloat16(bits: np.ndarray) -> np.ndarray:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.float32 and target == tl.bfloat16:
            return interpreter.TensorHandle(_to_bfloat16(src.data), target)
        if source == tl.bfloat16 and target == tl.float32:
            return interpreter.TensorHandle(_from_bfloat16(src.data), target)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (
            interpreter.TensorHandle(_from_bfloat16(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t
            for t in (a, b)
        )
        return dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    # The interpreter makes so many short-lived objects that looking for cycles takes a tenth of its time.
    gc.freeze()
    gc.set_threshold(100_000)

    @pytest.fixture(autouse=True)
    def poison():
        """torch.empty gives NaN: an element that no kernel writes shows."""
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)
