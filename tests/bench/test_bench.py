"""The benchmarks themselves: the gate, the counters, and one run from end to end at a tiny size."""

import csv
import json

import pytest
import torch

import proxyless_fast as pf
from proxyless_fast.bench import baselines, gate, linear, measure, memory, plot, run, steps

TINY = ["--space", "small", "--resolution", "8", "--batch", "4", "--steps", "1", "--threads", "1"]


class _WrongAlphas(baselines.Subject):
    """Its alphas get one and a half times their gradients."""

    def gradients(self, kind):
        return {name: 1.5 * grad if kind != "weight" else grad for name, grad in super().gradients(kind).items()}


class _WrongLoss(baselines.Subject):
    """It says that its loss is a hundredth higher than it is."""

    def differentiate(self, *arguments):
        return 1.01 * super().differentiate(*arguments)


class _Forgetful(baselines.Subject):
    """One of its alphas gets no gradient."""

    def gradients(self, kind):
        return dict(list(super().gradients(kind).items())[1:])


@pytest.fixture
def registry(monkeypatch):
    """A copy of the registry that a test may write to."""
    monkeypatch.setattr(baselines, "BASELINES", dict(baselines.BASELINES))
    for module in (run, steps):
        monkeypatch.setattr(module, "BASELINES", baselines.BASELINES)
    return baselines.BASELINES


def test_a_run_from_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(steps, "peak_bytes", lambda target, **arguments: 10**6)  # a process each is tested below
    names = ["ours", "ours-lean", "generic-nchw", "checkpoint", "darts"]
    options = ["--kinds", "weight", "full", "two", "blocks", "--baselines", *names, "--out", str(tmp_path)]
    assert run.main([*TINY, *options]) == 0
    printed = capsys.readouterr().out
    assert "full step" in printed and "x faster" in printed
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["machine"]["threads"] == 1 and report["limit_flops_per_second"] > 0
    lines = (tmp_path / "bench.csv").read_text().splitlines()
    assert lines[0].startswith("# ") and report["machine"]["cpu"] in lines[0]
    assert len(list(csv.DictReader(lines[1:]))) == len(report["rows"])
    of = {(row["kind"], row["baseline"]): row for row in report["rows"] if row["kind"] in baselines.MODES}
    assert set(of) == {(kind, name) for kind in baselines.MODES for name in names}
    for row in of.values():
        assert 0 < row["p20"] <= row["p50"] <= row["p80"] and row["flops"] > 0
    kept = {name: of["weight", name]["saved_bytes"] for name in names}
    assert kept["ours-lean"] < kept["ours"] < kept["generic-nchw"] and kept["darts"] > 3 * kept["generic-nchw"]
    assert {path.name for path in plot.write(report, tmp_path)} == {"steps.png", "blocks.png"}


def test_peak_of_a_step():
    settings = baselines.Settings("small", 28, 64, 1)
    paths = [(0, 1)] * 7
    peaks = [
        measure.peak_bytes(
            "proxyless_fast.bench.steps:fresh_step",
            baseline=name,
            kind="weight",
            settings=settings.to_dict(),
            paths=paths,
        )
        for name in ("generic", "checkpoint")
    ]
    assert peaks[0] > 1.5 * peaks[1] > 0


@pytest.mark.parametrize(
    ("wrong", "kind", "what"),
    [(_WrongAlphas, "full", "alphas"), (_WrongAlphas, "two", "alphas"), (_WrongLoss, "weight", "loss"),
     (_Forgetful, "full", "no gradient")],
)  # fmt: skip
def test_the_gate_trips_on_a_wrong_baseline(registry, tmp_path, capsys, wrong, kind, what):
    registry["wrong"] = baselines.Baseline("wrong", "", lambda settings: wrong(settings.net()))
    options = ["--kinds", kind, "--baselines", "generic", "wrong", "--out", str(tmp_path)]
    assert run.main([*TINY, *options]) == 1
    error = capsys.readouterr().err
    assert "wrong" in error and f"{kind} step" in error and what in error
    assert not list(tmp_path.iterdir())


def test_the_gate_passes_baselines_and_their_weighted_sums():
    settings = baselines.Settings("small", 8, 4, 1)
    subjects = {name: baselines.BASELINES[name].build(settings) for name in ("generic", "darts", "checkpoint")}
    gate.check(subjects, settings, ["weight", "full"], steps.draw_paths(settings.net(), 1, 3)[0])


def test_the_definition_gives_the_gradients_of_the_gates():
    # dL/dalpha_i = sum_j <G, o_j> p_j (delta_ij - p_i), worked out here from outputs kept one by one.
    torch.manual_seed(0)
    op = pf.MixedOp([torch.nn.Linear(3, 3) for _ in range(4)])
    op.alpha.data = torch.tensor([0.3, -0.2, 0.1, 0.5])
    x, grad = torch.randn(5, 3), torch.randn(5, 3)
    (gate.Definition(op, (2, 0), "full", weighted=False)(x) * grad).sum().backward()
    dots = torch.stack([(candidate(x) * grad).sum() for candidate in op.candidates]).detach()
    p = op.probabilities().detach()
    torch.testing.assert_close(op.alpha.grad, p * (dots - (p * dots).sum()))


def test_saved_bytes_of_a_known_graph():
    layer, x = torch.nn.Linear(4, 8), torch.randn(16, 4)
    with measure.SavedBytes(layer.parameters()) as watch:
        h = layer(x)  # keeps x: 16 x 4
        y = h.sigmoid()  # keeps its output: 16 x 8
        z = y * y.view(16, 8)  # keeps y, which is there already, by a view too
        loss = z.square().sum()  # keeps z
    assert watch.total == 4 * (16 * 4 + 16 * 8 + 16 * 8)
    loss.backward()
    assert layer.weight.grad is not None
    with measure.SavedBytes(layer.parameters()) as watch, torch.no_grad():
        layer(x).sigmoid()
    assert watch.total == 0


def test_saved_bytes_counts_what_custom_functions_keep():
    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x.new_empty(100))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    with measure.SavedBytes() as watch:
        Keep.apply(torch.ones(2, requires_grad=True))
    assert watch.total == 400


def _allocate(megabytes: int):
    size = megabytes * 250_000
    return lambda: None, lambda: torch.ones(size)


def test_peak_of_a_fresh_process(monkeypatch):
    peak = measure.peak_bytes("tests.bench.test_bench:_allocate", megabytes=80)
    assert peak == pytest.approx(80e6, rel=0.1)
    with pytest.raises(RuntimeError, match="no_such"):
        measure.peak_bytes("tests.bench.test_bench:no_such")


def test_growth_of_memory():
    rows = [
        {"kind": "memory", "baseline": name, "case": str(n), "peak_bytes": bytes_}
        for name, n, bytes_ in (
            ("full", 2, 100),
            ("full", 12, 101),
            ("full", 4, 500),
            ("darts", 2, 10),
            ("darts", 4, 20),
            ("darts", 12, 60),
        )
    ]
    assert memory.growth(rows, "full") == pytest.approx(0.01)
    assert memory.growth(rows, "darts") == pytest.approx(5)
    assert memory.table(rows).row_count == 2


def test_deviation_from_linear():
    rows = [
        {"kind": "linear", "case": "weight step", "baseline": "ours", "batch": batch, "p50": seconds}
        for batch, seconds in ((8, 0.96), (16, 1.6), (32, 3.0), (64, 6.4))
    ]
    assert linear.deviation(rows, "weight step", "ours") == pytest.approx(0.2)


def test_flops_follow_the_sampled_paths():
    net = baselines.Settings("small", 28, 4, 1).net()
    layers = [layer for layer in net.layers() if layer.mixed is not None]
    costs = [[0 if choice is None else choice.macs for choice in layer.choices] for layer in layers]
    path = steps.draw_paths(net, 1, 0)[0]
    active = pf.count_macs(net)  # draw_paths left its path in the net
    partners = sum(cost[partner] for cost, (_, partner) in zip(costs, path, strict=True))
    everything = active + sum(sum(cost) - cost[a] for cost, (a, _) in zip(costs, path, strict=True))
    assert steps.flops(net, path, "weight", 4) == 2 * 4 * 3 * active
    assert steps.flops(net, path, "full", 4) == 2 * 4 * (active + everything)
    assert steps.flops(net, path, "two", 4) == 2 * 4 * (2 * active + partners)
    assert steps.flops(net, path, "full", 4, weighted=True) == 2 * 4 * 2 * everything


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--baselines", "official"], "--official PATH"),
        (["--baselines", "ours-graphed"], "ours-graphed needs a GPU"),
        (["--official", "/nonexistent"], "/nonexistent"),
        (["--batch", "0"], "positive integer"),
        (["--kinds", "nothing"], "nothing"),
    ],
)
def test_wrong_options_exit_with_code_2(capsys, options, said):
    with pytest.raises(SystemExit) as end:
        run.main(options)
    assert end.value.code == 2 and said in capsys.readouterr().err
