"""The traffic model's promises, and that it counts what it says."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import fusion, model
from benchmarks.gpu.shapes import BlockShape, imagenet
from benchmarks.gpu.traffic import CARDS, halo
from proxyless_fast.ops.gpu.host.stencils import expansion_pays
from tests.csrc.emulation import emulate

BATCH = 64


@pytest.fixture(scope="module")
def rows():
    return model.rows(BATCH, torch.bfloat16)


def test_modelled_traffic_of_a_step(rows):
    assert len(rows) == 21
    assert model.ratio(rows, "arch", "fast") <= 0.35
    assert model.ratio(rows, "weight", "fast") <= 0.45


def test_a_step_of_a_layer_is_few_launches():
    """Late layers are so short that the host's work for a launch is what they take."""
    late = BlockShape(BATCH, 96, 96, 14, 5, 1, 6)
    assert len(model.ours(late, torch.bfloat16, "weight")) <= 28
    assert len(model.ours(late, torch.bfloat16, "arch")) <= 54


MOST_OF_TRITON = {"A100": {"weight": 0.89, "arch": 0.84}, "H100": {"weight": 0.81, "arch": 0.72}}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_modelled_traffic_with_expansion_in_shared_memory(rows, card):
    """Of the Triton path's bytes; the roofline time goes down too, the halo's products and all."""
    for (step, policy), (moved, seconds) in model.totals(BATCH, torch.bfloat16, card, True).items():
        assert moved <= MOST_OF_TRITON[card.name][step] * sum(r.bytes[step, policy] for r in rows)
        assert seconds <= 0.91 * sum(r.seconds[step, policy, card.name] for r in rows)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_expansion_is_taken_where_the_model_says(card):
    for shape in fusion.every_mbconv():
        (two, one), (two_back, one_back) = (fusion.times(shape, card, backward) for backward in (False, True))
        if expansion_pays(shape.ci, shape.kernel, shape.stride, card.arch):
            assert one <= two and one_back <= two_back, shape
        else:
            assert two <= 1.2 * one, shape


def test_the_modelled_halo_is_that_of_the_tiles_or_more():
    def seen(tile, step, kernel, size, tiles):  # inside the image, over all tiles along an axis
        starts = [i * tile * step - kernel // 2 for i in range(tiles)]
        return sum(min(size, i + (tile - 1) * step + kernel) - max(0, i) for i in starts)

    shapes = [(s.ch, s.size, k, s.stride, s.ci) for s in dict.fromkeys(imagenet(BATCH)) for k in (3, 5, 7)]
    tilings = emulate.tilings([(0, 1, BATCH, ch, n, n, k, stride, ci) for ch, n, k, stride, ci in shapes])
    for (_, n, k, stride, _), t in zip(shapes, tilings, strict=True):
        actual = seen(t.height, stride, k, n, t.down) * seen(t.width, stride, k, n, t.across) / n**2
        assert actual <= halo(n, n, k, stride) <= 2.2 * actual


def test_what_is_kept_for_backward(rows):
    assert model.kept_ratio(rows, "fast") <= 0.35
    assert model.kept_ratio(rows, "lean") <= 0.15


def test_the_model_counts_eager_as_written():
    shape = BlockShape(2, 4, 6, 8, 3, 1, 3)  # batch, in, out, size, kernel, stride, expand
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
