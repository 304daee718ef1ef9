"""The short form of the fuzzer of checkpoints, and a fault that it must see."""

import pytest

from proxyless_fast.search import checkpoint
from tests.fuzz import checkpoints


def test_a_damaged_checkpoint_is_never_another_state():
    assert checkpoints.main(seconds=60.0, seed=0, cases=60) == 0


@pytest.mark.parametrize("blind", ["_digest", "load"])
def test_the_fuzzer_sees_what_is_wrong(monkeypatch, blind):
    if blind == "_digest":  # what torch and zip do not notice
        monkeypatch.setattr(checkpoint, "_digest", lambda path: path.stem.partition("-")[2])
    else:
        monkeypatch.setattr(checkpoint, "load", lambda folder: (checkpoint.read(checkpoint.newest(folder)), None))
    assert checkpoints.main(seconds=60.0, seed=0, cases=300) == 1
