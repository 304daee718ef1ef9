"""The composed MBConv, interpreted, against float64: at most twice the error of eager PyTorch in the same dtype."""

import math

import pytest
import torch

from proxyless_fast.ops.batch_norm import norm_dot_reference
from proxyless_fast.ops.gpu.host import depthwise, mbconv, ops, probe, project, stencils
from proxyless_fast.ops.gpu.host.first_norm import gram_rows
from proxyless_fast.ops.gpu.host.group import rows_of
from proxyless_fast.ops.mbconv import mbconv_reference
from tests.ops.gpu.interpreted.test_kernels import few_programs  # noqa: F401  (a fixture)

FLOOR = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}

#        batch, in, out, height, width, kernel, stride, expand, activation
SHAPES = [
    (2, 6, 5, 9, 9, 5, 2, 3, "relu6"),
    (1, 8, 8, 7, 5, 7, 1, 6, "relu6"),
    (3, 16, 24, 6, 8, 3, 2, 6, "silu"),
    (2, 5, 7, 6, 5, 3, 1, 1, "relu6"),
    (1, 24, 24, 5, 4, 3, 1, 6, "hardswish"),
    (1, 48, 40, 4, 5, 3, 1, 6, "relu"),
    (1, 70, 20, 3, 3, 3, 2, 4, "identity"),
]
NAMES = ["w1", "g1", "b1", "wd", "g2", "b2", "wp", "g3", "b3"]


def inputs(shape, dtype, mean=0.0):
    b, ci, co, h, w, k, s, e, _ = shape
    generator = torch.Generator().manual_seed(sum(shape[:8]))

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def gain(c):
        return torch.rand(c, generator=generator, dtype=torch.float64) + 0.5

    ch = ci * e
    params = [randn(ch, ci, 1, 1) / math.sqrt(ci), gain(ch), randn(ch)] if e > 1 else []
    params += [randn(ch, 1, k, k) / k, gain(ch), randn(ch), randn(co, ch, 1, 1) / math.sqrt(ch), gain(co), randn(co)]
    x = randn(b, ci, h, w) + mean
    grad = randn(b, co, (h - 1) // s + 1, (w - 1) // s + 1)
    return x.to(dtype), grad.to(dtype), [p.to(dtype) for p in params]


def running_of(params, dtype):
    return [t for p in params[1::3] for t in (torch.zeros(p.numel(), dtype=dtype), torch.ones(p.numel(), dtype=dtype))]


def eager(x, grad, params, shape, dtype, training, running=()):
    """(output, dx, gradients of params, gate) by autograd in `dtype`."""
    x, grad = x.to(dtype).requires_grad_(), grad.to(dtype)
    params = [p.to(dtype).requires_grad_() for p in params]
    out = mbconv_reference(x, params, running, stride=shape[6], activation=shape[8], training=training, eps=1e-3)
    grads = torch.autograd.grad(out, [x, *params], grad)
    gate = (out.detach().double() * grad.double()).sum()
    return [out.detach(), *grads, gate]


def ours(x, grad, params, shape, training, policy, running=()):
    stride, activation = shape[6], shape[8]
    mean = cov = None
    if training and len(params) == 9:
        mean, cov = gram_rows(rows_of(x))
    keep = {"lean": 1, "fast": 2}[policy]
    out, y, d, statistics = ops.mbconv(x, params, running, mean, cov, stride, activation, training, 1e-3, keep)
    dx, dparams = ops.mbconv_backward(
        grad, x, y, d, statistics, params, mean, cov, stride, activation, training, 1e-3, True, True
    )
    gate = ops.mbconv_probe(
        x, grad, params, list(running), [len(params)], mean, cov, stride, activation, training, 0.1, 1e-3
    )
    return [out, dx, *dparams, gate[0]]


def check(x, grad, params, shape, dtype, training, policy, running=()):
    exact = [r.double() for r in running]
    truth = eager(x, grad, params, shape, torch.float64, training, [r.clone() for r in exact])
    peer = eager(x, grad, params, shape, dtype, training, [r.clone() for r in running])
    names = ["out", "dx", *NAMES[-len(params) :], "gate"]
    for name, a, b, t in zip(names, ours(x, grad, params, shape, training, policy, running), peer, truth, strict=True):
        assert a.shape == t.shape, name
        scale = (truth[0] * grad.double()).norm() if name == "gate" else t.norm()
        error, allowed = ((v.double() - t).norm() / scale for v in (a, b))
        assert error <= 2 * allowed + FLOOR[dtype], f"d{name}: {error:.2e}, eager {allowed:.2e}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_in_float32(shape):
    check(*inputs(shape, torch.float32), shape, torch.float32, True, "fast")


@pytest.mark.parametrize(
    "shape, dtype",
    [
        (SHAPES[0], torch.bfloat16),
        (SHAPES[2], torch.bfloat16),
        (SHAPES[5], torch.bfloat16),
        (SHAPES[0], torch.float16),
        (SHAPES[2], torch.float16),
    ],
    ids=str,
)
def test_training_in_half_precision(shape, dtype):
    check(*inputs(shape, dtype), shape, dtype, True, "lean")


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[5]], ids=str)
def test_reductions_over_several_programs_and_tiles(shape, few_programs):  # noqa: F811
    shape = (2, *shape[1:])
    check(*inputs(shape, torch.float32), shape, torch.float32, True, "lean")


def test_more_outputs_than_one_program_holds(monkeypatch):
    monkeypatch.setattr(project, "MOST_OUTPUTS", 16)
    check(*inputs(SHAPES[2], torch.float32), SHAPES[2], torch.float32, True, "fast")


def test_far_mean():
    check(*inputs(SHAPES[0], torch.float32, mean=100.0), SHAPES[0], torch.float32, True, "fast")


def test_constant_channel():
    x, grad, params = inputs(SHAPES[0], torch.float32)
    x[:, 1] = 3.0
    check(x, grad, params, SHAPES[0], torch.float32, True, "fast")


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[5]], ids=str)
def test_frozen_norms(shape):
    x, grad, params = inputs(shape, torch.float32)
    running = [r + 0.3 for r in running_of(params, torch.float32)]
    check(x, grad, params, shape, torch.float32, False, "fast", running)


def test_inference_writes_only_the_output():
    x, grad, params = inputs(SHAPES[0], torch.float32)
    running = [r + 0.3 for r in running_of(params, torch.float32)]
    out, y, d, _ = ops.mbconv(x, params, running, None, None, 2, "relu6", False, 1e-3, 0)
    truth = eager(x, grad, params, SHAPES[0], torch.float64, False, [r.double() for r in running])[0]
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    assert y.numel() == d.numel() == 0


@pytest.mark.parametrize("training, keep", [(True, 2), (True, 1), (False, 2), (False, 0)])
def test_a_shortcut_adds_x_and_its_gradient(training, keep):
    x, grad, params = inputs(SHAPES[1], torch.float32)
    running = running_of(params, torch.float32)
    mean, cov = gram_rows(rows_of(x)) if training else (None, None)
    arguments = (x, params, running, mean, cov, 1, "relu6", training, 1e-3, keep)
    out, y, d, statistics = ops.mbconv(*arguments)
    torch.testing.assert_close(ops.mbconv(*arguments, True)[0], out + x)
    if keep:
        back = (grad, x, y, d, statistics, params, mean, cov, 1, "relu6", training, 1e-3, True, False)
        torch.testing.assert_close(ops.mbconv_backward(*back, True)[0], ops.mbconv_backward(*back)[0] + grad)


@pytest.mark.parametrize("input, weights", [(True, False), (False, True)])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[5], SHAPES[6]], ids=str)
def test_half_of_backward_is_that_half_of_all(shape, input, weights):
    x, grad, params = inputs(shape, torch.float32)
    mean, cov = gram_rows(rows_of(x)) if len(params) == 9 else (None, None)
    _, y, d, statistics = ops.mbconv(x, params, [], mean, cov, shape[6], shape[8], True, 1e-3, 2)
    arguments = (grad, x, y, d, statistics, params, mean, cov, shape[6], shape[8], True, 1e-3)
    dx, dparams = ops.mbconv_backward(*arguments, True, True)
    part, dpart = ops.mbconv_backward(*arguments, input, weights)
    if input:
        torch.testing.assert_close(part, dx, rtol=1e-5, atol=1e-6)
        assert dpart == []
    else:
        assert part.numel() == 0
        for a, b in zip(dpart, dparams, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def candidates(dtype=torch.float32):
    """Three candidates of one layer (kernel, expand) and x, grad."""
    shapes = [(2, 6, 5, 7, 8, k, 2, e, "relu6") for k, e in ((3, 3), (5, 6), (3, 6))]
    x, grad, _ = inputs(shapes[0], dtype)
    return shapes, x, grad, [inputs(s, dtype)[2] for s in shapes]


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]], ids=["three norms", "two norms"])
def test_running_statistics_move_as_batch_norm_moves_them(shape):
    x, _, params = inputs(shape, torch.float32)
    running = [r + 0.3 for r in running_of(params, torch.float32)]
    truth = [r.double() for r in running]
    mbconv_reference(x.double(), [p.double() for p in params], truth, stride=shape[6], momentum=0.25, eps=1e-3)
    statistics = ops.mbconv(x, params, [], None, None, shape[6], shape[8], True, 1e-3, 0)[-1]
    pixels_out = x.shape[0] * ((x.shape[2] - 1) // shape[6] + 1) * ((x.shape[3] - 1) // shape[6] + 1)
    ops.update_running(statistics, running, x.numel() // x.shape[1], pixels_out, 0.25)
    for a, b in zip(running, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("workspace", [0, 1 << 20], ids=["one by one", "one launch"])
@pytest.mark.parametrize("training", [True, False])
def test_probe_of_several_candidates(workspace, training, monkeypatch):
    monkeypatch.setattr(probe, "WORKSPACE", workspace)
    shapes, x, grad, params = candidates()
    assert len(probe.probe_groups(x, params, 2)) == (1 if workspace else 3)
    running = [running_of(p, torch.float32) for p in params]
    expected_running = [[r.double() for r in own] for own in running]
    expected = [
        eager(x, grad, p, s, torch.float64, training, own)[-1]
        for p, s, own in zip(params, shapes, expected_running, strict=True)
    ]
    mean, cov = gram_rows(rows_of(x))
    gates = ops.mbconv_probe(
        x, grad, [t for p in params for t in p], [r for own in running for r in own], [9, 9, 9], mean, cov, 2, "relu6",
        training, 0.1, 1e-3,
    )  # fmt: skip
    torch.testing.assert_close(gates.double(), torch.stack(expected), rtol=1e-5, atol=1e-4)
    for own, truth in zip(running, expected_running, strict=True):
        for a, b in zip(own, truth, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]], ids=str)
def test_through_the_ops_of_the_cuda_stencils(shape, monkeypatch):
    """What a GPU with the CUDA C++ part runs, its depthwise ops taken by ATen here."""
    monkeypatch.setattr(stencils, "can_take", lambda x, kernels, stride: len(set(kernels)) == 1)
    check(*inputs(shape, torch.float32), shape, torch.float32, True, "fast")
    x, grad, params = inputs(shape, torch.float32)
    mean, cov = gram_rows(rows_of(x)) if len(params) == 9 else (None, None)
    _, y, d, statistics = ops.mbconv(x, params, [], mean, cov, shape[6], shape[8], True, 1e-3, 2)
    arguments = (grad, x, y, d, statistics, params, mean, cov, shape[6], shape[8], True, 1e-3)
    alone, _ = ops.mbconv_backward(*arguments, True, False)
    torch.testing.assert_close(alone, ops.mbconv_backward(*arguments, True, True)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("policy", ["fast", "lean"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[4]], ids=str)
def test_expand_and_depthwise_in_one(shape, policy, dtype, monkeypatch):
    """What a GPU runs in half precision where it pays: e is never stored, in no pass of a weight step or a probe."""
    monkeypatch.setattr(stencils, "can_take", lambda x, kernels, stride: len(set(kernels)) == 1)
    for module in (depthwise, mbconv):
        monkeypatch.setattr(module, "expand", None)
    check(*inputs(shape, dtype), shape, dtype, True, policy)
    check(*inputs(shape, dtype), shape, dtype, False, policy, running_of(inputs(shape, dtype)[2], dtype))


def test_where_expand_and_depthwise_in_one_pays():
    pays = {
        arch: {(k, s) for k in (3, 5, 7) for s in (1, 2) if stencils.expansion_pays(24, k, s, arch)}
        for arch in (80, 90)
    }
    assert pays == {80: {(3, 1), (3, 2), (5, 2)}, 90: {(3, 1), (3, 2), (5, 1), (5, 2), (7, 2)}}
    assert stencils.expansion_pays(24, 5, 1, 100) and not stencils.expansion_pays(24, 5, 1, 86)
    assert stencils.expansion_pays(96, 3, 1, 80) and not stencils.expansion_pays(112, 3, 1, 90)


def test_probes_by_kernel_size_where_the_stencils_run(monkeypatch):
    shapes, x, grad, params = candidates()
    arguments = (x, grad, [t for p in params for t in p], [], [9, 9, 9], None, None, 2, "relu6", True, 0.1, 1e-3)
    expected = ops.mbconv_probe(*arguments)
    monkeypatch.setattr(stencils, "can_take", lambda x, kernels, stride: len(set(kernels)) == 1)
    assert [[shapes[j][5] for j in group] for group in probe.probe_groups(x, params, 2)] == [[3, 3], [5]]
    torch.testing.assert_close(ops.mbconv_probe(*arguments), expected, rtol=1e-5, atol=1e-4)


def test_the_same_bits_twice_and_nan_goes_through():
    x, grad, params = inputs(SHAPES[2], torch.float32)
    first, second = (ours(x, grad, params, SHAPES[2], True, "fast") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    x[0, 0, 0, 0] = float("nan")
    out, dx, *_, gate = ours(x, grad, params, SHAPES[2], True, "fast")
    assert out.isnan().any() and dx.isnan().any() and gate.isnan()


def test_any_memory_format():
    x, grad, params = inputs(SHAPES[0], torch.float32)
    expected = ours(x, grad, params, SHAPES[0], True, "fast")
    wide = torch.randn(2, 9, 9, 12).permute(0, 3, 1, 2)
    wide[:, ::2] = x
    values = ours(wide[:, ::2], grad.contiguous(memory_format=torch.channels_last), params, SHAPES[0], True, "fast")
    assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))
    assert values[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_gate_of_the_active_path_from_its_y(mean, dtype, few_programs):  # noqa: F811
    g = torch.Generator().manual_seed(3)
    y, grad = (torch.randn(2, 20, 9, 8, generator=g) + mean).to(dtype), torch.randn(2, 20, 9, 8, generator=g).to(dtype)
    gamma, beta = torch.rand(20, generator=g) + 0.5, torch.randn(20, generator=g)
    exact = y.double().transpose(0, 1).flatten(1)
    statistics = torch.cat([torch.randn(6).double(), exact.mean(1), exact.var(1, correction=0)])
    gate = ops.norm_dot(grad, y, statistics, gamma, beta, 1e-3)
    wide = [t.double() for t in (grad, y, statistics, gamma, beta)]
    truth = norm_dot_reference(*wide, 1e-3)
    scale = grad.double().norm() * 20**0.5
    assert (gate.double() - truth).abs() <= 1e-6 * scale
    assert gate.dtype == torch.float32
