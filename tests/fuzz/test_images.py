"""The short form of the fuzzer of images: some hundreds of files by a fixed seed."""

from tests.fuzz import images


def test_damaged_files_give_an_image_or_a_documented_error():
    assert images.main(seconds=30.0, seed=0, cases=400) == 0


def test_the_fuzzer_sees_another_error(monkeypatch):
    def read(path):
        raise KeyError(path)

    monkeypatch.setattr(images.images, "read", read)
    assert images.main(seconds=30.0, seed=0, cases=400) == 1
