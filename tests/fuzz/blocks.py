"""Blocks edited at random by every way torch offers, beside plain torch and float64: all passes, probes, statistics.

`python -m tests.fuzz.blocks [--seconds N] [--seed S] [--cases N]`. A case is a block, or a mixed op of blocks, that
runs, is edited, and runs again, up to four times. Prints the failing case with its seed and exits with 1.
"""

from __future__ import annotations

import copy
import random
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import proxyless_fast as pf
from proxyless_fast.blocks import ConvLayer, MBConv, ResidualBlock
from proxyless_fast.costs import cost_of
from tests.fuzz._command import from_command_line
from tests.fuzz._edits import EDITS, normal
from tests.fuzz.layouts import LAYOUTS

ACTS = ("relu6", "relu", "silu", "hardswish", "identity")
# Of the largest value: what another order of summing may change. A batch norm of few values makes more of it.
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-11}


class Wrong(Exception):
    """The engine computed something else than plain torch."""


class PlainMBConv(nn.Module):
    """What an MBConv is: its three groups, one after the other."""

    def forward(self, x):
        for group in (self.inverted_bottleneck, self.depth_conv, self.point_linear):
            x = x if group is None else group(x)
        return x


class PlainConvLayer(nn.Sequential):
    """What a ConvLayer is."""


PLAIN = {MBConv: PlainMBConv, ConvLayer: PlainConvLayer}


class Trio:
    """One block three times: ours, the same as plain torch runs it, and the latter in float64."""

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        self.ours = block.to(dtype)
        self.eager, self.truth = copy.deepcopy(block), copy.deepcopy(block).double()
        for twin in (self.eager, self.truth):
            twin.__class__ = PLAIN[type(block)]
            twin.__dict__.pop("policy", None)

    @property
    def all(self) -> tuple[nn.Module, ...]:
        return self.ours, self.eager, self.truth

    def edit(self, seed: int) -> str:
        """One edit of all three; its name, with "refused" where torch did not let it be made."""
        edit, refused = random.Random(seed).choice(EDITS), []
        for block in self.all:
            try:
                edit(block, random.Random(seed + 1))
            except Exception as error:
                refused.append(type(error).__name__)
        if len(refused) not in (0, 3):
            raise Wrong(f"{edit.__name__} could be made on some only: {refused}")
        return edit.__name__ + (" (refused)" if refused else "")


def drawn_block(draw: random.Random, channels: int, out: int | None = None, stride: int | None = None) -> nn.Module:
    stride = draw.choice((1, 1, 2)) if stride is None else stride
    out = draw.choice((channels, 5, 24)) if out is None else out
    if draw.random() < 0.75:
        block: Any = MBConv(channels, out, draw.choice((3, 5, 7)), stride, draw.choice((1, 2, 3, 6)), draw.choice(ACTS))
        block.policy = draw.choice(("fast", "fast", "lean", "off"))
    else:
        block = ConvLayer(channels, out, draw.choice((1, 3, 5)), stride, draw.choice((*ACTS, None)))
    with torch.no_grad():
        for p in block.parameters():
            p.add_(normal(draw, p), alpha=0.2)
    return block.train(draw.random() < 0.75)


def outcome(run: Callable, *args: Any) -> dict[str, Tensor | None] | Exception:
    try:
        return run(*args)
    except Wrong:
        raise
    except Exception as error:
        return error


def leaves(modules: tuple[nn.Module, ...]) -> dict[str, Tensor | None]:
    """Gradients and buffers, and takes the gradients away."""
    found: dict[str, Tensor | None] = {}
    for i, module in enumerate(modules):
        for name, p in module.named_parameters():
            found[f"{i}.{name}.grad"], p.grad = p.grad, None
        found |= {f"{i}.{name}": b.clone() for name, b in module.named_buffers()}
    return found


def passed(net: nn.Module, x: Tensor, grad: bool, seed: int) -> dict[str, Tensor | None]:
    draw = random.Random(seed)
    x = draw.choice(LAYOUTS)(x.clone(), draw).detach().requires_grad_(grad)
    out = net(x)
    if out.requires_grad:
        # The gradient of a plain sum is one number, broadcast.
        draw.choice((out * weights_like(out), 3 * out))[..., draw.randrange(2) :].sum().backward()
    return {"output": out.detach(), "x.grad": x.grad, **leaves((net,))}


def weights_like(out: Tensor) -> Tensor:
    return normal(random.Random(out.numel()), out)


def gated(op: pf.MixedOp, x: Tensor) -> dict[str, Tensor | None]:
    """The arch step of our mixed op."""
    out = op(x)
    (out * weights_like(out)).sum().backward()
    found = {"output": out.detach(), "alpha": op.alpha.grad, **leaves(tuple(op.candidates))}
    op.alpha.grad = None
    return found


def by_definition(op: pf.MixedOp, blocks: list[nn.Module], x: Tensor) -> dict[str, Tensor | None]:
    """The same by eq. 4: every gated candidate's output written out, and p_i (g_i - <p, g>)."""
    outputs = {op.active: blocks[op.active](x)}
    with torch.no_grad():
        outputs |= {i: blocks[i](x) for i in op.gated_indices if i != op.active}
    if len({out.shape for out in outputs.values()}) > 1 or x._version:
        raise ValueError("candidates differ in shape, or change the input that they share")
    grad = weights_like(outputs[op.active])
    if outputs[op.active].requires_grad:
        (outputs[op.active] * grad).sum().backward()
    alpha = op.alpha.detach().double().requires_grad_()
    index = list(op.gated_indices)
    p = torch.softmax(alpha[index], 0)
    gates = torch.stack([(outputs[i].detach() * grad).sum().double() for i in index])
    (p * gates).sum().backward()
    return {"output": outputs[op.active].detach(), "alpha": alpha.grad, **leaves(tuple(blocks))}


def compare(found: list, dtype: torch.dtype) -> None:
    """Raises Wrong unless ours is as near to the truth as eager is, or both raised."""
    ours, eager, truth = found
    if any(isinstance(result, Exception) for result in found):
        if not (isinstance(ours, Exception) and isinstance(eager, Exception)):
            raise Wrong(f"ours gave {brief(ours)}, plain torch {brief(eager)}")
        return
    if ours.keys() != eager.keys():
        raise Wrong(f"names differ: {ours.keys() ^ eager.keys()}")
    # A gradient may be a sum of large numbers that is zero: the largest of a case says how large those can be.
    scale = max((float(torch.linalg.vector_norm(t.double())) for t in truth.values() if t is not None), default=0.0)
    for name, exact in truth.items():
        mine, theirs = ours[name], eager[name]
        if (mine is None) != (theirs is None) or (mine is not None and mine.shape != theirs.shape):
            raise Wrong(f"{name}: ours {mine!r:.200}, plain torch {theirs!r:.200}")
        if mine is None or exact is None or not exact.numel():
            continue
        errors = [torch.linalg.vector_norm(value.double() - exact.double()) for value in (mine, theirs)]
        allowed = 2 * errors[1] + CLOSE[dtype] * scale
        if not errors[0] <= allowed and bool(torch.isfinite(theirs).all() and torch.isfinite(exact).all()):
            raise Wrong(f"{name}: error {errors[0]:.3g}, allowed {allowed:.3g}; eager's {errors[1]:.3g}")


def brief(result: Any) -> str:
    return repr(result) if isinstance(result, Exception) else "numbers"


def one_block(draw: random.Random, dtype: torch.dtype, log: list[str]) -> None:
    channels = draw.choice((3, 4, 8, 17))
    trio = Trio(drawn_block(draw, channels), dtype)
    nets: Any = trio.all
    square = type(trio.ours) is MBConv and trio.ours.out_channels == channels and trio.ours.stride == 1
    if square and draw.random() < 0.5:
        nets = tuple(ResidualBlock(block, shortcut=True) for block in trio.all)
    x = drawn_image(draw, channels, dtype)
    for i in range(draw.choice((2, 3, 4, 5))):
        if i:
            log.append(trio.edit(draw.randrange(2**31)))
            x = draw.choice((x, drawn_image(draw, channels, dtype)))
        grad, seed, images = draw.random() < 0.8, draw.randrange(2**31), (x, x, x.double())
        found = [outcome(passed, net, image, grad, seed) for net, image in zip(nets, images, strict=True)]
        compare(found, dtype)
        if any(isinstance(result, Exception) for result in found):
            return
        log[-1:] = [f"{name}, {told(trio, x, draw.random() < 0.1)}" for name in log[-1:]]


def drawn_image(draw: random.Random, channels: int, dtype: torch.dtype) -> Tensor:
    return normal(draw, torch.zeros(0, dtype=dtype), draw.choice((2, 3)), channels, *draw.choices(range(4, 10), k=2))


def told(trio: Trio, x: Tensor, measured: bool) -> str:
    """Whether the block says that it runs fused; that it tells why not, and costs what its modules do or nothing."""
    block: Any = trio.ours
    fused, reason = block.fused(x)
    if fused == bool(reason):
        raise Wrong(f"fused(x) is {fused, reason!r}")
    if measured:
        with torch.no_grad():
            block(x), trio.truth(x.double())  # so that all running statistics have moved once more
            with FlopCounterMode(display=False) as counter:
                out = trio.eager(x)
        try:
            shape = cost_of("block", block, (*x.shape[2:], x.shape[1]))
        except ValueError:
            return "not fused" if reason else "fused"
        macs, size = counter.get_total_flops() // (2 * len(x)), (*out.shape[2:], out.shape[1])
        if shape is None or (shape.macs, shape.output) != (macs, size):
            raise Wrong(f"costs are {shape}, measured {macs} multiply-accumulates and output {size}")
    return "not fused" if reason else "fused"


def one_layer(draw: random.Random, dtype: torch.dtype, log: list[str]) -> None:
    channels, out, stride = draw.choice((4, 8)), draw.choice((4, 6)), draw.choice((1, 2))
    trios = [Trio(drawn_block(draw, channels, out, stride), dtype) for _ in range(draw.choice((2, 3)))]
    op = pf.MixedOp([trio.ours for trio in trios]).to(dtype)
    for i in range(draw.choice((2, 3, 4))):
        if i:
            place = draw.randrange(len(trios))
            log.append(f"candidate {place}: {trios[place].edit(draw.randrange(2**31))}")
        with torch.no_grad():
            op.alpha.copy_(normal(draw, op.alpha))
        first, second = draw.sample(range(len(trios)), 2)
        op.activate(first, *(("full",) if draw.random() < 0.6 else ("two", second)))
        x = drawn_image(draw, channels, dtype)
        found = [
            outcome(gated, op, x.clone()),
            outcome(by_definition, op, [trio.eager for trio in trios], x.clone()),
            outcome(by_definition, op, [trio.truth for trio in trios], x.double().clone()),
        ]
        compare(found, dtype)
        if any(isinstance(result, Exception) for result in found):
            return
        log[-1:] = [f"{name}, {told(trios[place], x, False)}" for name in log[-1:]]


def main(seconds: float, seed: int, cases: int) -> int:
    warnings.simplefilter("ignore")
    start, edits, fused = time.monotonic(), 0, 0
    for case in range(seed, seed + cases):
        if time.monotonic() - start > seconds:
            break
        draw, log = random.Random(case), []
        torch.manual_seed(case)
        dtype = torch.float64 if draw.random() < 0.7 else torch.float32
        try:
            (one_block if draw.random() < 0.7 else one_layer)(draw, dtype, log)
        except Wrong as wrong:
            print(f"blocks: case {case} ({dtype}), edits: {', '.join(log) or 'none'}: {wrong}")
            return 1
        edits += sum("refused" not in name for name in log)
        fused += sum("refused" not in name and name.endswith(", fused") for name in log)
    print(f"blocks: {edits:,} edits in {case - seed:,} cases, {fused:,} of them run fused, none computed wrong")
    return 0


if __name__ == "__main__":
    from_command_line(main, __doc__)
