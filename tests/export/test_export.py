"""What leaves the project and comes back: official configs, JSON, safetensors, ONNX, timm."""

import copy
import json
import sys

import onnx as onnx_format
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from proxyless_fast import export, spaces
from proxyless_fast.blocks import MBConv, ResidualBlock, Zero, candidate
from proxyless_fast.costs import count_macs, count_parameters
from proxyless_fast.export.onnx_file import onnx
from proxyless_fast.export.onnx_graph import build
from proxyless_fast.supernet import derive, mixed_ops

NAMES = ("cpu", "gpu", "mobile")


def lively(net):
    """Statistics and affine weights that leave no layer idle, and outputs of an ordinary size."""
    generator = torch.Generator().manual_seed(5)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.2, 0.6, generator=generator)
            module.weight.data.uniform_(0.7, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
    return net.eval()


def random_path(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draws = {label: torch.randint(len(op), (), generator=generator).item() for label, op in mixed_ops(net).items()}
    return lively(derive(net, draws))


@pytest.fixture
def small():
    return random_path(spaces.small(resolution=14), seed=0)


@pytest.fixture
def cell():
    return random_path(spaces.cell(channels=8, cells_per_stage=1, resolution=16), seed=4)


def image(net, batch=2):
    return torch.randn(batch, net.in_channels, net.resolution, net.resolution)


def run(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


def edited(config, change):
    config = copy.deepcopy(config)
    change(config)
    return config


# architecture and weights


@pytest.mark.parametrize("kind", ["small", "cell"])
def test_architecture_and_weights_rebuild_the_net(kind, tmp_path, request):
    net = request.getfixturevalue(kind)
    export.save_architecture(net, tmp_path / "a" / "architecture.json")
    export.save_weights(net, tmp_path / "a" / "weights.safetensors")
    again = export.load_architecture(tmp_path / "a" / "architecture.json").eval()
    x = image(net)
    assert not torch.equal(again(x), net(x))
    export.load_weights(again, tmp_path / "a" / "weights.safetensors")
    assert torch.equal(again(x), net(x))
    assert again.resolution == net.resolution
    document = json.loads((tmp_path / "a" / "architecture.json").read_text())
    assert document == export.architecture(net) == export.architecture(again)
    assert (document["parameters"], document["macs"]) == (count_parameters(net), count_macs(net))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["architecture.json", "weights.safetensors"]


def test_an_architecture_keeps_batch_norm_settings(small):
    next(m for m in small.modules() if isinstance(m, nn.BatchNorm2d)).eps = 1e-4
    again = export.from_architecture(export.architecture(small))
    assert [m.eps for m in again.modules() if isinstance(m, nn.BatchNorm2d)] == [
        m.eps for m in small.modules() if isinstance(m, nn.BatchNorm2d)
    ]
    assert next(m for m in again.modules() if isinstance(m, nn.BatchNorm2d)).eps == 1e-4
    with pytest.raises(ValueError, match="one momentum and one eps"):
        export.official(small)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda d: d.update(format="other"), r"format must be 'proxyless_fast\.architecture', got 'other'"),
        (lambda d: d.pop("net"), "architecture: net is missing"),
        (lambda d: d["net"].pop("resolution"), r"architecture: net\.resolution is missing"),
        (lambda d: d["net"]["blocks"][1].update(name="9x9_Magic"), "'9x9_Magic' is unknown"),
        (lambda d: d["net"].update(kind="tree"), r"net\.kind must be one of 'chain', 'cell', got 'tree'"),
    ],
)
def test_a_damaged_architecture_file_is_named(small, tmp_path, change, complaint):
    path = tmp_path / "architecture.json"
    path.write_text(json.dumps(edited(export.architecture(small), change)))
    with pytest.raises(ValueError, match=complaint) as caught:
        export.load_architecture(path)
    assert str(path) in str(caught.value)


def test_a_supernet_has_no_architecture():
    with pytest.raises(ValueError, match="net must be derived"):
        export.architecture(spaces.small())
    with pytest.raises(ValueError, match="got Linear"):
        export.architecture(nn.Linear(2, 2))


def test_weights_that_do_not_fit_are_named(small, tmp_path):
    path = tmp_path / "weights.safetensors"
    export.save_weights(small, path)
    whole = load_file(path)
    bias = whole["classifier.linear.bias"]
    for state, complaint in (
        ({k: v for k, v in whole.items() if k != "classifier.linear.bias"}, r"it lacks classifier\.linear\.bias"),
        ({**whole, "extra.weight": bias.clone()}, r"it has what the net lacks: extra\.weight"),
        ({**whole, "classifier.linear.bias": torch.zeros(3)}, r"linear\.bias has shape \(3,\), the net's has \(10,\)"),
    ):
        save_file(state, path)
        with pytest.raises(ValueError, match=complaint):
            export.load_weights(small, path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        export.load_weights(small, path)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        export.load_weights(small, tmp_path / "none.safetensors")


# ONNX


@pytest.mark.parametrize("kind", ["small", "cell"])
def test_onnx_files_compute_what_the_net_does(kind, tmp_path, request):
    net = request.getfixturevalue(kind)
    error = export.onnx(net, tmp_path / "net.onnx")
    model = onnx_format.load(tmp_path / "net.onnx")
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    for batch in (1, 5):
        x = image(net, batch)
        with torch.no_grad():
            expected = net(x)
        assert expected.std() > 1e-2
        assert (run(model, x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert 0 <= error < 1e-4
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


def test_export_leaves_the_net_as_it_was(small, tmp_path):
    small.train()
    before = copy.deepcopy(small.state_dict())
    export.onnx(small, tmp_path / "net.onnx")
    assert small.training
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


def test_a_model_that_disagrees_is_not_written(small, tmp_path, monkeypatch):
    def wrong(net, shape, dynamic_batch):
        other = copy.deepcopy(net)
        other.classifier.linear.bias.data[0] += 0.05
        return build(other, shape, dynamic_batch)

    monkeypatch.setattr(sys.modules[onnx.__module__], "build", wrong)
    with pytest.raises(RuntimeError, match=r"differs from the net by 0\.05.* was not written"):
        export.onnx(small, tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_nets_of_other_making_are_traced(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3)

        def forward(self, x):
            return torch.tanh(self.conv(x)).mean((2, 3))

    net = Odd()
    assert export.onnx(net, tmp_path / "odd.onnx", input_shape=(2, 8, 8)) < 1e-5
    assert net.training
    with pytest.raises(ValueError, match="input_shape must be given for a Odd"):
        export.onnx(net, tmp_path / "odd.onnx")


def test_a_supernet_is_not_exported(tmp_path):
    with pytest.raises(ValueError, match="net must be derived"):
        export.onnx(spaces.small(), tmp_path / "net.onnx")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [8, 9])
@pytest.mark.parametrize(
    "name",
    [
        "3x3_MBConv1", "5x5_MBConv3", "7x7_MBConv6", "Zero", "Identity", "3x3_AvgPool", "3x3_MaxPool", "5x5_DepthConv",
        "3x3_DilatedDepthConv", "1x1_Conv", "3x3_Conv",
    ],
)  # fmt: skip
def test_every_candidate_has_an_onnx_form(name, stride, side, monkeypatch):
    if stride == 2 and name in ("Identity", "Zero"):
        return
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: pytest.fail("traced"))
    op = lively(candidate(name, 6, 6, stride))
    x = torch.randn(1, 6, side, side)
    with torch.no_grad():
        expected = op(x)
    torch.testing.assert_close(run(build(op, (6, side, side)), x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act", ["relu6", "relu", "silu", "hardswish", "identity"])
def test_every_activation_has_an_onnx_form(act):
    op = lively(MBConv(4, 4, 3, 1, 3, act=act))
    block = ResidualBlock(op, shortcut=True)
    x = torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        expected = block(x)
    torch.testing.assert_close(run(build(block, (4, 6, 6)), x), expected, rtol=1e-4, atol=1e-5)


def test_a_block_that_chose_zero_is_its_input():
    x = torch.randn(1, 4, 6, 6)
    assert torch.equal(run(build(ResidualBlock(Zero(), True), (4, 6, 6)), x), x)
    assert torch.equal(run(build(ResidualBlock(Zero(), False), (4, 6, 6)), x), torch.zeros_like(x))


def test_every_path_of_a_cell_has_an_onnx_form(monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: pytest.fail("traced"))
    supernet = spaces.cell(channels=4, cells_per_stage=1, resolution=9)
    for seed in range(6):
        net = random_path(supernet, seed)
        x = image(net, 1)
        with torch.no_grad():
            expected = net(x)
        torch.testing.assert_close(run(build(net, (3, 9, 9)), x), expected, rtol=1e-4, atol=1e-5)
    zeros = lively(derive(supernet, {label: 0 for label in mixed_ops(supernet)}))
    with torch.no_grad():
        expected = zeros(x)
    torch.testing.assert_close(run(build(zeros, (3, 9, 9)), x), expected, rtol=1e-4, atol=1e-5)


# timm


@pytest.fixture
def timm_here():
    pytest.importorskip("timm")


@pytest.mark.usefixtures("timm_here")
@pytest.mark.parametrize("seed", range(3))
def test_timm_models_compute_what_the_net_does(seed):
    net = random_path(spaces.small(resolution=14), seed)
    model = export.timm(net)
    assert type(model).__module__.startswith("timm.") and not model.training
    x = image(net)
    with torch.no_grad():
        torch.testing.assert_close(model(x), net(x), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(net)


@pytest.mark.usefixtures("timm_here")
def test_a_published_net_becomes_a_timm_model(shared):
    net = lively(export.from_official(shared / "official" / "proxyless_mobile.config", resolution=64))
    model = export.timm(net)
    x = image(net, 1)
    with torch.no_grad():
        torch.testing.assert_close(model(x), net(x), rtol=1e-4, atol=1e-4)
    features = model.forward_features(x)
    assert features.shape == (1, 1280, 2, 2)


@pytest.mark.usefixtures("timm_here")
def test_what_timm_cannot_say_is_named(cell):
    with pytest.raises(ValueError, match="got CellNet"):
        export.timm(cell)
    with pytest.raises(ValueError, match=r"blocks\.1 has no form in timm"):
        export.timm(spaces.small())
    net = random_path(spaces.small(resolution=14))
    net.blocks[1] = ResidualBlock(MBConv(16, 24, 3, 2, 3, act="silu"), False)
    with pytest.raises(ValueError, match=r"blocks\.1 has no form in timm"):
        export.timm(net)
    net.blocks[1] = ResidualBlock(MBConv(15, 24, 3, 2, 3), False)
    with pytest.raises(ValueError, match="rounds the width 45 to a multiple of 8"):
        export.timm(net)


def test_without_timm_one_sentence_says_so(small, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"] + ["timm"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="export to timm needs the package timm: pip install timm"):
        export.timm(small)
