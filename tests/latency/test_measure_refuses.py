"""What `measure` and `profile` cannot take is refused in a sentence; a user's net with blocks of ours is taken."""

import onnx
import pytest
from onnx import TensorProto, helper
from torch import nn

from proxyless_fast import latency
from proxyless_fast.blocks import MBConv


def model(inputs):
    values = [helper.make_tensor_value_info(name, kind, [1, 2]) for name, kind in inputs]
    output = helper.make_tensor_value_info("output", inputs[0][1], [1, 2])
    node = helper.make_node("Add", [inputs[0][0], inputs[-1][0]], ["output"])
    graph = helper.make_graph([node], "g", values, [output])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


@pytest.mark.parametrize(
    ("inputs", "got"),
    [
        ([("a", TensorProto.FLOAT), ("b", TensorProto.FLOAT)], r"got a of tensor\(float\), b of tensor\(float\)"),
        ([("a", TensorProto.DOUBLE)], r"got a of tensor\(double\)"),
    ],
)
def test_a_file_of_other_inputs(inputs, got, tmp_path):
    onnx.save(model(inputs), tmp_path / "n.onnx")
    with pytest.raises(ValueError, match=rf"must have one input, a tensor\(float\), {got}"):
        latency.measure(tmp_path / "n.onnx", repeats=1)


def test_damaged_files(tmp_path):
    (tmp_path / "n.onnx").write_bytes(b"\xff nothing")
    with pytest.raises(ValueError, match=r"n\.onnx cannot be read as ONNX: "):
        latency.measure(tmp_path / "n.onnx")
    graph = helper.make_graph([helper.make_node("Magic", ["a"], ["output"])], "g", [], [])
    (tmp_path / "n.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(ValueError, match="the ONNX model does not run in ONNX Runtime: "):
        latency.measure(tmp_path / "n.onnx")


class Two(nn.Module):
    def forward(self, x, y):
        return x + y


def test_nets_of_a_user():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(MBConv(8, 8, 5), nn.LeakyReLU()), nn.AdaptiveAvgPool2d(1))
    training = net.train().training
    assert latency.measure(net, repeats=1, input_shape=(3, 16, 16)) > 0
    assert latency.measure(net.double(), repeats=1, input_shape=(3, 16, 16)) > 0
    assert net.training == training
    with pytest.raises(ValueError, match="net must take one input, and the forward of Two takes x, y"):
        latency.measure(Two(), repeats=1, input_shape=(3, 16, 16))
    with pytest.raises(ValueError, match=r"net does not take an input of shape \(1, 4, 16, 16\)"):
        latency.measure(net, repeats=1, input_shape=(4, 16, 16))
    with pytest.raises(
        ValueError, match=r"net must be one of proxyless_fast\.spaces or derived from one, got Sequential"
    ):
        latency.profile(net, repeats=1)
