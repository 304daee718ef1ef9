"""Valid calls of every native op, drawn at random, each with the same in plain torch."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from proxyless_fast.ops.activation import ACTIVATIONS
from proxyless_fast.ops.batch_norm import batch_norm_act_reference, norm_dot_reference
from proxyless_fast.ops.conv import conv_norm_act_reference
from proxyless_fast.ops.depthwise import (
    depthwise_backward_reference,
    depthwise_forward_reference,
    expand_depthwise_backward_reference,
    expand_depthwise_forward_reference,
)
from proxyless_fast.ops.mbconv import mbconv_reference, probe_reference
from proxyless_fast.ops.statistics import gate_dot_reference, gram_reference

NATIVE = torch.ops.proxyless_fast
EPS, MOMENTUM = 1e-3, 0.1
Arguments = dict[str, Any]


class Call(NamedTuple):
    """An op, its arguments by name, and what gives the same tensors in plain torch (None: an output it does not say).

    What a forward op gives its backward (y, d, statistics, ...) is made from the other arguments by `complete`, after
    those have their layout.
    """

    op: str
    arguments: Arguments
    reference: Callable[[Arguments], list[Tensor | None]]
    complete: Callable[[Arguments], Arguments] = dict


class Draw:
    """Tensors drawn by a seed."""

    def __init__(self, draw: random.Random, dtype: torch.dtype) -> None:
        self.random, self.dtype = draw, dtype
        self.generator = torch.Generator().manual_seed(draw.randrange(2**31))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def positive(self, *shape: int) -> Tensor:
        return (torch.rand(*shape, generator=self.generator) + 0.5).to(self.dtype)

    def image(self) -> Tensor:
        size = self.random.choice
        return self.normal(size((1, 2, 3)), size((1, 2, 3, 8, 17)), size((1, 2, 5, 8)), size((1, 3, 4, 9)))

    @property
    def activation(self) -> str:
        return self.random.choice(list(ACTIVATIONS))

    @property
    def training(self) -> bool:
        return self.random.random() < 0.6

    def params(self, inputs: int, out: int, expand: bool, kernel: int) -> list[Tensor]:
        wide = inputs * self.random.choice((1, 2, 3)) if expand else inputs
        shapes = [(wide, inputs, 1, 1)] if expand else []
        found = []
        for shape in [*shapes, (wide, 1, kernel, kernel), (out, wide, 1, 1)]:
            found += [self.normal(*shape) * 0.4, self.positive(shape[0]), self.normal(shape[0])]
        return found

    def running(self, params: list[Tensor]) -> list[Tensor]:
        return [t for gamma in params[1::3] for t in (self.normal(len(gamma)), self.positive(len(gamma)))]


def outputs_of(op: str, arguments: Arguments) -> list[Tensor]:
    """Every tensor that the op returns, and the running statistics that it moved."""
    given = dict(arguments)
    if op in MOVES:
        given["running"] = [t.clone() if isinstance(t, Tensor) else t for t in given["running"]]
    found = getattr(NATIVE, op)(**given)
    flat: list[Tensor] = []
    for item in found if isinstance(found, (tuple, list)) else [found]:
        flat += item if isinstance(item, (tuple, list)) else [] if item is None else [item]
    return flat + (given["running"] if op in MOVES else [])


MOVES = ("mbconv_probe", "update_running")


def gram(draw: Draw) -> Call:
    return Call("gram", {"x": draw.image()}, lambda a: list(gram_reference(a["x"])))


def gate_dot(draw: Draw) -> Call:
    x = draw.image()
    return Call("gate_dot", {"a": x, "b": draw.normal(*x.shape)}, lambda a: [gate_dot_reference(a["a"], a["b"])])


def norm_dot(draw: Draw) -> Call:
    y = draw.image()
    c = y.shape[1]
    statistics = torch.cat([draw.normal(c + draw.random.choice((0, 4))), draw.positive(c)]).double()
    arguments = {
        "grad": draw.normal(*y.shape), "y": y, "statistics": statistics, "gamma": draw.normal(c),
        "beta": draw.normal(c), "eps": EPS,
    }  # fmt: skip
    return Call("norm_dot", arguments, lambda a: [norm_dot_reference(**a)])


def block(draw: Draw) -> Arguments:
    x = draw.image()
    channels, stride = x.shape[1], draw.random.choice((1, 2))
    out = draw.random.choice((channels, 1, 5, 24))
    params = draw.params(channels, out, draw.random.random() < 0.7, draw.random.choice((3, 5, 7)))
    training = draw.training and x.numel() > channels * stride**2 * 2
    return {
        "x": x, "params": params, "running": [] if training else draw.running(params), "mean": None, "cov": None,
        "stride": stride, "activation": draw.activation, "training": training, "eps": EPS,
        "shortcut": stride == 1 and out == channels and draw.random.random() < 0.5,
    }  # fmt: skip


def with_gram(arguments: Arguments) -> Arguments:
    """Mean and covariance as the forward takes them."""
    if not (arguments["training"] and len(arguments["params"]) in (9, 18)):
        return dict(arguments)
    mean, cov = NATIVE.gram(arguments["x"].contiguous())
    return {**arguments, "mean": mean, "cov": cov}


def _block_options(a: Arguments) -> Arguments:
    return {
        "stride": a["stride"], "activation": a["activation"], "training": a["training"], "momentum": MOMENTUM,
        "eps": a["eps"],
    }  # fmt: skip


def mbconv(draw: Draw) -> Call:
    def reference(a: Arguments) -> list[Tensor | None]:
        return [mbconv_reference(a["x"], a["params"], a["running"], shortcut=a["shortcut"], **_block_options(a))]

    return Call("mbconv", {**block(draw), "keep": draw.random.choice((0, 1, 2))}, reference, with_gram)


def mbconv_backward(draw: Draw) -> Call:
    arguments = block(draw)
    x, stride = arguments["x"], arguments["stride"]
    sides = ((side - 1) // stride + 1 for side in x.shape[2:])
    grad, keep = draw.normal(x.shape[0], arguments["params"][-3].shape[0], *sides), draw.random.choice((1, 2))

    def complete(a: Arguments) -> Arguments:
        a = with_gram(a)
        running = a.pop("running")
        forward = {**a, "running": running, "keep": keep}
        for name in ("grad", "input", "weights"):
            forward.pop(name)
        _, y, d, statistics = NATIVE.mbconv(**forward)
        return {**a, "y": y, "d": d, "statistics": statistics}

    def reference(a: Arguments) -> list[Tensor | None]:
        x, params = a["x"].requires_grad_(), [p.requires_grad_() for p in a["params"]]
        out = mbconv_reference(x, params, a["running"], shortcut=a["shortcut"], **_block_options(a))
        found: Any = torch.autograd.grad(out, [x, *params], a["grad"])
        return [found[0] if a["input"] else None, *(found[1:] if a["weights"] else [])]

    arguments |= {"grad": grad, "input": draw.random.random() < 0.8, "weights": draw.random.random() < 0.8}
    return Call("mbconv_backward", arguments, reference, complete)


def mbconv_probe(draw: Draw) -> Call:
    first = block(draw)
    x, stride = first["x"], first["stride"]
    out = first["params"][-3].shape[0]
    blocks = [first["params"], draw.params(x.shape[1], out, draw.random.random() < 0.7, 5)]
    running = [] if first["training"] and draw.random.random() < 0.3 else [draw.running(p) for p in blocks]
    sides = ((side - 1) // stride + 1 for side in x.shape[2:])
    sizes = [len(p) for p in blocks]
    arguments = {
        "x": x, "grad": draw.normal(x.shape[0], out, *sides), "params": [t for p in blocks for t in p],
        "running": [t for r in running for t in r], "sizes": sizes, "mean": None, "cov": None, "momentum": MOMENTUM,
        **{name: first[name] for name in ("stride", "activation", "training", "eps")},
    }  # fmt: skip

    def complete(a: Arguments) -> Arguments:
        mean, cov = NATIVE.gram(a["x"].contiguous()) if a["training"] and 9 in sizes else (None, None)
        return {**a, "mean": mean, "cov": cov}

    def reference(a: Arguments) -> list[Tensor | None]:
        n, m = sizes[0], sizes[0] * 2 // 3
        params = [a["params"][:n], a["params"][n:]]
        running = [a["running"][:m], a["running"][m:]] if a["running"] else []
        return [probe_reference(a["x"], a["grad"], params, running, **_block_options(a)), *a["running"]]

    return Call("mbconv_probe", arguments, reference, complete)


def batch_norm_act(draw: Draw) -> Call:
    x = draw.image()
    c = x.shape[1]
    training = draw.training and x.numel() > c
    arguments = {
        "x": x, "weight": draw.normal(c), "bias": draw.normal(c),
        "running": [] if training else [draw.normal(c), draw.positive(c)], "activation": draw.activation,
        "training": training, "eps": EPS,
    }  # fmt: skip
    return Call("batch_norm_act", arguments, lambda a: [_normed(a)])


def _normed(a: Arguments) -> Tensor:
    mean, var = a["running"] or (None, None)
    options = (a["activation"], a["training"], MOMENTUM, a["eps"])
    return batch_norm_act_reference(a["x"], a["weight"], a["bias"], mean, var, *options)


def batch_norm_act_backward(draw: Draw) -> Call:
    call = batch_norm_act(draw)

    def complete(a: Arguments) -> Arguments:
        forward = {name: value for name, value in a.items() if name != "grad"}
        _, statistics = NATIVE.batch_norm_act(**forward)
        return {name: value for name, value in a.items() if name != "running"} | {"statistics": statistics}

    def reference(a: Arguments) -> list[Tensor | None]:
        inputs = [a[name].requires_grad_() for name in ("x", "weight", "bias")]
        return list(torch.autograd.grad(_normed(a), inputs, a["grad"]))

    arguments = {**call.arguments, "grad": draw.normal(*call.arguments["x"].shape)}
    return Call("batch_norm_act_backward", arguments, reference, complete)


def conv_norm_act(draw: Draw) -> Call:
    x = draw.image()[:, :3]
    out, stride, kernel = draw.random.choice((1, 4, 17)), draw.random.choice((1, 2)), draw.random.choice((1, 3, 5))
    training = draw.training and x.numel() > x.shape[1] * stride**2 * 2
    arguments = {
        "x": x, "weight": draw.normal(out, x.shape[1], kernel, kernel) * 0.4, "gamma": draw.normal(out),
        "beta": draw.normal(out), "running": [] if training else [draw.normal(out), draw.positive(out)],
        "stride": stride, "activation": draw.activation, "training": training, "eps": EPS,
    }  # fmt: skip
    return Call("conv_norm_act", arguments, lambda a: [_convolved(a)])


def _convolved(a: Arguments) -> Tensor:
    mean, var = a["running"] or (None, None)
    options = (a["stride"], a["activation"], a["training"], MOMENTUM, a["eps"])
    return conv_norm_act_reference(a["x"], a["weight"], a["gamma"], a["beta"], mean, var, *options)


def conv_norm_act_backward(draw: Draw) -> Call:
    call = conv_norm_act(draw)
    x, weight, stride = (call.arguments[name] for name in ("x", "weight", "stride"))
    grad = draw.normal(x.shape[0], len(weight), *((side - 1) // stride + 1 for side in x.shape[2:]))

    def complete(a: Arguments) -> Arguments:
        forward = {name: value for name, value in a.items() if name != "grad"}
        _, statistics, mean, cov = NATIVE.conv_norm_act(**forward)
        made = {"statistics": statistics, "mean": mean, "cov": cov}
        return {name: value for name, value in a.items() if name != "running"} | made

    def reference(a: Arguments) -> list[Tensor | None]:
        inputs = [a[name].requires_grad_() for name in ("weight", "gamma", "beta")]
        return list(torch.autograd.grad(_convolved(a), inputs, a["grad"]))

    return Call("conv_norm_act_backward", {**call.arguments, "grad": grad}, reference, complete)


def update_running(draw: Draw) -> Call:
    sizes = [draw.random.choice((1, 3, 17)) for _ in range(draw.random.choice((1, 2, 3)))]
    statistics = torch.cat([t for n in sizes for t in (draw.normal(n), draw.positive(n))]).double()
    pixels_in, pixels_out = draw.random.choice((2, 50)), draw.random.choice((2, 13))
    arguments = {
        "statistics": statistics, "running": [t for n in sizes for t in (draw.normal(n), draw.positive(n))],
        "pixels_in": pixels_in, "pixels_out": pixels_out, "momentum": draw.random.choice((0.1, 1.0)),
    }  # fmt: skip

    def reference(a: Arguments) -> list[Tensor | None]:
        moved: list[Tensor | None] = []
        for i, (old, new) in enumerate(
            zip(a["running"], a["statistics"].split([n for n in sizes for _ in "mv"]), strict=True)
        ):
            pixels = pixels_in if i < 2 and len(sizes) == 3 else pixels_out
            unbiased = new * pixels / (pixels - 1) if i % 2 else new
            moved.append(old + a["momentum"] * (unbiased - old))
        return moved

    return Call("update_running", arguments, reference)


def depthwise(draw: Draw) -> Arguments:
    x = draw.image()
    c, kernel = x.shape[1], draw.random.choice((1, 3, 5))
    scaled = draw.random.random() < 0.7
    return {
        "x": x, "scale": draw.normal(c) if scaled else None, "shift": draw.normal(c) if scaled else None,
        "weight": draw.normal(c, 1, kernel, kernel), "stride": draw.random.choice((1, 2)),
    }  # fmt: skip


def depthwise_forward(draw: Draw) -> Call:
    return Call("depthwise_forward", depthwise(draw), lambda a: list(depthwise_forward_reference(**a)))


def _gradient(draw: Draw, x: Tensor, channels: int, stride: int) -> Arguments:
    shape = (x.shape[0], channels, *((side - 1) // stride + 1 for side in x.shape[2:]))
    given = draw.random.random() < 0.5
    return {
        "dz": draw.normal(*shape), "d": draw.normal(*shape) if given else None,
        "affine": draw.normal(4, channels) if given else None,
    }  # fmt: skip


def depthwise_backward(draw: Draw) -> Call:
    a = depthwise(draw)
    a |= _gradient(draw, a["x"], a["x"].shape[1], a["stride"]) | {"mask": draw.random.random() < 0.5}
    which = draw.random.choice(("", "_input", "_weight"))
    if which == "_weight":
        del a["mask"]

    def reference(a: Arguments) -> list[Tensor | None]:
        q, dw = depthwise_backward_reference(**a)
        return {"": [q, dw], "_input": [q], "_weight": [dw]}[which]

    return Call(f"depthwise_backward{which}", a, reference)


def expand_depthwise_forward(draw: Draw) -> Call:
    x = draw.image()
    wide, kernel = draw.random.choice((1, 6, 17)), draw.random.choice((1, 3, 5))
    arguments = {
        "x": x, "w1": draw.normal(wide, x.shape[1]), "norm1": draw.normal(4, wide),
        "weight": draw.normal(wide, 1, kernel, kernel), "stride": draw.random.choice((1, 2)),
        "activation": draw.activation,
    }  # fmt: skip
    return Call("expand_depthwise_forward", arguments, lambda a: list(expand_depthwise_forward_reference(**a)))


def expand_depthwise_backward(draw: Draw) -> Call:
    a = expand_depthwise_forward(draw).arguments
    a |= _gradient(draw, a["x"], len(a["w1"]), a["stride"])
    return Call("expand_depthwise_backward", a, lambda a: list(expand_depthwise_backward_reference(**a)))


OPS = [
    gram, gate_dot, norm_dot, mbconv, mbconv_backward, mbconv_probe, batch_norm_act, batch_norm_act_backward,
    conv_norm_act, conv_norm_act_backward, update_running, depthwise_forward, depthwise_backward,
    expand_depthwise_forward, expand_depthwise_backward,
]  # fmt: skip
