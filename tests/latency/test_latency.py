"""Latency tables, expected latency and profiling."""

import itertools
import os
import pickle
import sys

import numpy as np
import onnx
import pytest
import torch
import yaml

from proxyless_fast import spaces
from proxyless_fast.blocks import MBConv
from proxyless_fast.export.onnx_graph import build
from proxyless_fast.latency import ExpectedLatency, LatencyTable, MissingKey, expected_latency, measure, profile
from proxyless_fast.latency.runtimes import onnxruntime
from proxyless_fast.latency.table import Entry
from proxyless_fast.mixed import MixedOp
from proxyless_fast.supernet import activate_most_likely, derive, mixed_ops, sample

KEY = "expanded_conv-input:56x56x24-output:56x56x24-expand:3-kernel:5-stride:1-idskip:1"


def numbered_table(net, overhead=0.0):
    """A table with a time of its own for every key of `net`."""
    table = LatencyTable({"overhead": overhead})
    keys = sorted({s.key for layer in net.layers() for s in layer.choices if s is not None})
    for i, key in enumerate(keys):
        table.add(key, 1.0 + 0.37 * i)
    return table


@pytest.fixture(scope="module")
def small():
    return spaces.small()


@pytest.fixture(scope="module")
def profiled(small):
    calls = []
    table = profile(small, repeats=5, progress=lambda done, total: calls.append((done, total)))
    return table, calls


# the table


def test_the_official_table_loads_and_predicts(shared):
    table = LatencyTable.load(shared / "official" / "mobile_trim.yaml")
    raw = yaml.safe_load((shared / "official" / "mobile_trim.yaml").read_text())
    assert set(table) == set(raw)
    assert table.header == {} and table.overhead == 0
    shape = MBConv(24, 24, 5, 1, 3).shape((56, 56, 24), idskip=1)
    assert shape.key == KEY
    found = table.predict(
        "expanded_conv", input=(56, 56, 24), output=(56, 56, 24), kernel=5, idskip=1, expand=3, stride=1
    )
    assert found == table.lookup(shape) == table.lookup(KEY) == raw[KEY]["mean"]
    assert table.predict("Logits", "7x7x1280", 1000) == raw["Logits-input:7x7x1280-output:1000"]["mean"]


def test_a_table_survives_a_round_trip(tmp_path):
    table = LatencyTable({"device": "a machine", "threads": 2, "overhead": 0.25})
    table.add(KEY, mean=1.5, count=7, var=0.1, median=1.4)
    table.add("Conv-input:8x8x3-output:8x8x4", mean=0.5)
    path = tmp_path / "deep" / "table.yaml"
    table.save(path)
    again = LatencyTable.load(path)
    assert again.header == table.header and again.overhead == 0.25
    assert {key: again[key] for key in again} == {key: table[key] for key in table}
    assert again.lookup(KEY) == 1.4  # the median, where there is one
    assert [p.name for p in path.parent.iterdir()] == ["table.yaml"]
    assert yaml.safe_load(path.read_text())[KEY]["mean"] == 1.5  # the official estimator reads it


def test_a_failed_save_leaves_the_old_table(tmp_path):
    path = tmp_path / "table.yaml"
    table = LatencyTable()
    table.add(KEY, 1.0)
    table.save(path)
    before = path.read_bytes()
    table.header["device"] = object()  # YAML cannot say this
    with pytest.raises(yaml.YAMLError):
        table.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["table.yaml"]


def test_a_missing_key_is_named_with_its_table(tmp_path):
    table = LatencyTable(path=tmp_path / "t.yaml")
    with pytest.raises(KeyError) as caught:
        table.lookup(KEY)
    assert str(caught.value) == f"the latency table {tmp_path / 't.yaml'} has no latency for {KEY}"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(("count", "more"), [(1, ""), (3, ""), (5, " and 2 more")])
def test_all_missing_keys_of_a_net_are_kept_and_the_first_named(small, count, more):
    table = numbered_table(small)
    gone = sorted(table)[3 : 3 + count]
    for key in gone:
        del table._entries[key]
    with pytest.raises(MissingKey) as caught:
        ExpectedLatency(small, table)
    assert sorted(caught.value.keys) == gone
    assert str(caught.value).endswith(f"has no latency for {', '.join(caught.value.keys[:3])}{more}")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not a latency table"),
        ("- a\n- b\n", "not a latency table"),
        ("header: {overhead: 1}\n", "it must hold operations with their means"),
        ("a: {count: 1}\n", "a.mean is missing"),
        ("a: 3\n", "a must be an object, got 3"),
        ("a: [1, 2]\n", "a must be an object, got a list of 2"),
        ("a: {mean: fast}\n", "a.mean must be a number, got 'fast'"),
        ("a: {mean: -1}\n", "a.mean must be greater than or equal to 0, got -1"),
        ("a: {mean: .nan}\n", "a.mean must be a finite number, got nan"),
        ("a: {mean: .inf}\n", "a.mean must be a finite number, got inf"),
        ("a: {mean: 1e400}\n", "a.mean must be a finite number, got inf"),
        ("a: {mean: 1e39}\n", "a.mean must be less than or equal to 1000000000, got 1e+39"),
        ("a: {mean: }\n", "a.mean must be a number, got None"),
        ("a: {mean: true}\n", "a.mean must be a number, got True"),
        ("a: {mean: '1.5'}\n", "a.mean must be a number, got '1.5'"),
        ("a: {mean: 3%}\n", "a.mean must be a number, got '3%'"),
        ("a: {mean: 0x10}\n", "a.mean must be a number, got '0x10'"),
        ("a: {mean: 010}\n", "a.mean must be a number, got '010'"),
        ("a: {mean: 1_000}\n", "a.mean must be a number, got '1_000'"),
        ("a: {mean: 1:30}\n", "a.mean must be a number, got '1:30'"),
        ("a: {mean: 1, var: .nan}\n", "a.var must be a finite number, got nan"),
        ("a: {mean: 1, var: }\n", "a.var must be a number, got None"),
        ("a: {mean: 1, median: -.inf}\n", "a.median must be a finite number, got -inf"),
        ("a: {mean: 1, median: null}\n", "a.median must be a number, got None"),
        ("a: {mean: 1, count: 0}\n", "a.count must be greater than or equal to 1, got 0"),
        ("a: {mean: 1, count: -1}\n", "a.count must be greater than or equal to 1, got -1"),
        ("a: {mean: 1, count: 1.5}\n", "a.count must be a whole number, got 1.5"),
        ("a: {mean: 1, count: true}\n", "a.count must be a whole number, got True"),
        ("a: {mean: 1, unit: s}\n", "a.unit is unknown and might change what the file means, got 's'"),
        ("a: {mean: " + "9" * 5000 + "}\n", "line 1: expected numbers of at most 64 digits, got one of 5000"),
        ("a: {mean: 1}\nb: 3\nc: 4\n", "b must be an object, got 3 (and 1 more)"),
        ("3: {mean: 1}\n", "line 1: expected text as a key, got 3"),
        ("a: {mean: 1}\na: {mean: 2}\n", "line 2: the key 'a' stands twice"),
        ("a: {mean: 1,\n  mean: 2}\n", "line 2: the key 'mean' stands twice"),
        ("a: &x {mean: 1}\nb: *x\n", "line 1: anchors and aliases are not taken, got 'x'"),
        ("a: {mean: 1}\n<<: {b: {mean: 1}}\n", "line 2: merge keys (<<) are not taken"),
        ("a: {mean: !!float 3}\n", "line 1: tags are not taken, got 'tag:yaml.org,2002:float'"),
        ("a: {mean: 1}\n---\nb: {mean: 1}\n", "line 2: expected one document, got a second"),
        ("a:\n\tmean: 1\n", "cannot be read as latency table"),
        ("\0\1\2", "cannot be read as latency table"),
        ("[" * 100_000, "line 1: expected at most 16 levels, got more"),
        ("a: " + "{a: " * 100_000, "line 1: expected at most 16 levels, got more"),
        ("- " * 100_000, "line 1: expected at most 16 levels, got more"),
        ("? " * 100_000, "expected at most 16 levels, got more"),
        ("a: [" + "1," * 600_000 + "]", "line 1: expected at most 500,000 values, got more"),
        ("#" * (17 << 20), "expected at most 16,777,216 bytes, got more"),
        ("header: 3\na: {mean: 1}\n", "header must be an object, got 3"),
        ("header:\na: {mean: 1}\n", "header must be an object, got None"),
        ("header: {overhead: }\na: {mean: 1}\n", "header.overhead must be a number, got None"),
        ("header: {overhead: -5}\na: {mean: 1}\n", "header.overhead must be greater than or equal to 0, got -5"),
        ("header: {overhead: .nan}\na: {mean: 1}\n", "header.overhead must be a finite number, got nan"),
        ("header: {path_error: 3%}\na: {mean: 1}\n", "header.path_error must be a number, got '3%'"),
        ("header: {path_error: [0.1]}\na: {mean: 1}\n", "header.path_error must be a number, got a list of 1"),
        ("header: {scale: 0}\na: {mean: 1}\n", "header.scale must be greater than 0, got 0"),
        ("header: {threads: 1.5}\na: {mean: 1}\n", "header.threads must be a whole number, got 1.5"),
        ("header: {device: }\na: {mean: 1}\n", "header.device must be text or a finite number of at least 0, got"),
        ("header: {x: {y: [1, .inf]}}\na: {mean: 1}\n", "header.x.y.1 must be text or a finite number"),
        ("a: [1, 2\n", "cannot be read as latency table"),
        ("a: !!python/object/apply:os.getcwd []\n", "line 1: tags are not taken"),
    ],
    ids=lambda value: value[:40],
)
def test_files_that_are_no_tables_are_refused(tmp_path, text, complaint):
    path = tmp_path / "table.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"table\.yaml") as caught:
        LatencyTable.load(path)
    assert complaint in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "text",
    [
        "header: {overhead: 5e-2}\na: {count: 30, mean: 9e-05, var: 4E-06}\n",
        '{"header": {"overhead": 0.05}, "a": {"count": 30, "mean": 9e-05, "var": 4e-06}}',
        "\ufeff# a comment\r\nheader:\r\n  overhead: .05\r\na:\r\n  count: 30.0\r\n  mean: 9.0E-5\r\n  var: +4e-6\r\n",
        "%YAML 1.2\n---\nheader: {overhead: 5.e-2}\n'a': {count: 3e1, mean: 9e-05, var: 0.000004}\n...\n",
    ],
)
def test_numbers_as_people_and_programs_write_them(tmp_path, text):
    path = tmp_path / "t.yaml"
    path.write_bytes(text.encode())
    table = LatencyTable.load(path)
    assert table.overhead == 0.05 and table["a"] == Entry(30, 9e-05, 4e-06)


def test_what_is_no_file_is_no_table(tmp_path):
    with pytest.raises(ValueError, match="no regular file"):
        LatencyTable.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        LatencyTable.load(tmp_path / "pipe")
    (tmp_path / "utf16").write_bytes("a: {mean: 1}".encode("utf-16"))
    with pytest.raises(ValueError, match="utf16 cannot be read as latency table: 'utf-8' codec"):
        LatencyTable.load(tmp_path / "utf16")


def test_texts_of_a_header_come_back_as_text(tmp_path):
    """A commit 1e5 is no number, though YAML 1.2 reads it so where it stands bare."""
    texts = [
        "1e5",
        "12",
        "1.5",
        ".5",
        "true",
        "no",
        "null",
        "",
        "010",
        "~",
        "2026-11-25",
        "é\n\x07",
        ".inf",
        "<<",
        "-1",
    ]
    texts += ["1_0", "0x1", "=", "- a", "a: b", "#", "1:30", "+.5E-3", "&a", "!b"]
    header = {"overhead": 1e-16, "lists": [1, "2"], "flag": True, **{f"text{i}": text for i, text in enumerate(texts)}}
    header["same"] = header["lists"]  # written out, not as an alias
    table = LatencyTable(header)
    table.add(KEY, 5e-324)
    table.save(tmp_path / "t.yaml")
    again = LatencyTable.load(tmp_path / "t.yaml")
    assert again.header == header and again[KEY].mean == 5e-324
    assert yaml.safe_load((tmp_path / "t.yaml").read_text())["header"] == header


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1, "3%", None, True, 10**400])
def test_a_table_in_memory_is_held_to_the_same(tmp_path, small, wrong):
    for name in ("overhead", "path_error"):
        table = numbered_table(small)
        table.header[name] = wrong
        with pytest.raises(ValueError, match=name):
            ExpectedLatency(small, table)
        with pytest.raises(ValueError, match=name):
            table.save(tmp_path / "t.yaml")
    for name in ("mean", "var", "median", "count"):
        if (name, wrong) not in (("median", None), ("count", 10**400)):
            with pytest.raises(ValueError, match=name):
                LatencyTable().add(KEY, **{"mean": 1.0, name: wrong})


def test_a_missing_file_and_a_missing_attribute_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no latency table at .*none\.yaml"):
        LatencyTable.load(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="got no kernel, idskip"):
        LatencyTable().predict("expanded_conv", (8, 8, 3), (8, 8, 3), expand=3, stride=1)


# E[latency]


def test_expected_latency_and_its_gradients_agree_with_the_official_code(shared):
    golden = np.load(shared / "golden" / "expected_latency.npz")
    net = spaces.mobile()
    ops = list(mixed_ops(net).values())
    assert len(ops) == 21
    for i, op in enumerate(ops):
        op.alpha.data = torch.from_numpy(golden[f"alpha{i}"])
    latency = expected_latency(net, LatencyTable.load(shared / "official" / "mobile_trim.yaml"))
    assert latency.shape == ()
    assert latency.item() == pytest.approx(golden["latency_ms"].item(), rel=1e-5)
    latency.backward()
    for i, op in enumerate(ops):
        expected = torch.from_numpy(golden[f"grad_alpha{i}"])
        assert (op.alpha.grad - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_expected_latency_is_the_mean_over_all_paths():
    net = spaces.small(candidates=("3x3_MBConv3", "5x5_MBConv6"))
    expected = ExpectedLatency(net, numbered_table(net, overhead=0.5))
    ops = mixed_ops(net)
    for op in ops.values():
        op.alpha.data.normal_()
    # the expectation is linear, so it is the mean path by path only if each time stands at its own candidate
    total = 0.0
    for path in itertools.product(*(range(len(op)) for op in ops.values())):
        p = np.prod([op.probabilities().tolist()[i] for op, i in zip(ops.values(), path, strict=True)])
        total += p * expected.of_choices(dict(zip(ops, path, strict=True)))
    assert float(expected().detach()) == pytest.approx(total, rel=1e-5)


def test_paths_and_their_bounds(small):
    expected = ExpectedLatency(small, numbered_table(small, overhead=0.5))
    ops = mixed_ops(small)
    all_zero = {label: op.names[-1] if op.names[-1] == "Zero" else 0 for label, op in ops.items()}
    assert expected.fastest <= expected.of_choices(all_zero) < expected.slowest
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        choices = sample(small, generator=generator)
        ms = expected.of_choices(choices)
        assert expected.fastest <= ms <= expected.slowest
        assert ms == pytest.approx(ExpectedLatency(derive(small, choices), numbered_table(small, 0.5)).fixed)
    with torch.no_grad():
        for op in ops.values():
            op.alpha.normal_()
    assert expected.most_likely() == pytest.approx(expected.of_choices(activate_most_likely(small)))
    with pytest.raises(ValueError, match=r"got none for blocks\.1"):
        expected.of_choices({label: 0 for label in ops if label != "blocks.1"})
    with pytest.raises(KeyError, match="nothing"):
        expected.of_choices({**all_zero, "nothing": 0})


def test_two_paths_count_the_pair_alone(small):
    expected = ExpectedLatency(small, numbered_table(small))
    for op in mixed_ops(small).values():
        op.alpha.data.normal_()
        op.alpha.grad = None
    sample(small, mode="two", generator=torch.Generator().manual_seed(2))
    latency = expected()
    latency.backward()
    by_hand = expected.fixed
    for label, op in mixed_ops(small).items():
        pair = [op.active, op.partner]
        p = torch.softmax(op.alpha.detach()[pair], 0)
        by_hand += float((p * torch.tensor([expected._times[label][i] for i in pair])).sum())
        outside = [i for i in range(len(op)) if i not in pair]
        assert op.alpha.grad[outside].abs().max() == 0 and op.alpha.grad[pair].abs().min() > 0
    assert float(latency.detach()) == pytest.approx(by_hand, rel=1e-5)
    activate_most_likely(small)


def test_pruned_candidates_weigh_nothing(small):
    net = spaces.small()
    expected = ExpectedLatency(net, numbered_table(net))
    op = mixed_ops(net)["blocks.1"]
    op.alpha.data[1:] = -torch.inf
    latency = expected()
    latency.backward()
    assert torch.isfinite(op.alpha.grad).all() and torch.isfinite(latency)


def test_a_net_without_layers_is_refused():
    with pytest.raises(ValueError, match="got Linear"):
        expected_latency(torch.nn.Linear(2, 2), LatencyTable())


# measuring


def test_profile_measures_every_key_once(small, profiled):
    table, calls = profiled
    assert set(table) == {s.key for layer in small.layers() for s in layer.choices if s is not None}
    assert calls == [(i, 5) for i in range(1, 6)]
    assert all(table[key].count == 5 and table[key].median is not None for key in table)
    for name in ("device", "runtime", "threads", "dtype", "batch", "date", "torch", "onnxruntime", "overhead", "scale"):
        assert name in table.header


def additive_time(model):
    """A machine on which a call takes 0.01 ms and every node a time of its own, whatever stands around it."""
    sizes = {init.name: np.prod(init.dims) for init in model.graph.initializer}
    weights = sum(1e-6 * sizes.get(name, 0) for node in model.graph.node for name in node.input)
    pools = sum(0.004 for node in model.graph.node if node.op_type == "GlobalAveragePool")
    additions = sum(0.003 for node in model.graph.node if node.op_type == "Add")
    return 0.01 + weights + pools + additions


@pytest.mark.parametrize("slowdown", [1.0, 1.25])
def test_block_times_add_up_to_whole_paths(monkeypatch, small, slowdown):
    """Exactly so on an additive machine; where whole nets are slower than that, `scale` makes it up."""
    module = sys.modules[profile.__module__]

    def rounds(models, repeats, progress):
        times = np.array([additive_time(m) for m in models])
        whole = np.array(
            [sum(node.op_type == "Gemm" and len(m.graph.node) > 9 for node in m.graph.node) for m in models]
        )
        times = np.where(whole == 1, 0.01 + (times - 0.01) * slowdown, times)
        ms = np.tile(times, (repeats, 1))
        ms[1] *= 7  # a slow phase, which the median passes over
        return ms

    monkeypatch.setattr(onnxruntime, "Session", lambda model, threads: model)
    monkeypatch.setattr(module, "_rounds", rounds)
    table = profile(small, repeats=5)
    assert table.header["overhead"] == pytest.approx(0.01)
    assert table.header["scale"] == pytest.approx(slowdown)
    assert table.header["path_error"] < 1e-6
    generator = torch.Generator().manual_seed(3)
    expected = ExpectedLatency(small, table)
    for _ in range(4):
        choices = sample(small, generator=generator)
        net = derive(small, choices)
        whole = 0.01 + (additive_time(build(net, (1, 28, 28))) - 0.01) * slowdown
        assert expected.of_choices(choices) == pytest.approx(whole, rel=1e-6)
    op = mixed_ops(small)["blocks.2"].candidates[1]
    alone = additive_time(build(op, (24, 14, 14))) - 0.01
    assert table.lookup(op.shape((14, 14, 24), 1)) == pytest.approx(slowdown * (alone + 0.003), rel=1e-6)


def test_a_derived_net_is_profiled_as_it_stands(small):
    net = derive(small)
    table = profile(net, repeats=2)
    assert set(table) == {s.key for layer in net.layers() for s in layer.choices if s is not None}
    assert table.header["paths"] == 1


def test_cells_are_profiled():
    net = spaces.cell(cells_per_stage=1, channels=8, resolution=16)
    table = profile(net, repeats=2)
    assert ExpectedLatency(net, table).fastest > table.overhead > 0


def test_measure_reads_nets_and_files(tmp_path, small):
    net = derive(small)
    assert measure(net, repeats=3) > 0
    onnx.save(build(net, (1, 28, 28), dynamic_batch=True), tmp_path / "net.onnx")
    assert measure(tmp_path / "net.onnx", repeats=3) > 0
    assert measure(torch.nn.Conv2d(3, 4, 3), repeats=1, input_shape=(3, 8, 8)) > 0


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda net: profile(net, runtime="tflite"), "runtime must be 'onnxruntime', got 'tflite'"),
        (lambda net: profile(net, threads=0), "threads must be a positive integer, got 0"),
        (lambda net: profile(net, repeats=2.5), "repeats must be a positive integer, got 2.5"),
        (lambda net: profile(torch.nn.ReLU()), "got ReLU"),
        (lambda net: measure(net), "net must be derived"),
        (lambda net: measure(torch.nn.ReLU()), "input_shape must be given for a ReLU"),
        (lambda net: measure(torch.nn.ReLU(), input_shape=(3, 8)), r"input_shape must be \(channels, height, width\)"),
        (lambda net: measure("nowhere.onnx"), "no ONNX file at nowhere.onnx"),
    ],
)
def test_wrong_arguments_are_named(small, call, complaint):
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        call(small)


def test_measuring_moves_no_statistics():
    net = spaces.small(candidates=("3x3_MBConv3",))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    profile(net, repeats=1)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(isinstance(op, MixedOp) for op in mixed_ops(net).values()) and net.training
