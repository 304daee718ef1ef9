"""Replaying sampled paths, with a recorder that runs again into the same memory: a CPU's stand-in for CUDA graphs.

What it keeps of the real one: results are in fixed memory, inputs are read where they lay at the recording, the memory
of a pool is anybody's (the stand-in overwrites every other result of the pool), and recording changes nothing.
"""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import proxyless_fast as pf


class Again:
    """Records by running, replays by running again."""

    device = "cpu"

    def __init__(self):
        self.pools, self.recorded, self.replayed = {}, 0, 0

    def pool(self):
        name = len(self.pools)
        self.pools[name] = []
        return name

    def warm(self):
        return nullcontext()

    def record(self, run, pool):
        self.recorded += 1
        results = [torch.empty_like(r).fill_(torch.nan) for r in run()]
        self.pools[pool] += results

        def replay():
            self.replayed += 1
            with torch.enable_grad():  # a replay is called from within an autograd function
                found = run()
            for memory in self.pools[pool]:
                memory.fill_(torch.nan)
            for memory, result in zip(results, found, strict=True):
                memory.copy_(result)

        return results, replay


CANDIDATES = ("3x3_MBConv3", "5x5_MBConv6", "Zero")


def supernet(seed=0):
    torch.manual_seed(seed)

    def layer(cin, cout, stride, names):
        op = pf.MixedOp({name: pf.candidate(name, cin, cout, stride) for name in names})
        return pf.blocks.ResidualBlock(op, shortcut=cin == cout and stride == 1)

    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        layer(8, 8, 1, CANDIDATES),
        layer(8, 8, 1, CANDIDATES),
        layer(8, 16, 2, CANDIDATES[:2]),
        layer(16, 16, 1, (*CANDIDATES, "Identity")),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    return net.to(memory_format=torch.channels_last)


def batch(seed=0, size=12):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, size, size, generator=g), torch.randint(5, (4,), generator=g)


def step(net, kind, seed, data=None, clear=True):
    """Loss and gradients of one step, the weights or the alphas frozen as a search freezes them."""
    x, labels = data or batch(seed)
    if clear:
        net.zero_grad(set_to_none=True)
    for p in pf.weight_parameters(net):
        p.requires_grad_(kind == "path")
    for p in pf.arch_parameters(net):
        p.requires_grad_(kind != "path")
    pf.sample(net, kind, torch.Generator().manual_seed(seed))
    loss = cross_entropy(net(x), labels)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def assert_same(a, b):
    assert torch.equal(a[0], b[0])
    assert a[1].keys() == b[1].keys()
    for name, grad in a[1].items():
        torch.testing.assert_close(grad, b[1][name], rtol=1e-6, atol=1e-7, msg=name)


def test_steps_are_what_they_are_without_graphs():
    plain, net, recorder = supernet(), supernet(), Again()
    pf.set_graphs(net, recorder=recorder)
    for seed in range(12):
        kind = ("path", "full", "two")[seed % 3]
        assert_same(step(net, kind, seed), step(plain, kind, seed))
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            if p.grad is not None:
                p.data -= 0.1 * p.grad
                q.data -= 0.1 * q.grad
    for (name, a), b in zip(net.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
    assert recorder.recorded and recorder.replayed > recorder.recorded
    pf.set_graphs(net, False)
    before = recorder.replayed
    assert_same(step(net, "path", 99), step(plain, "path", 99))
    assert recorder.replayed == before


def test_a_path_is_recorded_once_for_each_shape():
    net, recorder = supernet(), Again()
    pf.set_graphs(net, recorder=recorder)
    step(net, "path", 1)
    first = recorder.recorded
    assert first > 0 and first % 2 == 0  # a forward and a backward each
    step(net, "path", 1)
    assert recorder.recorded == first
    step(net, "path", 1, batch(size=10))
    assert recorder.recorded == 2 * first
    step(net, "path", 1)
    assert recorder.recorded == 2 * first


def test_gradients_of_two_steps_add_up():
    plain, net = supernet(), supernet()
    pf.set_graphs(net, recorder=Again())
    for n in (plain, net):
        step(n, "path", 3)
    assert_same(step(net, "path", 3, batch(8), clear=False), step(plain, "path", 3, batch(8), clear=False))


def test_a_forward_before_the_last_backward_is_refused():
    net = supernet()
    pf.set_graphs(net, recorder=Again())
    for op in pf.mixed_ops(net).values():
        op.activate(0)
    first = net(batch(0)[0])
    net(batch(1)[0]).sum().backward()
    with pytest.raises(RuntimeError, match="ran again before this backward"):
        first.sum().backward()


def test_moved_weights_are_recorded_anew():
    plain, net, recorder = supernet(), supernet(), Again()
    pf.set_graphs(net, recorder=recorder)
    step(net, "full", 2)
    step(plain, "full", 2)
    before = recorder.recorded
    for n in (net, plain):
        for p in n.parameters():
            p.data = p.data * 1.5
    assert_same(step(net, "full", 2), step(plain, "full", 2))
    assert recorder.recorded == 2 * before


def test_ops_beside_each_other_share_no_results():
    """Two ops of one input, whose gradients meet there: in a chain each result is read before the next replay."""
    torch.manual_seed(0)
    ops = nn.ModuleList(pf.MixedOp({name: pf.candidate(name, 8, 8) for name in CANDIDATES}) for _ in range(2))
    plain = copy.deepcopy(ops)
    pf.set_graphs(ops, recorder=Again())
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    kept = []
    for _ in range(2):
        found = []
        for pair in (ops, plain):
            pf.sample(pair, "full", torch.Generator().manual_seed(4))
            pair[0].activate(0, "full")
            pair[1].activate(1, "full")
            leaf = x.clone().requires_grad_()
            output = pair[0](leaf) + pair[1](leaf)
            output.square().sum().backward()
            found.append([output.detach().clone(), leaf.grad])
        kept.append(found)
    for ours, theirs in kept:
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_pruned_candidates_are_probed_no_more():
    op, recorder = pf.MixedOp({name: pf.candidate(name, 8, 8) for name in CANDIDATES}), Again()
    pf.set_graphs(op, recorder=recorder)
    for recorded in (2, 4):
        op.activate(0, "full")
        op.zero_grad()
        op(torch.randn(2, 8, 6, 6)).square().sum().backward()
        assert recorder.recorded == recorded
        op.alpha.data[1] = -torch.inf
    assert op.alpha.grad[1] == 0


def block(recorder):
    op = pf.MixedOp({name: pf.candidate(name, 8, 8) for name in CANDIDATES})
    pf.set_graphs(op, recorder=recorder)
    op.activate(0)
    return op, torch.randn(2, 8, 6, 6)


def test_hooks_of_parameters_and_of_the_op_run_once():
    """Not in the recording, where a parameter's place in autograd would also bring the stream of an older step."""
    op, x = block(Again())
    plain = copy.deepcopy(op)
    for one in (op, plain):
        for p in one.parameters():
            p.register_hook(lambda g: 2 * g)
        one.register_forward_hook(lambda module, args, output: 3 * output)
        for _ in range(2):
            one.zero_grad()
            one(x).square().sum().backward()
    for p, q in zip(op.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_what_cannot_be_recorded_runs_after_a_warning():
    class Broken(Again):
        def record(self, run, pool):
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    op, x = block(Broken())
    with pytest.warns(UserWarning, match="operation not permitted$"):
        y = op(x)
    assert torch.equal(y, op.candidates[0](x))
    assert torch.equal(op(x), y)  # without trying again
    assert "not permitted" in op.graphs.why_not(op, x)


def test_out_of_memory_while_recording_is_the_callers():
    class Full(Again):
        full = True

        def record(self, run, pool):
            if self.full:
                raise torch.OutOfMemoryError("no memory")
            return super().record(run, pool)

    recorder = Full()
    op, x = block(recorder)
    before = copy.deepcopy(op.state_dict())
    with pytest.raises(torch.OutOfMemoryError):
        op(x)
    for name, value in op.state_dict().items():
        assert torch.equal(value, before[name]), name
    recorder.full = False
    op(x).sum().backward()
    assert recorder.recorded == 2


def hook(op, x):
    op.candidates[0].depth_conv.register_forward_hook(lambda *_: None)


def other_policy(op, x):
    pf.set_policy(op, "off")


def two(op, x):
    op.activate(0, "two", 1)


def zero(op, x):
    op.activate("Zero")


def frozen(op, x):
    op.requires_grad_(False)


@pytest.mark.parametrize(
    "change, reason",
    [(hook, "hooks"), (other_policy, "'off'"), (two, "'two'"), (zero, "launches nothing"), (frozen, "gradient")],
)
def test_what_is_not_recorded_says_why(change, reason):
    op = pf.MixedOp({name: pf.candidate(name, 8, 8) for name in CANDIDATES})
    recorder = Again()
    pf.set_graphs(op, recorder=recorder)
    op.activate(0)
    x = batch()[0].repeat(1, 3, 1, 1)[:, :8].requires_grad_(change is not frozen)
    assert op.graphs.why_not(op, x) == ""
    change(op, x)
    assert reason in op.graphs.why_not(op, x)
    op(x)
    assert recorder.recorded == 0


def test_candidates_of_other_kinds_run_as_they_did():
    op = pf.MixedOp([nn.Conv2d(4, 4, 1), nn.ReLU()])
    recorder = Again()
    pf.set_graphs(op, recorder=recorder)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(op(x), op.candidates[0](x)) and recorder.recorded == 0
    assert "offers no recording" in op.graphs.why_not(op, x)


def test_no_grad_runs_as_it_did():
    net, recorder = supernet(), Again()
    pf.set_graphs(net, recorder=recorder)
    with torch.no_grad():
        net(batch()[0])
    assert recorder.recorded == 0


def test_a_copy_is_without_graphs():
    net = supernet()
    pf.set_graphs(net, recorder=Again())
    step(net, "path", 0)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert all(op.graphs is None for op in pf.mixed_ops(other).values())
    assert_same(step(copy.deepcopy(net), "path", 5), step(net, "path", 5))
    pf.derive(net)


@pytest.mark.parametrize(
    "net, message", [(supernet(), "expected a GPU"), (nn.Linear(2, 2), "expected at least one to replay")]
)
def test_wrong_nets_are_refused(net, message):
    with pytest.raises(ValueError, match=message):
        pf.set_graphs(net)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_graphs_give_what_the_launches_give(dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    plain, net = supernet().cuda(), supernet().cuda()
    pf.set_graphs(net)
    for seed in range(12):
        data = tuple(t.cuda() for t in batch(seed))
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            kind = ("path", "full")[seed % 2]
            assert_same(step(net, kind, seed, data), step(plain, kind, seed, data))
    for a, b in zip(net.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
