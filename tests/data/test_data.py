"""Datasets: where they come from, how they are split, and that batches are a pure function of (seed, epoch)."""

import gzip
import hashlib
import io
import json
import re
import subprocess
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from proxyless_fast.data import DataNotFound, UnreadableImage, fashion_mnist, fashion_mnist_folder, idx, loaders
from proxyless_fast.data.memory import MemoryLoader, augment, draw_moves, resize, statistics
from proxyless_fast.data.splits import hold_out


def idx_bytes(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def idx_files(train=60, test=20, classes=3, side=10):
    """The four files' contents; every image carries its own number in its first pixels."""
    files = {}
    for part, count in (("train", train), ("t10k", test)):
        images = np.random.default_rng(count).integers(0, 256, (count, side, side))
        images[:, 0, 0] = np.arange(count)
        files[f"{part}-images-idx3-ubyte"] = idx_bytes(images)
        files[f"{part}-labels-idx1-ubyte"] = idx_bytes(np.arange(count) % classes)
    return files


def write_idx(folder, zipped=False, **sizes):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in idx_files(**sizes).items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine without the dataset, the package manager or a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setattr(fashion_mnist.shutil, "which", lambda name: None)

    def unreachable(url, timeout):
        raise OSError("no network")

    monkeypatch.setattr(fashion_mnist.urllib.request, "urlopen", unreachable)
    return tmp_path


# Fashion-MNIST: the three ways


def test_without_any_way_one_message_names_all_three(nowhere):
    with pytest.raises(DataNotFound) as caught:
        loaders("fashion-mnist", 8)
    message = str(caught.value)
    for part in ("data/fashion-mnist", "dataset-fashion-mnist", "downloaded", "https://", "no network", "apt-get"):
        assert part in message
    assert "\n" not in message


def test_a_local_folder_comes_first(nowhere):
    write_idx(nowhere / "debian")
    assert fashion_mnist_folder() == nowhere / "debian"
    write_idx(nowhere / "data" / "fashion-mnist", zipped=True)
    assert fashion_mnist_folder().resolve() == nowhere / "data" / "fashion-mnist"


@pytest.mark.parametrize("lists_are_old", [False, True])
def test_the_package_is_installed_where_that_can_be_done(nowhere, monkeypatch, lists_are_old):
    commands = []

    def run(command, **options):
        commands.append(command[1])
        ready = "update" in commands or not lists_are_old
        if command[1] == "install" and ready:
            write_idx(nowhere / "debian")
        return subprocess.CompletedProcess(command, 0 if ready else 100, "", "E: Unable to locate package\n")

    monkeypatch.setattr(fashion_mnist.shutil, "which", lambda name: "/usr/bin/apt-get")
    monkeypatch.setattr(fashion_mnist.os, "geteuid", lambda: 0)
    monkeypatch.setattr(fashion_mnist.subprocess, "run", run)
    assert fashion_mnist_folder() == nowhere / "debian"
    assert commands == (["install", "update", "install"] if lists_are_old else ["install"])


def test_nothing_is_installed_without_root(nowhere, monkeypatch):
    monkeypatch.setattr(fashion_mnist.shutil, "which", lambda name: "/usr/bin/apt-get")
    monkeypatch.setattr(fashion_mnist.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(fashion_mnist.subprocess, "run", lambda *a, **k: pytest.fail("apt-get was run"))
    with pytest.raises(DataNotFound, match="takes apt-get and root"):
        fashion_mnist_folder()


def serve(monkeypatch, files, broken_mirrors=()):
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        mirror, name = url.rsplit("/", 1)
        if f"{mirror}/" in broken_mirrors:
            return io.BytesIO(b"not the file")
        return io.BytesIO(files[name])

    monkeypatch.setattr(fashion_mnist.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(fashion_mnist, "MD5", {n: hashlib.md5(c).hexdigest() for n, c in files.items()})
    return asked


def test_the_download_is_checked_cached_and_falls_back(nowhere, monkeypatch):
    files = {f"{name}.gz": gzip.compress(content) for name, content in idx_files().items()}
    first, second = fashion_mnist.MIRRORS
    asked = serve(monkeypatch, files, broken_mirrors=(first,))
    folder = fashion_mnist_folder()
    assert folder == nowhere / "cache" / "proxyless_fast" / "fashion-mnist"
    assert {path.name for path in folder.iterdir()} == set(files)
    assert len(asked) == 8 and asked[1].startswith(second)
    assert fashion_mnist_folder() == folder and len(asked) == 8  # the cache serves from now on
    assert loaders("fashion-mnist", 8).num_classes == 3


def test_a_wrong_checksum_is_refused_and_leaves_no_file(nowhere, monkeypatch):
    files = {f"{name}.gz": gzip.compress(content) for name, content in idx_files().items()}
    serve(monkeypatch, files, broken_mirrors=fashion_mnist.MIRRORS)
    with pytest.raises(DataNotFound, match=f"has md5 {hashlib.md5(b'not the file').hexdigest()}, expected"):
        fashion_mnist_folder()
    assert list((nowhere / "cache" / "proxyless_fast" / "fashion-mnist").iterdir()) == []


def test_the_published_digests_are_those_torchvision_checks():
    from torchvision.datasets import FashionMNIST

    assert dict(FashionMNIST.resources) == fashion_mnist.MD5


# IDX files


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_give_their_images_and_labels(tmp_path, zipped):
    images, labels = idx.read_pair(write_idx(tmp_path, zipped), "train")
    assert images.shape == (60, 1, 10, 10) and images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == list(range(60))
    assert labels.dtype == torch.int64 and labels.tolist() == [i % 3 for i in range(60)]


def test_damaged_idx_files_are_named(tmp_path):
    write_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    for content, complaint in (
        (whole[:-1], r"announces shape \(60, 10, 10\) but holds 5999 bytes"),
        (b"\x89PNG" + whole, "not an IDX file of bytes: it starts with 89504e47"),
        (b"", "starts with nothing"),
        (idx_bytes(np.zeros((59, 10, 10))), "do not belong together"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=complaint):
            loaders(tmp_path, 4)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither train-images-idx3-ubyte nor"):
        loaders(tmp_path, 4)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(whole)[:-9])
    with pytest.raises(ValueError, match=r"ubyte\.gz cannot be read"):
        loaders(tmp_path, 4)


def header(*sizes, kind=b"\0\0\x08"):
    return kind + bytes([len(sizes)]) + b"".join(size.to_bytes(4, "big") for size in sizes)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (header(2**31, 2**16, 2**16), "announces shape (2147483648, 65536, 65536) but holds 0 bytes"),
        (header(60, 10, 10) + bytes(6001), "announces shape (60, 10, 10) but holds 6001 bytes"),
        (header(0, 10, 10), "announces shape (0, 10, 10), expected sizes of at least 1"),
        (header(60, 0, 0), "announces shape (60, 0, 0), expected sizes of at least 1"),
        (header(6000) + bytes(6000), "has 1 dimensions, expected 3"),
        (header(*[1] * 255), "has 255 dimensions, expected 3"),
        (header(60, 10, 10)[:-2], "ends within its header"),
        (header(60, 10, 10, kind=b"\0\0\x0d"), "is not an IDX file of bytes: it starts with 00000d03"),
    ],
)
def test_idx_headers_that_promise_what_is_not_there_are_refused_unread(tmp_path, content, complaint):
    write_idx(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"train-images-idx3-ubyte {complaint}")):
        loaders(tmp_path, 4)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (header(300_000, 28, 28) + bytes(300_000 * 784), "235,200,000 bytes, in .* gzipped: expected at most 10 times"),
        (header(2**31, 28, 28) + bytes(100), "1,683,627,180,032 bytes, in .* gzipped: expected at most"),
        (header(60, 10, 10) + bytes(100_000_000), r"announces shape \(60, 10, 10\) but holds more than 6000 bytes"),
        (header(60, 10, 10) + bytes(5999), r"announces shape \(60, 10, 10\) but holds 5999 bytes"),
        (header(5000, 28, 28) + bytes(100), r"announces shape \(5000, 28, 28\) but holds 100 bytes"),
    ],
)
def test_gzipped_bombs_are_refused_before_they_unpack(tmp_path, content, complaint):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(content, 1))
    del content
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"train-images-idx3-ubyte\.gz .*{complaint}"):
        idx.read(path, 3)
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()


def test_a_large_gzipped_file_is_read_within_twice_its_content(tmp_path):
    images = np.random.default_rng(0).integers(0, 16, (4000, 28, 28), dtype=np.uint8)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx_bytes(images), 1))
    tracemalloc.start()
    found = idx.read(path, 3)
    assert tracemalloc.get_traced_memory()[1] < 2 * images.nbytes + 2**21
    tracemalloc.stop()
    np.testing.assert_array_equal(found.numpy(), images)


def test_long_idx_images_need_a_resolution(tmp_path):
    write_idx(tmp_path)
    for part, count in (("train", 60), ("t10k", 20)):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((count, 2, 9))))
    with pytest.raises(ValueError, match=r"resolution must be given for images .*, of 9x2 pixels"):
        loaders(tmp_path, 4)
    assert loaders(tmp_path, 4, resolution=9).resolution == 9


def test_labels_that_no_training_image_has_are_refused(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(20) % 5))
    with pytest.raises(ValueError, match="no training image has the test images' label 3, 4"):
        loaders(tmp_path, 4)


def test_idx_splits_say_what_a_net_must_know(tmp_path):
    splits = loaders(write_idx(tmp_path), 4, resolution=12)
    images, _ = idx.read_pair(tmp_path, "train")
    told = splits.preprocessing
    assert json.loads(json.dumps(told)) == told and splits.classes == ("0", "1", "2")
    assert (told["channels"], told["resolution"], told["short_side"]) == (1, 12, None)
    assert told["mean"] == pytest.approx([images.double().mean().item() / 255])
    assert told["std"] == pytest.approx([images.double().std(correction=0).item() / 255])
    for loader in (splits.train, splits.valid, splits.test):
        assert (loader.num_classes, loader.in_channels, loader.resolution) == (3, 1, 12)


def test_fashion_mnist_has_names_for_its_classes(nowhere):
    write_idx(nowhere / "data" / "fashion-mnist", classes=10)
    assert loaders("fashion-mnist", 8).classes[5:7] == ("Sandal", "Shirt")


# splits


def split_of(keys, labels, fraction=0.3, seed=3):
    """The keys that are held out, and those that are not."""
    parts = hold_out([key.encode() for key in keys], torch.tensor(labels), fraction, seed)
    return [{keys[index] for index in part.tolist()} for part in parts]


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_hold_out_is_disjoint_whole_sorted_and_seeded(fraction):
    keys, labels = [str(i) for i in range(3000)], [i % 3 for i in range(3000)]
    train, valid = split_of(keys, labels, fraction)
    assert train | valid == set(keys) and not train & valid
    for label in range(3):
        share = sum(int(key) % 3 == label for key in valid) / 1000
        assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / 1000) ** 0.5
    assert split_of(keys, labels, fraction) == [train, valid]
    assert split_of(keys, labels, fraction, seed=4)[1] != valid
    indices = hold_out([b"%d" % i for i in range(3000)], torch.tensor(labels), fraction, 3)
    assert all(part.tolist() == sorted(part.tolist()) for part in indices)


def test_images_that_come_go_or_are_sorted_anew_move_no_other():
    keys, labels = [f"{i % 4}/{i}.jpg" for i in range(400)], [i % 4 for i in range(400)]
    _, valid = split_of(keys, labels)
    more = [f"{i % 4}/new{i}.jpg" for i in range(900)]
    assert split_of(keys + more, labels + [i % 4 for i in range(900)])[1] & set(keys) == valid
    assert split_of(keys[::-1], labels[::-1])[1] == valid
    assert split_of(keys[100:300], labels[100:300])[1] == valid & set(keys[100:300])
    assert split_of(keys, labels, 0.4)[1] > valid  # a larger fraction takes more, and none back


def test_each_class_keeps_an_image_to_train_on_and_something_is_held_out():
    for seed in range(40):
        train, valid = split_of(["a0", "b0", "b1", "b2"], [0, 1, 1, 1], 0.4, seed)
        assert "a0" in train and len(train) > 1 and valid


def numbers(loader):
    """Each image's own number, from its first pixel, in the order of the batches."""
    pixels = torch.cat([x[:, 0, 0, 0] for x, _ in loader])
    return ((pixels - loader._offset.item()) / loader._scale.item()).round().int().tolist()


def test_idx_loaders_share_out_every_image_once(tmp_path):
    splits = loaders(write_idx(tmp_path, train=64), 8, valid_fraction=0.25, seed=1)
    assert (splits.num_classes, splits.in_channels, splits.resolution) == (3, 1, 10)
    held_out = splits.valid.size
    assert 8 <= held_out < 24 and (splits.train.size, splits.test.size) == (64 - held_out, 20)
    splits.train.drop_last = False
    counts = [-(-loader.size // 8) for loader in (splits.train, splits.valid, splits.test)]
    assert [len(loader) for loader in (splits.train, splits.valid, splits.test)] == counts
    assert numbers(splits.test) == list(range(20))
    valid = numbers(splits.valid)
    splits.train.shift = 0
    train = numbers(splits.train)
    assert sorted(train + valid) == list(range(64))
    assert train != sorted(train) and valid != sorted(valid)


def test_training_batches_are_full_ones(tmp_path):
    train = loaders(write_idx(tmp_path), 7, valid_fraction=0).train
    assert [len(y) for _, y in train] == [7] * 8 and len(train) == 8


def test_no_fraction_means_no_validation(tmp_path):
    splits = loaders(write_idx(tmp_path), 8, valid_fraction=0)
    assert splits.valid is None and splits.train.size == 60


def epoch_of(loader, epoch):
    loader.set_epoch(epoch)
    return list(loader)


def equal(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def test_batches_are_a_pure_function_of_seed_and_epoch(tmp_path):
    write_idx(tmp_path)
    train = loaders(tmp_path, 8, seed=1).train
    zero, one = epoch_of(train, 0), epoch_of(train, 1)
    torch.rand(5)  # the global generator plays no part
    assert equal(epoch_of(loaders(tmp_path, 8, seed=1).train, 1), one)
    assert equal(epoch_of(train, 0), zero)
    assert not equal(zero, one)
    assert not equal(epoch_of(loaders(tmp_path, 8, seed=2).train, 0), zero)
    state = torch.get_rng_state()
    epoch_of(train, 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_are_normalised_channels_last_floats(tmp_path):
    splits = loaders(write_idx(tmp_path), 60, valid_fraction=0)
    splits.train.shift = 0
    ((x, y),) = list(splits.train)
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    assert y.dtype == torch.int64
    assert x.mean().abs() < 1e-5 and abs(x.std(correction=0) - 1) < 1e-5


def test_augmentation_shifts_and_mirrors_whole_images():
    images = torch.randint(1, 256, (64, 2, 5, 7), dtype=torch.uint8)
    moved = augment(images, 2, *draw_moves(64, 2, torch.Generator().manual_seed(0)))
    assert moved.shape == images.shape and moved.is_contiguous(memory_format=torch.channels_last)
    seen = set()
    for image, found in zip(images, moved, strict=True):
        padded = F.pad(image, [2] * 4)
        # which way a mirrored image is shifted is a matter of taste: the mirror image of some shift
        options = {
            (flip, dy, dx): padded[:, dy : dy + 5, dx : dx + 7].flip([2] if flip else [])
            for flip in (0, 1) for dy in range(5) for dx in range(5)
        }  # fmt: skip
        matches = [key for key, option in options.items() if torch.equal(option, found)]
        assert len(matches) == 1
        seen |= set(matches)
    assert {flip for flip, _, _ in seen} == {0, 1}
    assert {dy for _, dy, _ in seen} == {dx for _, _, dx in seen} == set(range(5))


def test_statistics_agree_with_the_definition():
    images = torch.randint(0, 256, (50, 3, 6, 6), dtype=torch.uint8)
    mean, std = statistics(images)
    scaled = images.double().div(255).transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, scaled.mean(1).float())
    torch.testing.assert_close(std, scaled.std(1, correction=0).float())


def test_resizing_keeps_what_is_flat(tmp_path):
    flat = torch.full((2, 1, 10, 10), 77, dtype=torch.uint8)
    assert torch.equal(resize(flat, 16), torch.full((2, 1, 16, 16), 77, dtype=torch.uint8))
    splits = loaders(write_idx(tmp_path), 8, resolution=14)
    assert splits.resolution == 14 and next(iter(splits.test))[0].shape == (8, 1, 14, 14)


# image folders


@pytest.fixture
def image_folder(tmp_path):
    root = tmp_path / "images"
    for part, count in (("train", 10), ("val", 4)):
        for label, name in enumerate(("ant", "bee")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i + 100 * label).integers(0, 256, (40, 50 + i, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def test_an_image_folder_is_split_and_transformed(image_folder):
    splits = loaders(image_folder, 4, resolution=32, valid_fraction=0.2, workers=0)
    assert (splits.num_classes, splits.in_channels, splits.resolution) == (2, 3, 32)
    assert splits.train.size + splits.valid.size == 20 and splits.test.size == 8
    for loader in (splits.train, splits.valid, splits.test):
        x, y = next(iter(loader))
        assert x.shape == (min(4, loader.size), 3, 32, 32) and x.dtype == torch.float32 and y.dtype == torch.int64
        assert x.is_contiguous(memory_format=torch.channels_last)
    train, valid = ({part.samples.name(i) for i in range(part.size)} for part in (splits.train, splits.valid))
    assert len(train | valid) == 20
    assert torch.cat([y for _, y in splits.test]).tolist() == [0] * 4 + [1] * 4


def test_held_out_images_go_through_the_evaluation_transforms(image_folder):
    splits = loaders(image_folder, 4, resolution=28, valid_fraction=0.2, workers=0)
    valid = splits.valid
    valid.shuffle = False
    x, _ = next(iter(valid))
    path = valid.samples.name(0)
    with Image.open(path) as image:
        resized = image.resize((int(32 * image.width / 40), 32), Image.Resampling.BILINEAR)
    left = round((resized.width - 28) / 2)
    pixels = torch.from_numpy(np.array(resized.crop((left, 2, left + 28, 30)))).permute(2, 0, 1) / 255
    expected = (pixels - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    assert (x[0] - expected).abs().max() < 0.05


def test_worker_processes_change_nothing(image_folder):
    def epoch(workers, number):
        return epoch_of(loaders(image_folder, 4, 16, seed=5, workers=workers).train, number)

    assert equal(epoch(0, 3), epoch(2, 3))
    assert not equal(epoch(0, 3), epoch(0, 4))


def test_decoding_leaves_the_global_generator_alone(image_folder):
    train = loaders(image_folder, 4, 16, workers=0).train
    iterator = iter(train)
    state = torch.get_rng_state()
    next(iterator)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(image_folder, workers):
    path = image_folder / "val" / "bee" / "2.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UnreadableImage) as caught:
        list(loaders(image_folder, 4, 16, workers=workers).test)
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be read as an image") and "\n" not in message


def test_folders_that_are_no_datasets_are_named(image_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no dataset at .*nothing"):
        loaders(tmp_path / "nothing", 4)
    with pytest.raises(FileNotFoundError, match=r"no image folder at .*train"):
        loaders(tmp_path, 4)
    (image_folder / "train" / "cat").mkdir()
    with pytest.raises(ValueError, match=r"class without images: .*cat"):
        loaders(image_folder, 4)
    Image.new("RGB", (8, 8)).save(image_folder / "train" / "cat" / "0.png")
    with pytest.raises(ValueError, match="only one of them has cat"):
        loaders(image_folder, 4)
    for part in ("train", "val"):
        (tmp_path / "flat" / part).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "flat" / part / "0.png")
    with pytest.raises(ValueError, match="has no class folders"):
        loaders(tmp_path / "flat", 4)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 61, "valid_fraction": 0}, "batch_size 61 is larger than the 60 training images"),
        ({"batch_size": 4, "valid_fraction": 1}, r"valid_fraction must lie in \[0, 1\), got 1"),
        ({"batch_size": 4, "valid_fraction": 0.001}, "valid_fraction 0.001 of 60 training images holds out none"),
        ({"batch_size": 4, "resolution": 0}, "resolution must be at least 1, got 0"),
        ({"batch_size": 4, "seed": -1}, "seed must not be negative, got -1"),
        ({"batch_size": 4, "workers": -1}, "workers must not be negative, got -1"),
        ({"batch_size": 4.0}, r"batch_size must be an integer, got 4\.0"),
        ({"batch_size": "4"}, "batch_size must be an integer, got '4'"),
        ({"batch_size": True}, "batch_size must be an integer, got True"),
        ({"batch_size": 4, "resolution": 10.5}, r"resolution must be an integer, got 10\.5"),
        ({"batch_size": 4, "valid_fraction": float("nan")}, r"valid_fraction must lie in \[0, 1\), got nan"),
        ({"batch_size": 4, "valid_fraction": "0.1"}, r"valid_fraction must lie in \[0, 1\), got '0\.1'"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, complaint):
    write_idx(tmp_path)
    with pytest.raises(ValueError, match=complaint):
        loaders(tmp_path, **arguments)


def test_a_loader_is_re_iterable_after_a_break(tmp_path):
    splits = loaders(write_idx(tmp_path), 8)
    assert isinstance(splits.train, MemoryLoader)
    for batch in splits.train:
        first = batch
        break
    assert torch.equal(next(iter(splits.train))[0], first[0])
