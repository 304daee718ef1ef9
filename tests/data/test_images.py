"""Reading one image file: brightness by mode, orientation, bounds; and what loaders do about damaged files."""

import logging
import os
import re
import struct
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from proxyless_fast.data import UnreadableImage, folder, images, loaders

RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)


def tiff(data, *, bits, photometric=1, sample_format=1, big_endian=False):
    """A TIFF file of one uncompressed 64×64 strip, which Pillow itself would not write."""
    order = ">" if big_endian else "<"
    tags = {256: 64, 257: 64, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 64, 279: len(data)}
    tags[339] = sample_format
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = (b"MM" if big_endian else b"II") + struct.pack(order + "HI", 42, 8 + len(data))
    return head + data + struct.pack(order + "H", len(tags)) + entries + bytes(4)


def png(rows, *, depth, color, width=64):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, color, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def packed_twelve_bits():
    first, second = (RAMP * 4095).astype(int).reshape(-1, 2).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()


def pixels(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return np.asarray(images.read(str(path)))


def assert_ramp(found, levels=200, inverted=False, atol=0.02):
    found = found.astype(float) / 255
    assert found.shape == (64, 64, 3) and len(np.unique(found)) >= levels
    np.testing.assert_allclose(found, np.repeat((1 - RAMP if inverted else RAMP)[..., None], 3, 2), atol=atol)


EIGHT, SIXTEEN = (RAMP * 255).astype(np.uint8), (RAMP * 65535).astype(np.uint16)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("extension", ["png", "tif", "gif", "bmp", "webp", "jpg", "ppm"])
def test_every_mode_of_every_format_keeps_its_brightness(tmp_path, mode, extension):
    path = tmp_path / f"x.{extension}"
    try:
        Image.fromarray(EIGHT).convert(mode).save(path, quality=95)
    except (OSError, KeyError, ValueError):
        pytest.skip(f"{extension} does not hold {mode}")
    few = {"levels": 16, "atol": 0.04} if extension == "gif" else {}  # Pillow writes some in few colours
    assert_ramp(pixels(path), **few)


def test_palettes_with_alpha_keep_their_colours(tmp_path):
    Image.fromarray(EIGHT).convert("P").save(tmp_path / "x.png", transparency=bytes(range(256)))
    assert_ramp(pixels(tmp_path / "x.png"))


def test_one_bit_images_are_black_and_white(tmp_path):
    Image.fromarray(EIGHT > 127).save(tmp_path / "x.png")
    assert np.unique(pixels(tmp_path / "x.png")).tolist() == [0, 255]


GREY = {
    "png": png([row.tobytes() for row in SIXTEEN.astype(">u2")], depth=16, color=0),
    "png with alpha": png([np.repeat(r, 2).astype(">u2").tobytes() for r in SIXTEEN], depth=16, color=4),
    "png in colour": png([np.repeat(r, 3).astype(">u2").tobytes() for r in SIXTEEN], depth=16, color=2),
    "png in colour with alpha": png([np.repeat(r, 4).astype(">u2").tobytes() for r in SIXTEEN], depth=16, color=6),
    "little-endian tiff": tiff(SIXTEEN.astype("<u2").tobytes(), bits=16),
    "big-endian tiff": tiff(SIXTEEN.astype(">u2").tobytes(), bits=16, big_endian=True),
    "12-bit tiff": tiff(packed_twelve_bits(), bits=12),
    "pgm": b"P5 64 64 65535\n" + SIXTEEN.astype(">u2").tobytes(),
    "10-bit pgm": b"P5 64 64 1023\n" + (RAMP * 1023).astype(">u2").tobytes(),
    "float tiff": tiff(RAMP.astype("<f4").tobytes(), bits=32, sample_format=3),
}


@pytest.mark.parametrize("kind", GREY)
def test_deep_grey_is_scaled_to_eight_bits(tmp_path, kind):
    (tmp_path / "x").write_bytes(GREY[kind])
    assert_ramp(pixels(tmp_path / "x"))


def test_white_is_zero_turns_deep_grey_over(tmp_path):
    for name, data, options in (
        ("16", SIXTEEN.astype("<u2"), {"bits": 16}),
        ("float", RAMP.astype("<f4"), {"bits": 32, "sample_format": 3}),
        ("8", EIGHT, {"bits": 8}),
    ):
        (tmp_path / name).write_bytes(tiff(data.tobytes(), photometric=0, **options))
        assert_ramp(pixels(tmp_path / name), inverted=True)


def test_deep_grey_is_scaled_alike_in_every_block(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(GREY["png"])
    whole = pixels(tmp_path / "x")
    monkeypatch.setattr(images, "BLOCK", 64 * 5)
    np.testing.assert_array_equal(pixels(tmp_path / "x"), whole)


@pytest.mark.parametrize(
    ("data", "options", "complaint"),
    [
        ((RAMP * 65535).astype("<i4"), {"bits": 32, "sample_format": 2}, "signed integers, whose range is not known"),
        ((RAMP * 32767).astype("<i2"), {"bits": 16, "sample_format": 2}, "signed integers"),
        ((RAMP * 127).astype("i1"), {"bits": 8, "sample_format": 2}, "signed integers"),
        ((RAMP * 2**31).astype("<u4"), {"bits": 32}, "32-bit integers, whose range is not known"),
        ((RAMP * 255).astype("<f4"), {"bits": 32, "sample_format": 3}, "floating-point values outside 0 to 1"),
        ((RAMP - 0.1).astype("<f4"), {"bits": 32, "sample_format": 3}, "outside 0 to 1"),
        (np.where(RAMP < 0.9, RAMP, np.nan).astype("<f4"), {"bits": 32, "sample_format": 3}, "outside 0 to 1"),
        (np.where(RAMP < 0.9, RAMP, np.inf).astype("<f4"), {"bits": 32, "sample_format": 3}, "outside 0 to 1"),
    ],
)
def test_values_without_a_known_range_are_refused(tmp_path, data, options, complaint):
    (tmp_path / "x.tif").write_bytes(tiff(data.tobytes(), **options))
    with pytest.raises(UnreadableImage, match=rf"x\.tif cannot be read as an image: it holds .*{complaint}"):
        images.read(str(tmp_path / "x.tif"))


def test_of_several_frames_the_first_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    for name in ("x.gif", "x.webp", "x.tif", "x.png"):
        frames[0].save(
            tmp_path / name, save_all=True, append_images=frames[1:], **({} if "tif" in name else {"duration": 9})
        )
        assert abs(pixels(tmp_path / name).astype(int) - [255, 0, 0]).max() < 8


# orientation

CORNERS = np.zeros((20, 32), np.uint8)
CORNERS[:10, :16], CORNERS[:10, 16:], CORNERS[10:, :16] = 240, 160, 80
# As the standard says where the stored first row and first column lie in the picture: what each orientation shows.
SHOWN = {
    1: CORNERS, 2: CORNERS[:, ::-1], 3: CORNERS[::-1, ::-1], 4: CORNERS[::-1],
    5: CORNERS.T, 6: CORNERS[::-1].T, 7: CORNERS[::-1, ::-1].T, 8: CORNERS.T[::-1],
}  # fmt: skip


@pytest.mark.parametrize("extension", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", [*SHOWN, 0, 9])
def test_images_are_turned_as_a_viewer_turns_them(tmp_path, extension, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{extension}"
    Image.fromarray(CORNERS).convert("RGB").save(path, exif=exif.tobytes(), quality=95)
    shown = SHOWN.get(orientation, CORNERS)
    found = pixels(path)[..., 0]
    assert found.shape == shown.shape
    assert abs(found.astype(int) - shown).mean() < 3


def test_damaged_exif_data_leave_the_image_as_it_is(tmp_path):
    Image.fromarray(CORNERS).save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\x12" * 40, quality=95)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.asarray(images.read(str(tmp_path / "x.jpg"))).shape == (20, 32, 3)


# what cannot be read


def test_what_is_no_image_is_named(tmp_path):
    Image.fromarray(EIGHT).save(tmp_path / "x.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:-300])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    (tmp_path / "flat.png").write_bytes(png([], depth=8, color=0))
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name, why in (
        ("cut.jpg", "[Tt]runcated"),
        ("empty.png", "it is empty"),
        ("script.png", "its format is none of"),  # Pillow alone would start Ghostscript
        ("flat.png", "pixels|format is none"),
        ("folder.png", "not a regular file"),
        ("pipe.png", "not a regular file"),
        ("nowhere.png", "No such file"),
    ):
        with pytest.raises(UnreadableImage, match=rf"{name} cannot be read as an image: .*({why})"):
            images.read(str(tmp_path / name))


def test_a_wrong_extension_does_not_matter(tmp_path):
    Image.fromarray(EIGHT).save(tmp_path / "x", "PNG")
    os.rename(tmp_path / "x", tmp_path / "x.jpg")
    assert_ramp(pixels(tmp_path / "x.jpg"))


@pytest.mark.parametrize(("width", "height"), [(9460, 9460), (20000, 10000), (65537, 1), (1, 65537)])
def test_images_beyond_the_bounds_are_refused_undecoded(tmp_path, width, height):
    row = bytes((width + 7) // 8)
    (tmp_path / "x.png").write_bytes(png([row] * height, depth=1, color=0, width=width))
    tracemalloc.start()
    with (
        warnings.catch_warnings(record=True) as warned,
        pytest.raises(UnreadableImage, match=r"x\.png cannot be read as an image: .*pixels"),
    ):
        warnings.simplefilter("always")
        images.read(str(tmp_path / "x.png"))
    assert not warned
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("size", [(1, 1), (1, 65536), (65536, 1), (4000, 2), (3, 700)])
def test_long_images_take_no_more_than_others(size, monkeypatch):
    image = Image.new("RGB", size, (255, 0, 0))
    largest = 0
    resize = Image.Image.resize

    def watched(self, size, *args, **kwargs):
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched)
    for transform in (folder.train_transform(64), folder.eval_transform(64)):
        x = transform(image)
        assert x.shape == (3, 64, 64)
        torch.testing.assert_close(x[:, 0, 0], torch.tensor([2.2489, -2.0357, -1.8044]), atol=1e-3, rtol=0)
    assert largest <= 73 * 73 * (folder.LONGEST + 2)


@pytest.mark.parametrize("size", [(40, 30), (160, 40), (161, 40), (30, 121), (401, 20), (20, 400)])
def test_the_centre_crop_sees_what_it_saw_of_the_whole_image(size):
    generator = np.random.default_rng(1)
    small = Image.fromarray(generator.integers(0, 256, (size[1] // 5 + 2, size[0] // 5 + 2, 3), dtype=np.uint8))
    image = small.resize(size, Image.Resampling.BICUBIC)
    whole = transforms.Compose([transforms.Resize(37), transforms.CenterCrop(32)])(image)
    cut = transforms.Compose([folder.middle, transforms.Resize(37), transforms.CenterCrop(32)])(image)
    difference = abs(np.asarray(whole, int) - np.asarray(cut, int))
    assert difference.max() == 0 if max(size) <= 4 * min(size) + 1 else difference.mean() < 12


def test_threads_may_read_one_file_at_once(tmp_path):
    (tmp_path / "x").write_bytes(GREY["png"])
    expected = pixels(tmp_path / "x")
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: np.asarray(images.read(str(tmp_path / "x"))), range(64)):
            np.testing.assert_array_equal(found, expected)


# damaged files in a loader


@pytest.fixture
def many(tmp_path):
    """200 training and 100 test images of one class, each of its own colour."""
    for part, count in (("train", 200), ("val", 100)):
        (tmp_path / part / "a").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / part / "a" / f"{i:03}.png")
    return tmp_path


def damage(root, *names):
    for name in names:
        (root / f"{name}.png").write_bytes(b"no image")


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_files_are_named_once_and_skipped(many, workers, caplog):
    damage(many, "train/a/003", "train/a/199", "val/a/050")
    splits = loaders(many, 8, 4, valid_fraction=0, workers=workers)
    with caplog.at_level(logging.WARNING):
        for epoch in range(2):
            splits.train.set_epoch(epoch)
            assert [len(y) for _, y in splits.train] == [8] * 25  # a neighbour stands in: batches keep their size
        tested = torch.cat([x for x, _ in splits.test])[:, 0, 0, 0]
    assert ((tested * 0.229 + 0.485) * 255).round().int().tolist() == [i for i in range(100) if i != 50]
    assert [record.getMessage().count("cannot be read") for record in caplog.records] == [1, 1, 1]
    assert all(f"{name}.png" in caplog.text for name in ("a/003", "a/199", "a/050"))


def test_batches_with_stand_ins_are_pure_functions_of_seed_and_epoch(many):
    damage(many, "train/a/003", "train/a/004")

    def batches(workers):
        train = loaders(many, 8, 4, valid_fraction=0, seed=2, workers=workers).train
        train.set_epoch(3)
        return torch.cat([x for x, _ in train])

    assert torch.equal(batches(0), batches(2))


@pytest.mark.parametrize("workers", [0, 2])
def test_more_damaged_files_than_the_limit_end_in_one_sentence(many, workers):
    damage(many, "val/a/010", "val/a/090")
    with pytest.raises(UnreadableImage) as caught:
        list(loaders(many, 8, 4, valid_fraction=0, workers=workers).test)
    message = str(caught.value)
    assert message.startswith(f"{many}/val/a/090.png cannot be read as an image: ") and "\n" not in message
    assert message.endswith("; more than 1 of 100 images are damaged")


def test_a_folder_of_damaged_files_only_ends_soon(many):
    damage(many, *(f"train/a/{i:03}" for i in range(200)))
    with pytest.raises(UnreadableImage, match="more than 2 of 200 images are damaged"):
        list(loaders(many, 8, 4, valid_fraction=0, workers=0).train)


def end_process(image):
    os._exit(9)


def test_a_worker_that_the_system_ends_is_one_sentence(many):
    loader = folder.FolderLoader([(str(many / "val" / "a" / "000.png"), 0)] * 4, end_process, 2, workers=1)
    with pytest.raises(ChildProcessError, match=r"was ended by the system .*: expected memory for workers=1$"):
        list(loader)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_command_line_names_a_damaged_file_in_one_line(many, workers, capfd):
    from proxyless_fast import cli

    damage(many, *(f"train/a/{i:03}" for i in range(0, 200, 2)))
    options = ["--resolution", "16", "--batch-size", "8", "--no-latency", "--epochs", "1", "--warmup-epochs", "0"]
    code = cli.main(["search", "--run", str(many / "run"), "--data", str(many), "--workers", workers, *options])
    error = capfd.readouterr().err
    assert code == 2 and error.count("\n") == 1
    assert re.match(rf"proxyless-fast search: {many}/train/a/\d+\.png cannot be read as an image", error)
