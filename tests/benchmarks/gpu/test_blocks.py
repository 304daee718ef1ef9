"""Single blocks of every layer."""

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import blocks
from tests.benchmarks.gpu.fakes import make_session


def test_blocks_of_every_layer(tmp_path, quick):
    session = make_session(tmp_path)
    rows = blocks.measure(session, ["ours", "generic", "checkpoint"], 4, ["bf16"])
    assert {r["who"] for r in rows} == {"ours", "generic"}  # a checkpoint is around blocks
    layers = {tuple(case.split()[:3]) for case in (r["case"] for r in rows)}
    assert len({r["case"] for r in rows}) == len(layers) > 3
    (shown,) = blocks.tables(rows)
    assert shown.row_count == len(layers)
