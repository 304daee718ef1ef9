"""Each op beside its plain-torch reference: pytest benchmarks --benchmark-enable --benchmark-only

Correctness is asserted before anything is timed. `--benchmark-group-by=param:shape` sets op and reference side by side.
"""

import pytest
import torch

from proxyless_fast import ops

# channels, side: narrow tensors of the paper's ImageNet supernet at 224 x 224, batch 16
NARROW = [(16, 112), (24, 56), (40, 28), (80, 14), (192, 7)]
# in, out, side, stride, kernel, expand
BLOCKS = [
    (32, 16, 112, 1, 3, 1),
    (16, 24, 112, 2, 3, 3),
    (24, 24, 56, 1, 5, 6),
    (24, 40, 56, 2, 7, 6),
    (40, 40, 28, 1, 7, 6),
    (80, 80, 14, 1, 5, 6),
    (192, 192, 7, 1, 7, 6),
]
BATCH = 16
HOW = pytest.mark.parametrize("how", ["op", "reference"])
NARROWS = pytest.mark.parametrize("shape", NARROW, ids=lambda shape: "x".join(map(str, shape)))
WIDES = pytest.mark.parametrize("shape", BLOCKS, ids=lambda shape: "x".join(map(str, shape)))


def _images(channels: int, side: int) -> torch.Tensor:
    return torch.randn(BATCH, channels, side, side).contiguous(memory_format=torch.channels_last)


@HOW
@NARROWS
def test_gram(benchmark, shape, how):
    x = _images(*shape)
    torch.testing.assert_close(ops.gram(x), ops.gram_reference(x), atol=1e-4, rtol=1e-4)
    benchmark(ops.gram if how == "op" else ops.gram_reference, x)


@HOW
@NARROWS
def test_gate_dot(benchmark, shape, how):
    a, b = _images(*shape), _images(*shape)
    scale = a.norm() * b.norm()
    torch.testing.assert_close(ops.gate_dot(a, b) / scale, ops.gate_dot_reference(a, b) / scale, atol=1e-6, rtol=0)
    benchmark(ops.gate_dot if how == "op" else ops.gate_dot_reference, a, b)


class Block:
    """Arguments of one MBConv, and its op or reference."""

    def __init__(self, shape: tuple[int, ...], how: str) -> None:
        inputs, outputs, side, self.stride, kernel, expand = shape
        torch.manual_seed(0)
        wide = inputs * expand
        weights = [torch.randn(wide, inputs, 1, 1) * inputs**-0.5] if expand > 1 else []
        weights += [torch.randn(wide, 1, kernel, kernel) / kernel, torch.randn(outputs, wide, 1, 1) * wide**-0.5]
        self.params = [t for w in weights for t in (w, torch.rand(w.shape[0]) + 0.5, torch.randn(w.shape[0]))]
        self.x = _images(inputs, side)
        self.grad = _images(outputs, (side - 1) // self.stride + 1)
        self.function = ops.mbconv.mbconv if how == "op" else ops.mbconv_reference
        self.probing = ops.probe if how == "op" else ops.probe_reference

    def double(self) -> "Block":
        self.x, self.grad = self.x.double(), self.grad.double()
        self.params = [p.double() for p in self.params]
        return self

    def forward(self) -> torch.Tensor:
        return self.function(self.x, self.params, stride=self.stride)

    def require(self, weights: bool) -> list[torch.Tensor]:
        leaves = [self.x, *self.params] if weights else [self.x]
        for leaf in leaves:
            leaf.requires_grad_()
        return leaves

    def backward(self, output: torch.Tensor, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(output, leaves, self.grad, retain_graph=True)

    def gradients(self, weights: bool) -> tuple[torch.Tensor, ...]:
        leaves = self.require(weights)
        return self.backward(self.forward(), leaves)

    def probe(self) -> torch.Tensor:
        return self.probing(self.x, self.grad, [self.params], stride=self.stride)


def _close(found: torch.Tensor, truth: torch.Tensor) -> None:
    # Within a float32 rounding of 0 or 6 an activation's mask may fall either way, with a small effect on the whole.
    assert (found - truth).norm() <= 1e-3 * truth.norm()


@HOW
@WIDES
def test_mbconv_forward(benchmark, shape, how):
    with torch.no_grad():
        _close(Block(shape, "op").forward(), Block(shape, "reference").double().forward())
    block = Block(shape, how)
    block.require(weights=True)
    benchmark(block.forward)


@HOW
@WIDES
@pytest.mark.parametrize("weights", [True, False], ids=["all", "input"])
def test_mbconv_backward(benchmark, shape, how, weights):
    found, truth = Block(shape, "op"), Block(shape, "reference").double()
    for gradient, expected in zip(found.gradients(weights), truth.gradients(weights), strict=True):
        _close(gradient, expected)
    block = Block(shape, how)
    leaves = block.require(weights)
    benchmark(block.backward, block.forward(), leaves)


@HOW
@WIDES
def test_mbconv_probe(benchmark, shape, how):
    found, truth = Block(shape, "op"), Block(shape, "reference").double()
    scale = truth.grad.norm() * truth.forward().norm()
    assert (found.probe() - truth.probe()).abs() <= 1e-5 * scale
    benchmark(Block(shape, how).probe)
