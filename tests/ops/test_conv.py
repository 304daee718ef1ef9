"""A convolution with its norm and activation against float64 truth: at most twice the error of eager float32."""

import pytest
import torch

import proxyless_fast as pf
from proxyless_fast.ops.activation import ACTIVATIONS
from proxyless_fast.ops.conv import can_run_conv_norm_act, conv_norm_act, conv_norm_act_reference

ops = torch.ops.proxyless_fast


def randn(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


# name: x, output channels, kernel, stride
CASES = {
    "stem": (last(randn(3, 3, 32, 40)), 32, 3, 2),
    "contiguous, odd sizes": (randn(2, 3, 17, 23), 24, 3, 2),
    "wide row": (randn(1, 1, 3, 300), 5, 5, 1),
    "kernel 7 of one channel": (randn(2, 1, 15, 14), 20, 7, 3),
    "pointwise": (randn(2, 40, 5, 6), 17, 1, 1),
    "kernel above the image": (randn(4, 2, 2, 3), 8, 5, 2),
    "one image": (randn(1, 3, 8, 8), 16, 3, 1),
    "sliced": (randn(2, 9, 20, 22)[:, 2:5, 1:17:2], 33, 3, 2),
    "far mean": (randn(2, 3, 24, 24) + 100, 16, 3, 2),
    "constant channel": (torch.cat([randn(2, 2, 9, 9), torch.full((2, 1, 9, 9), 3.0)], 1), 12, 3, 1),
}


def parameters(x, co, k):
    """Weight, gamma, beta, and running statistics as training on such data leaves them."""
    values = [randn(co, x.shape[1], k, k, seed=5) * 0.3, randn(co, seed=6).abs() + 0.5, randn(co, seed=7)]
    y = torch.nn.functional.conv2d(x.double(), values[0].double(), padding=k // 2).transpose(0, 1).flatten(1)
    std = y.std(1).clamp_min(0.1)
    values += [y.mean(1) + 0.3 * std * randn(co, seed=8), std**2 * (randn(co, seed=9).abs() + 0.5)]
    return [v.float().to(x.dtype) for v in values]


def run(function, x, co, k, stride, activation, training, grad):
    *values, mean, var = parameters(x, co, k)
    leaves = [v.clone().requires_grad_() for v in values]
    y = function(x, *leaves, mean, var, stride, activation, training)
    y.backward(grad.to(y.dtype))
    names = ("weight", "gamma", "beta")
    return {"y": y.detach(), "mean": mean, "var": var, **{n: v.grad for n, v in zip(names, leaves, strict=True)}}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", CASES)
def test_as_exact_as_eager(name, activation, training):
    x, co, k, stride = CASES[name]
    shape = conv_norm_act_reference(x, *parameters(x, co, k), stride).shape
    grad = randn(*shape, seed=11)
    truth = run(conv_norm_act_reference, x.double(), co, k, stride, activation, training, grad)
    eager = run(conv_norm_act_reference, x, co, k, stride, activation, training, grad)
    ours = run(conv_norm_act, x, co, k, stride, activation, training, grad)
    assert ours["y"].is_contiguous(memory_format=torch.channels_last)
    for key, expected in truth.items():
        scale = expected.norm().clamp_min(1e-30)
        error = (ours[key].double() - expected).norm() / scale
        assert error <= 2 * (eager[key].double() - expected).norm() / scale + 6e-7, key  # 5 units in the last place
    ours = run(conv_norm_act, x.double(), co, k, stride, activation, training, grad)
    for key, expected in truth.items():
        torch.testing.assert_close(ours[key], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["silu", "hardswish", "identity"])
def test_gradcheck(activation, training):
    x = randn(2, 2, 5, 4).double()
    *values, mean, var = parameters(x, 5, 3)

    def function(weight, gamma, beta):
        return conv_norm_act(x, weight, gamma, beta, mean.clone(), var.clone(), 2, activation, training)

    assert torch.autograd.gradcheck(function, [v.requires_grad_() for v in values])


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_opcheck(training):
    x, co, k, stride = CASES["contiguous, odd sizes"]
    *values, mean, var = parameters(x, co, k)
    leaves = [v.requires_grad_() for v in values]
    arguments = (x, *leaves, [mean, var], stride, "relu6", training, 1e-3)
    torch.library.opcheck(ops.conv_norm_act.default, arguments, rtol=1e-4, atol=1e-5)


def test_bits_do_not_depend_on_threads():
    x, co, k, stride = CASES["stem"]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run(conv_norm_act, x, co, k, stride, "relu6", True, randn(3, co, 16, 20)))
    finally:
        torch.set_num_threads(before)
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


def test_scratch_memory_is_written_before_it_is_read():
    x, co, k, stride = CASES["sliced"]
    grad = randn(2, co, 4, 11)
    clean = run(conv_norm_act, x, co, k, stride, "relu6", True, grad)
    torch.use_deterministic_algorithms(True)  # with torch.utils.deterministic.fill_uninitialized_memory, on by default
    try:
        poisoned = run(conv_norm_act, x, co, k, stride, "relu6", True, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in clean.items():
        assert torch.equal(poisoned[name], value), name


def test_what_is_kept():
    x = last(randn(4, 3, 32, 32))
    layer = pf.blocks.ConvLayer(3, 16, 3, 2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x).sum().backward()
    assert sum(t.numel() for t in kept if t.numel() >= x.numel()) == x.numel()


def test_layer_takes_it_and_says_when_not():
    layer, x = pf.blocks.ConvLayer(3, 16, 3, 2), last(randn(4, 3, 16, 16))
    reference = pf.blocks.ConvLayer(3, 16, 3, 2)
    reference.load_state_dict(layer.state_dict())
    reference.policy = "off"
    for _ in range(2):
        torch.testing.assert_close(layer(x), reference(x), rtol=1e-4, atol=1e-5)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    ok, reason = can_run_conv_norm_act(x.requires_grad_(), layer.conv.weight)
    assert not ok and "gradient" in reason
    layer(x).sum().backward()  # with a gradient for x the layer runs as torch's own convolution
    assert x.grad is not None
    ok, reason = can_run_conv_norm_act(x.detach(), torch.zeros(8, 3, 5, 5))
    assert not ok and "75 inputs" in reason


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(3, 4)},
        {"weight": torch.zeros(4, 3, 3, 3)},
        {"gamma": torch.zeros(3)},
        {"activation": "gelu"},
        {"stride": 0},
        {"x": torch.zeros(1, 2, 1, 1)},
        {"x": torch.zeros(2, 2, 3, 3, requires_grad=True)},
    ],
)
def test_wrong_arguments(change):
    arguments = dict(x=randn(2, 2, 3, 3), weight=torch.ones(4, 2, 3, 3), gamma=torch.ones(4), beta=torch.zeros(4))
    arguments |= dict(running_mean=None, running_var=None, activation="relu6")
    with pytest.raises(ValueError, match="conv_norm_act: "):
        conv_norm_act(**{**arguments, **change})
