"""The depthwise ops on any device: parity with eager, batch norm's algebra, gradcheck, opcheck, wrong arguments."""

import pytest
import torch
import torch.nn.functional as F

import proxyless_fast as pf
from proxyless_fast.ops import (
    bn_affine,
    depthwise_backward,
    depthwise_backward_input,
    depthwise_backward_reference,
    depthwise_backward_weight,
    depthwise_forward,
    depthwise_forward_reference,
    expand_depthwise_backward,
    expand_depthwise_backward_reference,
    expand_depthwise_forward,
    expand_depthwise_forward_reference,
)

ops = torch.ops.proxyless_fast
# On a GPU the same tests run the kernels of csrc/cuda; tests/csrc/test_cuda_depthwise.py emulates them without one.
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() and pf.build_info()["cuda"] else [])]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# batch, channels, height, width, kernel, stride
SHAPES = [
    (1, 3, 5, 7, 3, 1),
    (2, 24, 9, 9, 5, 2),
    (1, 33, 8, 11, 7, 1),
    (2, 33, 7, 6, 7, 2),
    (3, 8, 1, 1, 3, 2),
    (2, 4, 6, 5, 1, 1),
    (1, 5, 12, 4, 9, 2),
]


def sample(shape, dtype=torch.float32, prologue=True, device="cpu"):
    """Every tensor of the ops for one shape: (x, weight, scale, shift), stride, (dz, d, affine)."""
    b, c, h, w, k, stride = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(sum(shape))

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(device)

    x = (2 * randn(b, c, h, w) + 1).to(dtype).contiguous(memory_format=torch.channels_last)
    scale, shift = (randn(c).abs() + 0.5).to(wide), randn(c).to(wide)
    out = (b, c, (h - 1) // stride + 1, (w - 1) // stride + 1)
    dz, d, affine = randn(*out).to(dtype), randn(*out).to(dtype), randn(4, c).to(wide)
    forward = (x, (randn(c, 1, k, k) / k).to(dtype), scale if prologue else None, shift if prologue else None)
    return forward, stride, (dz, d, affine)


def double(tensors):
    return [None if t is None else t.double() for t in tensors]


def relative(value, truth):
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def eager_forward(x, weight, scale, shift, stride):
    """The same work in eager PyTorch, rounded to x's dtype after each op as autocast-free half training does."""
    if scale is not None:
        x = (x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]).clamp(0, 6)
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=x.shape[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("prologue", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_is_as_exact_as_eager(shape, dtype, prologue, device):
    tensors, stride, _ = sample(shape, dtype, prologue, device)
    truth, mean, var = depthwise_forward_reference(*double(tensors), stride)
    d, our_mean, our_var = depthwise_forward(*tensors, stride)
    assert d.dtype == dtype and d.is_contiguous(memory_format=torch.channels_last)
    floor = torch.finfo(dtype).eps
    assert relative(d, truth) <= 2 * relative(eager_forward(*tensors, stride), truth) + floor
    # Against the statistics of the tensor that was stored, and of the exact one.
    stored = d.to(our_mean.dtype)
    torch.testing.assert_close(our_mean, stored.mean((0, 2, 3)))
    torch.testing.assert_close(our_var, stored.var((0, 2, 3), correction=0))
    size = truth.square().mean((0, 2, 3)).sqrt()
    assert ((our_mean - mean).abs() <= 8 * floor * size).all()
    assert ((our_var - var).abs() <= 16 * floor * size.square()).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("prologue", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(shape, dtype, prologue, device):
    tensors, stride, gradient = sample(shape, dtype, prologue, device)
    x, weight, scale, shift = tensors
    for dz, d, affine in (gradient, (gradient[0], None, None)):
        for mask in (True, False):
            arguments = (dz, d, affine, x, scale, shift, weight)
            q, dw = depthwise_backward(*arguments, stride, mask)
            truth = depthwise_backward_reference(*double(arguments), stride, mask)
            floor = 2 * torch.finfo(dtype).eps
            assert relative(q, truth[0]) <= floor and relative(dw, truth[1]) <= floor
            assert q.dtype == dtype and q.shape == x.shape and dw.dtype == weight.dtype
            assert torch.equal(q, depthwise_backward_input(*arguments, stride, mask))
            assert torch.equal(dw, depthwise_backward_weight(*arguments, stride))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_affine_is_the_backward_of_batch_norm(shape):
    """Depthwise, BN2 and ReLU6 by our ops and `bn_affine`, against autograd through F.batch_norm, in float64."""
    (x, weight, scale, shift), stride, (g, _, _) = sample(shape, torch.float64)
    c, eps = x.shape[1], 1e-3
    g2 = torch.rand(c, dtype=torch.float64) + 0.5
    b2 = torch.randn(c, dtype=torch.float64)
    u = (x * scale[:, None, None] + shift[:, None, None]).requires_grad_()
    w = weight.clone().requires_grad_()
    z = F.batch_norm(eager_forward(u.clamp(0, 6), w, None, None, stride), None, None, g2, b2, True, 0, eps)
    expected = torch.autograd.grad(z.clamp(0, 6), (u, w), g)

    d, mean, var = depthwise_forward(x, weight, scale, shift, stride)
    i2 = (var + eps).rsqrt()
    d_hat = (d - mean[:, None, None]) * i2[:, None, None]
    z = d_hat * g2[:, None, None] + b2[:, None, None]
    dz = g * ((z > 0) & (z < 6))
    affine = bn_affine(g2, mean, i2, dz.sum((0, 2, 3)), (dz * d_hat).sum((0, 2, 3)), d.numel() // c)
    for value, truth in zip(depthwise_backward(dz, d, affine, x, scale, shift, weight, stride), expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(2, 3, 5, 4, 3, 1), (1, 2, 6, 5, 5, 2)], ids=str)
@pytest.mark.parametrize("prologue", [True, False])
def test_gradcheck(shape, prologue):
    tensors, stride, _ = sample(shape, torch.float64, prologue)
    inputs = [None if t is None else t.detach().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: depthwise_forward(*t, stride), inputs)
    weights_only = [None if t is None else t.detach().requires_grad_(i == 1) for i, t in enumerate(tensors)]
    assert torch.autograd.gradcheck(lambda *t: depthwise_forward(*t, stride)[1:], weights_only)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_opcheck(shape, dtype, device):
    tensors, stride, gradient = sample(shape, dtype, device=device)
    backward = (*gradient, tensors[0], *tensors[2:], tensors[1], stride)
    leaves = [t.detach().requires_grad_() for t in tensors]
    torch.library.opcheck(ops.depthwise_forward.default, (*leaves, stride))
    torch.library.opcheck(ops.depthwise_backward.default, (*backward, True))
    torch.library.opcheck(ops.depthwise_backward_input.default, (*backward, True))
    torch.library.opcheck(ops.depthwise_backward_weight.default, backward)


EXPANDED = [
    ((2, 24, 9, 9, 5, 2), 3, "relu6"),
    ((1, 33, 8, 11, 7, 1), 16, "relu"),
    ((2, 33, 7, 6, 7, 2), 40, "silu"),
    ((3, 8, 1, 1, 3, 2), 5, "hardswish"),
    ((1, 5, 12, 4, 9, 2), 80, "identity"),
]


def expand_sample(shape, ci, dtype, device):
    (like, weight, _, _), stride, gradient = sample(shape, dtype, device=device)
    b, c, h, w = like.shape
    x = torch.randn(b, ci, h, w, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    norm1 = torch.randn(4, c, device=device).to(gradient[2].dtype)
    return (x, (torch.randn(c, ci, device=device) / ci**0.5).to(dtype), norm1, weight), stride, gradient


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, ci, activation", EXPANDED, ids=str)
def test_expand_and_depthwise_in_one(shape, ci, activation, dtype, device):
    tensors, stride, gradient = expand_sample(shape, ci, dtype, device)
    d, mean, var = expand_depthwise_forward(*tensors, stride, activation)
    de, dw = expand_depthwise_backward(*gradient, *tensors, stride, activation)
    truth, _, _ = expand_depthwise_forward_reference(*double(tensors), stride, activation)
    true_de, true_dw = expand_depthwise_backward_reference(*double((*gradient, *tensors)), stride, activation)
    floor = 2 * torch.finfo(dtype).eps  # e is rounded too
    assert relative(d, truth) <= floor and relative(de, true_de) <= floor and relative(dw, true_dw) <= floor
    assert d.dtype == de.dtype == dtype and dw.dtype == tensors[3].dtype
    assert d.is_contiguous(memory_format=torch.channels_last) and de.is_contiguous(memory_format=torch.channels_last)
    stored = d.to(mean.dtype)
    torch.testing.assert_close(mean, stored.mean((0, 2, 3)))
    torch.testing.assert_close(var, stored.var((0, 2, 3), correction=0))
    view = tensors[0].contiguous()
    torch.testing.assert_close(expand_depthwise_forward(view, *tensors[1:], stride, activation)[0], d)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, ci, activation", EXPANDED, ids=str)
def test_opcheck_of_expand(shape, ci, activation, dtype, device):
    tensors, stride, gradient = expand_sample(shape, ci, dtype, device)
    torch.library.opcheck(ops.expand_depthwise_forward.default, (*tensors, stride, activation))
    torch.library.opcheck(ops.expand_depthwise_backward.default, (*gradient, *tensors, stride, activation))


@pytest.mark.parametrize("device", DEVICES)
def test_layouts(device):
    """Sliced and NCHW inputs give what channels-last ones give."""
    tensors, stride, (dz, d, affine) = sample((2, 24, 9, 9, 5, 2), device=device)
    x, weight, scale, shift = tensors
    wide = torch.cat([x, x, x], 1)
    forward = depthwise_forward(*tensors, stride)
    backward = depthwise_backward(dz, d, affine, x, scale, shift, weight, stride)
    for view in (x.contiguous(), wide[:, 24:48], x.transpose(2, 3).contiguous().transpose(2, 3)):
        for value, first in zip(depthwise_forward(view, *tensors[1:], stride), forward, strict=True):
            torch.testing.assert_close(value, first)
        ours = depthwise_backward(dz.contiguous(), d, affine, view, scale, shift, weight, stride)
        for value, first in zip(ours, backward, strict=True):
            torch.testing.assert_close(value, first)


@pytest.mark.parametrize("device", DEVICES)
def test_weights_in_float32_beside_half_inputs(device):
    (x, weight, scale, shift), stride, (dz, _, _) = sample((1, 33, 8, 11, 7, 1), torch.bfloat16, device=device)
    d, _, _ = depthwise_forward(x, weight.float(), scale, shift, stride)
    assert torch.equal(d, depthwise_forward(x, weight, scale, shift, stride)[0])
    _, dw = depthwise_backward(dz, None, None, x, scale, shift, weight.float(), stride)
    assert dw.dtype == torch.float32


ONE = torch.zeros(1, 4, 5, 5)
WEIGHT = torch.zeros(4, 1, 3, 3)
CHANNEL = torch.zeros(4)
W1, NORM1 = torch.zeros(4, 3), torch.zeros(4, 4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: depthwise_forward(ONE[0], WEIGHT), "depthwise_forward: x must have shape"),
        (lambda: depthwise_forward(ONE[:0], WEIGHT), "depthwise_forward: x must have shape"),
        (lambda: depthwise_forward(ONE.long(), WEIGHT), "depthwise_forward: x must be float16"),
        (lambda: depthwise_forward(ONE, WEIGHT[:3]), "depthwise_forward: weight must have shape"),
        (lambda: depthwise_forward(ONE, torch.zeros(4, 1, 4, 4)), "depthwise_forward: weight must have shape"),
        (lambda: depthwise_forward(ONE, WEIGHT.half()), "depthwise_forward: weight must be"),
        (lambda: depthwise_forward(ONE, WEIGHT, stride=3), "depthwise_forward: stride must be 1 or 2, got 3"),
        (lambda: depthwise_forward(ONE, WEIGHT, scale=CHANNEL), "depthwise_forward: scale and shift must be given"),
        (lambda: depthwise_forward(ONE, WEIGHT, CHANNEL.double(), CHANNEL), "depthwise_forward: scale must be"),
        (lambda: depthwise_forward(ONE, WEIGHT, CHANNEL, CHANNEL[:3]), "depthwise_forward: shift must be"),
        (
            lambda: depthwise_backward(ONE[:, :3], None, None, ONE, None, None, WEIGHT),
            "depthwise_backward: dz must be",
        ),
        (
            lambda: depthwise_backward_input(ONE, ONE, None, ONE, None, None, WEIGHT),
            "depthwise_backward_input: d and affine must be given together, got only d",
        ),
        (
            lambda: depthwise_backward_weight(ONE, ONE, torch.zeros(3, 4), ONE, None, None, WEIGHT),
            "depthwise_backward_weight: affine must be",
        ),
        (lambda: expand_depthwise_forward(ONE[0], W1, NORM1, WEIGHT), "expand_depthwise_forward: x must have shape"),
        (lambda: expand_depthwise_forward(ONE, W1, NORM1, WEIGHT), "expand_depthwise_forward: w1 must be"),
        (lambda: expand_depthwise_forward(ONE[:, :3], W1.half(), NORM1, WEIGHT), "w1 must be Float"),
        (lambda: expand_depthwise_forward(ONE[:, :3], W1, NORM1[:3], WEIGHT), "norm1 must be Float"),
        (lambda: expand_depthwise_forward(ONE[:, :3], W1, NORM1, WEIGHT[:3]), "weight must have shape"),
        (lambda: expand_depthwise_forward(ONE[:, :3], W1, NORM1, WEIGHT, 1, "tanh"), "activation must be relu6"),
        (
            lambda: expand_depthwise_backward(ONE[:, :3], None, None, ONE[:, :3], W1, NORM1, WEIGHT),
            "expand_depthwise_backward: dz must be",
        ),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
