"""Gradients over several processes: those of the whole batch, of the active path alone, in few messages."""

import pytest
import torch
from torch import nn

import proxyless_fast as pf
from proxyless_fast.distributed.gradients import GradientSum, sum_vector
from proxyless_fast.distributed.ranks import Ranks
from proxyless_fast.supernet import ActiveParameters
from tests._ranks import run_ranks


def supernet():
    torch.manual_seed(0)
    return pf.spaces.small(candidates=["3x3_MBConv3", "5x5_MBConv6"], resolution=16).double().eval()  # norms frozen


def batch(net, images):
    draws = torch.Generator().manual_seed(1)
    return torch.randn(images, net.in_channels, 16, 16, dtype=torch.double, generator=draws), torch.arange(images) % 10


def path_gradients(bucket_bytes, own_paths):
    """(differences to one process, bytes sent, bytes of the weights that took part, messages) of two steps."""
    ranks, net, truth = Ranks.current(), supernet(), supernet()
    weights, active = list(pf.weight_parameters(net)), ActiveParameters(net)
    sums = GradientSum(weights, ranks, bucket_bytes)
    x, labels = batch(net, 5)
    shares = list(x.tensor_split(ranks.size)), list(labels.tensor_split(ranks.size))
    worst, taken = 0.0, 0
    for step in range(2):
        paths = []
        for rank in range(ranks.size):  # what all ranks do, in one process
            draws = torch.Generator().manual_seed(10 * step + (rank if own_paths else 0))
            paths.append(list(pf.sample(truth, generator=draws).values()))
            nn.functional.cross_entropy(truth(shares[0][rank]), shares[1][rank], reduction="sum").backward()
        pf.sample(net, generator=torch.Generator().manual_seed(10 * step + (ranks.rank if own_paths else 0)))
        sums.expect(active(paths), {id(p) for p in active()} if own_paths else None)
        part = shares[0][ranks.rank], shares[1][ranks.rank]
        nn.functional.cross_entropy(net(part[0]), part[1], reduction="sum").backward()
        sums.finish(5.0)
        for p, q in zip(weights, pf.weight_parameters(truth), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                worst = max(worst, float((p.grad - q.grad / 5).abs().max()))
                taken += p.numel() * p.element_size()
        net.zero_grad(set_to_none=True)
        truth.zero_grad(set_to_none=True)
    return worst, sums.bytes_sent, taken


@pytest.mark.parametrize(
    ("size", "own_paths", "bucket_bytes"),
    [(2, False, 1), (3, False, 100_000), (2, False, 1 << 30), (2, True, 100_000), (3, True, 1)],
)
def test_the_gradients_are_those_of_one_process_and_no_more_is_sent(size, own_paths, bucket_bytes):
    for worst, sent, taken in run_ranks(path_gradients, size, bucket_bytes, own_paths):
        assert worst < 1e-13
        assert sent == taken


def unused_gradients():
    ranks = Ranks.current()
    used, here, never = (nn.Parameter(torch.ones(2)) for _ in range(3))
    sums = GradientSum([used, here, never], ranks)
    sums.expect([used, here, never])
    (used.sum() + (here.sum() if ranks.rank else 0)).backward()
    sums.finish()
    return [None if p.grad is None else p.grad.tolist() for p in (used, here, never)]


def test_a_weight_that_only_some_processes_used():
    assert run_ranks(unused_gradients, 2) == [[[2, 2], [1, 1], None]] * 2


def accumulated_gradients():
    """Two parts of a batch in one step: only the second backward sends."""
    ranks, net = Ranks.current(), supernet()
    weights, active = list(pf.weight_parameters(net)), ActiveParameters(net)
    sums = GradientSum(weights, ranks)
    x, labels = batch(net, 8)
    pf.sample(net, generator=torch.Generator().manual_seed(0))
    truth = torch.autograd.grad(nn.functional.cross_entropy(net(x), labels, reduction="sum"), active())
    own = slice(4 * ranks.rank, 4 * ranks.rank + 4)
    x, labels = x[own], labels[own]
    nn.functional.cross_entropy(net(x[:2]), labels[:2], reduction="sum").backward()
    before = sums.bytes_sent
    sums.expect(active())
    nn.functional.cross_entropy(net(x[2:]), labels[2:], reduction="sum").backward()
    sums.finish()
    return before, max(float((p.grad - g).abs().max()) for p, g in zip(active(), truth, strict=True))


def test_parts_of_a_batch_are_sent_once():
    for before, worst in run_ranks(accumulated_gradients, 2):
        assert before == 0
        assert worst < 1e-12


def alpha_gradients():
    ranks = Ranks.current()
    alphas = [nn.Parameter(torch.zeros(n)) for n in (3, 2, 4)]
    for p in alphas[:2]:
        p.grad = torch.full_like(p, float(ranks.rank + 1))
    sent = sum_vector(alphas, ranks, 2.0)
    return sent, [None if p.grad is None else p.grad.tolist() for p in alphas]


def test_alphas_go_as_one_vector():
    assert run_ranks(alpha_gradients, 2) == [(9 * 4, [[1.5] * 3, [1.5] * 2, None])] * 2


def test_active_parameters_of_nested_and_shared_modules():
    shared = nn.Linear(2, 2)
    inner = pf.MixedOp({"a": nn.Linear(2, 2), "shared": shared}, label="inner")
    outer = pf.MixedOp({"inner": inner, "shared": shared, "c": nn.Linear(2, 2)}, label="outer")
    net = nn.Sequential(nn.Linear(2, 2), outer)
    active = ActiveParameters(net)
    for outer_index in range(3):
        for inner_index in range(2):
            outer.activate(outer_index)
            inner.activate(inner_index)
            net.zero_grad(set_to_none=True)
            net(torch.randn(4, 2)).sum().backward()
            wanted = {id(p) for p in pf.weight_parameters(net) if p.grad is not None}
            assert {id(p) for p in active()} == wanted
    both = {id(p) for p in active([[0, 0], [2, 1]])}
    wanted = [net[0], inner.candidates[0], outer.candidates[2]]
    assert both == {id(p) for module in wanted for p in module.parameters()}
