"""Whole steps: same paths, same weights, the median, and who runs out of memory or time."""

import os

import pytest
import torch

pytest.importorskip("triton")

import proxyless_fast.bench.baselines as baselines
from benchmarks.gpu import steps
from proxyless_fast.bench.measure import SavedBytes
from tests.benchmarks.gpu.fakes import Host, Spy, make_session


def test_all_run_the_same_paths(tmp_path, registry, quick):
    told = {}
    for name in ("one", "other"):
        told[name] = []
        registry(name, type(name, (Spy,), {"seen": told[name]}))
    steps.measure(make_session(tmp_path), ["one", "other"], [4], ["fp32"])
    assert told["one"] == told["other"]
    for kind in ("weight", "full"):
        assert len({paths for _, of, paths in told["one"] if of == kind}) == 2


def test_all_start_from_the_same_weights(registry):
    class Other(baselines.Subject):
        def __init__(self, net, *arguments):
            super().__init__(baselines.Settings("small", 16, 4, 1, seed=5).net(), *arguments)

    registry("other", Other)
    settings = baselines.Settings("small", 16, 4, 1)
    ours, other = (steps.prepare(settings, name).net.state_dict() for name in ("ours", "other"))
    assert all(torch.equal(value, other[name]) for name, value in ours.items())


def test_the_figure_is_the_median_over_the_paths_of_their_medians(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(steps, "PATHS", 3)
    times = iter([5.0, 1.0, 3.0, 9.0, 9.0, 2.0, 4.0, 4.0, 4.0] * 2)
    device = Host()
    device.time = lambda call, cold=False: next(times) / 1e3
    rows = steps.measure(make_session(tmp_path, device), ["generic"], [4], ["fp32"])
    assert [r["ms_by_path"] for r in rows] == [pytest.approx([3, 9, 4])] * 2
    assert [r["ms"] for r in rows] == pytest.approx([4, 4])


def test_who_runs_out_of_memory_stops_nobody_else(tmp_path, registry, quick):
    class Greedy(Spy):
        seen: list = []  # noqa: RUF012

        def step(self, x, labels, paths, kind):
            super().step(x, labels, paths, kind)
            if len(x) > 4:
                raise torch.OutOfMemoryError

    registry("greedy", Greedy)
    session = make_session(tmp_path)
    rows = steps.measure(session, ["greedy", "generic"], [4, 6, 8], ["fp32"])
    ran = {(r["who"], r["batch"]) for r in rows}
    assert ran == {("greedy", 4), ("generic", 4), ("generic", 6), ("generic", 8)}
    assert session.report["left_out"] == ["steps, fp32 greedy batch 6: out of memory"]
    assert max(batch for batch, _, _ in Greedy.seen) == 6


def test_the_slow_ones_come_after_the_others_and_at_one_batch():
    order = list(steps.cases(["compiled", "ours"], [64, 128], ["bf16", "fp32"]))
    assert order == [
        ("bf16", 64, "ours"), ("fp32", 64, "ours"), ("bf16", 64, "compiled"), ("fp32", 64, "compiled"),
        ("bf16", 128, "ours"), ("fp32", 128, "ours"),
    ]  # fmt: skip


def test_the_clock_is_looked_at_between_what_is_compiled(tmp_path, registry, quick):
    class Slow(Spy):
        seen: list = []  # noqa: RUF012

    registry("slow", Slow, slow=True)
    session = make_session(tmp_path, clock=lambda: float(len(Slow.seen)), parts=("steps",), seconds=5)
    subject = steps.prepare(session.settings, "slow")
    images, labels = session.settings.data()
    path = [(0, 1)] * 7
    assert not steps.warm(session, subject, "slow", (subject.images(images), labels), [path], "full", "slow")
    assert [kind for _, kind, _ in Slow.seen] == ["two"] * 5
    assert [paths[0][0] for _, _, paths in Slow.seen] == [0, 1, 2, 3, 4]
    assert "slow" in session.report["left_out"][0]


def test_half_precision_means_autocast(tmp_path):
    session = make_session(tmp_path)
    losses = {}
    for dtype in ("fp32", "bf16"):
        settings = session.of(dtype, 4)
        subject = steps.prepare(settings, "generic")
        kept = SavedBytes()
        paths = [(0, 1)] * 7
        losses[dtype] = subject.differentiate(*settings.data(), paths, "weight", kept), kept.total
    assert losses["bf16"][0] == pytest.approx(float(losses["fp32"][0]), rel=0.1)
    assert losses["bf16"][1] < 0.7 * losses["fp32"][1]


def test_summary_of_steps():
    def row(who, ms, mib):
        return {"dtype": "bf16", "step": "arch", "batch": 64, "who": who, "ms": ms, "peak_mib": mib}

    rows = [row("ours", 10, 100), row("generic", 25, 300), row("official", 40, 200), row("ours-lean", 12, 50)]
    (text,) = steps.summary(rows)
    assert text == "bf16 arch step, batch 64: 2.50x as fast as the best peer, generic, in 0.33 of its memory"


@pytest.mark.skipif("PROXYLESS_OFFICIAL" not in os.environ, reason="PROXYLESS_OFFICIAL names no clone")
def test_the_official_code_beside_ours(tmp_path, quick):
    session = make_session(tmp_path, space="mobile", resolution=32, official=os.environ["PROXYLESS_OFFICIAL"])
    names = ["official", "official-channels-last", "generic"]
    assert {"official", "official-channels-last", "ours"} <= set(steps.subjects(session))
    assert steps.correct(session, names, 4) is None
    rows = steps.measure(session, names, [4], ["bf16", "fp32"])
    assert len(rows) == 3 * 2 * 2 and not session.report["left_out"]
