"""Every op on the device: blocks against float64, a CUDA graph against the same outside, stencils against Triton's.

A result may be twice as far from float64 as eager PyTorch's in the same dtype, plus a floor, and the same bits twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from proxyless_fast.ops.mbconv import mbconv, mbconv_reference, probe

from .device import DTYPES
from .session import Session, first_line

FLOOR = {"bf16": 4e-3, "fp16": 1e-3, "fp32": 2e-6}
EPS = 1e-3
#         batch, in, out, height, width, kernel, stride, expand
CHECKED = [
    (2, 6, 5, 9, 9, 5, 2, 3),
    (1, 8, 8, 7, 11, 7, 1, 6),
    (3, 16, 24, 33, 17, 3, 2, 6),
    (2, 5, 7, 6, 5, 3, 1, 1),
    (64, 24, 40, 56, 56, 5, 2, 6),
    (32, 96, 96, 14, 14, 7, 1, 6),
    (64, 192, 320, 7, 7, 7, 1, 6),
]


def block_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cuda"
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """x, the output's gradient, and float32 parameters of one block, channels-last."""
    b, ci, co, h, w, k, s, e = shape
    g = torch.Generator(device).manual_seed(sum(shape))

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device)

    def norm(c: int) -> list[Tensor]:
        return [torch.rand(c, generator=g, device=device) + 0.5, randn(c)]

    ch = ci * e
    params = [randn(ch, ci, 1, 1) / math.sqrt(ci), *norm(ch)] if e > 1 else []
    params += [randn(ch, 1, k, k) / k, *norm(ch), randn(co, ch, 1, 1) / math.sqrt(ch), *norm(co)]
    x, grad = randn(b, ci, h, w), randn(b, co, (h - 1) // s + 1, (w - 1) // s + 1)
    return *(t.to(dtype, memory_format=torch.channels_last) for t in (x, grad)), params  # type: ignore[return-value]


def gradients(run: Callable[..., Tensor], x: Tensor, grad: Tensor, params: list[Tensor]) -> list[Tensor]:
    x, params = x.detach().requires_grad_(), [p.detach().requires_grad_() for p in params]
    out = run(x, params)
    return [out.detach(), *torch.autograd.grad(out, [x, *params], grad.to(out.dtype))]


def check_block(shape: tuple[int, ...], name: str, policy: str, device: str = "cuda") -> list[str]:
    """Names of what differs from float64 by more than twice the error of eager in the same dtype."""
    dtype, stride = DTYPES[name], shape[6]
    x, grad, params = block_inputs(shape, dtype, device)
    options: dict[str, Any] = {"stride": stride, "eps": EPS}
    half = [p.to(dtype) for p in params]  # both sides see the same rounded weights
    truth = gradients(
        lambda x, p: mbconv_reference(x, p, **options), x.double(), grad.double(), [p.double() for p in half]
    )
    eager = gradients(lambda x, p: mbconv_reference(x, p, **options), x, grad, half)
    ours = gradients(lambda x, p: mbconv(x, p, policy=policy, **options), x, grad, half)
    again = gradients(lambda x, p: mbconv(x, p, policy=policy, **options), x, grad, half)
    frozen = mbconv(x, [p.detach() for p in half], policy=policy, **options)  # no gradient: nothing kept
    leaf = x.detach().requires_grad_()
    (alone,) = torch.autograd.grad(mbconv(leaf, half, policy=policy, **options), leaf, grad)  # weights are frozen
    bad = [] if torch.equal(frozen, ours[0]) else ["forward without gradients"]
    bad += [] if (alone - ours[1]).norm() <= FLOOR[name] * ours[1].norm() else ["dx alone"]
    for i, (a, twice, b, t) in enumerate(zip(ours, again, eager, truth, strict=True)):
        error, allowed = ((v.double() - t).norm() / t.norm() for v in (a, b))
        label = ["out", "dx"][i] if i < 2 else f"gradient of parameter {i - 2}"
        bad += [f"{label}: {error:.1e}, eager {allowed:.1e}"] if not error <= 2 * allowed + FLOOR[name] else []
        bad += [] if torch.equal(a, twice) else [f"{label}: other bits the second time"]
    gates = probe(x, grad, [half, half], **options)
    gate, scale = (truth[0] * grad.double()).sum(), (truth[0] * grad.double()).norm()
    allowed = (eager[0].double() * grad.double()).sum() - gate
    if not ((gates.double() - gate).abs() <= 2 * allowed.abs() + FLOOR[name] * scale).all():
        bad.append(f"gates: {gates.tolist()}, {gate.item()} expected")
    return bad


def check_graph() -> list[str]:
    """A block's forward and backward in a CUDA graph gives the bits that it gives outside."""
    x, grad, params = block_inputs(CHECKED[4], torch.bfloat16)
    run = lambda: gradients(lambda x, p: mbconv(x, p, stride=2, eps=EPS), x, grad, params)  # noqa: E731
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    torch.cuda.synchronize()
    return [] if all(map(torch.equal, captured, expected)) else ["CUDA graph: other bits than outside"]


def check_stencils() -> list[str]:
    """The CUDA C++ stencils against Triton's depthwise kernels, where they are built."""
    from proxyless_fast.ops.gpu.host import stencils

    if not stencils.are_built():
        return []
    bad = []
    chosen = stencils.can_take
    for shape in CHECKED:
        x, grad, params = block_inputs(shape, torch.float32)
        both = []
        for use in (chosen, lambda *_: False):
            stencils.can_take = use
            both.append(gradients(lambda x, p: mbconv(x, p, stride=shape[6], eps=EPS), x, grad, params))  # noqa: B023
        stencils.can_take = chosen
        if any((a - b).norm() > 1e-5 * b.norm() + 1e-6 for a, b in zip(*both, strict=True)):
            bad.append(f"stencils differ from Triton's kernels at {shape}")
    return bad


def measure(session: Session) -> list[str]:
    """What is wrong: nothing, where it should be used. Blocks for which there is no time are left out, and named."""
    failures = []
    for shape in CHECKED:
        for name in DTYPES:
            for policy in ("fast", "lean"):
                if not session.over(f"correctness, {shape} {name} {policy}"):
                    try:
                        found = check_block(shape, name, policy, session.settings.device)
                    except Exception as error:  # an op that raises is wrong too
                        found = [first_line(error)]
                    failures += [f"{shape} {name} {policy}: {text}" for text in found]
    if session.device.name == "cuda":
        failures += check_graph() + check_stencils()
    session.report["correctness"] = failures
    return failures
