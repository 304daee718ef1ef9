"""The short form of the fuzzer of files: some hundred files of each kind by a fixed seed."""

import pytest

from tests.fuzz import files


def test_damaged_files_are_read_or_refused():
    assert files.main(seconds=60.0, seed=0, cases=150) == 0


@pytest.mark.parametrize(
    ("kind", "name", "wrong"),
    [
        ("report", "check", lambda model, content, source: content["space"]["name"].upper()),
        ("official", "run", lambda net: [][0]),
        ("weights", "load_weights", lambda net, path: net.first_conv.conv.weight.data.fill_(float("nan"))),
    ],
)
def test_the_fuzzer_sees_what_is_wrong(monkeypatch, kind, name, wrong):
    monkeypatch.setattr(files, name, wrong)
    assert files.main(seconds=60.0, seed=0, cases=150, kinds=kind) == 1
