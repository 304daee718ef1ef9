"""One run of the benchmark: its time budget and its report."""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.benchmarks.gpu.fakes import make_session


def test_parts_get_their_shares_and_what_is_left_over(tmp_path):
    now = 0.0
    session = make_session(tmp_path, parts=("steps", "passes"), seconds=550, clock=lambda: now)
    with session.part("steps"):
        now = 349.0
        assert not session.over("a")
        now = 351.0
        assert session.over("b")
    with session.part("passes"):
        now = 549.0
        assert not session.over("c")
        now = 551.0
        assert session.over("d")
    assert session.report["left_out"] == ["b: out of time", "d: out of time"]


def test_the_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    session = make_session(tmp_path)
    session.report["figure"] = 1
    session.save()
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("it was renamed"))
    session.report["figure"] = {(1, 2): "JSON has no such key"}
    with pytest.raises(TypeError):
        session.save()
    assert json.loads((tmp_path / "gpu.json").read_text())["figure"] == 1
