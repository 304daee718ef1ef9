"""Batches of any structure, cut by images."""

from collections import namedtuple

import pytest
import torch

from proxyless_fast.search.parts import count_images, split_batch

Named = namedtuple("Named", ["x", "y"])


def images(count):
    return torch.arange(count * 2.0).reshape(count, 2)


@pytest.mark.parametrize(("count", "parts", "sizes"), [(6, 2, [3, 3]), (5, 2, [2, 3]), (3, 8, [1, 1, 1]), (1, 4, [1])])
def test_parts_are_about_equal_and_in_order(count, parts, sizes):
    x = images(count)
    found = split_batch((x, torch.arange(count)), parts)
    assert [count_images(part) for part in found] == sizes
    assert torch.equal(torch.cat([part[0] for part in found]), x)
    assert torch.cat([part[1] for part in found]).tolist() == list(range(count))


def test_a_batch_of_no_images_is_one_part():
    batch = (images(0), torch.arange(0))
    assert split_batch(batch, 4) == [batch]


def test_structures_stay_what_they_are():
    x, targets = images(4), [{"boxes": torch.ones(n, 4)} for n in (0, 1, 4, 2)]
    batch = {"x": Named(x, [x + 1, x + 2, x + 3]), "targets": targets, "scale": torch.tensor(3.0), "name": "a", "k": 2}
    first, second = split_batch(batch, 2)
    assert isinstance(first["x"], Named) and torch.equal(second["x"].x, x[2:])
    assert [len(item) for item in first["x"].y] == [2, 2, 2]
    assert first["targets"] == targets[:2] and second["targets"] == targets[2:]
    assert all((part["scale"], part["name"], part["k"]) == (3.0, "a", 2) for part in (first, second))


@pytest.mark.parametrize("wrap", [list, tuple])
@pytest.mark.parametrize("boxes", [(1, 3), (2, 3), (0, 2)])
def test_two_images_in_a_pair(wrap, boxes):
    """The batch itself is of as many items as images, and so may boxes be."""
    x, targets = images(2), [torch.ones(n, 4) for n in boxes]
    for part, number in zip(split_batch(wrap([x, targets]), 2), (0, 1), strict=True):
        assert torch.equal(part[0], x[number : number + 1])
        assert len(part[1]) == 1 and part[1][0] is targets[number]
    dicts = [{"boxes": target} for target in targets]
    assert [part[1] for part in split_batch(wrap([x, dicts]), 2)] == [dicts[:1], dicts[1:]]


def test_labels_in_a_list_are_cut():
    first, second = split_batch([images(2), torch.tensor([5, 6])], 2)
    assert first[1].tolist() == [5] and second[1].tolist() == [6]


def test_what_can_be_cut_in_two_ways_stays_whole():
    batch = (images(2), [torch.ones(2, 4), torch.zeros(2, 4)])  # boxes of two images, or two labels of each
    assert split_batch(batch, 2) == [batch]
    assert len(split_batch((images(2), tuple(batch[1])), 2)) == 2  # a tuple has no item per image


@pytest.mark.parametrize("cut", [torch.ones(3, 4), [torch.ones(3, 4)]])
def test_another_first_dimension_is_refused(cut):
    with pytest.raises(ValueError, match=r"batch: got a tensor of shape \(3, 4\), expected 4 images first"):
        split_batch((images(4), cut), 2)


@pytest.mark.parametrize("batch", [[], {"x": 1}, ("a", torch.tensor(1.0))])
def test_a_batch_without_images_is_refused(batch):
    with pytest.raises(ValueError, match="without a tensor of images, expected one"):
        split_batch(batch, 2)
