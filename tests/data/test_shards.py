"""Shards: tar files as WebDataset lays them out, read in place; the batches are those of the same files in folders."""

import io
import itertools
import logging
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from proxyless_fast.data import UnreadableImage, loaders, shards
from proxyless_fast.data.folder import FolderLoader, train_transform
from proxyless_fast.data.shard_files import expand
from proxyless_fast.data.shards import Shards


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(number, side=12):
    pixels = np.random.default_rng(number).integers(0, 256, (side, side + number % 3, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def sample(number, classes=2):
    return [(f"{number:04}.png", picture(number)), (f"{number:04}.cls", str(number % classes).encode())]


def write(path, members, **options):
    """A tar file of (name, content) or of TarInfo with content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return path


def chained(numbers, classes=2):
    return list(itertools.chain.from_iterable(sample(number, classes) for number in numbers))


@pytest.fixture
def dataset(tmp_path):
    """48 training images in three shards, 8 test images in one."""
    for shard in range(3):
        write(tmp_path / "set" / "train" / f"{shard}.tar", chained(range(16 * shard, 16 * shard + 16)))
    write(tmp_path / "set" / "val" / "0.tar", chained(range(100, 108)))
    return tmp_path / "set"


def load(place, **options):
    return loaders(place, 4, **{"resolution": 8, "workers": 0, "valid_fraction": 0.25} | options)


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_give_the_batches_of_the_same_files_in_a_folder(tmp_path, workers, format):
    names = [f"{'long' * 40 if format != tarfile.USTAR_FORMAT else 'x'}{i}" for i in range(20)]
    files = []
    for i, name in enumerate(names):
        (tmp_path / f"{name}.png").write_bytes(picture(i))
        files.append((str(tmp_path / f"{name}.png"), i % 3))
    members = [
        pair for i, name in enumerate(names) for pair in ((f"{name}.png", picture(i)), (f"{name}.cls", b"%d" % (i % 3)))
    ]
    paths = [write(tmp_path / f"{i}.tar", members[16 * i : 16 * i + 16], format=format) for i in range(3)]
    options = {"seed": 3, "shuffle": True, "workers": workers}
    ours = FolderLoader(Shards([str(path) for path in paths]), train_transform(8), 6, **options)
    theirs = FolderLoader(files, train_transform(8), 6, **options)
    assert equal(list(ours.batches_from(2)), list(theirs.batches_from(2)))
    for world in (1, 2, 3):
        for rank in range(world):
            ours.shard(rank, world)
            theirs.shard(rank, world)
            assert equal(list(ours.batches_from(1, 2)), list(theirs.batches_from(1, 2)))


def test_a_folder_of_shards_is_a_data_set(dataset):
    splits = load(dataset)
    assert (splits.num_classes, splits.in_channels, splits.resolution, splits.classes) == (2, 3, 8, ("0", "1"))
    assert splits.train.size + splits.valid.size == 48 and splits.test.size == 8
    assert torch.cat([y for _, y in splits.test]).tolist() == [0, 1] * 4


@pytest.mark.parametrize(
    "pattern",
    ["set/{train/{0..2},val/0}.tar", "set/{train,val}/0.tar", "flat", "flat/x-{train-0,train-1,train-2,val-0}.tar"],
)
def test_shards_may_be_named_by_a_pattern_or_lie_beside_each_other(dataset, tmp_path, pattern):
    (tmp_path / "flat").mkdir()
    for path in dataset.rglob("*.tar"):
        os.link(path, tmp_path / "flat" / f"x-{path.parent.name}-{path.name}")
    splits = load(str(tmp_path / pattern), valid_fraction=0)
    assert (splits.train.size, splits.test.size) == (16 if "{train,val}" in pattern else 48, 8)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a", ["a"]),
        ("a{0..2}b", ["a0b", "a1b", "a2b"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{a,b{1,2},}x{3..4}", ["ax3", "ax4", "b1x3", "b1x4", "b2x3", "b2x4", "x3", "x4"]),
    ],
)
def test_patterns_are_expanded_as_a_shell_does(pattern, names):
    assert expand(pattern) == names


@pytest.mark.parametrize(
    ("place", "error", "complaint"),
    [
        ("set/{train,val", ValueError, "a brace that is not closed"),
        ("set/{train,val}/{0..9999999}.tar", ValueError, "stands for 10,000,000 names"),
        ("set/{train,val}/{5..2}.tar", ValueError, "expected 1 to 100,000"),
        ("set/{train,val}/{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}.tar", ValueError, "names, expected 100,000 at most"),
        ("set/{train,val}/7.tar", FileNotFoundError, r"no shard at .*train/7\.tar: expected a tar file"),
        ("set/train/{0..2}.tar", ValueError, "has 3 shards to train on and 0 to test on, expected both"),
        ("set/{a,b}.tar", ValueError, r"set/a\.tar: expected train or val in the name of a shard or of its folder"),
        ("half", ValueError, "has shards in train/ only"),
        ("packed", ValueError, r"has 0\.tar\.gz, expected shards that are not compressed \(\.tar\)"),
    ],
)
def test_places_without_shards_are_named(dataset, tmp_path, place, error, complaint):
    write(tmp_path / "half" / "train" / "0.tar", chained(range(8)))
    (tmp_path / "packed" / "train").mkdir(parents=True)
    (tmp_path / "packed" / "train" / "0.tar.gz").write_bytes(b"x")
    with pytest.raises(error, match=complaint) as caught:
        load(str(tmp_path / place))
    assert "\n" not in str(caught.value)


def test_folders_of_classes_with_a_tar_file_among_them_are_an_image_folder(tmp_path):
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        for i in range(8):
            (tmp_path / part / "a" / f"{i}.png").write_bytes(picture(i))
        write(tmp_path / part / "a.tar", chained(range(3)))
    assert load(tmp_path).classes == ("a",)


def test_the_split_goes_by_the_keys(dataset, tmp_path):
    def held_out(place):
        valid = load(place, valid_fraction=0.3).valid
        return {valid.samples.key(i) for i in range(valid.size)}

    before = held_out(dataset)
    write(tmp_path / "other" / "train" / "all.tar", chained([*range(47, -1, -1), *range(500, 600)]))
    write(tmp_path / "other" / "val" / "0.tar", chained(range(100, 108)))
    after = held_out(tmp_path / "other")
    assert {key for key in after if int(key) < 48} == before and 0 < len(before) < 48


def test_labels_may_be_in_json(tmp_path):
    members = [("a.jpg", picture(1)), ("a.json", b'{"label": 7, "x": [1]}'), ("b.JPG", picture(2)), ("b.cls", b"3\n")]
    members += [("c.json", b'{"width": 4}'), ("c.cls", b"5"), ("c.txt", b"a cat"), ("c.png", picture(3))]
    members += [("d.png", picture(3)), ("d.json", b'{"cls": 2}'), ("e.txt", b"no sample at all")]
    assert Shards([str(write(tmp_path / "0.tar", members))]).labels.tolist() == [7, 3, 5, 2]


def test_what_systems_leave_behind_is_passed_over(tmp_path):
    members = [("./", b""), ("__MACOSX/0001.png", b"x"), ("._0001.png", b"x"), (".hidden.png", b"x")]
    folder = tarfile.TarInfo("dir")
    folder.type = tarfile.DIRTYPE
    found = Shards([str(write(tmp_path / "0.tar", [*members[1:], (folder, b""), *chained(range(3))]))])
    assert [found.key(i) for i in range(3)] == [b"0000", b"0001", b"0002"]


# damage


def faulty(*members, others=100):
    return [*chained(range(others)), *members]


def link(name, kind, target="/etc/passwd"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ([("x.png", picture(0))], r"sample x is damaged: it has no label \(\.cls or \.json\)"),
        ([("x.cls", b"1")], "sample x is damaged: it has no image"),
        ([("x.png", b""), ("x.cls", b"1")], "its image has 0 bytes, expected 1 to"),
        ([("x.png", picture(0)), ("x.cls", b"cat")], "its label is 'cat', expected a whole number below 65,536"),
        ([("x.png", picture(0)), ("x.cls", b"-1")], "its label is -1, expected"),
        ([("x.png", picture(0)), ("x.cls", b"9" * 70)], "its label is an integer of .* bits, expected"),
        ([("x.png", picture(0)), ("x.cls", b"true")], "its label is True, expected"),
        ([("x.png", picture(0)), ("x.cls", bytes(70_000))], r"\.cls has 70,000 bytes, expected at most"),
        ([("x.png", picture(0)), ("x.png", picture(1)), ("x.cls", b"1")], "it has two images"),
        ([(link("x.png", tarfile.SYMTYPE), b""), ("x.cls", b"1")], r"x\.png is no regular file"),
        ([(link("x.png", tarfile.LNKTYPE, "0001.png"), b""), ("x.cls", b"1")], r"x\.png is no regular file"),
        ([(link("x.png", tarfile.CHRTYPE), b""), ("x.cls", b"1")], r"x\.png is no regular file"),
        ([(link("x.png", tarfile.FIFOTYPE), b""), ("x.cls", b"1")], r"x\.png is no regular file"),
    ],
)
def test_a_damaged_sample_is_named_and_passed_over_and_two_are_too_many(tmp_path, caplog, members, complaint):
    path = write(tmp_path / "0.tar", faulty(*members))
    with caplog.at_level(logging.WARNING):
        assert len(Shards([str(path)])) == 100
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path}: ") and record.getMessage().endswith("; it is skipped")
    with pytest.raises(UnreadableImage, match=f"{complaint}.*; 1 of 51 samples are damaged, expected at most 0"):
        Shards([str(write(tmp_path / "1.tar", faulty(*members, others=50)))])


def test_a_damaged_image_in_a_shard_is_named_and_a_neighbour_stands_in(tmp_path, caplog):
    members = chained(range(120))
    members[20] = (members[20][0], b"no image")
    write(tmp_path / "train" / "0.tar", members)
    write(tmp_path / "val" / "0.tar", chained(range(8)))
    train = load(tmp_path, valid_fraction=0).train
    with caplog.at_level(logging.WARNING):
        assert sum(len(y) for _, y in train) == 120
    (record,) = caplog.records
    assert f"{tmp_path}/train/0.tar: 0010.png cannot be read as an image: its format" in record.getMessage()


def cut(path, kept):
    path.write_bytes(path.read_bytes()[:kept])


def test_a_shard_that_is_cut_short_gives_what_is_there_where_little_is_lost(tmp_path, caplog):
    path = write(tmp_path / "0.tar", chained(range(300)))
    with tarfile.open(path) as tar:
        starts = [member.offset for member in tar]
    cut(path, starts[-1] + 100)  # within the header of the last label
    with caplog.at_level(logging.WARNING):
        assert len(Shards([str(path)])) == 299
    assert f"cannot be read as a tar file from byte {starts[-1]:,} on" in caplog.text
    caplog.clear()
    cut(path, starts[300])
    with caplog.at_level(logging.WARNING):
        assert len(Shards([str(path)])) == 150  # how much is missing, nothing in the file says
    assert "its end is missing" in caplog.text


def test_a_damaged_header_in_the_middle_is_no_quiet_end(tmp_path):
    path = write(tmp_path / "0.tar", chained(range(100)))
    with tarfile.open(path) as tar:
        place = [member.offset for member in tar][80]
    content = bytearray(path.read_bytes())
    content[place] ^= 255
    path.write_bytes(content)
    with pytest.raises(UnreadableImage, match=rf"0\.tar cannot be read .* from byte {place:,} on: .*bytes are lost"):
        Shards([str(path)])


@pytest.mark.parametrize("content", [b"", b"no tar file", bytes(10240), b"\x1f\x8b" + bytes(600)])
def test_files_without_samples_are_refused(tmp_path, content):
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"0\.tar: has no sample; .*expected images"):
        Shards([str(tmp_path / "0.tar")])


def test_a_header_that_claims_much_takes_no_memory(tmp_path):
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 2**30
    with open(tmp_path / "0.tar", "wb") as file:
        file.write(name.tobuf(tarfile.GNU_FORMAT))
        file.truncate(2**30 + 4096)  # sparse
    with pytest.raises(ValueError, match="a header of 1,073,741,824 bytes, expected at most 1,048,576"):
        Shards([str(tmp_path / "0.tar")])


@pytest.mark.parametrize(
    "name", ["/etc/x.png", "../../x.png", "a/../../x.png", "x\ny.png", "\udcff.png", "x" * 5000 + ".png"]
)
def test_members_with_hostile_names_are_read_where_they_are(tmp_path, name):
    label = name.removesuffix("png") + "cls"
    path = write(tmp_path / "in" / "0.tar", [(name, picture(1)), (label, b"1")], format=tarfile.GNU_FORMAT)
    before = sorted(tmp_path.rglob("*"))
    found = Shards([str(path)])
    assert np.asarray(found.read(0)).shape == (12, 13, 3)
    assert [p for p in sorted(tmp_path.rglob("*")) if p not in before and "cache" not in p.parts] == []


def test_a_shard_in_both_parts_is_refused(dataset):
    os.remove(dataset / "val" / "0.tar")
    os.symlink(dataset / "train" / "0.tar", dataset / "val" / "x.tar")
    with pytest.raises(ValueError, match="expected no shard in both parts"):
        load(dataset)


def test_labels_that_no_training_image_has_are_refused(dataset):
    write(dataset / "val" / "0.tar", chained(range(8), classes=5))
    with pytest.raises(ValueError, match="no training image has the test images' label 2, 3, 4"):
        load(dataset)


# the index


def test_a_shard_is_looked_through_once_and_again_when_it_changes(dataset, monkeypatch):
    seen = []
    look_through = shards.look_through
    monkeypatch.setattr(shards, "look_through", lambda path: seen.append(path) or look_through(path))
    first = load(dataset).train
    assert len(seen) == 4
    again = load(dataset).train
    assert len(seen) == 4 and equal(list(first), list(again))
    assert [first.samples.name(i) for i in range(first.size)] == [again.samples.name(i) for i in range(again.size)]
    write(dataset / "train" / "1.tar", chained(range(200, 230)))
    assert load(dataset, valid_fraction=0).train.size == 62 and len(seen) == 5
    for kept in shards.cache_folder().iterdir():
        kept.write_bytes(kept.read_bytes()[:-7])
    assert load(dataset, valid_fraction=0).train.size == 62 and len(seen) == 9


def test_damage_is_told_from_the_index_too(tmp_path):
    path = str(write(tmp_path / "0.tar", faulty(("x.cls", b"1"), others=50)))
    said = []
    for _ in range(2):
        with pytest.raises(UnreadableImage) as caught:
            Shards([path])
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_a_cache_that_cannot_be_written_costs_time_only(dataset, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load(dataset).test.size == 8
