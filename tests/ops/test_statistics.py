"""Gram statistics and the gate dot product: error against float64 at most twice eager's, gradcheck, opcheck."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import proxyless_fast as pf
from proxyless_fast.ops import gate_dot, gate_dot_reference, gram, gram_reference

ops = torch.ops.proxyless_fast


def sample_inputs(dtype=torch.float32):
    """Shapes and layouts that kernels trip over; feeds parity, gradcheck (through float64) and opcheck."""
    generator = torch.Generator().manual_seed(7)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    wide = randn(2, 40, 9, 11)
    yield "contiguous", randn(3, 7, 5, 6)
    yield "channels_last", randn(2, 33, 7, 5).contiguous(memory_format=torch.channels_last)
    yield "sliced channels", wide[:, 3:20]
    yield "sliced pixels", wide[:, :, 1:8:2, 2:9]
    yield "transposed", wide.transpose(2, 3)
    yield "one pixel", randn(1, 5, 1, 1)
    yield "one channel", randn(4, 1, 3, 3)
    yield "far mean", randn(4, 12, 8, 8) + 100
    yield "constant channel", torch.cat([randn(2, 3, 4, 4), torch.full((2, 1, 4, 4), 3.0, dtype=dtype)], 1)


CASES = dict(sample_inputs())


def relative(value, truth):
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("name", CASES)
def test_gram_is_as_exact_as_eager(name):
    x = CASES[name]
    truth = gram_reference(x.double())
    eager = gram_reference(x)
    ours = gram(x)
    for value, reference, expected in zip(ours, eager, truth, strict=True):
        assert relative(value, expected) <= 2 * relative(reference, expected) + 1e-7


@pytest.mark.parametrize("name", CASES)
def test_gram_in_float64(name):
    x = CASES[name].double()
    for value, expected in zip(gram(x), gram_reference(x), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 70), st.integers(1, 13), st.integers(1, 13), st.booleans())
def test_gram_of_any_shape(b, c, h, w, last):
    x = torch.randn(b, c, h, w, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    for value, expected in zip(gram(x), gram_reference(x), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_gate_dot(name):
    a = CASES[name]
    b = torch.randn_like(a)
    truth = gate_dot_reference(a.double(), b.double())
    scale = (a.double() * b.double()).abs().sum()
    assert (gate_dot(a, b).double() - truth).abs() <= 2 * (
        gate_dot_reference(a, b).double() - truth
    ).abs() + 1e-7 * scale
    torch.testing.assert_close(gate_dot(a.double(), b.double()), truth, rtol=1e-12, atol=1e-12)


def test_gate_dot_of_millions_keeps_its_digits():
    a = torch.full((5_000_000,), 0.1)
    assert relative(gate_dot(a, a), gate_dot_reference(a.double(), a.double())) < 1e-6


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_threads(threads):
    x = torch.randn(8, 24, 40, 40)
    before = torch.get_num_threads()
    expected = [*gram(x), gate_dot(x, x)]
    try:
        torch.set_num_threads(threads)
        for value, first in zip([*gram(x), gate_dot(x, x)], expected, strict=True):
            assert torch.equal(value, first)
    finally:
        torch.set_num_threads(before)


def test_gradcheck():
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gram, (x,))
    assert torch.autograd.gradcheck(gate_dot, (x, y))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    for _, x in sample_inputs(dtype):
        x = x.detach().requires_grad_()
        torch.library.opcheck(ops.gram.default, (x,))
        torch.library.opcheck(ops.gate_dot.default, (x, torch.randn_like(x)))


@pytest.mark.slow
@pytest.mark.parametrize("isa", pf.build_info()["instruction_sets"])
def test_every_instruction_set(isa, tmp_path):
    flags = {"avx2": "avx2", "avx512": "avx512f"}
    if isa in flags and flags[isa] not in _cpu_flags():
        pytest.skip(f"this processor has no {isa}")
    code = (
        "import torch, proxyless_fast as pf\n"
        "from proxyless_fast.ops import *\n"
        f"assert pf.instruction_set() == {isa!r}\n"
        "x = torch.randn(3, 37, 9, 8, generator=torch.Generator().manual_seed(0))\n"
        "for x in (x, x.double()):\n"
        "    for a, b in zip(gram(x), gram_reference(x.double())):\n"
        "        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)\n"
        "    dot, exact = gate_dot(x, x).double(), gate_dot_reference(x.double(), x.double())\n"
        "    rtol = max(4 * torch.finfo(x.dtype).eps, 1e-12)  # the exact one is in float64 itself\n"
        "    torch.testing.assert_close(dot, exact, rtol=rtol, atol=0)\n"
    )
    run = run_with(isa, code, tmp_path)
    assert run.returncode == 0, run.stderr


def run_with(isa, code, folder):
    """Run code in a fresh interpreter, away from the checkout: an installed package must not be shadowed by it."""
    environment = {**os.environ, "PROXYLESS_FAST_ISA": isa}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True)


def _cpu_flags():
    try:
        with open("/proc/cpuinfo") as file:
            return file.read().split()
    except OSError:
        return []


@pytest.mark.slow
def test_unknown_instruction_set_is_refused(tmp_path):
    code = "import torch, proxyless_fast as pf\npf.instruction_set()"
    run = run_with("mmx", code, tmp_path)
    assert run.returncode != 0 and "PROXYLESS_FAST_ISA is 'mmx'" in run.stderr


@pytest.mark.parametrize(
    "call",
    [
        lambda: gram(torch.zeros(3, 4)),
        lambda: gram(torch.zeros(0, 4, 2, 2)),
        lambda: gram(torch.zeros(1, 4, 2, 2, dtype=torch.int64)),
        lambda: gate_dot(torch.zeros(3), torch.zeros(4)),
        lambda: gate_dot(torch.zeros(3), torch.zeros(3, dtype=torch.float64)),
    ],
)
def test_wrong_arguments(call):
    with pytest.raises(ValueError, match=r"gram: x must|gate_dot: a and b must"):
        call()
