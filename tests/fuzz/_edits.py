"""The ways in which people edit a block: each takes a block and a source of chance, and changes it as torch lets them.

Blocks of one structure are changed alike by equal chance, whatever their dtype and class: the fuzzer edits an engine
block, a plain one and a float64 one side by side.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

Edit = Callable[[nn.Module, random.Random], object]
GROUPS = ("inverted_bottleneck", "depth_conv", "point_linear")


def groups(block: nn.Module) -> list[nn.Module]:
    """The sequences of convolution, norm and activation in a block: its own if it is one."""
    if isinstance(block, nn.Sequential):
        return [block]
    return [group for name in GROUPS if (group := getattr(block, name)) is not None]


def normal(draw: random.Random, like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Numbers that are exact in float32, of like's dtype."""
    g = torch.Generator().manual_seed(draw.randrange(2**31))
    return torch.randn(*(shape or like.shape), generator=g).to(like.dtype)


class Excite(nn.Module):
    """A squeeze-and-excite without weights."""

    def forward(self, x):
        return x * torch.sigmoid(x.mean((2, 3), keepdim=True))


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class LikeConv(nn.Conv2d):
    """A subclass that changes nothing."""


class Shifted(nn.ReLU6):
    def forward(self, x):
        return super().forward(x) - 1


class Scaled(nn.Module):
    def forward(self, x):
        return 0.5 * x


class Tagged(torch.Tensor):
    """A tensor of a type of its own."""


ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Identity, nn.GELU, nn.Tanh, nn.ELU, nn.PReLU, Shifted, Excite,
    lambda: nn.ReLU(inplace=True), lambda: nn.ReLU6(inplace=True), lambda: nn.Hardtanh(0.0, 6.0),
    lambda: nn.Hardtanh(-1.0, 1.0), lambda: nn.LeakyReLU(0.2), lambda: nn.SiLU(inplace=True),
    lambda: nn.Sequential(nn.ReLU6()), lambda: nn.Hardswish(inplace=True), lambda: nn.Threshold(0.1, 0.0),
]  # fmt: skip


def dtype_of(block: nn.Module) -> torch.dtype:
    return next(p.dtype for p in block.parameters())


def one_group(edit: Callable[[nn.Module, random.Random], object]) -> Edit:
    """An edit of a random group of the block."""

    def apply(block, draw):
        return edit(draw.choice(groups(block)), draw)

    apply.__name__ = edit.__name__
    return apply


def all_activations(block, draw):
    kind = draw.choice(ACTIVATIONS)
    for group in groups(block):
        if hasattr(group, "act"):
            group.act = kind().to(dtype_of(block))


@one_group
def activation(group, draw):
    made = draw.choice(ACTIVATIONS)().to(group.bn.weight.dtype if hasattr(group, "bn") else torch.float64)
    way = draw.randrange(6)
    if way == 0:
        group.act = made
    elif way == 1:
        group._modules["act"] = made
    elif way == 2:
        group.add_module("act", made)
    elif way == 3:
        group.register_module("act", made)
    elif way == 4:
        group[len(group) - 1] = made
    else:
        group.append(made)


@one_group
def bounds(group, draw):
    setattr(group.act, draw.choice(("min_val", "max_val", "inplace")), draw.choice((0, 0.5, 6, 6.0, 1.0)))


@one_group
def insertion(group, draw):
    made = draw.choice((Excite, Scaled, nn.Identity, lambda: nn.Dropout(0.0), lambda: nn.AvgPool2d(3, 1, 1)))()
    way = draw.randrange(3)
    if way == 0:
        group.insert(draw.randrange(len(group) + 1), made)
    elif way == 1:
        group.add_module("more", made)
    else:
        group.extend([made])


@one_group
def removal(group, draw):
    if draw.random() < 0.5:
        del group[draw.randrange(len(group))]
    else:
        group.pop(draw.randrange(len(group)))


@one_group
def order(group, draw):
    names = list(group._modules)
    draw.shuffle(names)
    group._modules = OrderedDict((name, group._modules[name]) for name in names) if draw.random() < 0.5 else {
        name: group._modules[name] for name in names
    }  # fmt: skip


@one_group
def conv_attribute(group, draw):
    conv, pair = group.conv, lambda *v: (draw.choice(v),) * 2
    name = draw.choice(("stride", "padding", "dilation", "groups", "padding_mode", "in_channels", "kernel_size"))
    value = {
        "stride": lambda: draw.choice(((1, 1), (2, 2), (1, 2), 1, 2, [2, 2])), "padding": lambda: pair(0, 1, 2, 3),
        "dilation": lambda: pair(1, 2), "groups": lambda: draw.choice((1, 2, conv.groups)),
        "padding_mode": lambda: draw.choice(("zeros", "circular", "reflect")), "in_channels": lambda: 99,
        "kernel_size": lambda: (9, 9),
    }[name]()  # fmt: skip
    setattr(conv, name, value)


@one_group
def conv_replaced(group, draw):
    old = group.conv
    kernel = draw.choice((old.kernel_size, (1, 1), (3, 3), (5, 5), (3, 5)))
    across = tuple(k // 2 for k in kernel)
    options = {
        "stride": old.stride, "padding": draw.choice((across, across, "same" if old.stride == (1, 1) else across)),
        "groups": draw.choice((old.groups, 1)), "bias": draw.random() < 0.4,
        "padding_mode": draw.choice(("zeros", "zeros", "reflect", "replicate")),
    }  # fmt: skip
    kind = draw.choice((nn.Conv2d, nn.Conv2d, Doubled, LikeConv))
    made = kind(old.in_channels, old.out_channels, kernel, **options).to(old.weight.dtype)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(normal(draw, p) * 0.3)
    group.conv = made


@one_group
def weight_exchanged(group, draw):
    module = draw.choice((group.conv, group.bn))
    weight, way = module.weight, draw.randrange(8)
    new = normal(draw, weight) * 0.5
    if way == 0:
        module.weight = nn.Parameter(new)
    elif way == 1:
        weight.data = new
    elif way == 2:
        with torch.no_grad():
            weight.copy_(new)
    elif way == 3:
        del module.weight
        module.register_parameter("weight", nn.Parameter(new))
    elif way == 4:
        del module.weight
        module.register_buffer("weight", new)
    elif way == 5:
        torch.utils.swap_tensors(weight, nn.Parameter(new))
    elif way == 6:
        module._parameters["weight"] = nn.Parameter(new, requires_grad=draw.random() < 0.5)
    elif weight.dim() == 4:
        weight.data = normal(draw, weight, *weight.shape[:2], 5, 5)


@one_group
def weight_layout(group, draw):
    weight = group.conv.weight
    wide = torch.zeros(weight.shape[0] * 2, *weight.shape[1:], dtype=weight.dtype)
    wide[::2] = weight.detach()
    group.conv.weight = nn.Parameter(
        draw.choice(
            (
                weight.detach().to(memory_format=torch.channels_last),
                wide[::2],
                weight.detach().flip(0).contiguous().flip(0),
                weight.detach()[:1].expand(weight.shape),
                weight.detach().as_subclass(Tagged),
                weight.detach().transpose(2, 3).contiguous().transpose(2, 3),
            )
        )
    )


@one_group
def parametrization(group, draw):
    kind = draw.randrange(6)
    if kind == 0:
        parametrizations.weight_norm(group.conv)
    elif kind == 1:
        parametrize.register_parametrization(group.conv, "weight", Scaled())
    elif kind == 2:
        parametrize.register_parametrization(group.bn, "weight", Scaled())
    elif kind == 3:
        prune.l1_unstructured(group.conv, "weight", amount=0.3)
    elif kind == 4:
        nn.utils.weight_norm(group.conv)
    elif parametrize.is_parametrized(group.conv):
        parametrize.remove_parametrizations(group.conv, "weight", leave_parametrized=draw.random() < 0.5)


def hook(block, draw):
    module = draw.choice(list(block.modules()))
    kind = draw.randrange(6)
    if kind == 0:
        module.register_forward_hook(lambda m, args, output: output * 1.5)
    elif kind == 1:
        module.register_forward_pre_hook(lambda m, args: (args[0] + 0.25,))
    elif kind == 2:
        module.register_full_backward_hook(lambda m, grads, _: tuple(None if g is None else 2 * g for g in grads))
    elif kind == 3:
        module.register_full_backward_pre_hook(lambda m, grads: (3 * grads[0],))
    elif kind == 4:
        module.register_forward_hook(lambda m, args, kwargs, output: output + 1, with_kwargs=True, always_call=True)
    else:
        module.register_forward_hook(lambda m, args, output: output * 9).remove()


def weight_hook(block, draw):
    p = draw.choice(list(block.parameters()))
    if draw.random() < 0.5:
        p.register_hook(lambda grad: grad * 2)
    else:
        p.register_post_accumulate_grad_hook(lambda q: q.grad.mul_(3))


def own_forward(block, draw):
    module = draw.choice([block, *block.modules()])
    before = module.forward
    if draw.random() < 0.5:
        module.forward = lambda x: before(x) - 0.5
    else:
        kind = type(module)
        module.__class__ = type("Own", (kind,), {"forward": lambda self, x: kind.forward(self, x) * 1.25})


@one_group
def norm_attribute(group, draw):
    name = draw.choice(("eps", "momentum", "track_running_stats", "training", "num_features", "affine"))
    values = {
        "eps": (1e-3, 0.1, 0.0, 1), "momentum": (0.3, 1.0, 0.0, None, 1), "track_running_stats": (False, True),
        "training": (False, True), "num_features": (99,), "affine": (False,),
    }  # fmt: skip
    setattr(group.bn, name, draw.choice(values[name]))


def every_norm(block, draw):
    eps, momentum = draw.choice((1e-3, 0.1)), draw.choice((0.01, 0.5, 1.0, None))
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = eps, momentum


@one_group
def norm_replaced(group, draw):
    n = group.bn.num_features
    kinds = (
        lambda: nn.GroupNorm(1, n), lambda: nn.InstanceNorm2d(n), lambda: nn.Identity(),
        lambda: nn.BatchNorm2d(n, affine=False), lambda: nn.BatchNorm2d(n, track_running_stats=False),
        lambda: nn.BatchNorm2d(n, momentum=None), lambda: nn.BatchNorm2d(n, eps=0.01), lambda: nn.BatchNorm2d(n),
    )  # fmt: skip
    group.bn = draw.choice(kinds)().to(group.bn.weight.dtype).train(group.bn.training)


@one_group
def norm_tensor(group, draw):
    name = draw.choice(("weight", "bias", "running_mean", "running_var", "num_batches_tracked"))
    way = draw.randrange(3)
    old = getattr(group.bn, name)
    if way == 0:
        setattr(group.bn, name, None)
    elif way == 1 and old is not None and old.dim():
        new = normal(draw, old).abs() + 0.5
        setattr(group.bn, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
    elif old is not None and old.dim():
        # Not with steps between its values: torch's own batch norm reads such a weight wrongly on channels-last images.
        part = torch.stack([old.detach() + 1, old.detach()])[1]
        setattr(group.bn, name, nn.Parameter(part) if isinstance(old, nn.Parameter) else part)


def mode(block, draw):
    module = draw.choice(list(block.modules()))
    module.train(draw.random() < 0.5)


def frozen(block, draw):
    for p in draw.choice([block, *block.modules()]).parameters():
        p.requires_grad_(draw.random() < 0.3)


def loaded(block, draw):
    state = {k: v.clone() for k, v in block.state_dict().items()}
    for k, v in state.items():
        if v.is_floating_point():
            state[k] = normal(draw, v).abs() * 0.5 + 0.1
    block.load_state_dict(state, assign=draw.random() < 0.5)


def moved(block, draw):
    dtype = dtype_of(block)
    way = draw.randrange(4)
    if way == 0:
        block.to(memory_format=torch.channels_last)
    elif way == 1:
        block.to(torch.float64).to(dtype)
    elif way == 2:
        draw.choice(groups(block)).to(torch.float16).to(dtype)
    else:
        draw.choice(list(block.children())).half()


def replaced_group(block, draw):
    if not isinstance(block, nn.Sequential):
        name = draw.choice(GROUPS)
        group = getattr(block, name)
        if group is not None:
            way = draw.randrange(4)
            if way == 0:
                setattr(block, name, nn.Sequential(*group))
            elif way == 1:
                setattr(block, name, nn.Sequential(group))
            elif way == 2:
                setattr(block, name, copy.deepcopy(group))
            else:
                block.set_submodule(name, nn.Sequential(OrderedDict(group.named_children())))


@one_group
def folded(group, draw):
    """Convolution and norm in one, as deployment tools leave them."""
    if not group.bn.training:
        group.conv = nn.utils.fuse_conv_bn_eval(group.conv.eval(), group.bn)
        group.bn = nn.Identity()


def shared(block, draw):
    """One norm, or one weight, in two places."""
    found = groups(block)
    if len(found) == 3:
        first, second = found[0], found[1]
        if draw.random() < 0.5:
            second.bn = first.bn
        else:
            second.bn.weight = first.bn.weight


def pickled(block, draw):
    """In place of itself: what went to disk or to another process."""
    other = copy.deepcopy(block) if draw.random() < 0.5 else pickle.loads(pickle.dumps(block))
    block.__dict__.update(other.__dict__)


EDITS: list[Edit] = [
    all_activations, activation, bounds, insertion, removal, order, conv_attribute, conv_replaced, weight_exchanged,
    weight_layout, parametrization, hook, weight_hook, own_forward, norm_attribute, every_norm, norm_replaced,
    norm_tensor, mode, frozen, loaded, moved, replaced_group, folded, shared, pickled,
]  # fmt: skip
