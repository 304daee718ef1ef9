"""GPU kernels without a GPU: compiled to machine code for sm_80 and sm_90, and the traffic model's promises."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu_fusion as fusion
import gpu_model as model
import gpu_table as table
from gpu_launches import Shape, backward, compile_launch, distinct, every_launch, forward, recording, running

from tests.csrc.emulation import emulate

BATCH = 64


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_every_kernel_compiles_and_nothing_spills(arch, dtype):
    found = table.compiled(arch, dtype)
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
                shape = Shape(batch, *layer)
                running(shape, forward(shape, torch.bfloat16, "fast")[-1])
                backward(shape, torch.bfloat16, "fast", True)
        return {launched.key for launched in launches if launched.name != "merge_partials"}

    assert keys(57) == keys(BATCH) == keys(1)


def test_one_pixel_compiles(tmp_path):
    # triton.jit makes a constant of an argument that is 1; the interpreter does not, so this is compiled.
    launches = every_launch(1, torch.bfloat16, 90, [Shape(1, 8, 8, 1, 3, 1, 6)])
    for launched in distinct(launches, lambda launched: (launched.name, tuple(a is None for a in launched.args))):
        compile_launch(launched, 90, tmp_path)


@pytest.fixture(scope="module")
def rows():
    return model.rows(BATCH, torch.bfloat16)


def test_modelled_traffic_of_a_step(rows):
    assert len(rows) == 21
    assert model.ratio(rows, "arch", "fast") <= 0.35
    assert model.ratio(rows, "weight", "fast") <= 0.45


def test_a_step_of_a_layer_is_few_launches():
    """Late layers are so short that the host's work for a launch is what they take."""
    late = Shape(BATCH, 96, 96, 14, 5, 1, 6)
    assert len(model.ours(late, torch.bfloat16, "weight")) <= 28
    assert len(model.ours(late, torch.bfloat16, "arch")) <= 54


MOST_OF_TRITON = {"A100": {"weight": 0.89, "arch": 0.84}, "H100": {"weight": 0.81, "arch": 0.72}}


@pytest.mark.parametrize("card", model.CARDS, ids=lambda card: card.name)
def test_modelled_traffic_with_expansion_in_shared_memory(rows, card):
    """Of the Triton path's bytes; the roofline time goes down too, the halo's products and all."""
    for (step, policy), (moved, seconds) in model.totals(BATCH, torch.bfloat16, card, True).items():
        assert moved <= MOST_OF_TRITON[card.name][step] * sum(r.bytes[step, policy] for r in rows)
        assert seconds <= 0.91 * sum(r.seconds[step, policy, card.name] for r in rows)


@pytest.mark.parametrize("card", model.CARDS, ids=lambda card: card.name)
def test_expansion_is_taken_where_the_model_says(card):
    for shape in fusion.candidates():
        (two, one), (two_back, one_back) = (fusion.times(shape, card, backward) for backward in (False, True))
        if fusion.expansion_pays(shape.ci, shape.kernel, shape.stride, card.arch):
            assert one <= two and one_back <= two_back, shape
        else:
            assert two <= 1.2 * one, shape


def test_the_modelled_halo_is_that_of_the_tiles_or_more():
    def seen(tile, step, kernel, size, tiles):  # inside the image, over all tiles along an axis
        starts = [i * tile * step - kernel // 2 for i in range(tiles)]
        return sum(min(size, i + (tile - 1) * step + kernel) - max(0, i) for i in starts)

    shapes = [(s.ch, s.size, k, s.stride, s.ci) for s in dict.fromkeys(model.imagenet(BATCH)) for k in (3, 5, 7)]
    tilings = emulate.tilings([(0, 1, BATCH, ch, n, n, k, stride, ci) for ch, n, k, stride, ci in shapes])
    for (_, n, k, stride, _), t in zip(shapes, tilings, strict=True):
        actual = seen(t.height, stride, k, n, t.down) * seen(t.width, stride, k, n, t.across) / n**2
        assert actual <= model.halo(n, n, k, stride) <= 2.2 * actual


def test_what_is_kept_for_backward(rows):
    assert model.kept_ratio(rows, "fast") <= 0.35
    assert model.kept_ratio(rows, "lean") <= 0.15


def test_the_model_counts_eager_as_written():
    shape = model.Shape(2, 4, 6, 8, 3, 1, 3)  # batch, in, out, size, kernel, stride, expand
    x, wide, out = (2 * 64 * c * 4 for c in (4, 12, 6))
    counted = {}
    for p in model.eager(shape, torch.float32, "arch"):
        counted.setdefault(p.name, []).append(p.bytes)
    weights = (4 * 12 * 4, 12 * 9 * 4, 12 * 6 * 4)
    first = [x + wide + weights[0], 2 * wide + weights[1], wide + out + weights[2]]
    assert counted["convolution"][:3] == first
    assert counted["native_batch_norm"][0] >= 3 * wide
    # the input's gradient alone: frozen weights get none
    backward = [wide + out + weights[2], 2 * wide + weights[1], x + wide + weights[0]]
    assert counted["convolution_backward"] == backward
