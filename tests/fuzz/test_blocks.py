"""The short form of the fuzzer of edited blocks: some hundred cases by a fixed seed."""

import pytest

from tests.fuzz import blocks


def test_edited_blocks_compute_what_their_modules_say():
    assert blocks.main(seconds=600.0, seed=0, cases=400) == 0


@pytest.mark.parametrize(
    ("places", "wrong"),
    [
        (["reading.has_objects"], lambda module, *seen: True),
        (["blocks.mbconv.require_unhooked", "blocks.conv.require_unhooked"], lambda modules: None),
        (["reading.require_plain"], lambda module, kind, place: None),
        (["gates.input_versions", "mixed.input_versions"], lambda args, kwargs: []),
    ],
)
def test_the_fuzzer_sees_what_is_wrong(monkeypatch, places, wrong):
    for place in places:
        monkeypatch.setattr(f"proxyless_fast.{place}", wrong)
    assert blocks.main(seconds=600.0, seed=5386, cases=1000) == 1
