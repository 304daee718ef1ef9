"""Each kernel by itself, in the interpreter, against float64."""

import pytest
import torch
import torch.nn.functional as F

from proxyless_fast.ops.triton import configs, gradients, launch, passes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture
def few_programs(monkeypatch):
    """So few programs and tiles that every loop over tiles, and the merging of partial moments, runs."""

    def config(kernel, x, width, **at_most):
        found = configs.config(kernel, x.dtype, width, 90, **at_most)
        return found._replace(programs=3, tile=found.tile | {"BM": 16})

    monkeypatch.setattr(launch, "config", config)
    monkeypatch.setattr(passes, "MOST_TILES", 2)


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


def block(batch, ci, height, width, stride, widths, kernels, co, dtype, activation="relu6"):
    """A Block of candidates of the given widths side by side, and the same weights in float64."""
    x = rows(batch * height * width, ci, dtype)
    g = torch.Generator().manual_seed(1)
    ch = sum(widths)
    w1, wp = torch.randn(ch, ci, generator=g).to(dtype) / 4, torch.randn(co, ch, generator=g).to(dtype) / 4
    taps, first = [], 0
    for c, k in zip(widths, kernels, strict=True):
        taps.append((first, k, torch.randn(c, 1, k, k, generator=g).to(dtype) / k))
        first += c
    size = (batch, height, width, (height - 1) // stride + 1, (width - 1) // stride + 1)
    return passes.Block(x, size, w1, taps, wp, ch, stride, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pixels, channels", [(1, 3), (70, 16), (333, 40), (50, 130)])
def test_gram(pixels, channels, dtype):
    x = rows(pixels, channels, dtype)
    exact = x.double()
    mean, cov = passes.gram_rows(x)
    close(mean, exact.mean(0), dtype)
    centred = exact - exact.mean(0)
    expected = centred.t() @ centred / pixels
    assert (cov - expected).norm() <= 4 * EPS[dtype] * expected.norm() + 1e-12
    assert torch.equal(cov, cov.t())


def test_gram_of_a_far_mean(few_programs):
    x = rows(200, 20, torch.float32) + 100
    exact = x.double()
    mean, cov = passes.gram_rows(x)
    close(mean, exact.mean(0), torch.float32)
    centred = exact - exact.mean(0)
    close(cov, centred.t() @ centred / 200, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu6", "relu", "silu", "hardswish", "identity"])
def test_expand(activation, dtype):
    b = block(1, 10, 7, 5, 1, [37], [3], 4, dtype, activation)
    n = norm(37, 2)
    e = passes.expand(b, n)
    u = normed(b.x.double() @ b.w1.double().t(), n)
    acts = {"relu6": F.relu6, "relu": F.relu, "silu": F.silu, "hardswish": F.hardswish, "identity": lambda t: t}
    close(e, acts[activation](u), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_depthwise_side_by_side(stride, dtype, few_programs):
    b = block(2, 4, 7, 6, stride, [5, 20], [5, 3], 4, dtype)
    e = rows(b.pixels, b.ch, dtype, seed=5)
    d, partial, each = passes.depthwise(b, e, moments=True)
    image = e.double().view(2, 7, 6, -1).permute(0, 3, 1, 2)
    expected = torch.cat(
        [
            F.conv2d(image[:, f : f + t.shape[0]], t.double(), stride=stride, padding=k // 2, groups=t.shape[0])
            for f, k, t in b.taps
        ],
        1,
    )
    close(d, passes.rows_of(expected), dtype)
    gamma, beta = torch.ones(b.ch), torch.zeros(b.ch)
    statistics, _ = passes.finish_moments(partial, each, b.out_pixels, gamma, beta, 1e-3)
    close(statistics[0], d.double().mean(0), torch.float32)
    close(statistics[1], d.double().var(0, unbiased=False), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("co", [7, 72])
def test_project_and_its_epilogues(co, dtype, few_programs):
    b = block(2, 4, 7, 6, 1, [5, 20, 24], [3, 3, 3], co, dtype)
    d, g = rows(b.pixels, b.ch, dtype, seed=5), rows(b.pixels, co, dtype, seed=6)
    n, n3 = norm(b.ch, 3), norm(co, 4)
    h = F.relu6(normed(d.double(), n))
    one = passes.Block(b.x, b.size, b.w1, b.taps[:1], b.wp, b.ch, 1, "relu6")  # all channels as one candidate
    y = h @ b.wp.double().t()
    written, partial, each = passes.project(one, d, n, "train")
    close(written, y, dtype)
    statistics, _ = passes.finish_moments(partial, each, b.pixels, torch.ones(co), torch.zeros(co), 1e-3)
    close(statistics[0], written.double().mean(0), torch.float32)
    close(statistics[1], written.double().var(0, unbiased=False), torch.float32)
    close(passes.project(one, d, n, "eval", norm3=n3)[0], normed(y, n3), dtype)
    _, partial, each = passes.project(b, d, n, "probe", grad=g)
    for j, (first, last) in enumerate(((0, 5), (5, 25), (25, 49))):
        y = h[:, first:last] @ b.wp[:, first:last].double().t()
        mean, m2, sum_g, sum_yg = partial[j].double().unbind(1)
        counts = torch.full((len(mean), 1), float(each), dtype=torch.float64)
        counts[-1] = b.pixels - each * (len(mean) - 1)
        total = (mean * counts).sum(0) / b.pixels
        close(total, y.mean(0), dtype)
        close((m2 + counts * (mean - total) ** 2).sum(0), ((y - y.mean(0)) ** 2).sum(0), dtype)
        close((sum_yg + (mean - total) * sum_g).sum(0), ((y - y.mean(0)) * g.double()).sum(0), dtype, slack=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
def test_depthwise_backward(kernel, stride, dtype, few_programs):
    b = block(2, 4, 7, 6, stride, [20], [kernel], 4, dtype)
    e = rows(b.pixels, b.ch, dtype, seed=5)
    dz, d = rows(b.out_pixels, b.ch, dtype, seed=6), rows(b.out_pixels, b.ch, dtype, seed=7)
    affine = torch.randn(4, b.ch, generator=torch.Generator().manual_seed(8))
    p, r, mean, t = affine.double()
    dd = p * dz.double() + r * (d.double() - mean) + t
    dd = passes.image_of(dd, 2, *b.size[3:])
    image = passes.image_of(e.double(), 2, 7, 6)
    options = {"stride": stride, "padding": kernel // 2, "groups": b.ch}
    taps = b.taps[0][2].double()
    de, dtaps = gradients._depthwise(b, dz, d, affine, e, True)
    close(de, passes.rows_of(torch.nn.grad.conv2d_input(image.shape, taps, dd, **options)), dtype)
    expected = torch.nn.grad.conv2d_weight(image, taps.shape, dd, **options)
    close(dtaps.reshape(taps.shape), expected, torch.float32)
    alone, none = gradients._depthwise(b, dz, d, affine, None, True)
    assert torch.equal(alone, de)
    assert none is None
