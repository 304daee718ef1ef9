"""Blocks that a user has edited compute what their modules say, or say why they do not run fused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import proxyless_fast as pf
from proxyless_fast import export
from proxyless_fast.blocks import ConvLayer, LinearLayer, ReluConv, ResidualBlock
from proxyless_fast.spaces import ChainNet


class Excite(nn.Module):
    """A squeeze-and-excite, as people add it to a group."""

    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.scale(x.mean((2, 3), keepdim=True)))


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def activation(kind):
    def change(group):
        group.act = kind()

    return change


def added(group):
    group.add_module("se", Excite(group.bn.num_features).to(group.bn.weight.dtype))


def subclass(group):
    conv = group.conv
    other = Doubled(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, 1, conv.groups, False
    )
    other.weight, group.conv = conv.weight, other


def hook(group):
    group.bn.register_forward_hook(lambda module, args, output: output + 1)


def own_forward(group):
    group.act.forward = lambda x: x - 1


def bounds(group):
    group.act.max_val = 1.0


def circular(group):
    group.conv.padding_mode, group.conv._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]


def strided(group):
    group.conv.stride = (2, 2)


def parametrized(group):
    nn.utils.parametrizations.weight_norm(group.conv)


EDITS = [
    activation(nn.ReLU), activation(nn.Hardswish), activation(nn.Identity), activation(nn.Tanh), added, subclass, hook,
    own_forward, bounds, circular, strided, parametrized,
]  # fmt: skip


def by_modules(block, x):
    """The block's definition, each module called in turn."""
    groups = (
        [block] if isinstance(block, ConvLayer) else [block.inverted_bottleneck, block.depth_conv, block.point_linear]
    )
    for group in groups:
        for module in group:
            x = module(x)
    return x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(
    "make", [lambda: pf.MBConv(4, 6, 3), lambda: ConvLayer(3, 8, 3, 2), lambda: ConvLayer(24, 8, 3)]
)
def test_an_edit_holds(make, edit, training):
    block = make().double().train(training)
    x = torch.randn(4, 3, 9, 9, dtype=torch.float64)
    if not isinstance(block, ConvLayer) or block.conv.in_channels == 24:
        x = torch.randn(4, 4 if isinstance(block, pf.MBConv) else 24, 9, 9, dtype=torch.float64)
    block(x)  # read before it is edited, so that a description that was kept would be found out
    edit(block.depth_conv if isinstance(block, pf.MBConv) else block)
    expected = copy.deepcopy(block)
    ours, theirs = block(x), by_modules(expected, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for (name, p), q in zip(block.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9, msg=name)
    for (name, p), q in zip(block.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10, msg=name)


def test_what_the_engine_knows_it_still_runs():
    block, x = pf.MBConv(4, 4), torch.randn(2, 4, 6, 6)
    for group in (block.inverted_bottleneck, block.depth_conv):
        group.act = nn.Hardswish()
    assert block.fused(x) == (True, "") and block.act == "hardswish"
    block.depth_conv.act = nn.SiLU()
    assert "activations differ" in block.fused(x)[1]
    added(block.depth_conv)
    assert "holds 4 modules" in block.fused(x)[1]
    with pytest.raises(ValueError, match="holds 4 modules"):
        block.shape((6, 6, 4))


def test_weights_exchanged_behind_the_modules_back():
    """`weight.data = ...` changes no object: padding and groups were read beside another shape."""
    block, x = pf.MBConv(4, 4).double(), torch.randn(2, 4, 7, 7, dtype=torch.float64)
    layer, image = ConvLayer(3, 8, 3).double(), torch.randn(2, 3, 7, 7, dtype=torch.float64)
    for module, conv, given in ((block, block.depth_conv.conv, x), (layer, layer.conv, image)):
        module(given)
        out, inputs, _, _ = conv.weight.shape
        conv.weight.data = torch.randn(out, inputs, 5, 5, dtype=torch.float64)
        assert "another shape" in module.fused(given)[1]
        torch.testing.assert_close(module(given), by_modules(copy.deepcopy(module), given))


def test_costs_of_a_cell_follow_its_modules():
    net = pf.derive(pf.spaces.cell(channels=4, cells_per_stage=1, resolution=8))
    net.classifier.linear = nn.Linear(16, 3)
    assert net.num_classes == 3
    net.body[1].conv_b = ReluConv(8, 8, 5)
    net.body[1].conv_a.conv.stride = (1, 1)
    with pytest.raises(ValueError, match=r"body\.1: Reduction: its shortcut and its convolutions"):
        pf.count_macs(net)


def test_costs_follow_the_modules():
    block = pf.MBConv(4, 4)
    plain = block.shape((8, 8, 4))
    block.depth_conv.conv.stride = (2, 2)
    assert block.shape((8, 8, 4)).output == (4, 4, 4) and block.stride == 2
    block.inverted_bottleneck.act = block.depth_conv.act = nn.SiLU()
    assert block.shape((8, 8, 4)).key.endswith("-act:silu") and "act" not in plain.key


def chain(act):
    first, last = ConvLayer(3, 8, 3, 2, act=act), ConvLayer(8, 16, 1, act=act)
    return ChainNet(first, [ResidualBlock(pf.MBConv(8, 8, 3, 1, 3, act=act), True)], last, LinearLayer(16, 4), 16)


@pytest.mark.parametrize("act", ["hardswish", "silu", "relu"])
def test_activations_are_saved_with_the_architecture(act, tmp_path):
    net = chain(act)
    net(torch.randn(8, 3, 16, 16))
    export.save_architecture(net, tmp_path / "net.json")
    again = export.load_architecture(tmp_path / "net.json")
    again.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again.eval()(x), net.eval()(x))


def test_what_cannot_be_written_is_refused(tmp_path):
    for edit in (added, subclass, hook, bounds):
        net = chain("relu6")
        edit(net.blocks[0].mobile_inverted_conv.depth_conv)
        with pytest.raises(ValueError):
            export.save_architecture(net, tmp_path / "net.json")
    net = chain("relu6")
    net.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 3))
    with pytest.raises(ValueError, match="classifier is a Sequential"):
        pf.count_macs(net)
    assert not (tmp_path / "net.json").exists()


def test_a_second_derivative_is_refused_in_words():
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    for block in (pf.MBConv(4, 4), ConvLayer(4, 4, 3)):
        with pytest.raises(NotImplementedError, match="can be differentiated once"):
            torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        pf.set_policy(block, "off")
        (dx,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()


@pytest.mark.parametrize("average", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.99)}])
def test_averages_of_a_pruned_net_are_numbers(average):
    op = pf.MixedOp([pf.Identity(), nn.ReLU(), pf.Zero()])
    op.alpha.data = torch.tensor([2.0, 1.0, -4.0])
    copied = AveragedModel(op, use_buffers=False, **average)
    assert op.prune(0.05) == ["2"]
    for _ in range(3):
        copied.update_parameters(op)
    assert copied.module.alpha.isfinite().all() and copied.module.most_likely == 0
    assert copied.module.probabilities()[2] == 0


def test_states_from_before_the_mask_load():
    op = pf.MixedOp([pf.Identity(), nn.ReLU(), pf.Zero()])
    op.load_state_dict({"alpha": torch.tensor([0.5, -torch.inf, 0.0])})
    assert op.pruned.tolist() == [False, True, False] and op.alpha.isfinite().all()
    torch.testing.assert_close(op.probabilities(), torch.softmax(torch.tensor([0.5, -torch.inf, 0.0]), 0))


def wrong_calls():
    ops = torch.ops.proxyless_fast
    x, c = torch.randn(2, 3, 4, 4), torch.ones(3)
    statistics = torch.zeros(6, dtype=torch.float64)
    yield "running must hold", lambda: ops.update_running(statistics, [], 9, 9, 0.1)
    yield "running\\[1\\] must have shape", lambda: ops.update_running(statistics, [c, torch.ones(2)], 9, 9, 0.1)
    yield "running\\[0\\] must have shape", lambda: ops.update_running(statistics, [torch.ones(3, 1), c], 9, 9, 0.1)
    yield "expanded", lambda: ops.update_running(statistics, [torch.ones(1).expand(3), c], 9, 9, 0.1)
    yield "eps must not", lambda: ops.batch_norm_act(x, c, c, [], "relu6", True, -1.0)
    yield "out", lambda: ops.conv_norm_act(x, torch.ones(0, 3, 3, 3), c[:0], c[:0], [], 1, "relu6", True, 1e-3)


@pytest.mark.parametrize("said, call", list(wrong_calls()))
def test_native_ops_name_the_argument(said, call):
    with pytest.raises(ValueError, match=said):
        call()


def test_strided_arguments_are_read_as_they_are():
    ops = torch.ops.proxyless_fast
    x, grad, gamma, beta = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.rand(3), torch.randn(3)
    _, statistics = ops.batch_norm_act(x, gamma, beta, [], "identity", True, 1e-3)
    apart = torch.empty(12, dtype=torch.float64)[::2].copy_(statistics)
    expected = (grad * F.batch_norm(x, None, None, gamma, beta, True, 0.1, 1e-3)).sum()
    torch.testing.assert_close(ops.norm_dot(grad, x, apart, gamma, beta, 1e-3), expected, rtol=1e-4, atol=1e-4)
    running = [torch.zeros(6)[::2], torch.ones(6)[::2]]
    ops.update_running(apart, running, 32, 32, 0.5)
    torch.testing.assert_close(running[0], (0.5 * statistics[:3]).float())


def test_costs_are_those_of_the_forward_that_runs():
    class Twice(pf.MBConv):
        def forward(self, x, shortcut=False):
            return super().forward(super().forward(x, shortcut), shortcut)

    net = pf.spaces.small()
    net.blocks[0].mobile_inverted_conv = Twice(16, 16, 3, 1, 1)
    with pytest.raises(ValueError, match=r"blocks\.0 is a Twice, which runs another forward than its shape"):
        pf.count_macs(net)
    block = pf.MBConv(16, 16, 3, 1, 1)
    block.forward = lambda x: x
    net.blocks[0].mobile_inverted_conv = block
    with pytest.raises(ValueError, match="runs another forward"):
        pf.count_macs(net)
    assert Twice(4, 4).fused(torch.randn(1, 4, 8, 8)) == (False, "the block has a forward of its own")


def test_hooks_on_every_module_are_run():
    """torch keeps them beside the modules: no object of the block's changes."""
    block, x = pf.MBConv(4, 4).double().eval(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    plain = block(x)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output + 1 if isinstance(module, nn.BatchNorm2d) else None
    )
    try:
        assert "hooks" in block.fused(x)[1]
        torch.testing.assert_close(block(x), by_modules(copy.deepcopy(block), x))
        assert not torch.allclose(block(x), plain)
    finally:
        handle.remove()
    assert block.fused(x) == (True, "")
    torch.testing.assert_close(block(x), plain, rtol=0, atol=0)


def test_a_convolution_patched_on_the_class_is_noticed(monkeypatch):
    block, x = pf.MBConv(4, 4).double().eval(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    plain, own = block(x), nn.Conv2d._conv_forward
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda self, *args: own(self, *args) + 1)
    assert "forward of its own" in block.fused(x)[1]
    torch.testing.assert_close(block(x), by_modules(copy.deepcopy(block), x))
    assert not torch.allclose(block(x), plain)
