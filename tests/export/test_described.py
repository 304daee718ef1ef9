"""What a net's outputs are called and what its images went through travels with every format, and comes back."""

import copy
import json
import struct

import onnx
import pytest
import torch
from torch import nn

from proxyless_fast import export, spaces
from proxyless_fast.blocks import ConvLayer
from proxyless_fast.io import documents
from tests.export.test_export import edited, image, lively, random_path

CLASSES = ["aardvark", "zebra", "naïve", "\n\u202e"]
IMAGES = {
    "channels": 1, "resolution": 14, "short_side": 16, "interpolation": "bicubic", "mean": [0.25], "std": [0.5],
}  # fmt: skip
SAID = {"classes": CLASSES, "preprocessing": {**IMAGES, "channel_order": "gray", "value_range": [0.0, 1.0]}}


@pytest.fixture(scope="module")
def bare():
    return random_path(spaces.small(num_classes=4, resolution=14), seed=0)


@pytest.fixture
def net(bare):
    net = copy.deepcopy(bare)
    export.describe(net, tuple(CLASSES), {**IMAGES, "mean": (0.25,)})
    return net


def test_every_format_carries_it_and_brings_it_back(net, bare, tmp_path):
    assert export.description(net) == export.description(copy.deepcopy(net)) == SAID
    assert export.description(bare) == {}
    export.save_architecture(net, tmp_path / "a.json")
    export.save_weights(net, tmp_path / "w.safetensors")
    export.onnx(net, tmp_path / "n.onnx")
    for name in ("a.json", "w.safetensors", "n.onnx"):
        assert export.description(tmp_path / name) == SAID
    assert {e.key for e in onnx.load(tmp_path / "n.onnx").metadata_props} == {"classes", "preprocessing"}
    again = export.load_architecture(tmp_path / "a.json").eval()
    assert export.description(again) == SAID
    export.load_weights(again, tmp_path / "w.safetensors")
    assert export.architecture(again) == export.architecture(net)
    x = image(net)
    assert torch.equal(again(x), net(x))
    export.load_weights(bare_copy := copy.deepcopy(bare), tmp_path / "w.safetensors")
    assert export.description(bare_copy) == SAID


def test_a_timm_model_has_it_where_timms_transforms_look(net):
    timm_data = pytest.importorskip("timm.data")
    model = export.timm(net)
    config = timm_data.resolve_model_data_config(model)
    assert (config["input_size"], config["mean"], config["std"]) == ((1, 14, 14), (0.25,), (0.5,))
    assert (config["crop_pct"], config["interpolation"]) == (14 / 16, "bicubic")
    assert model.pretrained_cfg["label_names"] == tuple(CLASSES)
    export.describe(net, None, {**IMAGES, "value_range": [0, 255]})
    with pytest.raises(ValueError, match=r"preprocessing has no form in timm: .* value_range of \[0, 1\]"):
        export.timm(net)


@pytest.mark.parametrize(
    ("classes", "images", "complaint"),
    [
        (["a", "b", "c", 4], None, r"description: classes\.3 must be a valid string, got 4"),
        (["a", "b", "c", "a"], None, "classes must be distinct, and 'a' stands twice"),
        (["a", "b", "c"], None, "classes must be 4, as the outputs of the net are, got 3"),
        (["a", "b", "c", ""], None, r"classes\.3 .*at least 1 character"),
        ("abcd", None, "classes must be a list of names, got 'abcd'"),
        (4, None, "classes must be a valid list, got 4"),
        (None, {**IMAGES, "mean": [0.1, 0.2]}, r"preprocessing\.mean must have 1 numbers, one a channel, got 2"),
        (None, {**IMAGES, "std": [0.0]}, r"preprocessing\.std\.0 must be greater than 0"),
        (None, {**IMAGES, "short_side": 12}, r"preprocessing\.short_side must be at least the resolution 14, got 12"),
        (None, {**IMAGES, "channel_order": "RGB"}, r"preprocessing\.channel_order must fit 1 channels, got 'RGB'"),
        (None, {**IMAGES, "colour": "RGB"}, r"preprocessing\.colour is unknown"),
        (None, {**IMAGES, "mean": torch.zeros(1)}, "preprocessing must be plain values that JSON can hold"),
        (None, {**IMAGES, "mean": [float("nan")]}, r"preprocessing\.mean\.0 must be a finite number"),
        (
            None,
            {**IMAGES, "channels": 3, "mean": [0, 0, 0], "std": [1, 1, 1]},
            r"preprocessing\.channels must be 1, as the channels of the net's images, got 3",
        ),
    ],
)
def test_what_is_no_description_is_refused(net, classes, images, complaint):
    with pytest.raises(ValueError, match=complaint):
        export.describe(net, classes, images)
    assert export.description(net) == SAID


@pytest.mark.parametrize("classifier", [nn.Linear(256, 3), nn.Sequential(nn.Dropout(), nn.Linear(256, 3))])
def test_a_classifier_changed_since_is_noticed_when_writing(net, classifier, tmp_path):
    net.classifier = classifier if isinstance(classifier, nn.Sequential) else net.classifier
    if not isinstance(classifier, nn.Sequential):
        net.classifier.linear = classifier
    for write in (export.save_weights, export.onnx):
        with pytest.raises(ValueError, match="classes must be 3, as the outputs of the net are, got 4"):
            write(net, tmp_path / "file")
    with pytest.raises(ValueError):
        export.save_architecture(net, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_weights_of_other_classes_are_refused(net, tmp_path):
    export.save_weights(net, tmp_path / "w.safetensors")
    export.describe(net, ["a", "b", "c", "d"])
    with pytest.raises(
        ValueError, match=r"w\.safetensors does not fit the net: classes\.0 is 'aardvark' there, and 'a'"
    ):
        export.load_weights(net, tmp_path / "w.safetensors")
    export.describe(net)
    export.load_weights(net, tmp_path / "w.safetensors")
    assert export.description(net) == SAID


def test_weights_of_a_net_that_computes_otherwise_are_refused(bare, tmp_path):
    export.save_weights(bare, tmp_path / "w.safetensors")
    for change, complaint in (
        (
            lambda n: [setattr(m, "eps", 1e-5) for m in n.modules() if isinstance(m, nn.BatchNorm2d)],
            r"bn\.eps is 0\.001",
        ),
        (lambda n: setattr(n.first_conv, "act", nn.SiLU()), r"first_conv\.act is 'relu6' there, and 'silu' here"),
    ):
        other = copy.deepcopy(bare)
        change(other)
        with pytest.raises(ValueError, match=complaint):
            export.load_weights(other, tmp_path / "w.safetensors")
    # These change nothing of what it computes in evaluation.
    other = copy.deepcopy(bare)
    other.classifier.dropout, other.resolution, other.first_conv.bn.momentum = nn.Dropout(0.2), 28, 0.01
    export.load_weights(other, tmp_path / "w.safetensors")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_could_not_be_loaded_are_not_written(net, bad, tmp_path):
    net.first_conv.conv.weight.data[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match=rf"net: first_conv\.conv\.weight must be finite in torch\.float32, got {bad}"):
        export.save_weights(net, tmp_path / "w.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["parameters", "macs"])
def test_an_architectures_own_counts_must_be_the_nets(net, key):
    document = export.architecture(net)
    right = document[key]
    wrong = edited(document, lambda d: d.update({key: right + 1}))
    with pytest.raises(ValueError, match=f"architecture: {key} must be {right}, as the net has, got {right + 1}"):
        export.from_architecture(wrong)
    export.from_architecture(edited(document, lambda d: d.pop(key)))


def test_changes_that_do_not_print_are_refused():
    net = lively(random_path(spaces.cell(channels=4, cells_per_stage=1, resolution=9), 4))
    pool = net.body[1].downsample.pool
    pool.divisor_override = 2
    with pytest.raises(ValueError, match=r"downsample\.pool is AvgPool2d\(.*\) with divisor_override 2, and an archit"):
        export.architecture(net)
    pool.divisor_override = None
    net.anything_of_a_user = 3
    export.architecture(net)
    act = next(m for m in net.modules() if isinstance(m, nn.ReLU) and not m.inplace)
    act.inplace = True  # it would write over what other edges of the cell read
    with pytest.raises(ValueError, match="with inplace True"):
        export.architecture(net)


def test_a_stem_of_another_kind_comes_back(bare, tmp_path):
    net = copy.deepcopy(bare)
    net.first_conv = lively(ConvLayer(2, 16, 5, 1, act="silu"))
    lively(net)
    export.save_architecture(net, tmp_path / "a.json")
    export.save_weights(net, tmp_path / "w.safetensors")
    again = export.load_architecture(tmp_path / "a.json").eval()
    export.load_weights(again, tmp_path / "w.safetensors")
    x = torch.randn(2, 2, 14, 14)
    assert torch.equal(again(x), net(x))


def safetensors(notes):
    header = json.dumps({"__metadata__": {"proxyless_fast": notes}}).encode()
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("n.onnx", b"\xff nothing", r"n\.onnx cannot be read as ONNX"),
        ("w.safetensors", safetensors("[1]"), r"metadata proxyless_fast must be an object, got a list of 1"),
        ("w.safetensors", safetensors("[" * 100), "expected at most 32 levels of brackets"),
        ("w.safetensors", safetensors('{"classes": ["a", "a"]}'), r"w\.safetensors: classes must be distinct"),
        ("a.json", b'{"classes": 3}', r"a\.json: classes must be a valid list, got 3"),
        ("a.txt", b"", r"source must be a net or a \.json, \.safetensors or \.onnx file, got .*a\.txt"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        export.description(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["n.onnx", "w.safetensors", "a.json"])
def test_files_that_are_not_there_are_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        export.description(tmp_path / name)


def test_a_document_too_large_to_be_read_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"a\.json can hold at most 4,194,304 bytes, got a document of 5,"):
        documents.write({"a": "x" * 5_000_000}, tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []
