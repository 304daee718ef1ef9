"""MBConv: the block of the paper's spaces, as one fused op wherever that is exact."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..candidates import GateTerm, has_hooks
from ..checks import check_positive
from ..costs import OpShape, conv_output, count_elements
from ..fusion import FusedArguments, Fusible, count_batch, norm_of, parameter
from ..ops.batch_norm import norm_dot
from ..ops.mbconv import can_run_mbconv, mbconv, mbconv_before_norm, probe
from ..ops.statistics import gram
from .parts import activation, batch_norm, check_odd, conv2d

Gram = tuple[Tensor, Tensor]  # mean (C,) and covariance (C, C) of a tensor's pixels


def _norm_term(grad: Tensor, tensors: Sequence[Tensor], eps: float) -> Tensor:
    """<grad, BN(y)>; tensors: y before the last norm, the statistics, and the norm's gamma and beta."""
    y, statistics, gamma, beta = tensors
    return norm_dot(grad, y, statistics, gamma, beta, eps)


def probe_blocks(
    blocks: Sequence[nn.Module],
    args: tuple,
    kwargs: dict[str, Any],
    grads: Sequence[Tensor | None],
    shared: Gram | None = None,
) -> list[Tensor | None]:
    """Gate gradients <G, o(x)> of MBConvs, in one call for each kind of block: `joint_probe` of the candidate protocol.

    None for what the fused engine does not take. shared: mean and covariance of x, if the caller has them. Running
    statistics move as if each block had run. No autograd.
    """
    gates: list[Tensor | None] = [None] * len(blocks)
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or len(grads) != 1 or grads[0] is None:
        return gates
    x, grad = args[0], grads[0]
    kinds: dict[tuple, list[tuple[int, FusedArguments]]] = {}
    for place, block in enumerate(blocks):
        if isinstance(block, MBConv):
            _, plan = block._plan(x)
            if plan is not None:
                kinds.setdefault((block.stride, block.act, plan.norm), []).append((place, plan))
    for (stride, act, norm), members in kinds.items():
        plans = [plan for _, plan in members]
        params, running = [plan.params for plan in plans], [plan.running for plan in plans]
        values = probe(x, grad, params, running, stride=stride, activation=act, gram=shared, **norm._asdict())
        for (place, _), value in zip(members, values.unbind(), strict=True):
            gates[place] = value
        if norm.training:
            count_batch([bn for plan in plans for bn in plan.norms])
    return gates


class MBConv(Fusible, nn.Module):
    """Mobile inverted bottleneck: 1x1 expand, depthwise, 1x1 project; BN after each, an activation after the first two.

    in_channels, out_channels: channels of x (B, in, H, W) and of the output (B, out, ceil(H/stride), ceil(W/stride)).
    kernel_size: odd. stride: of the depthwise convolution. expand_ratio: width of the inner tensors over in_channels;
    1 leaves the expansion out. State-dict names are the official ones (official search/modules/layers.py,
    MBInvertedConvLayer); paper section 4.1 has the candidates. Raises ValueError for wrong sizes.

    Runs as one fused op where `fused(x)` says so, else module by module: the same results and running statistics.
    policy: what the fused op keeps for backward, "fast" or "lean"; "off" never fuses (see `proxyless_fast.set_policy`).
    """

    policies = ("fast", "lean", "off")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        expand_ratio: int = 6,
        act: str = "relu6",
    ):
        super().__init__()
        check_positive(in_channels=in_channels, out_channels=out_channels, stride=stride, expand_ratio=expand_ratio)
        check_odd(kernel_size)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.expand_ratio, self.act = kernel_size, stride, expand_ratio, act
        wide = in_channels * expand_ratio

        def group(conv: nn.Conv2d, act: str | None) -> nn.Sequential:
            parts: list[tuple[str, nn.Module]] = [("conv", conv), ("bn", batch_norm(conv.out_channels))]
            if act is not None:
                parts.append(("act", activation(act)))
            return nn.Sequential(OrderedDict(parts))

        self.inverted_bottleneck = group(conv2d(in_channels, wide, 1), act) if expand_ratio > 1 else None
        self.depth_conv = group(conv2d(wide, wide, kernel_size, stride, groups=wide), act)
        self.point_linear = group(conv2d(wide, out_channels, 1), None)

    @property
    def name(self) -> str:
        """The official name, e.g. 5x5_MBConv6."""
        return f"{self.kernel_size}x{self.kernel_size}_MBConv{self.expand_ratio}"

    def forward(self, x: Tensor, shortcut: bool = False) -> Tensor:
        """x (B, in, H, W) to the output, plus x with `shortcut`, which costs nothing where the op is fused."""
        _, plan = self._plan(x)
        if plan is None:
            y = x if self.inverted_bottleneck is None else self.inverted_bottleneck(x)
            y = self.point_linear(self.depth_conv(y))
            return y + x if shortcut else y
        if plan.norm.training:
            count_batch(plan.norms)
        return mbconv(x, plan.params, plan.running, **self._options(plan), shortcut=shortcut)

    def run_gated(self, x: Tensor, shortcut: bool = False) -> tuple[Tensor, GateTerm | None]:
        """The output, and what a gate's gradient needs of it; (output without the shortcut, None) where not fused."""
        _, plan = self._plan(x)
        if plan is None:
            return self(x), None
        if plan.norm.training:
            count_batch(plan.norms)
        shared = gram(x.detach()) if plan.norm.training and self.expand_ratio > 1 else None
        out, y, statistics = mbconv_before_norm(
            x, plan.params, plan.running, **self._options(plan), gram=shared, shortcut=shortcut
        )
        # The output follows from y, which the block's own backward keeps: so nothing more is kept.
        tensors = (y.detach(), statistics, plan.params[-2], plan.params[-1])
        return out, GateTerm(tensors, partial(_norm_term, eps=plan.norm.eps), shared)

    def with_shortcut(self, x: Tensor) -> Tensor:
        """self(x) + x, summed where the output is written anyway."""
        return self(x, shortcut=True)

    joint_probe = staticmethod(probe_blocks)

    def why_not_recorded(self, x: Tensor) -> str:
        """Why the launches at x cannot be recorded, in words; empty if they can."""
        return self.fused(x)[1]

    def _options(self, plan: FusedArguments) -> dict[str, Any]:
        return dict(stride=self.stride, activation=self.act, policy=self.policy, **plan.norm._asdict())

    def fused(self, x: Tensor) -> tuple[bool, str]:
        """Whether the fused op takes x: (True, ""), or (False, why not, in words)."""
        reason, _ = self._plan(x)
        return not reason, reason

    def _plan(self, x: Tensor) -> tuple[str, FusedArguments | None]:
        if self.policy == "off":
            return "the policy is 'off'", None
        modules = [m for m in (self.inverted_bottleneck, self.depth_conv, self.point_linear) if m is not None]
        groups = [module._modules for module in modules]
        if has_hooks(*modules) or any(has_hooks(*group.values()) for group in groups):
            return "a module inside the block has hooks, which the fused op would not run", None
        norms = [group["bn"] for group in groups]
        reason, norm = norm_of(norms)
        if norm is None:
            return reason, None
        params, running = [], []
        for group, bn in zip(groups, norms, strict=True):
            params += [parameter(group["conv"], "weight"), parameter(bn, "weight"), parameter(bn, "bias")]
            running += [bn._buffers["running_mean"], bn._buffers["running_var"]]
        reason = can_run_mbconv(x, params, stride=self.stride, activation=self.act)[1]
        return reason, None if reason else FusedArguments(params, running, norms, norm)

    def recomputed(self) -> tuple[int, int]:
        """Of d, the depthwise output: (multiply-accumulates of one value, values per pixel); see `Fusible`."""
        return self.in_channels * self.stride**2 + self.kernel_size**2, self.in_channels * self.expand_ratio

    def shape(self, input: tuple[int, ...], idskip: int = 0) -> OpShape:
        """Cost at input (height, width, channels); idskip 1 where the block around it adds its input."""
        h, w, _ = input
        ho, wo = conv_output(h, self.stride), conv_output(w, self.stride)
        wide = self.in_channels * self.expand_ratio
        expand = h * w * self.in_channels * wide if self.expand_ratio > 1 else 0
        macs = expand + ho * wo * wide * (self.kernel_size**2 + self.out_channels)
        attributes = (
            ("expand", self.expand_ratio),
            ("kernel", self.kernel_size),
            ("stride", self.stride),
            ("idskip", idskip),
        )
        return OpShape("expanded_conv", input, (ho, wo, self.out_channels), attributes, macs, count_elements(self))

    def extra_repr(self) -> str:
        return f"{self.in_channels} -> {self.out_channels}, {self.name}, stride {self.stride}"
