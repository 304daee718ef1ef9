"""Batches shared out over processes, and started in the middle of an epoch: the very batches of one process."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from proxyless_fast.data import loaders
from proxyless_fast.data.folder import FolderLoader, train_transform
from proxyless_fast.data.memory import MemoryLoader
from proxyless_fast.data.order import part
from proxyless_fast.search.batches import endless_batches, epoch_batches

SIZES = [(21, 8), (20, 5), (9, 4), (10, 12), (17, 16)]  # images and batch size: last batches of 5, none, 1, 10, 1


def memory_loader(count, batch_size, **options):
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    options = {"shuffle": True, "shift": 2, "seed": 5} | options
    mean = torch.full((3,), 0.5)
    return MemoryLoader(images, torch.arange(count), batch_size, mean=mean, std=mean, **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for i in range(21):
        pixels = np.random.default_rng(i).integers(0, 256, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return [(str(folder / f"{i}.png"), i) for i in range(21)]


def folder_loader(files, count, batch_size, **options):
    options = {"shuffle": True, "seed": 5} | options
    return FolderLoader(files[:count], train_transform(8), batch_size, **options)


@pytest.fixture(params=["memory", "files"])
def make(request):
    if request.param == "memory":
        return memory_loader
    samples = request.getfixturevalue("files")
    return lambda count, batch_size, **options: folder_loader(samples, count, batch_size, **options)


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("world", range(1, 6))
@pytest.mark.parametrize(("count", "batch_size"), SIZES)
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_parts_of_all_ranks_are_the_batches_of_one_process(make, count, batch_size, world, drop_last):
    if drop_last and count < batch_size:
        pytest.skip("no batch")
    whole = list(make(count, batch_size, drop_last=drop_last).batches_from(3))
    ranks = []
    for rank in range(world):
        loader = make(count, batch_size, drop_last=drop_last)
        loader.shard(rank, world)
        assert (len(loader), loader.batch_size, loader.size) == (len(whole), batch_size, count)
        ranks.append(list(loader.batches_from(3)))
    for number, (images, labels) in enumerate(whole):
        parts = [batches[number] for batches in ranks]
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in parts)
        if len(labels) < world:
            expected = [rank % len(labels) for rank in range(world)]
            assert torch.equal(torch.cat([y for _, y in parts]), labels[expected])
            assert torch.equal(torch.cat([x for x, _ in parts]), images[expected])
            continue
        assert torch.equal(torch.cat([y for _, y in parts]), labels)
        assert torch.equal(torch.cat([x for x, _ in parts]), images)
        assert [len(y) for _, y in parts] == [len(y) for y in torch.tensor_split(labels, world)]


@pytest.mark.parametrize("world", [1, 3, 5])
@pytest.mark.parametrize(("count", "batch_size"), SIZES)
def test_an_evaluation_has_each_image_once(make, count, batch_size, world):
    found = []
    for rank in range(world):
        loader = make(count, batch_size)
        loader.shard(rank, world, repeat=False)
        found += [label for _, labels in loader for label in labels.tolist()]
    assert sorted(found) == list(range(count))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_its_own_images_only(files, monkeypatch, rank, workers, tmp_path):
    from proxyless_fast.data import images

    read = images.read

    def noted(path):
        with open(tmp_path / "read", "a") as file:
            file.write(path + "\n")
        return read(path)

    monkeypatch.setattr(images, "read", noted)
    loader = folder_loader(files, 20, 10, workers=workers)
    loader.shard(rank, 2)
    labels = torch.cat([y for _, y in loader])
    found = (tmp_path / "read").read_text().split()
    assert sorted(found) == sorted(files[label][0] for label in labels.tolist()) and len(found) == 10


@pytest.mark.parametrize(("rank", "world"), [(0, 0), (2, 2), (-1, 2), (0, 1.5), (True, 2)])
def test_wrong_ranks_are_refused(rank, world):
    with pytest.raises(ValueError, match=r"rank: got .* expected 0 to world_size - 1"):
        memory_loader(9, 3).shard(rank, world)


def test_parts_differ_by_at_most_one():
    for count, world in itertools.product(range(1, 20), range(1, 8)):
        parts = [part(count, rank, world) for rank in range(world)]
        sizes = [p.stop - p.start for p in parts]
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
        if count >= world:
            assert [i for p in parts for i in range(p.start, p.stop)] == list(range(count))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("skip", [0, 1, 3, 4])
def test_an_epoch_may_start_at_any_batch(make, skip, world):
    loader = make(20, 5)
    loader.shard(0, world)
    whole = list(epoch_batches(loader, 2))
    assert equal(list(epoch_batches(loader, 2, skip)), whole[skip:])
    assert equal(list(epoch_batches(loader, 2)), whole)  # the position was that of one pass
    later = [*loader.batches_from(3), *loader.batches_from(4)]
    assert equal(list(itertools.islice(endless_batches(loader, 2, 4 + skip), 4)), later[skip:][:4])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_batches_before_are_not_read(files, workers):
    gone = [("/nowhere/at/all.png", label) for _, label in files[:15]] + files[15:20]
    loader = FolderLoader(gone, train_transform(8), 5, workers=workers)
    ((_, labels),) = list(epoch_batches(loader, 0, 3))
    assert labels.tolist() == [15, 16, 17, 18, 19]


def test_a_loader_of_the_users_is_taken_as_it_is():
    class Theirs:
        batches, epochs = 4, []

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

        def __iter__(self):
            return iter("abcd")

        def __len__(self):
            return 4

    theirs = Theirs()
    assert list(epoch_batches(theirs, 7, 2)) == ["c", "d"] and theirs.epochs == [7]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_that_was_left_does_not_disturb_the_next(files, workers):
    loader = folder_loader(files, 20, 5, workers=workers)
    whole = list(loader.batches_from(1))
    next(iter(loader.batches_from(0)))
    assert equal(list(loader.batches_from(1)), whole)


def test_stand_ins_are_the_same_for_any_number_of_ranks(tmp_path):
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    for i in range(200):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(folder / f"{i:03}.png")
    (tmp_path / "val" / "a").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "val" / "a" / "0.png")
    (folder / "003.png").write_bytes(b"no image")

    def epoch(rank, world):
        train = loaders(tmp_path, 16, 4, valid_fraction=0, workers=0).train
        train.shard(rank, world)
        return [x for x, _ in train]

    for whole, *parts in zip(epoch(0, 1), *(epoch(rank, 3) for rank in range(3)), strict=True):
        assert torch.equal(torch.cat(parts), whole)
