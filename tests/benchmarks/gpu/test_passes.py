"""Every pass against the roof: what is counted, and that each is run once and timed alone."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import model, passes
from benchmarks.gpu.traffic import Card
from proxyless_fast.ops.gpu.host import launch
from tests.benchmarks.gpu.fakes import LAYER, Steady, make_session


def test_passes_are_those_of_the_model(no_launches):
    for kind, called in (("weight", "weight"), ("full", "arch")):
        with passes.watching(lambda call: 1e-6) as watch:
            passes.step(LAYER, torch.bfloat16, kind, "meta")
        modelled = model.ours(LAYER, torch.bfloat16, called)
        for of in ("bytes", "flops"):
            mine, counted = (sum(getattr(p, of) for p in ps) for ps in ((t.what for t in watch.timed), modelled))
            assert mine == pytest.approx(counted, rel=1e-3)  # this one starts at the Gram matrix


def test_shares_of_the_roof(tmp_path, no_launches):
    card = Card("made up", 1e12, 1e14, 1e13)
    session = make_session(tmp_path, Steady(1e-4), device="meta")
    rows = {r["pass"]: r for r in passes.of_step(session, LAYER, "bf16", "weight", card)}
    pixels, ci, ch = 64 * 56 * 56, 24, 144
    moved = 2 * (pixels * (ci + ch) + ci * ch) + 4 * 4 * ch  # x, e, W1, and the norm in float32
    expand = rows["expand"]
    count = expand["launches"]  # forward, and again in backward
    assert count == 2 and expand["us"] == pytest.approx(200)
    assert expand["gb_s"] == pytest.approx(moved / 1e-4 / 1e9, rel=1e-6)
    assert expand["of_copy"] == pytest.approx(moved / 1e-4 / 1e12, rel=1e-6)
    assert expand["of_product"] == pytest.approx(2 * pixels * ci * ch / 1e-4 / 1e14, rel=1e-6)
    assert expand["of_roof"] == max(expand["of_copy"], expand["of_product"]) and not expand["below"]
    assert rows["depthwise"]["of_product"] == pytest.approx(2 * pixels * ch * 49 / 1e-4 / 1e13, rel=1e-6)
    assert rows["finish_moments"]["below"] and sum(r["of_step"] for r in rows.values()) == pytest.approx(1)
    (text,) = passes.summary(list(rows.values()))
    assert text.startswith("bf16 weight step: ") and "finish_moments" in text and "expand (" not in text


def test_fp32_products_are_held_against_the_fp32_rate(tmp_path, no_launches):
    session = make_session(tmp_path, Steady(1e-4), device="meta")
    card = Card("made up", 1e12, 1e14, 1e13)
    rows = {r["pass"]: r for r in passes.of_step(session, LAYER, "fp32", "weight", card)}
    assert rows["expand"]["of_product"] == pytest.approx(2 * 64 * 56 * 56 * 24 * 144 / 1e-4 / 1e13, rel=1e-6)


def test_all_layers_are_covered_and_time_is_kept(tmp_path, no_launches):
    now = 0.0

    class Ticking(Steady):
        def time(self, call, cold=False):
            nonlocal now
            now += 1e-3
            return super().time(call, cold)

    session = make_session(tmp_path, Ticking(1e-4), parts=("passes",), clock=lambda: now, device="meta")
    ceilings = {"copy_bytes_s": 1e12, "bf16_flop_s": 1e14, "fp32_flop_s": 1e13}
    with session.part("passes"):
        rows = passes.measure(session, 64, ["bf16", "fp32"], ceilings)
    assert len({(r["dtype"], r["layer"], r["step"]) for r in rows}) == 2 * 11 * 2 and not session.report["left_out"]
    assert passes.table(rows).row_count == sum(r["of_step"] >= passes.SHOWN for r in rows)
    session = make_session(tmp_path, Ticking(1e-4), parts=("passes",), clock=lambda: now, seconds=1, device="meta")
    with session.part("passes"):
        rows = passes.measure(session, 64, ["bf16", "fp32"], ceilings)
    assert 0 < len({(r["dtype"], r["layer"], r["step"]) for r in rows}) < 44
    assert len(session.report["left_out"]) + len({(r["dtype"], r["layer"], r["step"]) for r in rows}) == 44


def test_the_stencils_are_passes_and_the_clock_is_not():
    x, taps = torch.randn(2, 8, 9, 9).contiguous(memory_format=torch.channels_last), torch.randn(8, 1, 3, 3)
    scratch = torch.zeros(4)
    with passes.watching(lambda call: float(scratch.zero_().sum()) or 1e-6) as watch:
        d, *_ = torch.ops.proxyless_fast.depthwise_forward(x, taps, None, None, 1)
        torch.ops.proxyless_fast.depthwise_backward(d, None, None, x, None, None, taps, 1, False)
        torch.ops.proxyless_fast.depthwise_backward_input(d, None, None, x, None, None, taps, 1, False)
    forward, backward, alone = (t.what for t in watch.timed)
    assert [p.name for p in (forward, backward, alone)] == [
        "depthwise_forward", "depthwise_backward", "depthwise_backward_input",
    ]  # fmt: skip
    products = 2 * x.numel() * 9
    assert [p.flops for p in (forward, backward, alone)] == [products, 2 * products, products]
    assert forward.bytes == 2 * x.nbytes + taps.nbytes + 2 * 8 * 4
    assert backward.bytes == 3 * x.nbytes + 2 * taps.nbytes and alone.bytes == 2 * x.nbytes + taps.nbytes


def test_each_launch_is_made_once_and_then_timed(monkeypatch):
    made = []
    monkeypatch.setattr(launch, "run", lambda kernel, *args, **constants: made.append(kernel.fn.__name__))

    def twice(call):
        for _ in range(2):
            call()
        torch.zeros(3).sum()
        return 1e-6

    timed = []
    for seconds in (twice, lambda call: 1e-6):
        with passes.watching(seconds) as watch:
            passes.step(LAYER, torch.float32, "weight", "meta")
        timed.append([t.what.name for t in watch.timed])
    assert timed[0] == timed[1]  # what the clock does is no pass
    assert made.count("expand_kernel") == (3 + 1) * timed[0].count("expand") == 8
