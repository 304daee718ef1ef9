"""The short form of the fuzzer of shards: some hundreds of cases by a fixed seed."""

from tests.fuzz import shards


def test_hostile_shards_give_samples_or_one_sentence():
    assert shards.main(seconds=30.0, seed=0, cases=150) == 0


def test_the_fuzzer_sees_another_error(monkeypatch):
    monkeypatch.setattr(shards.shards, "look_through", lambda path: {}[path])
    assert shards.main(seconds=30.0, seed=0, cases=20) == 1


def test_the_fuzzer_sees_a_sample_beyond_the_file(monkeypatch):
    def members(file, size):
        for member in real(file, size):
            member.offset_data += size * member.name.endswith(".png")
            yield member

    real = shards.shards._members
    monkeypatch.setattr(shards.shards, "_members", members)
    assert shards.main(seconds=30.0, seed=1, cases=50) == 1
