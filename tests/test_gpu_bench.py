"""The GPU benchmark without a GPU: everything but the device itself, which is faked."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu
import gpu_blocks
import gpu_correctness
import gpu_largest
import gpu_model
import gpu_passes
import gpu_precompile
import gpu_run
import gpu_steps
from gpu_launches import Shape, distinct
from triton.runtime import driver

from proxyless_fast.bench import baselines
from proxyless_fast.bench.measure import SavedBytes
from proxyless_fast.ops.triton import launch

ROOT = Path(__file__).resolve().parents[1]
LAYER = Shape(64, 24, 24, 56, 7, 1, 6)


class _Within(SavedBytes):
    """Runs out of memory where more is kept for backward than `limit`."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def _pack(self, tensor):
        kept = super()._pack(tensor)
        if self.total > self.limit:
            raise torch.OutOfMemoryError("more than the limit")
        return kept


class Host:
    """This CPU in place of a GPU: memory is what autograd keeps, the card's is 2 GiB."""

    name = "cpu"
    within = None

    def time(self, call, cold=False):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def peak(self, call):
        with SavedBytes() as kept:
            call()
        return kept.total

    def free(self):
        return 2 << 30

    @contextmanager
    def limited(self, limit):
        with _Within(limit) as self.within:
            yield

    def describe(self):
        return {"card": "a CPU"}

    def capability(self):
        return 90

    def table_architecture(self):
        return 90

    def clear(self):
        if self.within is not None:
            self.within._storages.clear()


class Steady(Host):
    """Every call takes as long as is said, and is not made."""

    def __init__(self, seconds):
        self.seconds = seconds

    def time(self, call, cold=False):
        return self.seconds


def make_run(tmp_path, host=None, parts=tuple(gpu_run.SHARES), seconds=1e9, clock=time.monotonic, **settings):
    of = {"space": "small", "resolution": 16, "batch": 4, "threads": 1} | settings
    console = Console(file=StringIO(), width=200)
    return gpu_run.Run(
        host or Host(), baselines.Settings(**of), list(parts), seconds, tmp_path / "gpu.json", console, clock
    )


@pytest.fixture
def quick(monkeypatch):
    """As few timed runs as there may be."""
    monkeypatch.setattr(gpu_steps, "SECONDS", 0)
    monkeypatch.setattr(gpu_blocks, "SECONDS", 0)
    monkeypatch.setattr(gpu_steps, "PATHS", 2)


@pytest.fixture
def no_launches(monkeypatch):
    """Triton's launches do nothing: their tensors are meta tensors, or nobody reads them."""
    monkeypatch.setattr(launch, "run", lambda *args, **constants: None)


@pytest.fixture
def registry(monkeypatch):
    """Enter a subject for this test: its name, class, and whether it counts as slow to make."""

    def enter(name, subject, slow=False):
        def build(settings):
            return subject(settings.net(), True, settings)

        monkeypatch.setitem(baselines.BASELINES, name, baselines.Baseline(name, "", build, slow=slow))

    return enter


def printed(run):
    return run.console.file.getvalue()


# the whole command


def test_every_part_from_end_to_end(tmp_path, quick, no_launches, monkeypatch):
    monkeypatch.setattr(gpu_steps, "SUBJECTS", ("ours", "generic", "official"))
    monkeypatch.setattr(gpu_correctness, "CHECKED", [(2, 6, 5, 9, 9, 5, 2, 3)])
    monkeypatch.setattr(gpu_correctness, "DTYPES", {"fp32": torch.float32})
    monkeypatch.setattr(gpu_passes, "imagenet", lambda batch: [Shape(batch, 24, 24, 8, 7, 1, 6)])
    run = make_run(tmp_path)
    assert gpu.measure(run, list(gpu_run.SHARES), [4, 8], ["bf16", "fp32"], 0.05) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["correctness"] == [] and report["gate"] is None
    assert set(report["ceilings"]) == {"copy_bytes_s", "bf16_flop_s", "fp32_flop_s"}
    everything = {
        (dtype, step, who, batch)
        for dtype in ("bf16", "fp32") for step in ("weight", "arch") for who in ("ours", "generic") for batch in (4, 8)
    }  # fmt: skip
    assert {(r["dtype"], r["step"], r["who"], r["batch"]) for r in report["steps"]} == everything
    assert len(report["steps"]) == len(everything)
    assert all(r["ms"] > 0 and r["peak_mib"] > 0 and len(r["ms_by_path"]) == 2 for r in report["steps"])
    assert len(report["largest"]) == 2 * 2 * 2 and len(report["passes"]) > 20
    assert {r["kind"] for r in report["blocks"]} == {"forward", "backward", "input-gradient", "probe"}
    said = printed(run)
    assert said.count("left out") == 1 and "--official PATH" in said
    for text in ("fp32, batch 8", "largest batch", "of roof", "blocks, bf16", "as fast as the best peer, generic"):
        assert text in said, text


def test_the_options_reach_the_parts(tmp_path, quick, monkeypatch, capsys):
    told = {}
    monkeypatch.setattr(gpu_steps, "SUBJECTS", ("ours", "generic"))
    monkeypatch.setattr(gpu_precompile, "precompile", lambda arch, capability, **work: told.update(work) or 7)
    options = [
        "--only",
        "steps",
        "--batches",
        "4",
        "6",
        "--dtypes",
        "fp32",
        "--out",
        str(tmp_path / "new" / "gpu.json"),
    ]
    settings = baselines.Settings("small", 16, 4, 1)
    assert gpu.benchmark(gpu.parser().parse_args(options), Host(), settings) == 0
    assert told["checked"] == [] and told["layers"] is None and told["dtypes"] == [torch.float32] and told["batch"] == 4
    report = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert {(r["dtype"], r["batch"]) for r in report["steps"]} == {("fp32", 4), ("fp32", 6)}
    assert report["card"] == "a CPU" and report["settings"]["space"] == "small" and report["seconds"] > 0
    assert not {"correctness", "largest", "passes", "blocks"} & set(report)
    said = capsys.readouterr().out
    assert "7 Triton kernels" in said and "written" in said


def test_an_op_that_is_wrong_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_correctness, "CHECKED", [(2, 6, 5, 9, 9, 5, 2, 3)])
    monkeypatch.setattr(gpu_correctness, "DTYPES", {"fp32": torch.float32})
    right = gpu_correctness.mbconv
    monkeypatch.setattr(gpu_correctness, "mbconv", lambda *a, **o: right(*a, **o) * 1.001)
    run = make_run(tmp_path)
    assert gpu.measure(run, ["correctness", "steps"], [4], ["fp32"], None) == 1
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert any("out: 1.0e-03" in text for text in report["correctness"]) and "steps" not in report
    monkeypatch.setattr(gpu_correctness, "mbconv", lambda *a, **o: 1 / 0)
    assert all("ZeroDivisionError" in text for text in gpu_correctness.measure(run))


def test_a_subject_that_is_wrong_ends_the_run(tmp_path, registry, capsys, monkeypatch):
    class Wrong(baselines.Subject):
        def differentiate(self, *arguments):
            return 1.01 * super().differentiate(*arguments)

    registry("wrong", Wrong)
    monkeypatch.setattr(gpu_steps, "SUBJECTS", ("generic", "wrong"))
    run = make_run(tmp_path)
    assert gpu.measure(run, ["steps"], [4], ["fp32"], None) == 1
    error = capsys.readouterr().err
    assert "wrong, weight step" in error and error.count("\n") == 1 and "steps" not in run.report


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: it would run")
@pytest.mark.parametrize("name", ["gpu.py", "gpu_tune.py"])
def test_without_a_gpu_it_says_so(name):
    command = [sys.executable, str(ROOT / "benchmarks" / name)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and "no GPU" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"), [(["--official", "/nonexistent"], "/nonexistent"), (["--batches", "0"], "must be positive")]
)
def test_wrong_options_exit_with_code_2(capsys, options, said):
    with pytest.raises(SystemExit) as end:
        gpu.main(options)
    assert end.value.code == 2 and said in capsys.readouterr().err


# the run: budget and report


def test_parts_get_their_shares_and_what_is_left_over(tmp_path):
    now = 0.0
    run = make_run(tmp_path, parts=("steps", "passes"), seconds=550, clock=lambda: now)
    with run.part("steps"):
        now = 349.0
        assert not run.over("a")
        now = 351.0
        assert run.over("b")
    with run.part("passes"):
        now = 549.0
        assert not run.over("c")
        now = 551.0
        assert run.over("d")
    assert run.report["left_out"] == ["b: out of time", "d: out of time"]


def test_the_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    run.report["figure"] = 1
    run.save()
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("it was renamed"))
    run.report["figure"] = {(1, 2): "JSON has no such key"}
    with pytest.raises(TypeError):
        run.save()
    assert json.loads((tmp_path / "gpu.json").read_text())["figure"] == 1


# compiling ahead


def test_kernels_compiled_ahead_are_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    checked = (2, 5, 7, 6, 5, 3, 1, 1)
    work = {"batch": 2, "layers": [], "dtypes": [], "checked": [checked], "checked_dtypes": [torch.bfloat16]}
    count = gpu_precompile.precompile(90, 90, 2, depthwise=False, **work)
    binaries = set(tmp_path.rglob("*.cubin"))
    assert len(binaries) == count > 5
    monkeypatch.setattr(driver, "_active", None)
    driver.set_active(gpu_precompile._Target(90))
    again = gpu_precompile.block_launches(checked, torch.bfloat16, 90)
    for launched in distinct([one for one in again if not one.name.startswith("depthwise")]):
        launched.kernel.device_caches.clear()  # as in a process that has compiled nothing yet
        gpu_precompile.compile_as_jit(launched)
    assert set(tmp_path.rglob("*.cubin")) == binaries


# steps


class Spy(baselines.Subject):
    """Notes what it is told to run."""

    seen: list = []  # noqa: RUF012

    def step(self, x, labels, paths, kind):
        self.seen.append((len(x), kind, tuple(paths)))
        super().step(x, labels, paths, kind)


def test_all_run_the_same_paths(tmp_path, registry, quick):
    told = {}
    for name in ("one", "other"):
        told[name] = []
        registry(name, type(name, (Spy,), {"seen": told[name]}))
    gpu_steps.measure(make_run(tmp_path), ["one", "other"], [4], ["fp32"])
    assert told["one"] == told["other"]
    for kind in ("weight", "full"):
        assert len({paths for _, of, paths in told["one"] if of == kind}) == 2


def test_all_start_from_the_same_weights(registry):
    class Other(baselines.Subject):
        def __init__(self, net, *arguments):
            super().__init__(baselines.Settings("small", 16, 4, 1, seed=5).net(), *arguments)

    registry("other", Other)
    settings = baselines.Settings("small", 16, 4, 1)
    ours, other = (gpu_steps.prepare(settings, name).net.state_dict() for name in ("ours", "other"))
    assert all(torch.equal(value, other[name]) for name, value in ours.items())


def test_the_figure_is_the_median_over_the_paths_of_their_medians(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(gpu_steps, "PATHS", 3)
    times = iter([5.0, 1.0, 3.0, 9.0, 9.0, 2.0, 4.0, 4.0, 4.0] * 2)
    device = Host()
    device.time = lambda call, cold=False: next(times) / 1e3
    rows = gpu_steps.measure(make_run(tmp_path, device), ["generic"], [4], ["fp32"])
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
    run = make_run(tmp_path)
    rows = gpu_steps.measure(run, ["greedy", "generic"], [4, 6, 8], ["fp32"])
    ran = {(r["who"], r["batch"]) for r in rows}
    assert ran == {("greedy", 4), ("generic", 4), ("generic", 6), ("generic", 8)}
    assert run.report["left_out"] == ["steps, fp32 greedy batch 6: out of memory"]
    assert max(batch for batch, _, _ in Greedy.seen) == 6


def test_the_slow_ones_come_after_the_others_and_at_one_batch():
    order = list(gpu_steps.cases(["compiled", "ours"], [64, 128], ["bf16", "fp32"]))
    assert order == [
        ("bf16", 64, "ours"), ("fp32", 64, "ours"), ("bf16", 64, "compiled"), ("fp32", 64, "compiled"),
        ("bf16", 128, "ours"), ("fp32", 128, "ours"),
    ]  # fmt: skip


def test_the_clock_is_looked_at_between_what_is_compiled(tmp_path, registry, quick):
    class Slow(Spy):
        seen: list = []  # noqa: RUF012

    registry("slow", Slow, slow=True)
    run = make_run(tmp_path, clock=lambda: float(len(Slow.seen)), parts=("steps",), seconds=5)
    subject = gpu_steps.prepare(run.settings, "slow")
    images, labels = run.settings.data()
    path = [(0, 1)] * 7
    assert not gpu_steps.warm(run, subject, "slow", (subject.images(images), labels), [path], "full", "slow")
    assert [kind for _, kind, _ in Slow.seen] == ["two"] * 5
    assert [paths[0][0] for _, _, paths in Slow.seen] == [0, 1, 2, 3, 4]
    assert "slow" in run.report["left_out"][0]


def test_half_precision_means_autocast(tmp_path):
    run = make_run(tmp_path)
    losses = {}
    for dtype in ("fp32", "bf16"):
        settings = run.of(dtype, 4)
        subject = gpu_steps.prepare(settings, "generic")
        kept = SavedBytes()
        paths = [(0, 1)] * 7
        losses[dtype] = subject.differentiate(*settings.data(), paths, "weight", kept), kept.total
    assert losses["bf16"][0] == pytest.approx(float(losses["fp32"][0]), rel=0.1)
    assert losses["bf16"][1] < 0.7 * losses["fp32"][1]


def test_summary_of_steps():
    def row(who, ms, mib):
        return {"dtype": "bf16", "step": "arch", "batch": 64, "who": who, "ms": ms, "peak_mib": mib}

    rows = [row("ours", 10, 100), row("generic", 25, 300), row("official", 40, 200), row("ours-lean", 12, 50)]
    (text,) = gpu_steps.summary(rows)
    assert text == "bf16 arch step, batch 64: 2.50x as fast as the best peer, generic, in 0.33 of its memory"


@pytest.mark.skipif("PROXYLESS_OFFICIAL" not in os.environ, reason="PROXYLESS_OFFICIAL names no clone")
def test_the_official_code_beside_ours(tmp_path, quick):
    run = make_run(tmp_path, space="mobile", resolution=32, official=os.environ["PROXYLESS_OFFICIAL"])
    names = ["official", "official-channels-last", "generic"]
    assert {"official", "official-channels-last", "ours"} <= set(gpu_steps.subjects(run))
    assert gpu_steps.correct(run, names, 4) is None
    rows = gpu_steps.measure(run, names, [4], ["bf16", "fp32"])
    assert len(rows) == 3 * 2 * 2 and not run.report["left_out"]


# the largest batch


def test_largest_batch_by_arithmetic():
    fixed, per_image = gpu_largest.line((16, 1700), (32, 3300))
    assert (fixed, per_image) == (100, 100)
    assert gpu_largest.predicted(4099, fixed, per_image) == 32
    assert gpu_largest.predicted(4100, fixed, per_image) == 40
    assert gpu_largest.predicted(50, fixed, per_image) == 0
    with pytest.raises(RuntimeError, match="does not grow"):
        gpu_largest.predicted(1000, *gpu_largest.line((16, 100), (32, 100)))


def test_largest_batch_is_run(tmp_path):
    run = make_run(tmp_path)
    limit = 64 << 20
    rows = gpu_largest.measure(run, ["ours", "generic", "checkpoint"], 4, ["fp32"], limit / 2**30)
    assert {(r["who"], r["step"]) for r in rows} == {
        (who, step) for who in ("ours", "generic", "checkpoint") for step in ("weight", "arch")
    }
    for r in rows:
        assert 0 < r["batch"] == r["predicted"]
        needed = (r["fixed_mib"] + r["image_mib"] * r["batch"]) * 2**20
        assert needed <= limit < needed + r["image_mib"] * gpu_largest.MULTIPLE * 2**20
    of = {(r["who"], r["step"]): r["batch"] for r in rows}
    assert of["ours", "weight"] > 2 * of["generic", "weight"]


def test_a_prediction_that_does_not_fit_is_lowered(tmp_path):
    run = make_run(tmp_path)
    settings = run.of("fp32", 4)
    subject = gpu_steps.prepare(settings, "generic")
    path = gpu_largest.widest(settings.net())
    needed = {b: run.device.peak(lambda b=b: gpu_largest.step(subject, settings, b, path, "weight")) for b in (40, 48)}
    found = gpu_largest.confirmed(run, subject, settings, needed[48] - 1, 56, path, "weight")
    assert found == 40
    assert gpu_largest.confirmed(run, subject, settings, needed[40] // 10, 48, path, "weight") == 0


def test_widest_path():
    layers = [layer for layer in baselines.Settings("small", 16, 4, 1).net().layers() if layer.mixed is not None]
    for layer, (active, partner) in zip(layers, gpu_largest.widest(baselines.Settings("small").net()), strict=True):
        assert layer.choices[active].macs == max(0 if c is None else c.macs for c in layer.choices)
        assert partner != active


def test_summary_of_largest():
    def row(who, batch):
        return {"dtype": "fp32", "step": "weight", "who": who, "batch": batch}

    texts = list(
        gpu_largest.summary([row("ours", 320), row("ours-lean", 200), row("generic", 96), row("official", 80)])
    )
    assert "ours 320, best peer generic 96: 3.33x (3x is reached)" in texts[0]
    assert "ours-lean 200" in texts[1] and "2.08x (3x is missed)" in texts[1]


# passes


def test_passes_are_those_of_the_model(no_launches):
    for kind, called in (("weight", "weight"), ("full", "arch")):
        with gpu_passes.watching(lambda call: 1e-6) as watch:
            gpu_passes.step(LAYER, torch.bfloat16, kind, "meta")
        model = gpu_model.ours(LAYER, torch.bfloat16, called)
        for of in ("bytes", "flops"):
            mine, counted = (sum(getattr(p, of) for p in ps) for ps in ((t.what for t in watch.timed), model))
            assert mine == pytest.approx(counted, rel=1e-3)  # this one starts at the Gram matrix


def test_shares_of_the_roof(tmp_path, no_launches):
    card = gpu_model.Card("made up", 1e12, 1e14, 1e13)
    run = make_run(tmp_path, Steady(1e-4), device="meta")
    rows = {r["pass"]: r for r in gpu_passes.of_step(run, LAYER, "bf16", "weight", card)}
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
    (text,) = gpu_passes.summary(list(rows.values()))
    assert text.startswith("bf16 weight step: ") and "finish_moments" in text and "expand (" not in text


def test_fp32_products_are_held_against_the_fp32_rate(tmp_path, no_launches):
    run = make_run(tmp_path, Steady(1e-4), device="meta")
    card = gpu_model.Card("made up", 1e12, 1e14, 1e13)
    rows = {r["pass"]: r for r in gpu_passes.of_step(run, LAYER, "fp32", "weight", card)}
    assert rows["expand"]["of_product"] == pytest.approx(2 * 64 * 56 * 56 * 24 * 144 / 1e-4 / 1e13, rel=1e-6)


def test_all_layers_are_covered_and_time_is_kept(tmp_path, no_launches):
    now = 0.0

    class Ticking(Steady):
        def time(self, call, cold=False):
            nonlocal now
            now += 1e-3
            return super().time(call, cold)

    run = make_run(tmp_path, Ticking(1e-4), parts=("passes",), clock=lambda: now, device="meta")
    ceilings = {"copy_bytes_s": 1e12, "bf16_flop_s": 1e14, "fp32_flop_s": 1e13}
    with run.part("passes"):
        rows = gpu_passes.measure(run, 64, ["bf16", "fp32"], ceilings)
    assert len({(r["dtype"], r["layer"], r["step"]) for r in rows}) == 2 * 11 * 2 and not run.report["left_out"]
    assert gpu_passes.table(rows).row_count == sum(r["of_step"] >= gpu_passes.SHOWN for r in rows)
    run = make_run(tmp_path, Ticking(1e-4), parts=("passes",), clock=lambda: now, seconds=1, device="meta")
    with run.part("passes"):
        rows = gpu_passes.measure(run, 64, ["bf16", "fp32"], ceilings)
    assert 0 < len({(r["dtype"], r["layer"], r["step"]) for r in rows}) < 44
    assert len(run.report["left_out"]) + len({(r["dtype"], r["layer"], r["step"]) for r in rows}) == 44


def test_the_stencils_are_passes_and_the_clock_is_not():
    x, taps = torch.randn(2, 8, 9, 9).contiguous(memory_format=torch.channels_last), torch.randn(8, 1, 3, 3)
    scratch = torch.zeros(4)
    with gpu_passes.watching(lambda call: float(scratch.zero_().sum()) or 1e-6) as watch:
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
        with gpu_passes.watching(seconds) as watch:
            gpu_passes.step(LAYER, torch.float32, "weight", "meta")
        timed.append([t.what.name for t in watch.timed])
    assert timed[0] == timed[1]  # what the clock does is no pass
    assert made.count("expand") == (3 + 1) * timed[0].count("expand") == 8


# blocks


def test_blocks_of_every_layer(tmp_path, quick):
    run = make_run(tmp_path)
    rows = gpu_blocks.measure(run, ["ours", "generic", "checkpoint"], 4, ["bf16"])
    assert {r["who"] for r in rows} == {"ours", "generic"}  # a checkpoint is around blocks
    layers = {tuple(case.split()[:3]) for case in (r["case"] for r in rows)}
    assert len({r["case"] for r in rows}) == len(layers) > 3
    (shown,) = gpu_blocks.tables(rows)
    assert shown.row_count == len(layers)
