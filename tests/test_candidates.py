"""The candidate protocol, by a candidate that is none of ours: what it offers is used, and is exact."""

import pytest
import torch
from torch import Tensor, nn

import proxyless_fast as pf
from proxyless_fast.candidates import GateTerm, offered
from tests.test_cuda_graphs import Again


def probe_scales(factors, args, kwargs, grads, shared=None):
    """<G, s x> = s <G, x>: all candidates of a layer need one product."""
    ((x,), (grad,)) = args, grads
    Scale.calls.append(("probe", len(factors), shared is not None))
    dot = (grad * x).sum()
    return [by.detach() * dot for by in factors]


def _by_input(grad: Tensor, tensors) -> Tensor:
    x, by = tensors
    return by * (grad * x).sum()


class Scale(nn.Module):
    """x times a weight."""

    calls: list = []  # noqa: RUF012  (emptied by the fixture)

    def __init__(self, by: float):
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        Scale.calls.append("forward")
        return self.by * x

    def with_shortcut(self, x: Tensor) -> Tensor:
        Scale.calls.append("with_shortcut")
        return (self.by + 1) * x

    def run_gated(self, x: Tensor, shortcut: bool = False) -> tuple[Tensor, GateTerm]:
        Scale.calls.append("run_gated")
        out = (self.by + 1) * x if shortcut else self.by * x
        return out, GateTerm((x.detach(), self.by.detach()), _by_input, shared="of the input")

    def probe_plan(self, x: Tensor):
        return self.by, (self.by,)

    joint_probe = staticmethod(probe_scales)

    def why_not_recorded(self, x: Tensor) -> str:
        return "" if self.by.requires_grad or x.requires_grad else "nothing to do"


class Louder(Scale):
    """A forward of its own, for which nothing of what Scale offers holds."""

    def forward(self, x: Tensor) -> Tensor:
        return 10 * self.by * x


class Squared(Louder):
    """A forward of its own, with an offer of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.by * x * x

    def with_shortcut(self, x: Tensor) -> Tensor:
        Scale.calls.append("squared with_shortcut")
        return self.by * x * x + x


@pytest.fixture(autouse=True)
def calls():
    Scale.calls.clear()
    return Scale.calls


def gradients(op, x, grad, shortcut):
    """(output, dx, gradient of alpha, of the candidates' weights), by the op or by the definition."""
    x = x.clone().requires_grad_()
    out = pf.blocks.ResidualBlock(op, shortcut)(x)
    parameters = [op.alpha, *(c.by for c in op.candidates)]
    found = torch.autograd.grad(out, [x, *parameters], grad, allow_unused=True)
    return out.detach(), *found


def by_definition(op, x, grad, shortcut):
    """d/dalpha of <grad, sum_j g_j o_j> at one-hot g (paper eq. 4), and the active path's own gradients."""
    x = x.clone().requires_grad_()
    outputs = [nn.Module.__call__(candidate, x) for candidate in op.candidates]
    out = outputs[op.active] + (x if shortcut else 0)
    parameters = [c.by for c in op.candidates]
    dx, *dw = torch.autograd.grad(out, [x, *parameters], grad, allow_unused=True, retain_graph=True)
    dots = torch.stack([(grad * o).sum() for o in outputs]).detach()
    p = torch.softmax(op.alpha.detach(), 0)
    return out.detach(), dx, p * (dots - (p * dots).sum()), *dw


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("active", [0, 2, 3])
def test_gates_are_those_of_the_definition(active, shortcut):
    op = pf.MixedOp([Scale(0.5), Scale(-2.0), Scale(3.0), Louder(0.7), Squared(1.5)]).double()
    op.alpha.data = torch.tensor([0.3, -0.2, 0.1, 0.5, 0.0], dtype=torch.float64)
    x, grad = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    op.activate(active, "full")
    for ours, expected in zip(gradients(op, x, grad, shortcut), by_definition(op, x, grad, shortcut), strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_an_offered_probe_is_one_call_for_all_that_offer_it(calls):
    op = pf.MixedOp([Scale(0.5), Scale(-2.0), Scale(3.0), Louder(0.7), pf.Zero()]).double()
    op.activate(0, "full")
    op(torch.randn(3, 4, dtype=torch.float64)).sum().backward()
    assert calls == ["run_gated", ("probe", 2, True)]  # Louder was run by itself, Zero not at all
    calls.clear()
    op.activate(3, "full")
    op(torch.randn(3, 4, dtype=torch.float64)).sum().backward()
    assert calls == [("probe", 3, False)]  # what Louder might share is not of their kind


def test_the_shortcut_is_left_to_who_offers_it(calls):
    op = pf.MixedOp([Scale(0.5), Louder(0.7), Squared(1.5)]).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    for active, said in ((0, ["with_shortcut"]), (1, []), (2, ["squared with_shortcut"])):
        calls.clear()
        op.activate(active)
        torch.testing.assert_close(pf.blocks.ResidualBlock(op, True)(x), op.candidates[active].forward(x) + x)
        assert [call for call in calls if call != "forward"] == said


@pytest.mark.parametrize("how", ["subclass", "hook", "replaced forward"])
def test_an_offer_for_another_forward_is_passed_over(how, calls):
    scale = Louder(2.0) if how == "subclass" else Scale(2.0)
    if how == "hook":
        scale.register_forward_hook(lambda module, args, output: 10 * output)
    elif how == "replaced forward":
        scale.forward = lambda x: 10 * scale.by * x
    assert all(offered(scale, name) is None for name in ("with_shortcut", "run_gated", "joint_probe"))
    op = pf.MixedOp([pf.Identity(), scale]).double()
    op.alpha.data.zero_()
    x = torch.randn(5, dtype=torch.float64)
    op.activate(0, "full")
    op(x).sum().backward()
    identity, louder = x.sum(), 20 * x.sum()
    torch.testing.assert_close(op.alpha.grad, 0.25 * torch.stack([identity - louder, louder - identity]))


def test_an_offered_recording_is_replayed():
    plain, op = (pf.MixedOp([Scale(0.5), Scale(-2.0)]).double() for _ in range(2))
    recorder = Again()
    pf.set_graphs(op, recorder=recorder)
    for step in range(4):
        x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for net in (plain, op):
            net.zero_grad()
            net.activate(step % 2, "full")
            net(x.clone().requires_grad_()).square().sum().backward()
        torch.testing.assert_close(op.alpha.grad, plain.alpha.grad)
    assert recorder.recorded == 4 and recorder.replayed == 8  # forward and backward of two paths, each twice
