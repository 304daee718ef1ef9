"""Blocks and spaces: shapes, names, costs counted from shapes, official nets to the unit."""

import copy
import json

import pytest
import torch
from torch import nn

import proxyless_fast as pf
from proxyless_fast.blocks import ResidualBlock
from proxyless_fast.costs import Layer

NAMES = [f"{k}x{k}_MBConv{e}" for k in (3, 5, 7) for e in range(1, 7)]
NAMES += ["3x3_AvgPool", "3x3_MaxPool", "3x3_DepthConv", "5x5_DepthConv", "7x7_DepthConv", "3x3_DilatedDepthConv"]
NAMES += ["1x1_Conv", "3x3_Conv", "Zero", "Identity"]


def count_by_hooks(module, x):
    """Multiply-accumulates by running the module and watching its convolutions: independent of the shapes' formulas."""
    total = 0

    def conv(m, _, out):
        nonlocal total
        total += out.numel() // out.shape[0] * m.weight[0].numel()

    def linear(m, _, out):
        nonlocal total
        total += m.weight.numel()

    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(conv)
        elif isinstance(m, nn.Linear):
            m.register_forward_hook(linear)
    return module(x), lambda: total


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stride, out", [(1, 6), (2, 6), (1, 10), (2, 10)])
def test_candidates(name, stride, out):
    keeps_channels = "Pool" in name
    if (name == "Identity" and (stride, out) != (1, 6)) or (keeps_channels and out != 6):
        with pytest.raises(ValueError, match=name):
            pf.candidate(name, 6, out, stride)
        return
    module = pf.candidate(name, 6, out, stride)
    assert module.name == name
    y, macs = count_by_hooks(module, torch.randn(2, 6, 9, 7))
    h, w = (9, 7) if stride == 1 else (5, 4)
    assert y.shape == (2, out, h, w)
    shape = module.shape((9, 7, 6))
    if shape is not None:
        assert shape.output == (h, w, out)
        assert shape.macs == macs()
        assert shape.parameters == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", ["9x9_MBCon3", "3x5_MBConv3", "4x4_MBConv3", "3x3_MBConv", "3x3_MBConv0", "", "Zeros"])
def test_unknown_candidates(name):
    with pytest.raises(ValueError):
        pf.candidate(name, 8, 8)


@pytest.mark.parametrize("field, value", [("in_channels", 0), ("out_channels", -1), ("stride", 0), ("expand_ratio", 0)])
def test_wrong_sizes_are_named(field, value):
    sizes = {"in_channels": 8, "out_channels": 8, field: value}
    with pytest.raises(ValueError, match=f"{field} must be a positive integer, got {value}"):
        pf.MBConv(**sizes)


def test_residual_block():
    x = torch.randn(2, 4, 5, 5)
    block = ResidualBlock(pf.MBConv(4, 4), shortcut=True).eval()
    torch.testing.assert_close(block(x), block.mobile_inverted_conv(x) + x)
    assert ResidualBlock(pf.Zero(), shortcut=True)(x) is x


@pytest.mark.parametrize(
    "net",
    [
        pf.spaces.mobile(num_classes=7, resolution=64),
        pf.spaces.mobile(num_classes=5, width=1.4, resolution=96),
        pf.spaces.mobile(num_classes=5, width=0.35, resolution=33),
        pf.spaces.small(),
        pf.spaces.small(num_classes=3, in_channels=3, resolution=32),
        pf.spaces.cell(cells_per_stage=1),
        pf.spaces.cell(cells_per_stage=2, channels=8, resolution=15),
    ],
    ids=lambda net: f"{type(net).__name__}-{net.resolution}",
)
def test_costs_of_a_net_are_what_running_it_shows(net):
    with torch.no_grad():
        for alpha in pf.arch_parameters(net):
            alpha.copy_(torch.randn_like(alpha))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    pf.activate_most_likely(net)
    derived = pf.derive(net).eval()
    assert pf.count_macs(net) == pf.count_macs(derived)
    assert pf.count_parameters(net) == pf.count_parameters(derived) == sum(p.numel() for p in derived.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    y, macs = count_by_hooks(copy.deepcopy(derived), torch.randn(1, net.in_channels, net.resolution, net.resolution))
    assert y.shape == (1, net.num_classes)
    assert macs() == pf.count_macs(derived)
    rebuilt = pf.spaces.from_config(json.loads(json.dumps(derived.config())))
    rebuilt.load_state_dict(derived.state_dict())
    x = torch.randn(2, net.in_channels, net.resolution, net.resolution)
    assert torch.equal(rebuilt.eval()(x), derived(x))


def test_the_paper_s_space():
    net = pf.spaces.mobile()
    ops = pf.mixed_ops(net)
    assert [len(op) for op in ops.values()] == [6, 7, 7, 7] * 5 + [6]
    widths = [[24] * 4, [40] * 4, [80] * 4, [96] * 4, [192] * 4, [320]]
    assert [op.candidates[0].out_channels for op in ops.values()] == [w for stage in widths for w in stage]
    layers = net.layers()
    assert all(isinstance(layer, Layer) for layer in layers)
    assert layers[0].choices[0].key == "Conv-input:224x224x3-output:112x112x32"
    assert layers[2].choices[2].key == (
        "expanded_conv-input:112x112x16-output:56x56x24-expand:3-kernel:5-stride:2-idskip:0"
    )
    assert layers[3].choices[-1] is None
    assert layers[-1].choices[0].key == "Logits-input:7x7x1280-output:1000"


def test_cell_space():
    net = pf.spaces.cell(cells_per_stage=1)
    assert len(pf.mixed_ops(net)) == 18
    with torch.no_grad():
        for i, alpha in enumerate(pf.arch_parameters(net)):
            alpha[i % 5] = 1
    derived = pf.derive(net)
    assert derived.architecture_strings()[0] == (
        "|none~0|+|skip_connect~0|nor_conv_1x1~1|+|nor_conv_3x3~0|avg_pool_3x3~1|none~2|"
    )
    x = torch.randn(2, 16, 4, 4)
    cell, (a, b, c) = derived.body[0].eval(), (derived.body[0].edges[i] for i in (2, 3, 4))
    torch.testing.assert_close(cell(x), b(x) + c(torch.zeros_like(x)))
    torch.testing.assert_close(a(x).shape, x.shape)


@pytest.mark.parametrize("kwargs", [{"num_classes": 0}, {"resolution": 2.5}, {"width": -1}, {"candidates": ()}])
def test_wrong_spaces(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        pf.spaces.mobile(**kwargs)
