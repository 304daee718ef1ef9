"""The CUDA kernels without a GPU: executed on the CPU under sanitizers, and compiled for sm_80 and sm_90."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from proxyless_fast.ops import (
    bn_affine,
    depthwise_backward_reference,
    depthwise_forward_reference,
    gram,
)
from tests.csrc.emulation import emulate, resources

# batch, channels, height, width, kernel, stride: odd sizes, one image, channels under, over and off a vector's, one
# pixel, several tiles down and across.
SHAPES = [
    (1, 3, 5, 7, 3, 1),
    (2, 24, 9, 9, 5, 2),
    (1, 33, 7, 11, 7, 1),
    (2, 33, 8, 6, 7, 2),
    (3, 8, 1, 1, 3, 2),
    (2, 16, 1, 3, 5, 1),
    (1, 40, 14, 14, 3, 2),
    (1, 8, 30, 61, 5, 1),
    (1, 8, 35, 50, 7, 2),
    (2, 7, 33, 16, 3, 1),
]


def sample(shape, dtype, prologue=True):
    b, c, h, w, k, stride = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(sum(shape))

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    x, weight = (2 * randn(b, c, h, w) + 1).to(dtype), (randn(c, 1, k, k) / k).to(dtype)
    scale, shift = (randn(c).abs() + 0.5).to(wide), randn(c).to(wide)
    out = (b, c, (h - 1) // stride + 1, (w - 1) // stride + 1)
    dz, d, affine = randn(*out).to(dtype), randn(*out).to(dtype), randn(4, c).to(wide)
    return x, weight, scale if prologue else None, shift if prologue else None, dz, d, affine, stride


def double(*tensors):
    return [None if t is None else t.double() for t in tensors]


def relative(value, truth):
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def eager(x, weight, scale, shift, dz, d, affine, stride, mask):
    """d, q and dw by eager PyTorch in x's dtype: batch norm in float32 with a rounded result, plain convolutions."""
    wide = scale.dtype if scale is not None else affine.dtype
    e = u = x
    if scale is not None:
        u = (x.to(wide) * scale[:, None, None] + shift[:, None, None]).to(x.dtype)
        e = u.clamp(0, 6)
    options = {"stride": stride, "padding": weight.shape[-1] // 2, "groups": x.shape[1]}
    a = affine[:, :, None, None]
    dd = (a[0] * dz.to(wide) + a[1] * (d.to(wide) - a[2]) + a[3]).to(x.dtype)
    q = torch.nn.grad.conv2d_input(e.shape, weight, dd, **options)
    dw = torch.nn.grad.conv2d_weight(e, weight.shape, dd, **options)
    return F.conv2d(e, weight, **options), q * ((u > 0) & (u < 6)) if mask else q, dw


def assert_as_exact(values, references, truths, dtype):
    """At most twice the error of eager in the same dtype against float64, above a floor of a few roundings."""
    # In float64 eager is the truth itself.
    floor = 16 * torch.finfo(dtype).eps if dtype == torch.float64 else 2 * torch.finfo(torch.float32).eps
    for value, reference, truth in zip(values, references, truths, strict=True):
        assert relative(value, truth) <= 2 * relative(reference, truth) + floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_emulated_kernels_are_as_exact_as_eager(checked, shape, dtype):
    *tensors, stride = sample(shape, dtype)
    x, weight, scale, shift, dz, d, affine = tensors
    truth, _, _ = depthwise_forward_reference(*double(x, weight, scale, shift), stride)
    true_q, true_dw = depthwise_backward_reference(*double(dz, d, affine, x, scale, shift, weight), stride)
    ours, our_mean, our_var = checked.forward(x, weight, scale, shift, stride)
    q, dw = checked.backward(dz, d, affine, x, scale, shift, weight, stride, True)
    assert_as_exact([ours, q, dw], eager(*tensors, stride, True), [truth, true_q, true_dw], dtype)
    stored = ours.to(our_mean.dtype)
    torch.testing.assert_close(our_mean, stored.mean((0, 2, 3)))
    torch.testing.assert_close(our_var, stored.var((0, 2, 3), correction=0))


@pytest.mark.parametrize("kernel, stride", list(itertools.product([3, 5, 7], [1, 2])))
def test_every_kernel_without_prologues(checked, kernel, stride):
    """Plain input, plain dz, no mask; one gradient at a time; weights in float32; tensors off a 16-byte boundary."""
    dtype = torch.float16
    x, weight, _, _, dz, _, _, _ = sample((1, 16, 11, 10, kernel, stride), dtype, prologue=False)
    nothing = (None, None)
    d, _, _ = checked.forward(x, weight.float(), *nothing, stride, skew=2)
    assert torch.equal(d, checked.forward(x, weight, *nothing, stride)[0])
    arguments = (dz, *nothing, x, *nothing, weight, stride)
    q, dw = checked.backward(*arguments, False)
    assert torch.equal(q, checked.backward(*arguments, False, (True, False), skew=2)[0])
    assert torch.equal(dw, checked.backward(*arguments, False, (False, True), skew=6)[0])
    truth = depthwise_backward_reference(*double(*arguments[:-1]), stride, False)
    assert relative(d, depthwise_forward_reference(x.double(), weight.double(), stride=stride)[0]) < 5e-4
    assert relative(q, truth[0]) < 5e-4 and relative(dw, truth[1]) < 1e-6
    unread = (*arguments[:3], torch.full_like(x, float("nan")), *arguments[4:])
    assert torch.equal(q, checked.backward(*unread, False, (True, False))[0])
    masked = checked.backward(*arguments, True, (True, False))[0]
    assert torch.equal(masked, torch.where((x > 0) & (x < 6), q, 0.0))


def test_statistics_of_a_far_mean(checked):
    """A mean of 100 spreads costs no digits of the variance, however many blocks share the sum."""
    x = (torch.randn(2, 8, 30, 40, dtype=torch.float64) + 100).float()
    weight = torch.zeros(8, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    truth = x.double().var((0, 2, 3), correction=0)
    for groups in (1, 3, 0):
        _, mean, var = checked.forward(x, weight, None, None, 1, groups=groups)
        torch.testing.assert_close(var.double(), truth, rtol=1e-5, atol=0)
        torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)


def test_any_number_of_blocks_gives_the_same_tensors(checked):
    """One block that walks every tile, or one block a tile; and every run gives the same bits."""
    x, weight, scale, shift, dz, d, affine, stride = sample((2, 8, 33, 35, 5, 1), torch.float32)
    backward = (dz, d, affine, x, scale, shift, weight, stride, True)
    first, q, dw = *checked.forward(x, weight, scale, shift, stride)[:1], *checked.backward(*backward)
    for groups in (1, 2):
        assert torch.equal(first, checked.forward(x, weight, scale, shift, stride, groups=groups)[0])
        other_q, other_dw = checked.backward(*backward, groups=groups)
        assert torch.equal(q, other_q)
        torch.testing.assert_close(dw, other_dw, rtol=1e-4, atol=1e-4)
    assert torch.equal(dw, checked.backward(*backward)[1])


@pytest.mark.parametrize("kernel, stride", [(3, 1), (5, 2), (7, 1)])
def test_emulated_kernels_agree_with_the_cpu_engine(checked, kernel, stride):
    """d, BN2's statistics and the depthwise weight gradient within a whole MBConv of 8 -> 24 -> 8 channels."""
    eps, ops = 1e-3, torch.ops.proxyless_fast
    x = torch.randn(2, 8, 13, 12).contiguous(memory_format=torch.channels_last)
    norms = [(torch.rand(c) + 0.5, torch.randn(c)) for c in (24, 24, 8)]
    convs = [torch.randn(24, 8, 1, 1), torch.randn(24, 1, kernel, kernel) / kernel, torch.randn(8, 24, 1, 1)]
    params = [p for conv, norm in zip(convs, norms, strict=True) for p in (conv, *norm)]
    running = [t for c in (24, 24, 8) for t in (torch.zeros(c), torch.ones(c))]
    tail = (*gram(x), stride, "relu6", True, eps)
    _, y, d, statistics = ops.mbconv(x, params, running, *tail, 2)
    mean1, var1, mean2, var2 = statistics.split(24)[:4]
    u = F.conv2d(x, convs[0])
    scale = norms[0][0] * (var1 + eps).rsqrt().float()
    shift = norms[0][1] - scale * mean1.float()
    ours, mean, var = checked.forward(u, convs[1], scale, shift, stride)
    b, c, h, w = ours.shape
    theirs = d.permute(1, 0, 2).reshape(b, h, w, -1)[..., :c].permute(0, 3, 1, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mean, mean2.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(var, var2.float(), rtol=1e-4, atol=1e-4)

    grad = torch.randn(b, 8, h, w)
    _, theirs = ops.mbconv_backward(grad, x, y, d, statistics, params, *tail, True, True)
    i2 = (var + eps).rsqrt()
    d_hat = (ours - mean[:, None, None]) * i2[:, None, None]
    z = (d_hat * norms[1][0][:, None, None] + norms[1][1][:, None, None]).requires_grad_()
    out = F.batch_norm(F.conv2d(z.clamp(0, 6), convs[2]), None, None, *norms[2], True, 0, eps)
    (dz,) = torch.autograd.grad(out, z, grad)
    db, dg = dz.sum((0, 2, 3)), (dz * d_hat).sum((0, 2, 3))
    affine = bn_affine(norms[1][0], mean, i2, db, dg, b * h * w)
    (dw,) = checked.backward(dz, ours, affine, u, scale, shift, convs[1], stride, True, (False, True))
    assert relative(dw, theirs[3].double()) < 1e-4


def test_half_types_of_the_emulation_round_as_torch_does(checked):
    weight = torch.zeros(1 << 15, 1, 3, 3)
    bits = torch.randint(0, 1 << 32, (1 << 15,), generator=torch.Generator().manual_seed(1)).to(torch.uint32)
    near = torch.randn(1 << 14) * torch.logspace(-9, 5, 1 << 14)
    values = torch.cat([bits.view(torch.float32)[: 1 << 14].nan_to_num(), near])
    weight[:, 0, 1, 1] = values
    for dtype in (torch.float16, torch.bfloat16):
        one = torch.ones(1, 1 << 15, 1, 1, dtype=dtype)
        d, _, _ = checked.forward(one, weight, None, None, 1)
        assert torch.equal(d.flatten().view(torch.int16), values.to(dtype).view(torch.int16))


def test_no_data_race():
    """Under ThreadSanitizer, with blocks that walk several tiles: each thread of a block is a real thread."""
    racing = emulate.Emulated("thread")
    if b"unexpected memory mapping" in racing.run().stderr:
        pytest.skip("this kernel's address space randomisation is more than the compiler's ThreadSanitizer knows")
    for shape in [(2, 32, 9, 16, 3, 1), (1, 40, 18, 17, 7, 2)]:
        x, weight, scale, shift, dz, d, affine, stride = sample(shape, torch.float16)
        racing.forward(x, weight, scale, shift, stride, groups=1)
        racing.backward(dz, d, affine, x, scale, shift, weight, stride, True, groups=1)


def test_tilings_fit_every_shape():
    shapes = [
        (backward, dtype, batch, channels, *size, kernel, stride, expand)
        for backward, dtype, kernel, stride in itertools.product((0, 1), (0, 2), (3, 5, 7), (1, 2))
        for batch, channels in ((1, 3), (64, 144), (2, 1152))
        for size in ((1, 1), (7, 7), (14, 14), (28, 28), (56, 56), (112, 112), (5, 300), (97, 3))
        for expand in ((0, 16, 80, 256) if dtype == 0 else (0,))
    ]
    for shape, tiling in zip(shapes, emulate.tilings(shapes), strict=True):
        backward, dtype, batch, channels, height, width, kernel, stride, _ = shape
        rows, columns = (height, width) if backward else (-(-height // stride), -(-width // stride))
        quads = 8 if dtype == 0 else 4
        strip = 8 if backward and stride == 2 else 7
        assert tiling.height * tiling.down >= rows > tiling.height * (tiling.down - 1)
        assert tiling.width * tiling.across >= columns > tiling.width * (tiling.across - 1)
        assert tiling.width % strip == 0
        assert not backward or tiling.height % stride == tiling.width % stride == 0
        assert tiling.threads % 32 == 0 and 128 <= tiling.threads <= 224 and tiling.shared_bytes <= 48 * 1024
        assert tiling.threads >= quads * max(tiling.height * tiling.width // strip, kernel)
        assert tiling.chunks * quads * 4 >= channels > (tiling.chunks - 1) * quads * 4
        assert 1 <= tiling.groups <= batch * tiling.down * tiling.across


@pytest.mark.skipif(resources.nvcc() is None, reason="no nvcc in PATH to compile the CUDA kernels with")
@pytest.mark.parametrize("architecture", [80, 90])
def test_machine_code_has_no_spills(architecture):
    kernels = resources.rows(architecture, (64, 144, 56, 56), 24)
    names = {(k.name, k.dtype, k.kernel, k.stride) for k, _, _ in kernels}
    every = set(itertools.product(("forward", "backward"), ("fp16", "bf16", "fp32"), (3, 5, 7), (1, 2)))
    assert names == {("depthwise_" + name, *rest) for name, *rest in every} | {
        ("expand_depthwise_" + name, dtype, *rest) for name, dtype, *rest in every if dtype != "fp32"
    }
    for kernel, tiling, blocks in kernels:
        assert kernel.spills == 0 and kernel.stack == 0, kernel
        # One block computes while another waits for its tile.
        assert blocks >= 2, (kernel, tiling)
