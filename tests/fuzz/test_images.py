"""The short form of the fuzzers of images and image folders: some hundreds of cases by a fixed seed."""

from tests.fuzz import folders, images


def test_damaged_files_give_an_image_or_a_documented_error():
    assert images.main(seconds=30.0, seed=0, cases=400) == 0


def test_the_fuzzer_sees_another_error(monkeypatch):
    def read(path):
        raise KeyError(path)

    monkeypatch.setattr(images.images, "read", read)
    assert images.main(seconds=30.0, seed=0, cases=400) == 1


def test_random_folders_give_each_image_once_or_one_sentence():
    assert folders.main(seconds=30.0, seed=0, cases=200) == 0


def test_the_fuzzer_sees_an_image_in_two_parts(monkeypatch):
    monkeypatch.setattr("proxyless_fast.data.splits.check_apart", lambda training, testing: None)
    assert folders.main(seconds=30.0, seed=0, cases=2000) == 1
