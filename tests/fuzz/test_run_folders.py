"""The short form of the fuzzer of run folders: some cases of every stage by a fixed seed."""

from contextlib import nullcontext

import pytest

from proxyless_fast.cli import stages
from tests.fuzz import run_folders


def test_damaged_run_folders_are_refused_or_do_not_matter():
    assert run_folders.main(seconds=60.0, seed=0, cases=120) == 0


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("_naming", lambda description: nullcontext()),  # one of two files is not named
        ("_require_same_search", lambda run, config, path: (run.folder / ".x.tmp").touch()),  # something is left behind
    ],
)
def test_the_fuzzer_sees_what_is_wrong(monkeypatch, name, wrong):
    monkeypatch.setattr(stages, name, wrong)
    assert run_folders.main(seconds=60.0, seed=0, cases=300) == 1
