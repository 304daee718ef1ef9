"""The expansion made in shared memory, on the CPU under sanitizers: emulated tensor cores, warps of real threads."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from proxyless_fast.ops import expand_depthwise_backward_reference, expand_depthwise_forward_reference
from proxyless_fast.ops.activation import ACTIVATIONS
from proxyless_fast.ops.depthwise import expand_reference
from tests.csrc.emulation import emulate
from tests.csrc.test_cuda_depthwise import assert_as_exact, double, eager, relative

# batch, channels of x, of e, height, width, kernel, stride, activation: fewer and more inputs than a step of 16, off a
# vector's, one image, one pixel, several tiles, several chunks of channels.
EXPANDED = [
    (1, 3, 5, 7, 9, 3, 1, "relu6"),
    (2, 16, 96, 20, 19, 3, 2, "silu"),
    (1, 24, 33, 33, 17, 7, 1, "hardswish"),
    (2, 40, 40, 16, 30, 5, 2, "relu"),
    (1, 80, 24, 9, 8, 7, 2, "identity"),
    (3, 16, 8, 1, 1, 5, 1, "relu6"),
    (1, 7, 16, 6, 40, 3, 1, "silu"),
    (1, 24, 72, 15, 31, 5, 1, "relu6"),
]


def expand_sample(shape, dtype):
    """x, w1, norm1, weight; dz, d, affine."""
    b, ci, c, h, w, k, stride, _ = shape
    generator = torch.Generator().manual_seed(sum(shape[:-1]))

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    x, w1 = (randn(b, ci, h, w) + 0.5).to(dtype), (randn(c, ci) / ci**0.5).to(dtype)
    norm1 = torch.stack([randn(c), randn(c), randn(c).abs() + 0.5, randn(c)]).float()
    out = (b, c, (h - 1) // stride + 1, (w - 1) // stride + 1)
    gradient = randn(*out).to(dtype), randn(*out).to(dtype), randn(4, c).float()
    return (x, w1, norm1, (randn(c, 1, k, k) / k).to(dtype)), gradient


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", EXPANDED, ids=str)
def test_expansion_in_shared_memory_is_as_exact_as_eager(checked, shape, dtype):
    """Against float64 and eager, and against an expansion that is stored: bit for bit but for e's own last rounding."""
    *_, stride, activation = shape
    tensors, gradient = expand_sample(shape, dtype)
    x, w1, norm1, weight = tensors
    truth, _, _ = expand_depthwise_forward_reference(*double(*tensors), stride, activation)
    true_q, true_dw = expand_depthwise_backward_reference(*double(*gradient, *tensors), stride, activation)
    ours, our_mean, our_var = checked.expand_forward(*tensors, stride, activation)
    q, dw = checked.expand_backward(*gradient, *tensors, stride, activation)

    mean, _, scale, shift = norm1[:, :, None, None]
    u = F.conv2d(x, w1[:, :, None, None]).float()
    z = ((u - mean) * scale + shift).to(dtype)
    peer = eager(ACTIVATIONS[activation](z), weight, None, None, *gradient, stride, False)
    assert_as_exact([ours, q, dw], peer, [truth, true_q, true_dw], dtype)
    stored = ours.float()
    torch.testing.assert_close(our_mean, stored.mean((0, 2, 3)))
    torch.testing.assert_close(our_var, stored.var((0, 2, 3), correction=0))

    e = expand_reference(x, w1, norm1, activation)
    two = checked.forward(e, weight, None, None, stride)[0]
    assert relative(ours, two.double()) < torch.finfo(dtype).eps / 4
    two_q, two_dw = checked.backward(*gradient, e, None, None, weight, stride, False)
    assert torch.equal(q, two_q) and relative(dw, two_dw.double()) < 1e-5


@pytest.mark.parametrize("kernel, stride", list(itertools.product([3, 5, 7], [1, 2])))
def test_expansion_bit_for_bit(checked, kernel, stride):
    """Where sums are exact it gives the bits of a stored e; off alignment, in one block, weights in float32 as well."""
    b, ci, c, h, w, dtype = 2, 20, 40, 8, 17, torch.float16
    tensors, gradient = expand_sample((b, ci, c, h, w, kernel, stride, "relu6"), dtype)
    x, w1 = torch.randint(-8, 9, (b, ci, h, w)).to(dtype) / 8, torch.randint(-8, 9, (c, ci)).to(dtype) / 8
    norm1 = torch.randint(1, 9, (4, c)).float() / 4
    tensors = (x, w1, norm1, tensors[3])
    e = expand_reference(x, w1, norm1, "relu6")
    assert 0.1 < (e == 0).float().mean() < 0.9
    expected = checked.forward(e, tensors[3], None, None, stride)
    expected_gradients = checked.backward(*gradient, e, None, None, tensors[3], stride, False)
    wide = (*tensors[:3], tensors[3].float())
    for arguments, skew, groups in ((tensors, 0, 0), (tensors, 2, 0), (tensors, 8, 1), (wide, 0, 0)):
        d, mean, _ = checked.expand_forward(*arguments, stride, "relu6", skew, groups)
        assert torch.equal(d, expected[0])
        torch.testing.assert_close(mean, expected[1])
        q, dw = checked.expand_backward(*gradient, *arguments, stride, "relu6", skew, groups)
        assert torch.equal(q, expected_gradients[0])
        torch.testing.assert_close(dw, expected_gradients[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_nan_goes_through_the_expansion(checked, activation):
    tensors, _ = expand_sample((1, 16, 8, 9, 9, 3, 1, activation), torch.bfloat16)
    tensors[0][0, 3, 4, 5] = float("nan")
    d, _, _ = checked.expand_forward(*tensors, 1, activation)
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[3:6, 4:7] = True
    assert torch.equal(d[0].isnan(), expected.expand(8, 9, 9))


def test_no_data_race():
    """Under ThreadSanitizer, with a block that walks several tiles."""
    racing = emulate.Emulated("thread")
    if b"unexpected memory mapping" in racing.run().stderr:
        pytest.skip("this kernel's address space randomisation is more than the compiler's ThreadSanitizer knows")
    for shape in [(1, 24, 40, 9, 16, 3, 1, "relu6"), (2, 3, 8, 7, 17, 5, 2, "silu")]:
        tensors, gradient = expand_sample(shape, torch.bfloat16)
        racing.expand_forward(*tensors, *shape[-2:], groups=1)
        racing.expand_backward(*gradient, *tensors, *shape[-2:], groups=1)
