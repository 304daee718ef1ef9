"""MixedOp and its gates against plain autograd: what DESIGN's semantics 1 to 5 and 8 promise."""

import copy
import pickle

import pytest
import torch
from torch import nn

import proxyless_fast as pf


def mixed(names=("3x3_MBConv3", "5x5_MBConv6", "3x3_MBConv1", "Zero"), cin=6, cout=6, stride=1, dtype=torch.float64):
    op = pf.MixedOp({name: pf.candidate(name, cin, cout, stride) for name in names}, label="block").to(dtype)
    with torch.no_grad():
        op.alpha.copy_(torch.randn(len(op)))
    return op


def gates_by_autograd(op, x, grad_output, gated):
    """Gate and alpha gradients by the definition: sum_i g_i o_i(x), every path in the graph, softmax by autograd."""
    op = copy.deepcopy(op)
    gates = torch.zeros(len(op), dtype=x.dtype, requires_grad=True)
    (sum(gates[i] * op.candidates[i](x) for i in gated) * grad_output).sum().backward()
    alpha = op.alpha.detach()[gated].requires_grad_()
    torch.softmax(alpha, 0).backward(gates.grad[gated])
    grad_alpha = torch.zeros(len(op), dtype=x.dtype)
    grad_alpha[gated] = alpha.grad
    return gates.grad, grad_alpha


@pytest.mark.parametrize("active", range(4))
def test_full_gradient_is_the_definition(active):
    op = mixed()
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    expected = gates_by_autograd(op, x.detach(), g, [0, 1, 2, 3])[1]
    alone = copy.deepcopy(op)
    op.activate(active, mode="full")
    y = op(x)
    y.backward(g)
    torch.testing.assert_close(op.alpha.grad, expected)
    # The output and dL/dx are the active candidate's, as if it were alone.
    x2 = x.detach().requires_grad_()
    y2 = alone.candidates[active](x2)
    y2.backward(g)
    assert torch.equal(y, y2) and torch.equal(x.grad, x2.grad)
    if active == 3:
        assert torch.equal(x.grad, torch.zeros_like(x)) and op.alpha.grad.abs().min() > 0


@pytest.mark.parametrize("active, partner", [(0, 1), (2, 3), (3, 1)])
def test_two_touches_the_pair_alone(active, partner):
    op = mixed()
    x, g = torch.randn(2, 2, 6, 5, 5, dtype=torch.float64)
    expected = gates_by_autograd(op, x, g, [active, partner])[1]
    ran = count_runs(op)
    op.activate(active, mode="two", partner=partner)
    op(x).backward(g)
    torch.testing.assert_close(op.alpha.grad, expected)
    assert ran == [active] + ([partner] if op.names[partner] != "Zero" else [])
    others = [i for i in range(4) if i not in (active, partner)]
    assert op.alpha.grad[others].abs().max() == 0


def test_gate_probabilities_of_a_pair_are_differentiable():
    op = mixed()
    op.activate(1, mode="two", partner=2)
    p = op.gate_probabilities()
    torch.testing.assert_close(p[[1, 2]], torch.softmax(op.alpha.detach()[[1, 2]], 0))
    assert p[[0, 3]].abs().sum() == 0
    p[1].backward()
    assert op.alpha.grad[1] > 0 and op.alpha.grad[2] == -op.alpha.grad[1] and op.alpha.grad[0] == 0


def test_rescale_keeps_the_pair_s_mass():
    net = nn.Sequential(mixed(), mixed())
    net[1].label = "second"
    pf.sample(net, "two", torch.Generator().manual_seed(3))
    before = [op.alpha.detach().clone() for op in net]
    optimizer = torch.optim.SGD(pf.arch_parameters(net), lr=0.3)
    net(torch.randn(2, 6, 5, 5, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    moved = [op.alpha.detach().clone() for op in net]
    pf.rescale(net)
    for op, old, new in zip(net, before, moved, strict=True):
        pair = [op.active, op.partner]
        torch.testing.assert_close(op.alpha.detach()[pair].exp().sum(), old[pair].exp().sum())
        torch.testing.assert_close(op.alpha[pair].diff(), new[pair].diff())
        assert not torch.allclose(op.alpha.detach()[pair], old[pair])
        # The mass of the pair within the whole softmax is what it was, so the others keep their probabilities.
        others = [i for i in range(4) if i not in pair]
        torch.testing.assert_close(op.probabilities()[others], torch.softmax(old, 0)[others])


def count_runs(op):
    ran = []
    for i, module in enumerate(op.candidates):
        module.register_forward_hook(lambda *_, i=i: ran.append(i))
    return ran


def test_a_weight_step_runs_the_active_path_alone():
    op = mixed()
    ran = count_runs(op)
    op.activate("5x5_MBConv6")
    op(torch.randn(2, 6, 5, 5, dtype=torch.float64)).sum().backward()
    assert ran == [1]
    assert op.alpha.grad is None
    for i, module in enumerate(op.candidates):
        assert all((p.grad is not None) == (i == 1) for p in module.parameters())


def test_probes_run_once_each_without_autograd_and_move_their_statistics():
    op = mixed()
    grad_modes = []
    for module in op.candidates:
        module.register_forward_hook(lambda *_: grad_modes.append(torch.is_grad_enabled()))
    before = [{k: v.clone() for k, v in module.state_dict().items()} for module in op.candidates]
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    op.activate(0, mode="full")
    loss = op(x).sum()
    assert grad_modes == [True]
    loss.backward()
    assert grad_modes == [True, False, False]
    for module, old in zip(op.candidates, before, strict=True):
        alone = copy.deepcopy(module)
        alone.load_state_dict(old)
        alone(x)
        for key, value in alone.state_dict().items():
            torch.testing.assert_close(module.state_dict()[key], value)
        if old:
            assert module.state_dict()["point_linear.bn.num_batches_tracked"] == 1


def test_alpha_gradient_adds_up_with_other_terms_of_the_loss():
    op = mixed()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    times = torch.tensor([1.0, 2.0, 0.5, 0.0], dtype=torch.float64)

    def gradient(*terms):
        clone = copy.deepcopy(op)
        clone.activate(1, mode="full")
        loss = 0
        if "task" in terms:
            loss = loss + clone(x).square().sum()
        if "latency" in terms:
            loss = loss + (clone.gate_probabilities() * times).sum()
        loss.backward()
        return clone.alpha.grad

    torch.testing.assert_close(gradient("task", "latency"), gradient("task") + gradient("latency"))


class Structured(nn.Module):
    """Takes positional, keyword, tuple and dict arguments; gives a dict of a tensor, a tuple and an integer tensor."""

    def __init__(self, scale):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(float(scale), dtype=torch.float64))

    def forward(self, pair, *, extra, times=1):
        a, b = pair
        y = self.weight * (a + extra["c"]) * times
        return {"y": y, "more": (y * b, torch.arange(3))}


def test_structured_inputs_and_outputs():
    op = pf.MixedOp([Structured(2), Structured(-3)]).double()
    a, b, c = torch.randn(3, 4, dtype=torch.float64)
    op.activate("1", mode="full")
    out = op((a, b), extra={"c": c}, times=2)
    assert out["more"][1].tolist() == [0, 1, 2]
    (out["y"].sum() + out["more"][0].square().sum()).backward()

    weights = [2.0, -3.0]
    base = 2 * (a + c)
    grad_y = 1 + 2 * (weights[1] * base * b) * b
    gates = torch.stack([(grad_y * w * base).sum() for w in weights])
    p = torch.tensor([0.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(op.alpha.grad, p * (gates - (p * gates).sum()))


def test_zero_beside_tuples():
    op = pf.MixedOp({"id": pf.Identity(), "zero": pf.Zero()})
    pair = (torch.randn(3, requires_grad=True), torch.randn(2))
    op.activate("zero", mode="full")
    first, second = op(pair)
    assert first.abs().sum() == 0 and second.shape == (2,)
    (first.sum() + second.sum()).backward()
    gate = (pair[0].sum() + pair[1].sum()).detach()
    torch.testing.assert_close(op.alpha.grad, torch.stack([gate / 4, -gate / 4]))
    assert torch.equal(pair[0].grad, torch.zeros(3))


def test_nested_mixed_ops():
    inner = pf.MixedOp({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}, label="inner")
    outer = pf.MixedOp({"plain": nn.Linear(3, 3), "nest": nn.Sequential(inner, nn.Linear(3, 3))}, label="outer")
    net = nn.Sequential(outer).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    outer.activate("nest", mode="full")
    inner.activate("b", mode="full")
    net(x).square().sum().backward()
    assert outer.alpha.grad.abs().sum() > 0 and inner.alpha.grad.abs().sum() > 0
    inner.alpha.grad = None
    outer.activate("plain", mode="full")  # the nested op is probed without autograd
    net(x).square().sum().backward()
    assert inner.alpha.grad is None
    assert list(pf.mixed_ops(net)) == ["outer", "inner"]
    with torch.no_grad():
        outer.alpha.copy_(torch.tensor([0.0, 1.0]))
        inner.alpha.copy_(torch.tensor([0.0, 1.0]))
    derived = pf.derive(net)
    assert not pf.mixed_ops(derived)
    torch.testing.assert_close(derived(x), outer.candidates[1][1](inner.candidates[1](x)))


def test_sum_and_softmax_modes():
    op = mixed()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    outputs = [copy.deepcopy(c)(x) for c in op.candidates]
    op.activate(mode="sum")
    torch.testing.assert_close(op(x), sum(outputs))
    op.activate(mode="softmax")
    p = op.probabilities().detach()
    torch.testing.assert_close(op(x), sum(w * o for w, o in zip(p, outputs, strict=True)))
    op(x).square().sum().backward()
    assert op.alpha.grad.abs().sum() > 0


def test_two_supernets_in_two_modes_do_not_disturb_each_other():
    a, b = mixed(), mixed()
    pf.sample(a, "full", torch.Generator().manual_seed(0))
    pf.sample(b, "path", torch.Generator().manual_seed(0))
    assert (a.mode, b.mode) == ("full", "path")
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    (a(x) + b(x)).sum().backward()
    assert a.alpha.grad is not None and b.alpha.grad is None


def test_changing_the_output_in_place_is_an_error_not_a_wrong_gradient():
    op = mixed()
    op.activate(0, mode="full")
    y = op(torch.randn(2, 6, 5, 5, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"inplace|in-place|in place"):
        y.mul_(2)
        y.sum().backward()


def test_no_grad_and_frozen_alpha_probe_nothing():
    op = mixed()
    ran = count_runs(op)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    op.activate(0, mode="full")
    with torch.no_grad():
        op(x)
    op.alpha.requires_grad_(False)
    op(x).sum().backward()
    assert ran == [0, 0]


def test_pruned_candidates_are_neither_sampled_nor_probed():
    op = mixed()
    with torch.no_grad():
        op.alpha.copy_(torch.tensor([2.0, 0.0, -9.0, 1.0]))
    assert op.prune(0.01) == ["3x3_MBConv1"]
    ran = count_runs(op)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(60):
        seen |= set(pf.sample(op, "full", generator).values())
    assert seen == {0, 1, 3}
    optimizer = torch.optim.Adam(pf.arch_parameters(op), lr=0.1, betas=(0.0, 0.999))
    op(torch.randn(2, 6, 5, 5, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    assert 2 not in ran and op.pruned.tolist() == [False, False, True, False] and op.alpha.isfinite().all()
    for _ in range(30):
        pf.sample(op, "two", generator)
        assert 2 not in (op.active, op.partner)
    op.prune(1.0)
    pf.sample(op, "two", generator)
    assert op.partner is None and list(op.gated_indices) == [op.active] == [op.most_likely]
    op(torch.randn(2, 6, 5, 5, dtype=torch.float64)).sum().backward()
    pf.rescale(op)


@pytest.mark.parametrize("mode", ["path", "full"])
def test_copies_round_trip(mode):
    op = mixed()
    pf.sample(op, mode)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    for clone in (copy.deepcopy(op), pickle.loads(pickle.dumps(op))):
        assert (clone.active, clone.mode, clone.names, clone.label) == (op.active, op.mode, op.names, op.label)
        assert torch.equal(copy.deepcopy(clone)(x), copy.deepcopy(op)(x))
    other = mixed()
    other.load_state_dict(op.state_dict())
    assert torch.equal(other.alpha, op.alpha)
    other.activate(op.active)
    assert torch.equal(other(x), copy.deepcopy(op)(x))


def test_derive_leaves_the_supernet_and_every_trace_of_nas_behind():
    net = pf.spaces.small(resolution=8)
    with torch.no_grad():
        for alpha in pf.arch_parameters(net):
            alpha.copy_(torch.randn_like(alpha))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    derived = pf.derive(net)
    assert not any(isinstance(m, pf.MixedOp) for m in derived.modules())
    assert not any("alpha" in name or "candidates" in name for name in derived.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    x = torch.randn(3, 1, 8, 8)
    pf.activate_most_likely(net)
    assert torch.equal(derived(x), copy.deepcopy(net)(x))
    mine = {id(p) for p in net.parameters()}
    assert not any(id(p) in mine for p in derived.parameters())
    fixed = pf.derive(net, {"blocks.2": 0})
    assert fixed.blocks[2].mobile_inverted_conv.name == "3x3_MBConv3"


def test_derive_breaks_ties_towards_the_lower_index():
    op = pf.MixedOp([nn.Linear(2, 2), nn.ReLU(), nn.ReLU()])
    assert isinstance(pf.derive(op), nn.Linear)


@pytest.mark.parametrize("mode", ["path", "full", "two"])
def test_torch_compile_of_the_surrounding_net(mode):
    op = pf.MixedOp([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)], label="op")
    net = nn.Sequential(nn.Linear(4, 4), op, nn.ReLU(), nn.Linear(4, 2)).double()
    compiled = torch.compile(net, backend="eager")
    x = torch.randn(5, 4, dtype=torch.float64)
    for seed in range(3):
        pf.sample(net, mode, torch.Generator().manual_seed(seed))
        net.zero_grad()
        expected = net(x)
        expected.square().sum().backward()
        grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
        net.zero_grad()
        compiled(x).square().sum().backward()
        for p, g in zip(net.parameters(), grads, strict=True):
            assert (p.grad is None) == (g is None)
            if g is not None:
                torch.testing.assert_close(p.grad, g)


def test_autocast_reaches_the_probes():
    dtypes = []
    op = pf.MixedOp([nn.Linear(4, 4), nn.Linear(4, 4)])
    for module in op.candidates:
        module.register_forward_hook(lambda _m, _i, out: dtypes.append(out.dtype))
    op.activate(0, mode="full")
    with torch.autocast("cpu", torch.bfloat16):
        y = op(torch.randn(3, 4))
    y.float().sum().backward()
    assert dtypes == [torch.bfloat16, torch.bfloat16] and op.alpha.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "error, call",
    [
        (ValueError, lambda op: pf.MixedOp({})),
        (ValueError, lambda op: pf.MixedOp([3])),
        (KeyError, lambda op: op.activate("9x9_MBConv6")),
        (IndexError, lambda op: op.activate(4)),
        (IndexError, lambda op: op.activate(-1)),
        (ValueError, lambda op: op.activate(0, mode="half")),
        (ValueError, lambda op: op.activate(None)),
        (ValueError, lambda op: op.activate(0, mode="two")),
        (ValueError, lambda op: op.activate(0, mode="two", partner=0)),
        (ValueError, lambda op: op.activate(0, mode="path", partner=1)),
        (ValueError, lambda op: pf.sample(op, "softmax")),
        (ValueError, lambda op: pf.sample(nn.Linear(2, 2))),
        (ValueError, lambda op: pf.mixed_ops(nn.Sequential(op, copy.deepcopy(op)))),
        (KeyError, lambda op: pf.derive(op, {"nowhere": 0})),
    ],
)
def test_wrong_arguments(error, call):
    with pytest.raises(error):
        call(mixed())


def test_outputs_of_different_shapes_are_named():
    op = pf.MixedOp({"a": nn.Linear(2, 3), "b": nn.Linear(2, 4)})
    op.activate("a", mode="full")
    with pytest.raises(ValueError, match=r"'b'.*\(5, 3\).*\(5, 4\)"):
        op(torch.randn(5, 2)).sum().backward()


def test_a_probed_weight_that_changes_before_backward_raises():
    op = pf.MixedOp([pf.MBConv(4, 4, 3), pf.MBConv(4, 4, 5), nn.Conv2d(4, 4, 1)])
    x = torch.randn(2, 4, 6, 6)
    for change in (
        lambda: op.candidates[1].depth_conv.conv.weight.mul_(2),
        lambda: op.candidates[2].weight.add_(1),
        lambda: setattr(op.candidates[2], "weight", nn.Parameter(torch.zeros(4, 4, 1, 1))),
    ):
        op.activate(0, "full")
        loss = op(x).sum()
        with torch.no_grad():
            change()
        with pytest.raises(RuntimeError, match=r"a weight of candidate '[12]' was changed or replaced"):
            loss.backward()
    op(x).sum().backward()
    assert op.alpha.grad is not None
