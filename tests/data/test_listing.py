"""What an image folder holds, as people have them: hidden files, links, loops, odd names; what a split would empty."""

import logging
import os
import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image

from proxyless_fast.data import loaders
from proxyless_fast.data.listing import scan


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for part, count in (("train", 8), ("val", 4)):
        for name in "ab":
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (12, 9), (i, i, i)).save(root / part / name / f"{i}.png")
    return root


def names(folder, root=None):
    return [os.path.relpath(path, root or folder) for path, _ in scan(folder).samples]


def load(folder, **options):
    return loaders(folder, 2, **{"resolution": 8, "workers": 0, "valid_fraction": 0.25} | options)


def test_an_ordinary_folder_is_listed_as_torchvision_does(folder):
    from torchvision.datasets import ImageFolder

    (folder / "train" / "a" / "deep" / "er").mkdir(parents=True)
    for path in ("a/deep/er/x.JPG", "a/deep/Y.Png", "b/z.jpeg", "b/10.png", "a/a.webp"):
        shutil.copy(folder / "train" / "a" / "0.png", folder / "train" / path)
    theirs = ImageFolder(str(folder / "train"))
    ours = scan(folder / "train")
    assert ours.samples == theirs.samples and list(ours.classes) == theirs.classes


def test_hidden_files_and_what_systems_leave_behind_are_passed_over(folder):
    expected = names(folder / "train")
    for place in (".ipynb_checkpoints", "__MACOSX", "@eaDir", "a/.ipynb_checkpoints", "a/__MACOSX/a", "b/@eaDir/0.png"):
        (folder / "train" / place).mkdir(parents=True)
        shutil.copy(folder / "train" / "a" / "0.png", folder / "train" / place / "0.png")
    (folder / "train" / ".empty").mkdir()
    for path in ("._a", "a/._0.png", "a/.DS_Store", ".DS_Store", "b/.hidden.jpg"):
        (folder / "train" / path).write_bytes(b"\0\5\x16\7" + b"\0" * 100)
    assert names(folder / "train") == expected
    splits = load(folder)
    assert splits.classes == ("a", "b") and splits.train.size + splits.valid.size == 16
    assert sum(len(y) for _, y in splits.train) == splits.train.size // 2 * 2


def test_a_hidden_folder_above_does_not_hide_the_images(folder, tmp_path):
    hidden = tmp_path / ".cache"
    os.rename(folder, hidden)
    assert load(hidden).num_classes == 2


def test_a_class_of_hidden_files_only_is_named(folder):
    (folder / "train" / "c").mkdir()
    (folder / "train" / "c" / "._0.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"class without images: c \(expected files in \.jpg"):
        load(folder)


def test_files_that_are_passed_over_for_their_names_are_counted(folder, caplog):
    for name in ("x.heic", "y.heic", "notes.txt"):
        (folder / "train" / "a" / name).write_bytes(b"x")
    shutil.copy(folder / "train" / "a" / "0.png", folder / "train" / "loose.png")
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert "train: 1 images lie in no class folder" in caplog.text
    assert "train: 3 files are passed over for their names: .heic, .txt" in caplog.text


@pytest.mark.parametrize("target", ["train/a", "train", ".", "train/a/deep", "train/a/deep/back"])
def test_loops_end_and_no_image_is_found_twice(folder, target):
    expected = names(folder / "train")
    deep = folder / "train" / "a" / "deep"
    deep.mkdir()
    os.symlink(folder / target, deep / "back")
    os.symlink(folder / target, folder / "train" / "a" / "loop")
    assert names(folder / "train") == expected
    splits = load(folder)
    assert splits.train.size + splits.valid.size == 16


def test_a_link_to_the_folder_itself_is_no_class(folder):
    os.symlink(".", folder / "train" / "self")
    assert scan(folder / "train").classes == ("a", "b")


def test_images_found_again_in_their_class_count_once(folder, tmp_path):
    expected = len(names(folder / "train"))
    a = folder / "train" / "a"
    os.symlink(a / "0.png", a / "00.png")
    os.symlink("0.png", a / "zz.png")
    os.link(a / "1.png", a / "again.png")
    outside = tmp_path / "outside"
    shutil.copytree(folder / "val" / "a", outside)
    for name in ("first", "second"):
        os.symlink(outside, a / name)
    os.symlink(outside / "2.png", a / "third.png")
    assert len(names(folder / "train")) == expected + 4
    parts = load(folder, valid_fraction=0.5)
    train, valid = (
        {os.path.realpath(part.samples.name(i)) for i in range(part.size)} for part in (parts.train, parts.valid)
    )
    assert not train & valid and len(train) + len(valid) == expected + 4


def test_linked_classes_and_linked_files_are_followed(folder, tmp_path):
    os.rename(folder / "train" / "a", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", folder / "train" / "a")
    os.rename(folder / "train" / "b" / "0.png", tmp_path / ".object")  # as git-annex and others keep their files
    os.symlink(tmp_path / ".object", folder / "train" / "b" / "0.png")
    splits = load(folder, valid_fraction=0)
    assert splits.train.size == 16 and len(list(splits.train)) == 8


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_file_in_two_classes_is_refused(folder, link):
    link(folder / "train" / "a" / "0.png", folder / "train" / "b" / "same.png")
    with pytest.raises(
        ValueError, match=r"train/a/0\.png and .*train/b/same\.png are one file: expected each image in"
    ):
        load(folder)


def test_two_classes_that_are_one_folder_are_refused(folder):
    for part in ("train", "val"):
        os.symlink("a", folder / part / "c")
    with pytest.raises(ValueError, match="are one file"):
        load(folder)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_file_in_training_and_test_is_refused(folder, link):
    link(folder / "train" / "b" / "3.png", folder / "val" / "b" / "same.png")
    with pytest.raises(ValueError, match=r"train/b/3\.png and .*val/b/same\.png are one file: expected none in both"):
        load(folder)


def test_validation_images_that_are_a_link_to_the_training_images_are_refused(folder):
    shutil.rmtree(folder / "val")
    os.symlink("train", folder / "val")
    with pytest.raises(ValueError, match="expected none in both parts"):
        load(folder)


def test_a_link_to_nothing_is_named_when_it_is_read(folder):
    os.symlink("nowhere.png", folder / "val" / "a" / "9.png")
    os.symlink("ring.png", folder / "val" / "a" / "ring.png")
    with pytest.raises(ValueError, match=r"val/a/9\.png cannot be read as an image: No such file"):
        list(load(folder).test)


def test_names_of_classes_in_any_script_and_either_form(folder):
    decomposed = unicodedata.normalize("NFD", "été")
    for part, name in (("train", "été"), ("val", decomposed)):
        shutil.copytree(folder / part / "a", folder / part / name)
        shutil.copytree(folder / part / "a", folder / part / "日本")
    assert load(folder).classes == ("a", "b", "été", "日本")
    shutil.copytree(folder / "train" / "a", folder / "train" / decomposed)
    with pytest.raises(ValueError, match="two folders for class été"):
        load(folder)


def test_names_that_are_no_text_are_escaped_or_refused(folder):
    bad = os.fsdecode(os.fsencode(folder / "val" / "a") + b"/\xff\n.png")
    with open(bad, "wb") as file:
        file.write(b"no image")
    with pytest.raises(ValueError) as caught:
        list(load(folder).test)
    assert r"/\udcff\n.png cannot be read" in str(caught.value) and str(caught.value).isprintable()
    os.mkdir(os.fsencode(folder / "train") + b"/\xff")
    with pytest.raises(ValueError, match=r"\\udcff: the name of a class must be UTF-8 text"):
        load(folder)


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    real = os.scandir

    def scandir(path):
        if str(path).endswith("train/b"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"train/b cannot be listed: Permission denied"):
        load(folder)


def test_classes_of_one_part_only_are_named(folder):
    for i in range(8):
        shutil.copytree(folder / "val" / "a", folder / "val" / f"new{i}")
    with pytest.raises(ValueError, match=r"only one of them has new0, new1, new2, new3, new4 and 3 more"):
        load(folder)


def test_a_split_that_takes_the_last_training_image_of_a_class_is_refused(folder):
    for i in range(1, 8):
        (folder / "train" / "b" / f"{i}.png").unlink()
    with pytest.raises(
        ValueError, match=r"valid_fraction 0.6 holds out every training image of class b \(of 1\): expec"
    ):
        load(folder, valid_fraction=0.6)


def test_a_class_without_a_held_out_image_is_warned_of(folder, caplog):
    for i in range(1, 8):
        (folder / "train" / "b" / f"{i}.png").unlink()
    with caplog.at_level(logging.WARNING):
        splits = load(folder, valid_fraction=0.1)
    assert (splits.train.size, splits.valid.size) == (8, 1)
    assert "valid_fraction 0.1 holds out no image of class b (of 1)" in caplog.text


def test_splits_and_loaders_say_what_a_net_must_know(folder):
    import json

    splits = load(folder)
    assert splits.classes == ("a", "b")
    assert json.loads(json.dumps(splits.preprocessing)) == splits.preprocessing == {
        "channels": 3, "resolution": 8, "short_side": 9, "interpolation": "bilinear",
        "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    for loader in (splits.train, splits.valid, splits.test):
        assert (loader.num_classes, loader.in_channels, loader.resolution) == (2, 3, 8)


def test_the_preprocessing_that_is_written_down_is_that_of_the_test_images(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "val" / "a" / "0.png")
    splits = load(folder, resolution=16)
    told = splits.preprocessing
    with Image.open(folder / "val" / "a" / "0.png") as image:
        height = int(told["short_side"] * image.height / image.width)
        image = image.resize((told["short_side"], height), Image.Resampling.BILINEAR)
    left, top = (round((side - 16) / 2) for side in image.size)
    values = np.asarray(image.crop((left, top, left + 16, top + 16)), np.float32) / 255
    expected = (values - np.float32(told["mean"])) / np.float32(told["std"])
    found = next(iter(splits.test))[0][0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
