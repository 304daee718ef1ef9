"""GPU kernels without a GPU: compiled to machine code for sm_80 and sm_90."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import table
from benchmarks.gpu.compiled import compile_launch
from benchmarks.gpu.launches import backward, distinct, every_launch, forward, move_running, recording
from benchmarks.gpu.shapes import BlockShape

BATCH = 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_every_kernel_compiles_and_nothing_spills(arch, dtype):
    found = table.compile_all(arch, dtype)
    names = {launched.name for launched, _ in found}
    assert names == {
        "gram_partial", "gram_finish", "expand", "depthwise", "finish_moments", "project", "normalise", "pair_sums",
        "finish_gradient", "project_backward", "depthwise_backward", "expand_backward", "expand_input", "finish_input",
        "finish_probe", "merge_partials", "expand_moments", "expand_correction", "finish_weight", "norms_of_block",
        "update_running", "finish_gate",
    }  # fmt: skip
    limit = {80: 163, 90: 227}[arch] * 1024
    for launched, code in found:
        assert code.shared <= limit, (launched.name, launched.config)
        assert code.stack == 0, (launched.name, launched.config, launched.constants)


def test_another_batch_compiles_nothing():
    """Neither an odd one, nor one of one image; probes are left out, which a smaller batch puts into larger groups."""

    def keys(batch):
        with recording(90) as launches:
            for layer in ((24, 40, 56, 3, 2, 6), (96, 96, 14, 7, 1, 3)):
                shape = BlockShape(batch, *layer)
                move_running(shape, forward(shape, torch.bfloat16, "fast")[-1])
                backward(shape, torch.bfloat16, "fast", True)
        return {launched.key for launched in launches if launched.name != "merge_partials"}

    assert keys(57) == keys(BATCH) == keys(1)


def test_one_pixel_compiles(tmp_path):
    # triton.jit makes a constant of an argument that is 1; the interpreter does not, so this is compiled.
    launches = every_launch(1, torch.bfloat16, 90, [BlockShape(1, 8, 8, 1, 3, 1, 6)])
    for launched in distinct(launches, lambda launched: (launched.name, tuple(a is None for a in launched.args))):
        compile_launch(launched, 90, tmp_path)
