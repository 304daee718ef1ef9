"""Blocks and mixed ops through the fused engine: the same results, statistics and state as module by module."""

import copy
import resource
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import proxyless_fast as pf
from proxyless_fast.blocks import ConvLayer, mbconv
from proxyless_fast.blocks.residual import ResidualBlock

KINDS = [("3x3_MBConv3", 6, 6, 1), ("5x5_MBConv6", 5, 9, 2), ("7x7_MBConv1", 8, 8, 1), ("3x3_MBConv1", 7, 3, 2)]


def results(module, x, g):
    module = copy.deepcopy(module)
    x = x.detach().clone().requires_grad_()
    y = module(x)
    y.backward(g)
    grads = {name: p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **grads, **{f"state {k}": v for k, v in module.state_dict().items()}}


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-9, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")


def off(module):
    module = copy.deepcopy(module)
    pf.set_policy(module, "off")
    return module


@pytest.mark.parametrize("policy", ["fast", "lean"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name, cin, cout, stride", KINDS)
def test_a_block_is_its_modules(name, cin, cout, stride, training, policy):
    block = pf.candidate(name, cin, cout, stride).double().train(training)
    pf.set_policy(block, policy)
    x = torch.randn(3, cin, 9, 11, dtype=torch.float64)
    g = torch.randn_like(off(block)(x))
    assert block.fused(x) == (True, "")
    assert_same(results(block, x, g), results(off(block), x, g))


@pytest.mark.parametrize("act", ["relu6", "relu", "silu", "hardswish", None])
@pytest.mark.parametrize("training", [True, False])
def test_a_conv_layer_is_its_modules(act, training):
    layer = ConvLayer(3, 10, 3, 2, act=act).double().train(training)
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    g = torch.randn_like(off(layer)(x))
    assert_same(results(layer, x, g), results(off(layer), x, g))


def test_a_frozen_block_computes_the_input_gradient_alone():
    block = pf.MBConv(6, 6).double()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(off(block)(x).square().sum(), x)[0]
    block.requires_grad_(False)
    block(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("mode", ["full", "two"])
def test_a_mixed_op_of_fused_and_other_candidates(mode):
    names = ["3x3_MBConv3", "3x3_DepthConv", "7x7_MBConv6", "Identity", "5x5_MBConv1", "Zero"]
    op = pf.MixedOp({n: pf.candidate(n, 6, 6) for n in names}).double()
    with torch.no_grad():
        op.alpha.copy_(torch.randn(6))
    x, g = torch.randn(2, 3, 6, 7, 8, dtype=torch.float64)
    for active in range(6):
        op.activate(active, mode=mode, partner=(active + 2) % 6 if mode == "two" else None)
        assert_same(results(op, x, g), results(off(op), x, g))


def test_a_net():
    net = pf.spaces.small(resolution=12).double()
    x = torch.randn(4, 1, 12, 12, dtype=torch.float64)
    g = torch.randn(4, 10, dtype=torch.float64)
    for seed, mode in enumerate(["path", "full", "two"]):
        pf.sample(net, mode, torch.Generator().manual_seed(seed))
        ours, expected = results(net, x, g), results(off(net), x, g)
        assert [k for k, v in ours.items() if v is None] == [k for k, v in expected.items() if v is None]
        ran = [k for k, v in expected.items() if v is not None]
        assert_same({k: ours[k] for k in ran}, {k: expected[k] for k in ran})


def test_probes_go_to_the_engine_in_one_call(monkeypatch):
    names = ["3x3_MBConv3", "5x5_MBConv6", "7x7_MBConv3", "3x3_MBConv1", "Zero"]
    op = pf.MixedOp({n: pf.candidate(n, 4, 4) for n in names})
    calls = []

    def counted(x, grad, params, *rest, **options):
        calls.append(len(params))
        return pf.ops.probe(x, grad, params, *rest, **options)

    monkeypatch.setattr(mbconv, "probe", counted)
    op.activate(1, mode="full")
    op(torch.randn(2, 4, 6, 6)).sum().backward()
    assert calls == [3]


@pytest.mark.parametrize("active", [0, 3])
def test_a_layer_takes_the_covariance_of_its_input_once(active, monkeypatch):
    op = pf.MixedOp({n: pf.candidate(n, 4, 4) for n in ["3x3_MBConv3", "5x5_MBConv6", "7x7_MBConv3", "3x3_MBConv1"]})
    calls, gram = [], pf.ops.gram

    def counted(x, group=""):
        calls.append(x)
        return gram(x)

    monkeypatch.setattr(mbconv, "gram", counted)
    monkeypatch.setattr(sys.modules["proxyless_fast.ops.mbconv"], "gram_of", counted)
    op.activate(active, mode="full")
    op(torch.randn(2, 4, 6, 6)).sum().backward()
    assert len(calls) == 1


class Residual(nn.Module):
    """The block's definition, with every sum written out."""

    def __init__(self, block):
        super().__init__()
        self.mobile_inverted_conv = block.mobile_inverted_conv

    def forward(self, x):
        return self.mobile_inverted_conv(x) + x


@pytest.mark.parametrize("candidate", [0, 1, 2, None])
@pytest.mark.parametrize("mode", ["path", "full"])
def test_a_residual_block_adds_its_input(candidate, mode):
    names = ["3x3_MBConv3", "3x3_MBConv1", "Zero"]
    op = pf.candidate(names[0], 4, 4) if candidate is None else pf.MixedOp({n: pf.candidate(n, 4, 4) for n in names})
    block = pf.blocks.ResidualBlock(op, True).double()
    if candidate is not None:
        op.activate(candidate, mode)
    x, g = torch.randn(2, 2, 4, 6, 5, dtype=torch.float64).unbind()
    ours, expected = results(block, x, g), results(off(Residual(block)), x, g)
    zeros = [k for k, v in expected.items() if v is None]
    assert zeros == [k for k, v in ours.items() if v is None]
    assert_same({k: v for k, v in ours.items() if v is not None}, {k: v for k, v in expected.items() if v is not None})


def test_memory_is_used_again_and_can_be_given_back():
    block, x = pf.MBConv(16, 16, 3, 1, 6), torch.randn(8, 16, 56, 56)
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()  # noqa: E731
    y = block(x)
    address, expected = y.data_ptr(), y.detach().clone()
    del y
    assert block(x).data_ptr() == address
    before = resident()
    pf.release_memory()
    assert resident() < before - 2**23
    torch.testing.assert_close(block(x), expected)


def reasons(block, x):
    fused, reason = block.fused(x)
    assert not fused
    return reason


def test_backward_within_autocast_is_that_outside():
    torch.manual_seed(0)
    net, x = nn.Sequential(ConvLayer(3, 8), pf.MBConv(8, 8, 3, 1, 6)), torch.randn(4, 3, 9, 9)
    found = []
    for within in (False, True):
        net.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x).square().mean()
            if within:
                out.backward()
        if not within:
            out.backward()
        found.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_on_the_cpu_is_fused_in_float32(dtype):
    """Output, gradients, gates: at most twice as far from the truth as those of torch's own ops under autocast."""
    torch.manual_seed(0)
    op = pf.MixedOp({n: pf.candidate(n, 8, 8) for n in ("3x3_MBConv3", "Identity", "5x5_MBConv6")}, label="op")
    net = nn.Sequential(ConvLayer(3, 8), ResidualBlock(op, True), ConvLayer(8, 8, 1))
    x = torch.randn(4, 3, 9, 9)
    nets = {"truth": copy.deepcopy(net).double(), "eager": off(copy.deepcopy(net)), "fused": net}
    for active in range(3):
        found = {}
        for name, own in nets.items():
            own.zero_grad(set_to_none=True)
            pf.mixed_ops(own)["op"].activate(active, mode="full")
            with torch.autocast("cpu", dtype, enabled=name != "truth"):
                out = own(x.double() if name == "truth" else x)
                if name == "fused":
                    assert own[1].mobile_inverted_conv.candidates[0].fused(x.new_ones(2, 8, 9, 9, dtype=dtype))[0]
            (out.double() ** 2).mean().backward()
            # As one vector: of some, such as a shift before the next norm, the true gradient is zero.
            weights = torch.cat([p.grad.double().flatten() for p in pf.weight_parameters(own) if p.grad is not None])
            found[name] = out.detach(), weights, pf.mixed_ops(own)["op"].alpha.grad
        for ours, eager, truth in zip(*(found[name] for name in ("fused", "eager", "truth")), strict=True):
            error = [float((value.double() - truth).norm()) for value in (ours, eager)]
            assert error[0] <= 2 * error[1] and error[1] < 0.1 * float(truth.norm())


def test_why_not():
    block, x = pf.MBConv(4, 4), torch.randn(2, 4, 6, 6)
    assert block.fused(x) == (True, "")
    assert "float16" in reasons(block, x.half())
    assert "'off'" in reasons(off(block), x)
    assert "11" in reasons(pf.MBConv(4, 4, 11), x)
    assert "bfloat16" in reasons(block, x.bfloat16())
    mixed = copy.deepcopy(block)
    mixed.depth_conv.bn.eval()
    assert "differ" in reasons(mixed, x)
    hooked = copy.deepcopy(block)
    hooked.depth_conv.register_forward_hook(lambda *_: None)
    assert "hooks" in reasons(hooked, x)
    other = copy.deepcopy(block)
    other.point_linear.bn = nn.SyncBatchNorm(4)
    assert "SyncBatchNorm" in reasons(other, x)
    cumulative = copy.deepcopy(block)
    cumulative.point_linear.bn.momentum = None
    assert "momentum" in reasons(cumulative, x)
    assert hooked.probe_plan(x) is None


def test_auto_spends_its_budget_where_recomputing_costs_most():
    net = pf.spaces.mobile(num_classes=3, resolution=64)
    size = 2 * 2 * 2 * 192 * 6 * 4  # one path's d in a 2x2 layer of 192 channels, batch 2, float32
    pf.set_policy(net, "auto", budget_bytes=5 * size // 2, batch_size=2)  # block 17 is half as wide, and comes first
    fast = [i for i, b in enumerate(net.blocks[1:], 1) if b.mobile_inverted_conv.candidates[0].policy == "fast"]
    assert fast == [17, 18, 19]
    pf.set_policy(net, "auto", budget_bytes=1 << 40, batch_size=2)
    assert all(m.policy == "fast" for m in net.modules() if isinstance(m, pf.MBConv))
    pf.set_policy(net, "auto", budget_bytes=0, batch_size=2)
    assert all(m.policy == "lean" for m in net.modules() if isinstance(m, pf.MBConv))


@pytest.mark.parametrize(
    "arguments, message",
    [(("faster",), "policy must be one of"), (("auto",), "budget_bytes and batch_size"), (("lean", 3, 4), "budget")],
)
def test_wrong_policies(arguments, message):
    policy, *rest = arguments
    with pytest.raises(ValueError, match=message):
        pf.set_policy(pf.MBConv(4, 4), policy, **dict(zip(("budget_bytes", "batch_size"), rest, strict=False)))


@pytest.mark.slow
def test_a_search_samples_the_same_paths_and_ends_with_the_same_alphas():
    # In float64: 30 steps of training amplify float32 rounding of either path to a tenth of what the alphas move.
    x, y = torch.randn(64, 1, 12, 12, dtype=torch.float64), torch.randint(0, 10, (64,))
    ends, paths = [], []
    for policy in ("fast", "off"):
        torch.manual_seed(1)
        net = pf.spaces.small(resolution=12).double()
        pf.set_policy(net, policy)
        weights = torch.optim.SGD(pf.weight_parameters(net), lr=0.05, momentum=0.9, nesterov=True)
        alphas = torch.optim.Adam(pf.arch_parameters(net), lr=1e-3, betas=(0.0, 0.999))
        taken = []
        for step in range(30):
            for mode, optimizer in (("path", weights), ("full", alphas)):
                taken.append(pf.sample(net, mode, torch.Generator().manual_seed(step)))
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x), y).backward()
                optimizer.step()
        paths.append(taken)
        ends.append(torch.cat([alpha.detach() for alpha in pf.arch_parameters(net)]))
    assert paths[0] == paths[1]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-9)
    assert ends[0].abs().max() > 5e-3  # they went somewhere


class Doubled(pf.MBConv):
    """A candidate of a user's, built on ours."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("mode", ["path", "full"])
@pytest.mark.parametrize("active", [0, 1])
def test_a_subclass_runs_as_its_own_forward_says(active, mode):
    op = pf.MixedOp({"ours": pf.MBConv(4, 4, 3, 1, 3), "theirs": Doubled(4, 4, 3, 1, 3)})
    block = pf.blocks.ResidualBlock(op, True).double()
    op.activate(active, mode)
    x, g = torch.randn(2, 2, 4, 6, 5, dtype=torch.float64).unbind()
    ours, expected = results(block, x, g), results(off(Residual(block)), x, g)
    ran = [k for k, v in expected.items() if v is not None]
    assert ran == [k for k, v in ours.items() if v is not None]
    assert_same({k: ours[k] for k in ran}, {k: expected[k] for k in ran})


@pytest.mark.slow
def test_torch_compile_takes_a_path_in_one_graph():
    """The fused ops have fake kernels and autograd of their own: tracing neither breaks nor changes anything."""
    net = pf.spaces.small(num_classes=10, in_channels=1, resolution=28)
    choices = {label: op.index("5x5_MBConv3") for label, op in pf.mixed_ops(net).items()}
    path = pf.derive(net, choices)
    inside = [m for m in path.modules() if isinstance(m, pf.MBConv)]
    assert inside and all(block.fused(torch.randn(1, block.in_channels, 8, 8))[0] for block in inside)
    compiled = torch.compile(copy.deepcopy(path), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 1, 28, 28)
    for run in (path, compiled):
        run(x).square().sum().backward()
    for p, q in zip(path.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for p, q in zip(path.buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(p, q)
