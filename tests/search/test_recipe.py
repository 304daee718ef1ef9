"""Mixed batches are pure functions of (seed, step, rank); averages go on to the same bits."""

import io
import sys

import numpy as np
import pytest
import torch
from torch import nn

from proxyless_fast.search.recipe import Mix, average


def batch(count=8, classes=5):
    images = torch.randn(count, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    return images, torch.arange(count) % classes


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_mixing_is_a_pure_function_of_seed_step_and_rank(mixup, cutmix):
    images, labels = batch()
    before = images.clone()

    def mixed(step, seed=1, rank=0):
        return Mix(mixup, cutmix, 5, rank)(seed, step, (images, labels))

    x, y = mixed(3)
    torch.rand(3)
    np.random.rand(2)
    assert all(torch.equal(a, b) for a, b in zip((x, y), mixed(3), strict=True))
    for other in (mixed(4), mixed(3, seed=2), mixed(3, rank=1)):
        assert not torch.equal(other[0], x)
    assert torch.equal(images, before) and x.is_contiguous(memory_format=torch.channels_last)
    state = np.random.get_state()[1].copy()
    mixed(3)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_images_and_labels_are_mixed_alike():
    images, labels = batch()
    for step in range(20):
        x, y = Mix(0.4, 0.0, 5)(0, step, (images, labels))
        torch.testing.assert_close(y.sum(1), torch.ones(8))
        share = y[0, labels[0]].item()  # the first is mixed with the last, of label 2
        torch.testing.assert_close(x[0], share * images[0] + (1 - share) * images[7])
        x, y = Mix(0.0, 1.0, 5)(0, step, (images, labels))
        own = (x[0] == images[0]).all(0).float().mean().item()
        assert abs(own - y[0, labels[0]].item()) < 1e-6


@pytest.mark.parametrize("count", [1, 7])
def test_of_an_odd_batch_the_last_image_stays(count):
    images, labels = batch(count)
    x, y = Mix(0.4, 1.0, 5)(0, 0, (images, labels))
    assert torch.equal(x[-1], images[-1]) and y[-1].tolist() == [float(i == labels[-1]) for i in range(5)]
    assert count == 1 or not torch.equal(x[0], images[0])


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"mixup: got a batch of \[4, 3\] and \[4\], expected images"):
        Mix(0.4, 0.0, 5)(0, 0, (torch.rand(4, 3), torch.arange(4)))
    with pytest.raises(ValueError, match="mixup: got a batch of dict and NoneType, expected images"):
        Mix(0.4, 0.0, 5)(0, 0, {"images": torch.rand(4, 3, 2, 2)})


def test_without_timm_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.data", None)
    with pytest.raises(ImportError, match=r"^mixup: needs timm, .*pip install proxyless-fast\[recipe\]$"):
        Mix(0.4, 0.0, 5)


def steps(net, ema, numbers):
    for number in numbers:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        net(torch.randn(4, 3, generator=torch.Generator().manual_seed(number)))
        ema.update_parameters(net)


def small_net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_an_average_goes_on_to_the_same_bits():
    net = small_net()
    ema = average(net, 0.9)
    steps(net, ema, range(5))
    file = io.BytesIO()
    torch.save([net.state_dict(), ema.state_dict()], file)
    steps(net, ema, range(5, 9))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = small_net()
    again.load_state_dict(saved[0])
    resumed = average(again, 0.9)
    resumed.load_state_dict(saved[1])
    steps(again, resumed, range(5, 9))
    for name, value in ema.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_an_average_is_the_recursion_that_names_it():
    net = small_net()
    ema = average(net, 0.9)
    expected = None
    for number in range(6):
        steps(net, ema, [number])
        now = {name: value.double() for name, value in net.state_dict().items() if value.is_floating_point()}
        expected = now if expected is None else {k: 0.9 * expected[k] + 0.1 * now[k] for k in now}
    for name, value in expected.items():
        torch.testing.assert_close(ema.module.state_dict()[name].double(), value, atol=1e-6, rtol=1e-6)
