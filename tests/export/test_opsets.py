"""ONNX files for runtimes of every age: written in the oldest opset that says all of ours, brought to newer ones."""

import logging

import onnx
import onnxruntime
import pytest
import torch
from onnx import version_converter
from torch import nn

from proxyless_fast import export, spaces
from proxyless_fast.blocks import ConvLayer, MBConv, candidate
from proxyless_fast.export.onnx_graph import OPSET, build
from tests.export.test_export import lively, random_path

NAMES = ["3x3_MBConv1", "7x7_MBConv6", "Zero", "Identity", "3x3_AvgPool", "3x3_MaxPool", "5x5_DepthConv",
         "3x3_DilatedDepthConv", "1x1_Conv", "3x3_Conv"]  # fmt: skip
ACTIVATIONS = ["relu6", "relu", "silu", "hardswish", "identity"]


def nets():
    for name in NAMES:
        for stride in (1, 2):
            if stride == 1 or name not in ("Zero", "Identity"):
                yield pytest.param(lambda n=name, s=stride: candidate(n, 6, 6, s), (6, 9, 9), id=f"{name}-{stride}")
    for act in ACTIVATIONS:
        yield pytest.param(lambda a=act: MBConv(6, 6, 3, 1, 3, act=a), (6, 8, 8), id=f"MBConv {act}")
        yield pytest.param(lambda a=act: ConvLayer(6, 6, 3, 2, act=a), (6, 8, 8), id=f"ConvLayer {act}")
    mobile = dict(num_classes=5, resolution=32, width=0.35)
    yield pytest.param(lambda: random_path(spaces.mobile(**mobile), 4), (3, 32, 32), id="mobile")
    yield pytest.param(lambda: random_path(spaces.small(resolution=14), 4), (1, 14, 14), id="small")
    odd = dict(channels=8, cells_per_stage=1, resolution=17)
    yield pytest.param(lambda: random_path(spaces.cell(**odd), 4), (3, 17, 17), id="cell")


@pytest.mark.parametrize(("make", "shape"), list(nets()))
def test_a_file_runs_in_every_opset(make, shape):
    torch.manual_seed(0)
    net = lively(make())
    model = build(net, shape, dynamic_batch=True)
    assert (model.opset_import[0].version, model.ir_version) == (OPSET, 6) == (11, 6)
    x = torch.randn(2, *shape)
    with torch.no_grad():
        expected = net(x)
    for opset in (11, 13, 17, 20, onnx.defs.onnx_opset_version()):
        converted = version_converter.convert_version(model, opset) if opset > OPSET else model
        converted.ir_version = 6 if opset == OPSET else 8 if opset <= 17 else 10
        onnx.checker.check_model(converted, full_check=True)
        session = onnxruntime.InferenceSession(converted.SerializeToString(), providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), opset


@pytest.mark.slow
def test_a_net_of_other_modules_says_which_and_in_what_opset(tmp_path, caplog):
    net = nn.Sequential(MBConv(8, 8, 3), nn.GroupNorm(2, 8))
    with caplog.at_level(logging.WARNING, "proxyless_fast"):
        assert export.onnx(net, tmp_path / "n.onnx", (8, 8, 8)) < 1e-4
    assert "no ONNX form for GroupNorm (1)" in caplog.text and "in opset 18" in caplog.text
    assert onnx.load(tmp_path / "n.onnx").opset_import[0].version == 18


def test_bounds_that_print_alike_stay_apart():
    net = nn.Sequential(nn.ReLU6(), nn.ReLU6())
    net[0].max_val, net[1].max_val = 5.0000004, 5.0000001
    model = build(net, (1, 2, 2))
    assert len({node.input[2] for node in model.graph.node if node.op_type == "Clip"}) == 2


class Two(nn.Module):
    def forward(self, x, y):
        return x + y


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Choice(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("net", "complaint"),
    [
        (Two(), "net must take one input, and the forward of Two takes x, y"),
        (Pair(), "net must give one tensor, got a tuple from Pair"),
        (MBConv(3, 8), r"net does not take an input of shape \(1, 8, 8, 8\): .*3"),
        pytest.param(Choice(), "torch cannot write Choice as ONNX: .*data-dependent", marks=pytest.mark.slow),
    ],
)
def test_what_has_no_onnx_form_is_refused_in_a_sentence(net, complaint, tmp_path):
    with pytest.raises(ValueError, match=complaint) as caught:
        export.onnx(net, tmp_path / "n.onnx", (8, 8, 8))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
