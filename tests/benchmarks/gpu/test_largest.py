"""The largest batch in equal memory: predicted, then run."""

import pytest

pytest.importorskip("triton")

import proxyless_fast.bench.baselines as baselines
from benchmarks.gpu import largest, steps
from tests.benchmarks.gpu.fakes import make_session


def test_largest_batch_by_arithmetic():
    fixed, per_image = largest.line((16, 1700), (32, 3300))
    assert (fixed, per_image) == (100, 100)
    assert largest.predicted(4099, fixed, per_image) == 32
    assert largest.predicted(4100, fixed, per_image) == 40
    assert largest.predicted(50, fixed, per_image) == 0
    with pytest.raises(RuntimeError, match="does not grow"):
        largest.predicted(1000, *largest.line((16, 100), (32, 100)))


def test_largest_batch_is_run(tmp_path):
    session = make_session(tmp_path)
    limit = 64 << 20
    rows = largest.measure(session, ["ours", "generic", "checkpoint"], 4, ["fp32"], limit / 2**30)
    assert {(r["who"], r["step"]) for r in rows} == {
        (who, step) for who in ("ours", "generic", "checkpoint") for step in ("weight", "arch")
    }
    for r in rows:
        assert 0 < r["batch"] == r["predicted"]
        needed = (r["fixed_mib"] + r["image_mib"] * r["batch"]) * 2**20
        assert needed <= limit < needed + r["image_mib"] * largest.MULTIPLE * 2**20
    of = {(r["who"], r["step"]): r["batch"] for r in rows}
    assert of["ours", "weight"] > 2 * of["generic", "weight"]


def test_a_prediction_that_does_not_fit_is_lowered(tmp_path):
    session = make_session(tmp_path)
    settings = session.of("fp32", 4)
    subject = steps.prepare(settings, "generic")
    path = largest.widest(settings.net())
    needed = {b: session.device.peak(lambda b=b: largest.step(subject, settings, b, path, "weight")) for b in (40, 48)}
    found = largest.confirmed(session, subject, settings, needed[48] - 1, 56, path, "weight")
    assert found == 40
    assert largest.confirmed(session, subject, settings, needed[40] // 10, 48, path, "weight") == 0


def test_widest_path():
    layers = [layer for layer in baselines.Settings("small", 16, 4, 1).net().layers() if layer.mixed is not None]
    for layer, (active, partner) in zip(layers, largest.widest(baselines.Settings("small").net()), strict=True):
        assert layer.choices[active].macs == max(0 if c is None else c.macs for c in layer.choices)
        assert partner != active


def test_summary_of_largest():
    def row(who, batch):
        return {"dtype": "fp32", "step": "weight", "who": who, "batch": batch}

    texts = list(largest.summary([row("ours", 320), row("ours-lean", 200), row("generic", 96), row("official", 80)]))
    assert "ours 320, best peer generic 96: 3.33x (3x is reached)" in texts[0]
    assert "ours-lean 200" in texts[1] and "2.08x (3x is missed)" in texts[1]
