"""MBConv: the block of the paper's spaces, as one fused op wherever that is exact."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..candidates import GateTerm
from ..checks import check_positive
from ..costs import OpShape, conv_output, count_elements
from ..fusion import FusedArguments, Fusible, count_batch, gather, why_not_now
from ..ops.batch_norm import norm_dot
from ..ops.mbconv import mbconv, mbconv_before_norm, probe, why_not_block, why_not_input
from ..ops.statistics import gram
from ..reading import Snapshot, Stage, Unreadable, read_stage, require_unhooked
from .parts import activation, batch_norm, check_odd, conv2d

Gram = tuple[Tensor, Tensor]  # mean (C,) and covariance (C, C) of a tensor's pixels


def _norm_term(grad: Tensor, tensors: Sequence[Tensor], eps: float) -> Tensor:
    """<grad, BN(y)>; tensors: y before the last norm, the statistics, and the norm's gamma and beta."""
    y, statistics, gamma, beta = tensors
    return norm_dot(grad, y, statistics, gamma, beta, eps)


def probe_blocks(
    plans: Sequence[FusedArguments],
    args: tuple,
    kwargs: dict[str, Any],
    grads: Sequence[Tensor | None],
    shared: Gram | None = None,
) -> list[Tensor | None]:
    """Gate gradients <G, o(x)> of MBConvs, in one call for each kind of block: `joint_probe` of the candidate protocol.

    shared: mean and covariance of x, if the caller has them. Running statistics move as if each block had run. No
    autograd.
    """
    gates: list[Tensor | None] = [None] * len(plans)
    if len(grads) != 1 or grads[0] is None:
        return gates
    x, grad = args[0], grads[0]
    kinds: dict[tuple, list[int]] = {}
    for place, plan in enumerate(plans):
        kinds.setdefault((plan.stride, plan.activation, plan.norm), []).append(place)
    for (stride, act, norm), places in kinds.items():
        alike = [plans[place] for place in places]
        params, running = [plan.params for plan in alike], [plan.running for plan in alike]
        values = probe(x, grad, params, running, stride=stride, activation=act, gram=shared, **norm._asdict())
        for place, value in zip(places, values.unbind(), strict=True):
            gates[place] = value
        if norm.training:
            count_batch([bn for plan in alike for bn in plan.norms])
    return gates


class Stages(NamedTuple):
    """An MBConv as its modules are: expansion (or none), depthwise convolution, projection."""

    expand: Stage | None
    depth: Stage
    project: Stage

    @property
    def in_channels(self) -> int:
        return self.depth.conv.out_channels if self.expand is None else self.expand.conv.inputs

    @property
    def wide(self) -> int:
        return self.depth.conv.out_channels

    @property
    def out_channels(self) -> int:
        return self.project.conv.out_channels

    @property
    def expand_ratio(self) -> int:
        if self.wide % self.in_channels:
            raise ValueError(f"MBConv: {self.wide} inner channels are no multiple of {self.in_channels} inputs")
        return self.wide // self.in_channels

    @property
    def all(self) -> list[Stage]:
        return [self.depth, self.project] if self.expand is None else [self.expand, self.depth, self.project]


def read_stages(block: MBConv) -> Stages:
    """What the modules of an MBConv are. Raises Unreadable for anything but an MBConv, in words."""
    expand = block.inverted_bottleneck
    stages = Stages(
        None if expand is None else _read_pointwise(expand, "inverted_bottleneck"),
        read_stage(block.depth_conv, "depth_conv"),
        _read_pointwise(block.point_linear, "point_linear"),
    )
    conv = stages.depth.conv
    if conv.inputs != 1 or conv.groups != conv.out_channels:
        raise Unreadable(
            f"depth_conv is no depthwise convolution: {conv.groups} groups of {conv.out_channels} channels"
        )
    if stages.expand is not None and stages.expand.conv.out_channels != stages.wide:
        raise Unreadable("inverted_bottleneck has another width than depth_conv")
    if stages.project.conv.inputs != stages.wide:
        raise Unreadable("point_linear has another width than depth_conv")
    if stages.project.activation != "identity":
        raise Unreadable(f"point_linear has an activation, {stages.project.activation}")
    if stages.expand is not None and stages.expand.activation != stages.depth.activation:
        raise Unreadable(f"its activations differ: {stages.expand.activation} and {stages.depth.activation}")
    return stages


def _read_pointwise(group: Any, place: str) -> Stage:
    stage = read_stage(group, place)
    if (stage.conv.kernel_size, stage.conv.stride, stage.conv.groups) != (1, 1, 1):
        raise Unreadable(f"{place}.conv is not 1x1 with stride 1 and one group")
    return stage


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
        wide = in_channels * expand_ratio

        def group(conv: nn.Conv2d, act: str | None) -> nn.Sequential:
            parts: list[tuple[str, nn.Module]] = [("conv", conv), ("bn", batch_norm(conv.out_channels))]
            if act is not None:
                parts.append(("act", activation(act)))
            return nn.Sequential(OrderedDict(parts))

        self.inverted_bottleneck = group(conv2d(in_channels, wide, 1), act) if expand_ratio > 1 else None
        self.depth_conv = group(conv2d(wide, wide, kernel_size, stride, groups=wide), act)
        self.point_linear = group(conv2d(wide, out_channels, 1), None)

    # What the block is, is what its modules are: none of these is kept beside them.

    @property
    def in_channels(self) -> int:
        return self._read().in_channels

    @property
    def out_channels(self) -> int:
        return self._read().out_channels

    @property
    def kernel_size(self) -> int:
        return self._read().depth.conv.kernel_size

    @property
    def stride(self) -> int:
        return self._read().depth.conv.stride

    @property
    def expand_ratio(self) -> int:
        return self._read().expand_ratio

    @property
    def act(self) -> str:
        """The activation's name: relu6, relu, silu, hardswish or identity."""
        return self._read().depth.activation

    @property
    def name(self) -> str:
        """The official name, e.g. 5x5_MBConv6."""
        return f"{self.kernel_size}x{self.kernel_size}_MBConv{self.expand_ratio}"

    def _read(self) -> Stages:
        try:
            return read_stages(self)
        except Unreadable as reason:
            raise ValueError(f"MBConv: {reason}; as it is, the block has no size of that name") from None

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
        shared = gram(x.detach(), plan.norm.group) if plan.norm.training and len(plan.params) == 9 else None
        out, y, statistics = mbconv_before_norm(
            x, plan.params, plan.running, **self._options(plan), gram=shared, shortcut=shortcut
        )
        # The output follows from y, which the block's own backward keeps: so nothing more is kept.
        tensors = (y.detach(), statistics, plan.params[-2], plan.params[-1])
        return out, GateTerm(tensors, partial(_norm_term, eps=plan.norm.eps), shared)

    def with_shortcut(self, x: Tensor) -> Tensor:
        """self(x) + x, summed where the output is written anyway."""
        return self(x, shortcut=True)

    def probe_plan(self, *args: Any, **kwargs: Any) -> tuple[FusedArguments, list[Tensor]] | None:
        """What `probe_blocks` needs of this block at x, and its weights; None where the fused op does not take it."""
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            return None
        _, plan = self._plan(args[0])
        return None if plan is None else (plan, plan.params)

    joint_probe = staticmethod(probe_blocks)

    def why_not_recorded(self, x: Tensor) -> str:
        """Why the launches at x cannot be recorded, in words; empty if they can."""
        return self.fused(x)[1]

    def _options(self, plan: FusedArguments) -> dict[str, Any]:
        return dict(stride=plan.stride, activation=plan.activation, policy=self.policy, **plan.norm._asdict())

    def _plan(self, x: Tensor) -> tuple[str, FusedArguments | None]:
        if self.policy == "off":
            return "the policy is 'off'", None
        reason = why_not_now(x)
        if reason:
            return reason, None
        found = Snapshot.of(self, self._gather)
        if isinstance(found, Unreadable):
            return str(found), None
        reason = found.why_stale() or why_not_input(x, found.params, found.activation, found.norm.group)
        return reason, None if reason else found

    def _gather(self) -> FusedArguments:
        stages = read_stages(self)
        groups = [
            group for group in (self.inverted_bottleneck, self.depth_conv, self.point_linear) if group is not None
        ]
        require_unhooked(module for group in groups for module in (group, *group))
        convs, norms = [stage.conv for stage in stages.all], [stage.norm for stage in stages.all]
        found = gather(convs, norms, stages.depth.conv.stride, stages.depth.activation)
        reason = why_not_block(found.params, found.stride, found.activation)
        if reason:
            raise Unreadable(reason)
        return found

    def recomputed(self) -> tuple[int, int]:
        """Of d, the depthwise output: (multiply-accumulates of one value, values per pixel); see `Fusible`."""
        stages = self._read()
        return stages.in_channels * stages.depth.conv.stride**2 + stages.depth.conv.kernel_size**2, stages.wide

    def shape(self, input: tuple[int, ...], idskip: int = 0) -> OpShape:
        """Cost at input (height, width, channels); idskip 1 where the block around it adds its input.

        Raises ValueError where the block's modules are no MBConv any more, or do not take the input's channels.
        """
        stages = self._read()
        (h, w, channels), depth, act = input, stages.depth.conv, stages.depth.activation
        if channels != stages.in_channels:
            raise ValueError(f"MBConv: input has {channels} channels, expected {stages.in_channels}")
        ho, wo = conv_output(h, depth.stride), conv_output(w, depth.stride)
        expand = 0 if stages.expand is None else h * w * channels * stages.wide
        macs = expand + ho * wo * stages.wide * (depth.kernel_size**2 + stages.out_channels)
        attributes: tuple[tuple[str, int | str], ...] = (
            ("expand", stages.expand_ratio),
            ("kernel", depth.kernel_size),
            ("stride", depth.stride),
            ("idskip", idskip),
        )
        # The published keys are of ReLU6; another activation takes another time.
        if act != "relu6":
            attributes += (("act", act),)
        return OpShape("expanded_conv", input, (ho, wo, stages.out_channels), attributes, macs, count_elements(self))

    def extra_repr(self) -> str:
        try:
            return f"{self.in_channels} -> {self.out_channels}, {self.name}, stride {self.stride}"
        except ValueError:
            return "edited"
