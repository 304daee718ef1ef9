"""Each kernel by itself, in the interpreter, against float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from proxyless_fast.ops.gpu.host import configs, launch
from proxyless_fast.ops.gpu.host import project as project_passes
from proxyless_fast.ops.gpu.host.depthwise import depthwise, depthwise_backward
from proxyless_fast.ops.gpu.host.expand import expand
from proxyless_fast.ops.gpu.host.first_norm import gram_rows
from proxyless_fast.ops.gpu.host.group import CandidateGroup, image_of, rows_of
from proxyless_fast.ops.gpu.host.norms import finish_moments
from proxyless_fast.ops.gpu.host.project import project

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture
def few_programs(monkeypatch):
    """So few programs and tiles that every loop over tiles, and the merging of partial moments, runs."""

    def config(kernel, x, width, **at_most):
        found = configs.config(kernel, x.dtype, width, 90, **at_most)
        return found._replace(programs=3, tile=found.tile | {"BM": 16})

    monkeypatch.setattr(launch, "config", config)
    monkeypatch.setattr(project_passes, "MOST_TILES", 2)


def close(value, truth, dtype, slack=2.0):
    error = (value.double() - truth).norm() / truth.norm().clamp_min(1e-30)
    assert error <= slack * EPS[dtype], f"{error:.2e}"


def rows(pixels, channels, dtype, seed=0):
    return torch.randn(pixels, channels, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm(channels, seed):
    g = torch.Generator().manual_seed(seed)
    values = [torch.randn(channels, generator=g) * 0.1, torch.rand(channels, generator=g) + 0.5]
    return torch.stack([values[0], values[1], values[1] * 1.5, torch.randn(channels, generator=g)])


def normed(v, n):
    m, _, s, b = n.double()
    return (v - m) * s + b


def make_candidates(batch, ci, height, width, stride, widths, kernels, co, dtype, activation="relu6"):
    """Candidates of the given widths side by side."""
    x = rows(batch * height * width, ci, dtype)
    g = torch.Generator().manual_seed(1)
    ch = sum(widths)
    w1, wp = torch.randn(ch, ci, generator=g).to(dtype) / 4, torch.randn(co, ch, generator=g).to(dtype) / 4
    taps, first = [], 0
    for c, k in zip(widths, kernels, strict=True):
        taps.append((first, k, torch.randn(c, 1, k, k, generator=g).to(dtype) / k))
        first += c
    size = (batch, height, width, (height - 1) // stride + 1, (width - 1) // stride + 1)
    return CandidateGroup(x, size, w1, taps, wp, ch, stride, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pixels, channels", [(1, 3), (70, 16), (333, 40), (50, 130)])
def test_gram(pixels, channels, dtype):
    x = rows(pixels, channels, dtype)
    exact = x.double()
    mean, cov = gram_rows(x)
    close(mean, exact.mean(0), dtype)
    centred = exact - exact.mean(0)
    expected = centred.t() @ centred / pixels
    assert (cov - expected).norm() <= 4 * EPS[dtype] * expected.norm() + 1e-12
    assert torch.equal(cov, cov.t())


def test_gram_of_a_far_mean(few_programs):
    x = rows(200, 20, torch.float32) + 100
    exact = x.double()
    mean, cov = gram_rows(x)
    close(mean, exact.mean(0), torch.float32)
    centred = exact - exact.mean(0)
    close(cov, centred.t() @ centred / 200, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu6", "relu", "silu", "hardswish", "identity"])
def test_expand(activation, dtype):
    group = make_candidates(1, 10, 7, 5, 1, [37], [3], 4, dtype, activation)
    n = norm(37, 2)
    e = expand(group, n)
    u = normed(group.x.double() @ group.w1.double().t(), n)
    acts = {"relu6": F.relu6, "relu": F.relu, "silu": F.silu, "hardswish": F.hardswish, "identity": lambda t: t}
    close(e, acts[activation](u), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_depthwise_side_by_side(stride, dtype, few_programs):
    group = make_candidates(2, 4, 7, 6, stride, [5, 20], [5, 3], 4, dtype)
    e = rows(group.pixels, group.ch, dtype, seed=5)
    d, partial, each = depthwise(group, e, moments=True)
    image = e.double().view(2, 7, 6, -1).permute(0, 3, 1, 2)
    expected = torch.cat(
        [
            F.conv2d(image[:, f : f + t.shape[0]], t.double(), stride=stride, padding=k // 2, groups=t.shape[0])
            for f, k, t in group.taps
        ],
        1,
    )
    close(d, rows_of(expected), dtype)
    gamma, beta = torch.ones(group.ch), torch.zeros(group.ch)
    statistics, _ = finish_moments(partial, each, group.out_pixels, gamma, beta, 1e-3)
    close(statistics[0], d.double().mean(0), torch.float32)
    close(statistics[1], d.double().var(0, unbiased=False), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("co", [7, 72])
def test_project_and_its_epilogues(co, dtype, few_programs):
    group = make_candidates(2, 4, 7, 6, 1, [5, 20, 24], [3, 3, 3], co, dtype)
    d, g = rows(group.pixels, group.ch, dtype, seed=5), rows(group.pixels, co, dtype, seed=6)
    n, n3 = norm(group.ch, 3), norm(co, 4)
    h = F.relu6(normed(d.double(), n))
    one = replace(group, taps=group.taps[:1])  # all channels as one candidate
    y = h @ group.wp.double().t()
    written, partial, each = project(one, d, n, "train")
    close(written, y, dtype)
    statistics, _ = finish_moments(partial, each, group.pixels, torch.ones(co), torch.zeros(co), 1e-3)
    close(statistics[0], written.double().mean(0), torch.float32)
    close(statistics[1], written.double().var(0, unbiased=False), torch.float32)
    close(project(one, d, n, "eval", norm3=n3)[0], normed(y, n3), dtype)
    _, partial, each = project(group, d, n, "probe", grad=g)
    for j, (first, last) in enumerate(((0, 5), (5, 25), (25, 49))):
        y = h[:, first:last] @ group.wp[:, first:last].double().t()
        mean, m2, sum_g, sum_yg = partial[j].double().unbind(1)
        counts = torch.full((len(mean), 1), float(each), dtype=torch.float64)
        counts[-1] = group.pixels - each * (len(mean) - 1)
        total = (mean * counts).sum(0) / group.pixels
        close(total, y.mean(0), dtype)
        close((m2 + counts * (mean - total) ** 2).sum(0), ((y - y.mean(0)) ** 2).sum(0), dtype)
        close((sum_yg + (mean - total) * sum_g).sum(0), ((y - y.mean(0)) * g.double()).sum(0), dtype, slack=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
def test_depthwise_backward(kernel, stride, dtype, few_programs):
    group = make_candidates(2, 4, 7, 6, stride, [20], [kernel], 4, dtype)
    e = rows(group.pixels, group.ch, dtype, seed=5)
    dz, d = rows(group.out_pixels, group.ch, dtype, seed=6), rows(group.out_pixels, group.ch, dtype, seed=7)
    affine = torch.randn(4, group.ch, generator=torch.Generator().manual_seed(8))
    p, r, mean, t = affine.double()
    dd = p * dz.double() + r * (d.double() - mean) + t
    dd = image_of(dd, 2, *group.size[3:])
    image = image_of(e.double(), 2, 7, 6)
    options = {"stride": stride, "padding": kernel // 2, "groups": group.ch}
    taps = group.taps[0][2].double()
    de, dtaps = depthwise_backward(group, dz, d, affine, e, True)
    close(de, rows_of(torch.nn.grad.conv2d_input(image.shape, taps, dd, **options)), dtype)
    expected = torch.nn.grad.conv2d_weight(image, taps.shape, dd, **options)
    close(dtaps.reshape(taps.shape), expected, torch.float32)
    alone, none = depthwise_backward(group, dz, d, affine, None, True)
    assert torch.equal(alone, de)
    assert none is None
