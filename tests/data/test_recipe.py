"""RandAugment and random erasing: pure functions of (seed, epoch, index), off by default, one sentence without timm."""

import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from proxyless_fast.data import loaders
from proxyless_fast.data.seeds import seeded


@pytest.fixture
def folder(tmp_path):
    for part, count in (("train", 24), ("val", 4)):
        for label in "ab":
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / label / f"{i}.png")
    return tmp_path


RECIPE = {"rand_augment": "rand-m9-mstd0.5", "random_erasing": 0.5}


def epoch(folder, workers=0, number=1, rank=0, world=1, **options):
    train = loaders(folder, 8, 16, 0.0, seed=4, workers=workers, **options).train
    train.shard(rank, world)
    return torch.cat([x for x, _ in train.batches_from(number)])


@pytest.mark.parametrize("options", [RECIPE, {"rand_augment": "rand-m5-n3-inc1"}, {"random_erasing": 1.0}])
def test_workers_and_ranks_change_nothing(folder, options):
    alone = epoch(folder, **options)
    assert torch.equal(epoch(folder, workers=2, **options), alone)
    parts = [epoch(folder, rank=rank, world=2, **options).view(6, 4, 3, 16, 16) for rank in range(2)]
    assert torch.equal(torch.cat(parts, 1).view_as(alone), alone)
    assert not torch.equal(epoch(folder, number=2, **options), alone)
    assert not torch.equal(epoch(folder), alone)


def test_only_training_images_are_changed(folder):
    plain, changed = (loaders(folder, 8, 16, workers=0, **options) for options in ({}, RECIPE))
    for one, other in ((plain.valid, changed.valid), (plain.test, changed.test)):
        assert all(torch.equal(a[0], b[0]) for a, b in zip(one, other, strict=True))


def test_the_global_generators_are_left_as_they_were(folder):
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    epoch(folder, **RECIPE)
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    np.testing.assert_array_equal(np.random.get_state()[1], state[2])


def test_seeded_decides_all_three_generators():
    def draw(*parts):
        with seeded(*parts):
            return torch.rand(1).item(), np.random.rand(), random.random()

    assert draw(1, 2) == draw(1, 2)
    assert all(a != b for a, b in zip(draw(1, 2), draw(1, 3), strict=True))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            {"rand_augment": "augmix-m3"},
            "rand_augment: got 'augmix-m3', expected None or what timm writes as rand-m9-m",
        ),
        ({"rand_augment": "rand-x9"}, "rand_augment: got 'rand-x9'"),
        ({"rand_augment": "rand-m9-mstd"}, "rand_augment: got"),
        ({"rand_augment": 9}, "rand_augment: got 9"),
        ({"random_erasing": 1.5}, r"random_erasing: got 1\.5, expected a probability in \[0, 1\]"),
        ({"random_erasing": float("nan")}, "random_erasing: got nan"),
        ({"random_erasing": True}, "random_erasing: got True"),
    ],
)
def test_wrong_recipes_are_named(folder, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        loaders(folder, 8, 16, workers=0, **options)


@pytest.mark.parametrize("name", RECIPE)
def test_without_timm_one_sentence_says_how_to_get_it(folder, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.data", None)
    with pytest.raises(ImportError, match=rf"^{name}: needs timm, .*pip install proxyless-fast\[recipe\]$"):
        loaders(folder, 8, 16, workers=0, **{name: RECIPE[name]})


def test_idx_files_have_no_such_recipe(tmp_path):
    from tests.data.test_data import write_idx

    with pytest.raises(ValueError, match=r"random_erasing: got 0\.5 for IDX files, expected an image folder or shards"):
        loaders(write_idx(tmp_path), 8, random_erasing=0.5)
