"""Batch norms over several processes are those of the whole batch in one: outputs, gradients, running statistics."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed import all_reduce, new_group

import proxyless_fast as pf
from proxyless_fast.blocks import ConvLayer, MBConv
from proxyless_fast.blocks.conv import DepthConv, ReluConv
from proxyless_fast.distributed.norms import SyncBatchNorm2d, synchronised
from tests._ranks import run_ranks

# Images by rank, of nine: a rank may have fewer than another.
SHARES = {2: [(0, 3), (3, 9)], 3: [(0, 4), (4, 5), (5, 9)]}
BLOCKS = {
    "norm": lambda: nn.BatchNorm2d(4),
    "conv": lambda: ConvLayer(4, 6, 3, 2),
    "pointwise": lambda: ConvLayer(4, 4, 1),
    "mbconv": lambda: MBConv(4, 4, 3, 1, 3),
    "strided": lambda: MBConv(4, 6, 5, 2, 2, act="hardswish"),
    "narrow": lambda: MBConv(4, 4, 3, 1, 1),
    "depthwise": lambda: DepthConv(4, 4),
    "relu first": lambda: ReluConv(4, 4),
}


def relative(ours, truth):
    return float((ours - truth).abs().max() / truth.abs().max().clamp(min=1e-3))


def errors_of_blocks():
    """The largest difference to one process, of each block by policy, and whether the block ran fused."""
    rank, size, group = torch.distributed.get_rank(), torch.distributed.get_world_size(), new_group().group_name
    draws = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(9, 6, 7, 7, dtype=torch.double, generator=draws) for _ in range(2))
    x = x[:, :4] * 2 + 30  # a far mean: sums about zero would lose digits
    own = slice(*SHARES[size][rank])
    found = {}
    for name, make in BLOCKS.items():
        for policy in ("fast", "lean", "off"):
            whole = make().double()
            with torch.no_grad():
                for p in whole.parameters():
                    p.normal_(generator=draws)
            shared = copy.deepcopy(whole)
            pf.set_policy(whole, "off")
            pf.set_policy(shared, policy)
            inputs, part = x.clone().requires_grad_(), x[own].clone().requires_grad_()
            out = whole(inputs)
            weights = grad[:, : out.shape[1], : out.shape[2], : out.shape[3]]
            (out * weights).sum().backward()
            with synchronised(shared, group):
                fused = shared.fused(part)[0] if hasattr(shared, "fused") else None
                ours = shared(part)
                (ours * weights[own]).sum().backward()
            errors = [relative(ours, out[own]), relative(part.grad, inputs.grad[own])]
            for p, q in zip(shared.parameters(), whole.parameters(), strict=True):
                all_reduce(p.grad)
                errors.append(relative(p.grad, q.grad))
            errors += [relative(p.double(), q) for p, q in zip(shared.buffers(), whole.buffers(), strict=True)]
            found[name, policy] = (max(errors), fused)
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_blocks_have_the_statistics_of_all_processes(size):
    for found in run_ranks(errors_of_blocks, size):
        for (name, policy), (error, fused) in found.items():
            assert error < 1e-12, (name, policy)
            if fused is not None:
                assert fused == (policy != "off"), (name, policy)


def errors_of_supernet(mode):
    """Gradients of weights and alphas, and running statistics, beside one process, in a step of a supernet."""
    rank, size, group = torch.distributed.get_rank(), torch.distributed.get_world_size(), new_group().group_name
    torch.manual_seed(0)
    whole = pf.spaces.small(candidates=["3x3_MBConv3", "5x5_MBConv6", "7x7_MBConv3"], resolution=16).double()
    shared = copy.deepcopy(whole)
    x, labels = torch.randn(9, whole.in_channels, 16, 16, dtype=torch.double), torch.arange(9)
    own = slice(*SHARES[size][rank])
    for net, part in ((whole, slice(None)), (shared, own)):
        pf.sample(net, mode, generator=torch.Generator().manual_seed(1))
        with synchronised(net, group if net is shared else ""):
            nn.functional.cross_entropy(net(x[part]), labels[part], reduction="sum").backward()
    errors = []
    for p, q in zip(shared.parameters(), whole.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            all_reduce(p.grad)
            errors.append(relative(p.grad, q.grad))
    errors += [relative(p.double(), q.double()) for p, q in zip(shared.buffers(), whole.buffers(), strict=True)]
    alphas = [op.alpha.grad for op in pf.mixed_ops(shared).values()]
    return max(errors), all(a is not None and bool(a.any()) for a in alphas) if mode != "path" else None


@pytest.mark.parametrize("mode", ["path", "full", "two"])
def test_a_supernet_too_with_its_probes(mode):
    for error, alphas in run_ranks(errors_of_supernet, 2, mode):
        assert error < 1e-11
        assert alphas is not False


def test_a_net_is_as_it_was_afterwards():
    net = nn.Sequential(MBConv(4, 4), nn.BatchNorm2d(4))
    before = {name: id(value) for name, value in net.state_dict(keep_vars=True).items()}
    with synchronised(net, "0"):
        assert sum(type(m) is SyncBatchNorm2d for m in net.modules()) == 4
        assert {name: id(value) for name, value in net.state_dict(keep_vars=True).items()} == before
    assert not any(isinstance(m, SyncBatchNorm2d) or "group" in vars(m) for m in net.modules())


def test_evaluation_asks_no_other_process():
    norm = nn.BatchNorm2d(4).eval()
    x = torch.randn(2, 4, 3, 3)
    expected = norm(x)
    with synchronised(norm, "no such group"):
        assert torch.equal(norm(x), expected)


def test_a_norm_of_another_kind_is_refused():
    with (
        pytest.raises(ValueError, match="net: 1 is a SyncBatchNorm, expected"),
        synchronised(nn.Sequential(nn.BatchNorm2d(4), nn.SyncBatchNorm(4)), "0"),
    ):
        pass
