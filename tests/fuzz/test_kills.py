"""The short form of the harness of kills: some signals by a fixed seed, and a fault that it must see."""

import pytest

from proxyless_fast.search import session
from tests.fuzz import kills


@pytest.mark.slow
@pytest.mark.parametrize("signals", ["KILL", "TERM,INT,HUP,USR1"])
def test_an_interrupted_run_ends_as_an_undisturbed_one(signals):
    assert kills.main(seconds=120.0, seed=1, cases=12, signals=signals) == 0


@pytest.mark.slow
def test_the_harness_sees_a_log_that_is_not_cut(monkeypatch):
    monkeypatch.setattr(session.Journal, "lengths", property(lambda self: {}, lambda self, value: None), raising=False)
    assert kills.main(seconds=120.0, seed=1, cases=40, signals="KILL") == 1
