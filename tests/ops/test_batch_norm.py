"""Batch norm with its activation against float64 truth: at most twice the error of eager float32."""

import pytest
import torch

from proxyless_fast.ops.activation import ACTIVATIONS
from proxyless_fast.ops.batch_norm import (
    batch_norm_act,
    batch_norm_act_reference,
    norm_dot,
    norm_dot_reference,
)

ops = torch.ops.proxyless_fast


def sample_inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    yield "contiguous", randn(3, 7, 5, 6) * 3
    yield "channels_last", (randn(2, 33, 7, 5) * 3).contiguous(memory_format=torch.channels_last)
    yield "sliced", randn(2, 40, 9, 11)[:, 3:20, 1:8:2]
    yield "one image", randn(1, 16, 4, 4) * 3
    yield "far mean", randn(4, 12, 8, 8) + 100
    yield "constant channel", torch.cat([randn(2, 3, 4, 4), torch.full((2, 1, 4, 4), 3.0, dtype=dtype)], 1)


CASES = dict(sample_inputs())


def parameters(x):
    c = x.shape[1]
    generator = torch.Generator().manual_seed(5)
    values = [torch.rand(c, generator=generator) + 0.5, torch.randn(c, generator=generator)]
    values += [torch.randn(c, generator=generator), torch.rand(c, generator=generator) + 0.5]
    return [v.to(x.dtype) for v in values]


def run(function, x, g, activation, training):
    weight, bias, mean, var = parameters(x)
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    leaves[0] = x.detach().requires_grad_()
    y = function(*leaves, mean, var, activation, training)
    y.backward(g)
    return {"y": y.detach(), "x": leaves[0].grad, "w": leaves[1].grad, "b": leaves[2].grad, "mean": mean, "var": var}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", CASES)
def test_as_exact_as_eager(name, activation, training):
    x = CASES[name]
    g = torch.randn(x.shape)
    truth = run(batch_norm_act_reference, x.double(), g.double(), activation, training)
    eager = run(batch_norm_act_reference, x, g, activation, training)
    ours = run(batch_norm_act, x, g, activation, training)
    for key, expected in truth.items():
        scale = expected.norm().clamp_min(1e-30)
        error = (ours[key].double() - expected).norm() / scale
        assert error <= 2 * (eager[key].double() - expected).norm() / scale + 3e-7, key
    ours = run(batch_norm_act, x.double(), g.double(), activation, training)
    for key, expected in truth.items():
        torch.testing.assert_close(ours[key], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["silu", "hardswish", "identity"])
def test_gradcheck(activation, training):
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    weight, bias, mean, var = parameters(x)

    def function(x, weight, bias):
        return batch_norm_act(x, weight, bias, mean.clone(), var.clone(), activation, training)

    assert torch.autograd.gradcheck(function, (x, weight.requires_grad_(), bias.requires_grad_()))


@pytest.mark.slow
def test_opcheck():
    for _, x in sample_inputs():
        weight, bias, mean, var = (t.requires_grad_(i < 2) for i, t in enumerate(parameters(x)))
        x = x.detach().requires_grad_()
        torch.library.opcheck(
            ops.batch_norm_act.default, (x, weight, bias, [mean, var], "relu6", True, 1e-3), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", CASES)
def test_norm_dot(name):
    y = CASES[name]
    weight, bias, _, _ = parameters(y)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    statistics = torch.cat(
        [torch.zeros(4), y.double().mean((0, 2, 3)), y.double().var((0, 2, 3), correction=0)]
    ).double()
    truth = norm_dot_reference(*(t.double() for t in (grad, y, statistics, weight, bias)), 1e-3)
    eager = norm_dot_reference(grad, y, statistics, weight, bias, 1e-3)
    ours = norm_dot(grad, y, statistics, weight, bias, 1e-3)
    rounding = 1e-7 * (grad.abs().sum() * weight.abs().max()).double()
    assert (ours - truth).abs() <= 2 * (eager - truth).abs() + rounding
    exact = norm_dot(grad.double(), y.double(), statistics, weight.double(), bias.double(), 1e-3)
    torch.testing.assert_close(exact, truth, rtol=1e-9, atol=1e-10)
    torch.library.opcheck(ops.norm_dot.default, (grad, y, statistics, weight, bias, 1e-3))


@pytest.mark.parametrize("change", [{"grad": torch.zeros(2, 4, 3, 2)}, {"statistics": torch.zeros(8)}])
def test_norm_dot_wrong_arguments(change):
    y = torch.randn(2, 4, 3, 3)
    arguments = dict(
        grad=y, y=y, statistics=torch.zeros(8).double(), gamma=torch.ones(4), beta=torch.zeros(4), eps=1e-3
    )
    with pytest.raises(ValueError, match="norm_dot: "):
        norm_dot(**{**arguments, **change})


def test_bits_do_not_depend_on_threads():
    x = torch.randn(8, 24, 60, 60)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run(batch_norm_act, x, torch.ones_like(x), "relu6", True))
    finally:
        torch.set_num_threads(before)
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


@pytest.mark.parametrize(
    "change",
    [{"x": torch.zeros(3, 4)}, {"weight": torch.zeros(3)}, {"activation": "gelu"}, {"x": torch.zeros(1, 4, 1, 1)}],
)
def test_wrong_arguments(change):
    arguments = dict(x=torch.randn(2, 4, 3, 3), weight=torch.ones(4), bias=torch.zeros(4))
    arguments |= dict(running_mean=None, running_var=None, activation="relu6")
    with pytest.raises(ValueError, match="batch_norm_act: "):
        batch_norm_act(**{**arguments, **change})
