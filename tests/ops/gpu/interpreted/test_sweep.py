"""The composed MBConv, interpreted, over the shapes that the CPU engine is held to."""

import pytest
import torch

from proxyless_fast.ops.gpu.host import configs, launch, ops
from proxyless_fast.ops.gpu.host.first_norm import gram_rows
from proxyless_fast.ops.gpu.host.group import rows_of
from proxyless_fast.ops.mbconv import mbconv_reference
from tests.ops.gpu.interpreted.test_block import FLOOR
from tests.ops.test_mbconv import EPS, SAMPLES, ids

# A norm over two pixels amplifies rounding as it likes, eager's as well as ours.
SHAPES = [s for s in SAMPLES if s.batch * s.height * s.width > 4]
# In half precision without the four large shapes, which add time and no case, and without far means, where eager is so
# far off that nothing else would show.
SMALL = [s for s in SHAPES if s.mean == 0 and s.batch * s.height * s.width * s.channels * s.expand * s.kernel**2 < 2e6]


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """The interpreter's time goes by programs, not by pixels: the tests of each kernel have the tiles of the table."""

    def config(kernel, x, width, **at_most):
        found = configs.config(kernel, x.dtype, width, 90, **at_most)
        return found._replace(tile=found.tile | {"BM": min(2048, configs.padded(x.shape[0]))})

    monkeypatch.setattr(launch, "config", config)


def by_autograd(sample, x, params, running, grad):
    """Output, dx, gradients of params, gate and moved running statistics."""
    x, params = x.detach().requires_grad_(), [p.detach().requires_grad_() for p in params]
    out = mbconv_reference(x, params, running, **sample.options, shortcut=sample.shortcut)
    grads = torch.autograd.grad(out, [x, *params], grad)
    gate = (out.detach().double() * grad.double()).sum()
    if sample.shortcut:  # a candidate's gate does not see the shortcut around it
        gate -= (x.detach().double() * grad.double()).sum()
    return [out.detach(), *grads, gate, *running]


def composed(sample, x, params, running, grad):
    """The same by the Triton kernels."""
    training, tail = sample.training, (sample.stride, sample.activation, sample.training)
    gram = gram_rows(rows_of(x)) if training and len(params) == 9 else (None, None)
    keep = {"lean": 1, "fast": 2}[sample.policy]
    out, y, d, statistics = ops.mbconv(x, params, running, *gram, *tail, EPS, keep, sample.shortcut)
    saved = (x, y, d, statistics, params, *gram, *tail, EPS)
    dx, dparams = ops.mbconv_backward(grad, *saved, True, True, sample.shortcut)
    probed = [r.clone() for r in running]
    gate = ops.mbconv_probe(x, grad, params, probed, [len(params)], *gram, *tail, 0.1, EPS)[0]
    if training:
        ops.update_running(statistics, running, *(t.numel() // t.shape[1] for t in (x, out)), 0.1)
        for a, b in zip(running, probed, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=2**-6, atol=2**-6)  # y is rounded, or not written
    return [out, dx, *dparams, gate, *running]


def errors(sample, dtype):
    """Name to (our relative error, eager's), for every result; both compute with values rounded to dtype."""
    x, params, running, grad = sample.tensors(dtype)
    wide = [x.double(), [p.double() for p in params], [r.double() for r in running], grad.double()]
    truth = by_autograd(sample, *wide)
    peer = by_autograd(sample, x, params, [r.clone() for r in running], grad)
    ours = composed(sample, x, params, running, grad)
    weights = ["w1", "g1", "b1", "wd", "g2", "b2", "wp", "g3", "b3"][-len(params) :]
    names = ["out", "dx", *weights, "gate", *(f"running[{i}]" for i in range(len(running)))]
    found = {}
    for name, a, b, t in zip(names, ours, peer, truth, strict=True):
        assert a.shape == t.shape, name
        # A gradient may be nothing but rounding: a shift before a linear layer and a norm has none.
        scale = t.norm() if t.norm() > 1e-9 * wide[-1].norm() else wide[-1].norm()
        if name == "gate":
            scale = truth[0].norm() * wide[-1].norm() / truth[0].numel() ** 0.5
        found[name] = tuple(((v.double() - t).norm() / scale).item() for v in (a, b))
    return found


@pytest.mark.parametrize("sample", SHAPES, ids=ids)
def test_sweep_in_float32(sample):
    for name, (error, allowed) in errors(sample, torch.float32).items():
        assert error <= 2 * allowed + FLOOR[torch.float32], f"{name}: {error:.2e}, eager {allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sweep_in_half_precision(dtype):
    """Over all shapes together: in one, a single pre-activation that rounds across a bound decides, ours or eager's."""
    found: dict[str, list[tuple[float, float]]] = {}
    for sample in SMALL:
        for name, pair in errors(sample, dtype).items():
            found.setdefault(name, []).append(pair)
    for name, pairs in found.items():
        ours, eager = (sum(e**2 for e in column) ** 0.5 for column in zip(*pairs, strict=True))
        assert 4 * eager < len(pairs) ** 0.5, f"{name}: zeros would pass"
        assert ours <= 2 * eager + FLOOR[dtype], f"{name}: {ours:.2e}, eager {eager:.2e} over {len(pairs)} shapes"
