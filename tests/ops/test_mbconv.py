"""The fused MBConv against plain torch: values, gradients, gates, running statistics; gradcheck, opcheck, same bits."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch

import proxyless_fast as pf
from proxyless_fast.ops import gram
from proxyless_fast.ops.mbconv import can_run_mbconv, mbconv, mbconv_reference, probe, probe_reference

EPS = 1e-3


@dataclass(frozen=True)
class Sample:
    """One shape and the ways to run it."""

    batch: int
    channels: int
    out: int
    height: int
    width: int
    kernel: int = 3
    stride: int = 1
    expand: int = 6
    activation: str = "relu6"
    training: bool = True
    policy: str = "fast"
    mean: float = 0.0
    layout: str = "channels_last"
    constant: bool = False
    shortcut: bool = False

    @property
    def options(self):
        return {"stride": self.stride, "activation": self.activation, "training": self.training, "eps": EPS}

    def tensors(self, dtype=torch.float64):
        """x, params, running, grad: drawn in float64 but exact in float32, so that all dtypes see the same values."""
        g = torch.Generator().manual_seed(hash((self.batch, self.channels, self.kernel, self.expand)) % 1000)
        wide = self.channels * self.expand

        def draw(*shape, scale=1.0, shift=0.0):
            return (torch.randn(*shape, generator=g) * scale + shift).double()

        x = draw(self.batch, self.channels, self.height, self.width, shift=self.mean)
        if self.constant:
            x[:, 0] = 3.0
        expand = [draw(wide, self.channels, 1, 1, scale=self.channels**-0.5)] if self.expand > 1 else []
        depthwise = draw(wide, 1, self.kernel, self.kernel, scale=1 / self.kernel)
        weights = [*expand, depthwise, draw(self.out, wide, 1, 1, scale=wide**-0.5)]
        params, running = [], []
        for w in weights:
            params += [w, draw(w.shape[0], scale=0.3, shift=1.0), draw(w.shape[0])]
            running += [draw(w.shape[0]), draw(w.shape[0]).abs() + 0.5]
        height, width = (self.height - 1) // self.stride + 1, (self.width - 1) // self.stride + 1
        grad = draw(self.batch, self.out, height, width)
        x = x.to(dtype)
        if self.layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        elif self.layout == "sliced":
            x = torch.cat([x, x], 1).repeat(1, 1, 1, 2)[:, : self.channels, :, : self.width]
        return x, [p.to(dtype) for p in params], [r.to(dtype) for r in running], grad.to(dtype)


def sample_inputs():
    base = Sample(2, 16, 24, 12, 12)
    yield base
    for kernel in (3, 5, 7):
        for stride in (1, 2):
            yield Sample(3, 16, 24, 11, 13, kernel, stride, 3)
            yield Sample(2, 5, 7, 9, 8, kernel, stride, 4, policy="lean")
    yield Sample(1, 24, 40, 28, 28, 5, 2)
    yield Sample(1, 8, 8, 1, 7, 3, 1, 2)
    yield Sample(2, 3, 4, 2, 1, 7, 2, 8)
    yield Sample(40, 20, 33, 7, 7, 7, 1, 6)
    yield Sample(20, 12, 12, 4, 4, 3, 2, 3, policy="lean")
    yield Sample(2, 32, 16, 14, 14, 3, 1, 1)
    yield Sample(3, 19, 16, 9, 9, 5, 2, 1, policy="lean")
    yield Sample(1, 16, 24, 112, 112, 3, 2, 6)
    yield Sample(2, 24, 24, 56, 56, 7, 1, 3)
    for activation in ("relu", "silu", "hardswish", "identity"):
        yield replace(base, activation=activation)
        yield replace(base, activation=activation, expand=1, stride=2, training=False)
    yield replace(base, training=False)
    yield replace(base, training=False, policy="lean", kernel=5, stride=2)
    yield replace(base, layout="contiguous")
    yield replace(base, layout="sliced", stride=2)
    yield replace(base, mean=100.0)
    yield replace(base, mean=100.0, expand=1, kernel=5)
    yield replace(base, constant=True)
    yield replace(base, out=16, shortcut=True)
    yield replace(base, out=16, shortcut=True, training=False, policy="lean", layout="sliced")
    yield replace(base, out=16, shortcut=True, expand=1, activation="silu")


SAMPLES = list(sample_inputs())
SMALL = [
    Sample(2, 3, 4, 4, 5, 3, 1, 2, "silu"),
    Sample(2, 3, 4, 5, 5, 5, 2, 2, "hardswish", policy="lean"),
    Sample(2, 3, 2, 4, 4, 3, 2, 1, "silu"),
    Sample(2, 3, 2, 3, 4, 7, 1, 3, "identity", training=False),
    Sample(2, 2, 3, 4, 4, 3, 1, 2, "relu6"),
]
ids = lambda s: str(s).removeprefix("Sample")  # noqa: E731


def everything(function, x, params, running, grad, sample, **more):
    """Output, gradients and running statistics by name."""
    x = x.detach().requires_grad_()
    params = [p.clone().requires_grad_() for p in params]
    running = [r.clone() for r in running]
    out = function(x, params, running, **sample.options, shortcut=sample.shortcut, **more)
    grads = torch.autograd.grad(out, [x, *params], grad)
    names = [f"d params[{i}]" for i in range(len(params))]
    return {
        "out": out.detach(),
        "dx": grads[0],
        **dict(zip(names, grads[1:], strict=True)),
        **{f"running[{i}]": r for i, r in enumerate(running)},
    }


def assert_as_good_as_eager(ours, eager, truth):
    """Largest error at most twice that of eager float32, over a floor of float32's rounding of the largest value."""
    for name, exact in truth.items():
        assert ours[name].shape == exact.shape
        error = (ours[name].double() - exact).abs().max().item()
        allowed = 2 * (eager[name].double() - exact).abs().max().item() + 4e-6 * exact.abs().max().item() + 1e-7
        assert error <= allowed, f"{name}: error {error:.2e}, eager and rounding allow {allowed:.2e}"


@pytest.mark.parametrize("sample", SAMPLES, ids=ids)
def test_parity(sample):
    truth = everything(mbconv_reference, *sample.tensors(), sample)
    eager = everything(mbconv_reference, *sample.tensors(torch.float32), sample)
    ours = everything(mbconv, *sample.tensors(torch.float32), sample, policy=sample.policy)
    assert_as_good_as_eager(ours, eager, truth)
    assert ours["out"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("sample", SAMPLES, ids=ids)
def test_double_is_exact(sample):
    truth = everything(mbconv_reference, *sample.tensors(), sample)
    ours = everything(mbconv, *sample.tensors(), sample, policy=sample.policy)
    for name, exact in truth.items():
        scale = exact.abs().max().item() + truth["dx"].abs().max().item()  # some gradients are zero but for rounding
        tolerance = 1e-9 if sample.mean else 1e-11
        torch.testing.assert_close(ours[name], exact, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("sample", SAMPLES, ids=ids)
def test_no_grad_output(sample):
    x, params, running, _ = sample.tensors(torch.float32)
    with torch.no_grad():
        alone = mbconv(x, params, [r.clone() for r in running], **sample.options, shortcut=sample.shortcut)
    params = [p.requires_grad_() for p in params]
    kept = mbconv(x, params, running, **sample.options, shortcut=sample.shortcut)
    torch.testing.assert_close(alone, kept.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sample", SAMPLES, ids=ids)
def test_probe(sample):
    """Several candidates of one layer, with and without an expand convolution, sharing x and its statistics."""
    others = [sample, replace(sample, kernel=5, expand=2), replace(sample, kernel=7, expand=1)]

    def gates(function, dtype, **more):
        x, _, _, grad = sample.tensors(dtype)
        params = [s.tensors(dtype)[1] for s in others]
        running = [s.tensors(dtype)[2] for s in others]
        result = function(x, grad, params, running, **sample.options, **more)
        return {"gates": result, **{f"running[{i}]": t for i, t in enumerate(t for r in running for t in r)}}

    truth, eager = gates(probe_reference, torch.float64), gates(probe_reference, torch.float32)
    x = sample.tensors(torch.float32)[0]
    ours = gates(probe, torch.float32, gram=gram(x))
    # A gate is a long sum that nearly cancels; its rounding is that of its terms.
    size = sample.tensors()[3].norm() * sample.out**0.5
    ours["gates"], eager["gates"], truth["gates"] = (g["gates"].double() / size for g in (ours, eager, truth))
    assert_as_good_as_eager(ours, eager, truth)
    double = gates(probe, torch.float64)
    torch.testing.assert_close(double["gates"] / size, truth["gates"], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("sample", [SAMPLES[0], SAMPLES[3], SAMPLES[15], SAMPLES[17]], ids=ids)
def test_input_gradient_alone(sample):
    """Frozen weights (the architecture step): the same input gradient, and none for the weights."""
    x, params, running, grad = sample.tensors(torch.float32)
    whole = everything(mbconv, x, params, running, grad, sample)
    x = x.requires_grad_()
    out = mbconv(x, params, running, **sample.options, shortcut=sample.shortcut)
    out.backward(grad)
    torch.testing.assert_close(x.grad, whole["dx"], rtol=0, atol=1e-5 * whole["dx"].abs().max().item())
    assert all(p.grad is None for p in params)


def test_gradients_asked_for():
    """Only what needs a gradient gets one, be it the input, some weights or nothing else."""
    sample = SAMPLES[0]
    x, params, running, grad = sample.tensors(torch.float32)
    whole = everything(mbconv, x, params, running, grad, sample)
    params[6].requires_grad_()
    mbconv(x, params, running, **sample.options, shortcut=sample.shortcut).backward(grad)
    torch.testing.assert_close(params[6].grad, whole["d params[6]"], rtol=1e-5, atol=1e-5)
    assert [p.grad is None for p in params] == [i != 6 for i in range(9)]


@pytest.mark.parametrize("sample", SMALL, ids=ids)
def test_gradcheck(sample):
    x, params, running, _ = sample.tensors()
    frozen = [] if sample.training else running

    def function(x, *params):
        return mbconv(x, params, frozen, **sample.options, policy=sample.policy)

    inputs = [t.requires_grad_() for t in (x, *params)]
    assert torch.autograd.gradcheck(function, inputs, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sample", SMALL, ids=ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(sample, dtype):
    ops = torch.ops.proxyless_fast
    x, params, running, grad = sample.tensors(dtype)
    mean, cov = gram(x)
    tail = (sample.stride, sample.activation, sample.training)
    forward = (x, params, running, mean, cov, *tail, EPS)
    torch.library.opcheck(ops.mbconv, (*forward, 0))
    _, y, d, statistics = ops.mbconv(*forward, 2)
    leaves = (x.requires_grad_(), [p.requires_grad_() for p in params], *forward[2:], 2)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.mbconv, leaves, test_utils=tests)
    x, params = x.detach(), [p.detach() for p in params]
    for weights in (True, False):
        torch.library.opcheck(
            ops.mbconv_backward, (grad, x, y, d, statistics, params, mean, cov, *tail, EPS, True, weights)
        )
    torch.library.opcheck(
        ops.mbconv_probe,
        (x, grad, params * 2, [r.clone() for r in running * 2], [len(params)] * 2, mean, cov, *tail, 0.1, EPS),
    )
    torch.library.opcheck(ops.update_running, (statistics, [r.clone() for r in running], 10, 10, 0.1))


@pytest.mark.parametrize("sample", [SAMPLES[0], SAMPLES[4], SAMPLES[16], SAMPLES[18]], ids=ids)
def test_same_bits_again(sample):
    tensors = sample.tensors(torch.float32)
    first, second = (everything(mbconv, *tensors, sample, policy=sample.policy) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(second[name], value), name


@pytest.mark.parametrize("sample", SAMPLES[:6] + SAMPLES[15:20], ids=ids)
def test_scratch_memory_is_written_before_it_is_read(sample):
    """With every fresh tensor and all scratch memory full of NaN, nothing changes."""
    tensors = sample.tensors(torch.float32)
    clean = everything(mbconv, *tensors, sample, policy=sample.policy)
    x, params, running, grad = tensors
    gates = probe(x, grad, [params], [[r.clone() for r in running]], **sample.options)
    torch.use_deterministic_algorithms(True)  # with torch.utils.deterministic.fill_uninitialized_memory, on by default
    try:
        poisoned = everything(mbconv, *tensors, sample, policy=sample.policy)
        gates_poisoned = probe(x, grad, [params], [[r.clone() for r in running]], **sample.options)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in clean.items():
        assert torch.equal(poisoned[name], value), name
    assert torch.equal(gates, gates_poisoned)


def test_memory_policies_keep_what_they_say():
    x, params, running, _ = Sample(2, 16, 24, 16, 16).tensors(torch.float32)
    x = x.requires_grad_()
    saved = {}
    for policy in ("fast", "lean"):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            mbconv(x, params, running, policy=policy)
        saved[policy] = sum(sizes)
    assert saved["fast"] - saved["lean"] == 96 * 2 * 16 * 16


@pytest.mark.slow
def test_wide_tensor_too_large_for_scratch_memory():
    """More than 128 MiB of d: lean, probe and no-grad passes run image by image, with the same results."""
    sample = Sample(5, 8, 6, 260, 260, 3, 1, 13)
    x, params, running, grad = sample.tensors(torch.float32)
    kept = everything(mbconv, x, params, running, grad, sample, policy="fast")
    streamed = everything(mbconv, x, params, running, grad, sample, policy="lean")
    for name, value in kept.items():
        tolerance = 1e-4 * value.abs().max().item()
        torch.testing.assert_close(streamed[name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    gate = probe(x, grad, [params], **sample.options)
    torch.testing.assert_close(gate[0], (kept["out"] * grad).sum(), rtol=0, atol=1e-4 * grad.norm().item())


@pytest.mark.slow
@pytest.mark.parametrize("isa", pf.build_info()["instruction_sets"])
def test_each_instruction_set(isa):
    """The sweep again in a process that runs with another instruction set."""
    environment = {**os.environ, "PROXYLESS_FAST_ISA": isa}
    found = subprocess.run(
        [sys.executable, "-c", "import proxyless_fast as pf; print(pf.instruction_set())"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if "but this machine runs" in found.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert found.stdout.strip() == isa, found.stderr
    if isa == pf.instruction_set():
        return  # the tests above ran with it
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "parity or double or test_probe or bits"],
        env=environment, check=True,
    )  # fmt: skip


def test_kernels_share_out_their_work():
    """Host code compiled without OpenMP would run every at::parallel_for on one thread, with the same results."""
    assert pf.build_info()["openmp"] == torch.backends.openmp.is_available()


def test_wrong_arguments_are_named():
    x, params, running, grad = SAMPLES[0].tensors(torch.float32)
    with pytest.raises(ValueError, match="stride must be 1 or 2, got 3"):
        mbconv(x, params, running, stride=3)
    with pytest.raises(ValueError, match=r"activation must be relu6, .* got 'gelu'"):
        mbconv(x, params, running, activation="gelu")
    with pytest.raises(ValueError, match=r"expand weight must have shape \[96, 16, 1, 1\]"):
        mbconv(x, [params[0][:, :8], *params[1:]], running)
    with pytest.raises(ValueError, match="third beta must have shape"):
        mbconv(x, [*params[:-1], params[-1][:3]], running)
    with pytest.raises(ValueError, match="policy must be one of lean, fast, got 'greedy'"):
        mbconv(x, params, running, policy="greedy")
    with pytest.raises(ValueError, match="running must hold"):
        mbconv(x, params, running[:4], training=False)
    with pytest.raises(ValueError, match="more than one value per channel"):
        mbconv(x[:1, :, :1, :1], params, running)
    with pytest.raises(ValueError, match="grad must have the shape"):
        probe(x, grad[:, :3], [params], [running])


def test_predicate_says_why_not():
    x, params, _, _ = SAMPLES[0].tensors(torch.float32)
    assert can_run_mbconv(x, params) == (True, "")
    for reason, arguments, options in [
        ("float16", (x.half(), params), {}),
        ("another dtype", (x, [params[0].double(), *params[1:]]), {}),
        ("stride is 3", (x, params), {"stride": 3}),
        ("'gelu'", (x, params), {"activation": "gelu"}),
        ("8 channels of x", (x[:, :8], params), {}),
        ("7 parameters", (x, params[:7]), {}),
        ("kernel is (9, 9)", (x, [*params[:3], torch.zeros(96, 1, 9, 9), *params[4:]]), {}),
        ("meta", (x.to("meta"), params), {}),
    ]:
        fits, why = can_run_mbconv(*arguments, **options)
        assert not fits and reason in why, (reason, why)


def test_benchmark_forward_backward(benchmark):
    sample = SAMPLES[0]
    tensors = sample.tensors(torch.float32)
    benchmark(everything, mbconv, *tensors, sample)


def test_benchmark_probe(benchmark):
    sample = SAMPLES[0]
    x, params, running, grad = sample.tensors(torch.float32)
    benchmark(probe, x, grad, [params] * 2, [running] * 2, **sample.options)
