"""Sampling: frequencies against p, the pair's law, one draw for a whole net, repeatability."""

from itertools import permutations

import pytest
import torch
from scipy import stats
from torch import nn

import proxyless_fast as pf

DRAWS = 20_000


def net_of(*alphas):
    ops = []
    for i, alpha in enumerate(alphas):
        op = pf.MixedOp([nn.Identity() for _ in alpha], label=f"op{i}")
        with torch.no_grad():
            op.alpha.copy_(torch.tensor(alpha))
        ops.append(op)
    return nn.ModuleList(ops)


@pytest.mark.slow
def test_frequencies_follow_p():
    net = net_of([0.0, 1.0, -1.0, 0.5], [2.0, 0.0], [0.1] * 7)
    generator = torch.Generator().manual_seed(11)
    counts = [torch.zeros(len(op)) for op in net]
    for _ in range(DRAWS):
        for count, index in zip(counts, pf.sample(net, "path", generator).values(), strict=True):
            count[index] += 1
    for op, count in zip(net, counts, strict=True):
        expected = op.probabilities().detach().double() * DRAWS
        assert stats.chisquare(count.double(), expected / expected.sum() * DRAWS).pvalue > 1e-3
    # and the test can tell: the same counts against another p
    assert stats.chisquare(counts[0], torch.full((4,), DRAWS / 4)).pvalue < 1e-6


@pytest.mark.slow
def test_pairs_follow_two_draws_without_replacement_and_the_pair_s_own_softmax():
    net = net_of([0.0, 1.0, -0.7], [0.3, 0.0, 0.0, 2.0])
    generator = torch.Generator().manual_seed(5)
    seen = [{pair: 0 for pair in permutations(range(len(op)), 2)} for op in net]
    for _ in range(DRAWS):
        pf.sample(net, "two", generator)
        for op, count in zip(net, seen, strict=True):
            count[op.active, op.partner] += 1
    for op, count in zip(net, seen, strict=True):
        p = op.probabilities().detach().double()
        p = p / p.sum()
        expected = []
        for i, j in count:
            drawn = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
            expected.append(float(drawn * p[i] / (p[i] + p[j])) * DRAWS)
        assert stats.chisquare(list(count.values()), expected).pvalue > 1e-3


def test_ops_of_a_net_are_independent():
    net = net_of([0.0, 0.0], [0.0, 0.0])
    generator = torch.Generator().manual_seed(2)
    table = torch.zeros(2, 2)
    for _ in range(4000):
        a, b = pf.sample(net, "path", generator).values()
        table[a, b] += 1
    assert stats.chi2_contingency(table.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("mode", ["path", "full", "two"])
def test_equal_seeds_give_equal_paths(mode):
    net = pf.spaces.mobile(num_classes=2, resolution=32)
    draws = []
    for _ in range(2):
        choice = pf.sample(net, mode, torch.Generator().manual_seed(42))
        draws.append((choice, [op.partner for op in pf.mixed_ops(net).values()]))
    assert draws[0] == draws[1]
    assert len(draws[0][0]) == 21
    others = {tuple(pf.sample(net, mode, torch.Generator().manual_seed(s)).values()) for s in range(8)}
    assert len(others) == 8


def test_one_draw_for_the_whole_net(monkeypatch):
    net = pf.spaces.mobile(num_classes=2, resolution=32)
    calls = []
    real = torch.Tensor.exponential_
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda t, *a, **k: calls.append(t.shape) or real(t, *a, **k))
    pf.sample(net, "full")
    assert calls == [(21, 7)]
