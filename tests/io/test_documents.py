"""JSON documents and their schemas."""

import copy
import json
import time

import pytest

from proxyless_fast import export, spaces
from proxyless_fast.io import documents
from proxyless_fast.io.schemas import Architecture, Report, check
from proxyless_fast.supernet import derive
from tests.export.test_export import edited, random_path


def test_what_is_written_is_read(tmp_path):
    document = {"a": [1, 2.5, None, True, "é\ud800"], "b": {"c": {}}, "d": 1e-320}
    documents.write(document, tmp_path / "a.json")
    assert documents.read(tmp_path / "a.json", "a document") == document


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_json_cannot_say_is_not_written(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"a\.json cannot hold train\.loss\.1 -?(nan|inf), expected finite numbers"):
        documents.write({"train": {"loss": [1.0, wrong]}}, tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_a_string_is_no_structure(tmp_path):
    """Brackets, commas and quotes inside strings count for nothing."""
    document = {"a": "[{" * 1000 + '\\"' + "," * 300_000, '"[[[\\': "]"}
    (tmp_path / "a.json").write_text(json.dumps(document))
    assert documents.read(tmp_path / "a.json", "a document") == document


# architectures


@pytest.fixture(scope="module")
def chain():
    return export.architecture(random_path(spaces.small(resolution=14)))


@pytest.fixture(scope="module")
def cell():
    return export.architecture(random_path(spaces.cell(channels=8, cells_per_stage=1, resolution=16)))


def test_architectures_that_we_write_pass(chain, cell):
    for document in (
        chain,
        cell,
        export.architecture(derive(spaces.mobile())),
        export.architecture(derive(spaces.cell())),
    ):
        check(Architecture, json.loads(json.dumps(document)), "it")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda d: d.update(format="other"), "format must be 'proxyless_fast.architecture', got 'other'"),
        (lambda d: d.update(version=3), "version is unknown"),
        (lambda d: d.pop("net"), "net is missing"),
        (lambda d: d.update(net=[]), "net must be an object, got a list of 0"),
        (lambda d: d["net"].update(kind="tree"), r"net\.kind must be one of 'chain', 'cell', got 'tree'"),
        (lambda d: d["net"].pop("resolution"), r"net\.resolution is missing"),
        (lambda d: d["net"].update(resolution=1e9), r"net\.resolution must be less than or equal to 65536"),
        (
            lambda d: d["net"]["blocks"][1].update(name="99x99_MBConv6"),
            r"net\.blocks\.1\.name must have no number above",
        ),
        (lambda d: d["net"]["blocks"][1].update(name="7x7_MBConv" + "9" * 60), r"name .*at most 64 characters"),
        (lambda d: d["net"]["blocks"][1].update(in_channels=99), r"net\.blocks\.1\.in_channels must be 16, .* got 99"),
        (lambda d: d["net"]["blocks"][1].update(shortcut=True), r"net\.blocks\.1\.shortcut must be false"),
        (
            lambda d: d["net"]["blocks"][1].update(shortcut=1),
            r"net\.blocks\.1\.shortcut must be a valid boolean, got 1",
        ),
        (lambda d: d["net"]["blocks"][1].update(stride=0), r"net\.blocks\.1\.stride must be greater"),
        (
            lambda d: d["net"]["blocks"][1].update(name="3x3_Conv", act="silu"),
            r"net\.blocks\.1\.act must be left out .*got 'silu'",
        ),
        (lambda d: d["net"]["classifier"].update(in_features=7), r"net\.classifier\.in_features must be"),
        (lambda d: d["net"]["classifier"].update(dropout=-0.1), r"net\.classifier\.dropout must be greater"),
        (lambda d: d["net"]["classifier"].update(out_features=10**12), r"net\.classifier\.out_features must be less"),
        (lambda d: d["net"].update(blocks=d["net"]["blocks"] * 300), r"net\.blocks .*at most 1000 items"),
        (lambda d: d["bn"].clear(), "bn .*at least 1 item"),
        (lambda d: d["bn"][0].update(eps="x"), r"bn\.0\.eps must be a number, got 'x'"),
    ],
)
def test_a_damaged_architecture_is_named(chain, change, complaint):
    with pytest.raises(ValueError, match=f"it: .*{complaint}"):
        check(Architecture, edited(chain, change), "it")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda n: n.update(cells_per_stage=1e9), r"net\.cells_per_stage must be less than or equal to 100, got 10+"),
        (lambda n: n.update(cells_per_stage=2), r"net\.cells must hold 6 cells, got 3"),
        (lambda n: n.update(cells=None), r"net\.cells must be a valid list, got None"),
        (lambda n: n["cells"][0].pop(), r"net\.cells\.0 .*at least 6 items"),
        (lambda n: n["cells"][0].append("Zero"), r"net\.cells\.0 .*at most 6 items"),
        (lambda n: n["cells"][0].__setitem__(0, None), r"net\.cells\.0\.0 must be a valid string, got None"),
        (lambda n: n.update(channels=4096), r"net\.cells must have at most 134,217,728 parameters"),
        (lambda n: n.update(channels=True), r"net\.channels must be a whole number, got True"),
    ],
)
def test_a_damaged_architecture_of_cells_is_named(cell, change, complaint):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=f"it: .*{complaint}"):
        check(Architecture, edited(cell, lambda d: change(d["net"])), "it")
    assert time.perf_counter() - start < 1


def test_no_name_of_a_candidate_has_more_parameters_than_its_bound():
    from proxyless_fast.blocks import candidate
    from proxyless_fast.io.schemas.architecture import _most_parameters

    for name in (
        "3x3_MBConv1",
        "7x7_MBConv6",
        "Zero",
        "3x3_AvgPool",
        "5x5_DepthConv",
        "3x3_DilatedDepthConv",
        "3x3_Conv",
    ):
        weights = sum(p.numel() for p in candidate(name, 8, 8).parameters() if p.dim() > 1)
        assert weights <= _most_parameters(name, 8, 8, "it")


# reports


def test_reports_are_loose_where_nobody_reads_them():
    space = {"name": "small", "num_classes": 10, "in_channels": 1, "resolution": 28}
    search = {"target": None, "target_source": "", "seconds": 1}
    data = {"name": "x", "batch_size": 8, "seed": 0, "valid_fraction": 0.5, "shift": 2}
    report = {"space": {**space, "width": 3, "mine": 1}, "data": data, "search": {**search, "history": [1]},
              "profile": {"threads": 1, "fastest": 0.1, "slowest": 1, "seconds": 1},
              "train": {"seconds": 1, "loss": [1]},
              "total": {"seconds": 3.5}, "notes": "mine"}  # fmt: skip
    check(Report, report, "it")
    for stage, value, complaint in (
        ("space", [], "space must be an object, got a list of 0"),
        ("space", {}, r"space\.name is missing"),
        ("space", {**space, "resolution": "28"}, r"space\.resolution must be a whole number, got '28'"),
        ("space", {**space, "candidates": [3]}, r"space\.candidates\.0 must be a valid string, got 3"),
        ("search", {**search, "target": "fast"}, r"search\.target must be a number, got 'fast'"),
        ("search", None, "search must be an object, got nothing"),
        ("data", {**data, "valid_fraction": 1}, r"data\.valid_fraction must be less than 1, got 1"),
        ("derive", {"seconds": 1}, r"derive\.target is missing"),
        ("profile", {**report["profile"], "threads": 0}, r"profile\.threads must be greater than or equal to 1, got 0"),
        ("train", {"seconds": -1}, r"train\.seconds must be greater than or equal to 0, got -1"),
    ):
        with pytest.raises(ValueError, match=f"it: {complaint}"):
            check(Report, {**copy.deepcopy(report), stage: value}, "it")
