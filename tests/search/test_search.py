"""The search: its configuration, its steps, what it finds, and that a run can be repeated and resumed to the bit."""

import copy
import itertools
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

from proxyless_fast import spaces
from proxyless_fast.blocks import MBConv, Zero
from proxyless_fast.latency import ExpectedLatency, LatencyTable
from proxyless_fast.mixed import MixedOp
from proxyless_fast.search import (
    NonFiniteLoss,
    Search,
    SearchConfig,
    TrainConfig,
    choose_path,
    evaluate,
    objective,
    train,
)
from proxyless_fast.search.checkpoint import load
from proxyless_fast.search.interrupt import Preempted
from proxyless_fast.search.optim import sgd
from proxyless_fast.search.reinforce import log_probability, surrogate, update_baseline
from proxyless_fast.supernet import arch_parameters, derive, mixed_ops, sample, weight_parameters


class Batches:
    """Batches in an order that is a function of (seed, epoch); counts what it served, and can press Ctrl-C."""

    def __init__(self, inputs, labels, batch_size, seed=0, interrupt_after=None, signal=signal.SIGINT):
        self.inputs, self.labels, self.batch_size, self.seed = inputs, labels, batch_size, seed
        self.interrupt_after, self.signal, self.served, self.epoch = interrupt_after, signal, 0, 0

    def __len__(self):
        return len(self.labels) // self.batch_size

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(1000 * self.seed + self.epoch))
        for i in range(len(self)):
            rows = order[i * self.batch_size : (i + 1) * self.batch_size]
            self.served += 1
            if self.served == self.interrupt_after:
                os.kill(os.getpid(), self.signal)
            yield self.inputs[rows], self.labels[rows]


class ToyNet(nn.Module):
    """Two mixed ops of real blocks, one of them with a Zero behind a shortcut."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = MixedOp({"a": MBConv(3, 8, 3, 2, 3), "b": MBConv(3, 8, 5, 2, 3)}, label="first")
        self.second = MixedOp({"a": MBConv(8, 8, 3, 1, 3), "b": MBConv(8, 8, 5, 1, 6), "zero": Zero()}, label="second")
        self.classifier = nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x)
        x = x + self.second(x)
        return self.classifier(x.mean((2, 3)))


class Times:
    """A latency model over mixed ops, given each candidate's ms."""

    def __init__(self, ops, times):
        self.ops, self.times = ops, times
        self.fastest = sum(min(t) for t in times.values())

    def __call__(self):
        return sum((op.gate_probabilities() * torch.tensor(self.times[label])).sum() for label, op in self.ops.items())

    def of_choices(self, choices):
        return sum(self.times[label][j] for label, j in choices.items())


def toy_loaders(**kwargs):
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(0, 4, (96,), generator=generator)
    inputs = torch.randn(96, 3, 8, 8, generator=generator) + labels[:, None, None, None] * 0.5
    return Batches(inputs[:64], labels[:64], 8, seed=1, **kwargs), Batches(inputs[64:], labels[64:], 8, seed=2)


def toy_times(net):
    return Times(mixed_ops(net), {"first": [1.0, 2.0], "second": [1.0, 2.0, 0.0]})


def config(**changes):
    values = {
        "epochs": 2,
        "warmup_epochs": 0,
        "lr": 0.05,
        "arch_every": 2,
        "arch_lr": 0.01,
        "target_ms": 2.0,
        "log_every": 3,
    }
    return SearchConfig(**{**values, "objective": "add_linear", "samples": 3, **changes})


def state_of(search):
    return {k: v.clone() for k, v in search.net.state_dict().items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


# configuration


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", -1), ("epochs", 1.5), ("epochs", True), ("warmup_epochs", -1), ("arch_every", 0), ("samples", 0),
        ("lr", 0), ("lr", math.nan), ("arch_lr", -1e-3), ("momentum", 1.0), ("label_smoothing", 1),
        ("weight_decay", -1), ("mode", "half"), ("objective", "log"), ("target_ms", 0), ("target_ms", math.inf),
        ("prune_below", 0.9), ("prune_below", 0), ("seed", -3), ("log_every", 0), ("mul_log_exponent", 0),
        ("target_ms", 0.5),
    ],
)  # fmt: skip
def test_config_error_is_one_sentence_with_field_value_and_expected(field, value):
    with pytest.raises(ValueError) as error:
        SearchConfig(**{field: value})
    message = str(error.value)
    assert field in message and repr(value) in message and "expected" in message and "\n" not in message


def test_config_combinations():
    SearchConfig(prune_below=0.01, arch_weight_decay=0.1)  # a pruned alpha stays finite
    SearchConfig(target_ms=0.5, objective="add_linear")
    assert SearchConfig(**SearchConfig(target_ms=80).to_dict()) == SearchConfig(target_ms=80)
    with pytest.raises(ValueError, match=r"TrainConfig.lr: got 0"):
        TrainConfig(lr=0)


def test_search_refuses_what_it_cannot_search():
    net, (train_batches, valid) = ToyNet(), toy_loaders()
    with pytest.raises(ValueError, match="no MixedOp"):
        Search(nn.Linear(2, 2), train_batches, valid)
    with pytest.raises(ValueError, match="valid: got a loader of 0 batches"):
        Search(net, train_batches, Batches(train_batches.inputs[:3], train_batches.labels[:3], 8))
    with pytest.raises(ValueError, match="target_ms: got None"):
        Search(net, train_batches, valid, SearchConfig(), toy_times(net))
    with pytest.raises(ValueError, match="at least the fastest path's 1 ms"):
        Search(net, train_batches, valid, config(target_ms=0.9), toy_times(net))
    with pytest.raises(ValueError, match="expected 'add_linear'"):
        Search(net, train_batches, valid, config(objective="mul_log"), toy_times(net))


# objective


def test_objective_has_the_official_values(shared):
    golden = np.load(shared / "golden" / "expected_latency.npz")
    latency, ref = torch.from_numpy(golden["latency_ms"]), float(golden["ref_ms"])
    for ce in (6.9, 2.3):
        ours = objective(torch.tensor(ce), latency, ref, kind="mul_log", alpha=0.2, beta=0.3)
        assert ours.item() == pytest.approx(float(golden[f"objective/mul_log/ce{ce}"]), rel=1e-5)
        ours = objective(torch.tensor(ce), latency, ref, kind="add_linear", weight=0.1)
        assert ours.item() == pytest.approx(float(golden[f"objective/add_linear/ce{ce}"]), rel=1e-5)


def test_objective_is_differentiable_and_says_what_is_wrong():
    ce = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    latency = torch.tensor(70.0, dtype=torch.float64, requires_grad=True)
    for kind in ("mul_log", "add_linear"):
        assert torch.autograd.gradcheck(lambda a, b, kind=kind: objective(a, b, 80.0, kind), (ce, latency))
    with pytest.raises(ValueError, match="kind is 'add'"):
        objective(1.0, 50.0, 80.0, kind="add")
    with pytest.raises(ValueError, match="ref is 1 ms"):
        objective(1.0, 50.0, 1)


# REINFORCE


def reinforce_estimates(baseline_of, steps=3000, samples=2):
    """Per-step gradient estimates, and the exact gradient of −E[R], on two mixed ops with a table of rewards."""
    net = nn.ModuleList([MixedOp([Zero()] * 3), MixedOp([Zero()] * 2)])
    ops = list(mixed_ops(net).values())
    with torch.no_grad():
        ops[0].alpha.copy_(torch.tensor([0.4, -0.3, 0.1]))
        ops[1].alpha.copy_(torch.tensor([-0.5, 0.2]))
    table = torch.tensor([[1.0, 0.2], [0.5, 0.9], [0.1, 0.3]])
    alphas = [op.alpha for op in ops]
    expected_reward = ops[0].probabilities() @ table @ ops[1].probabilities()
    exact = torch.cat(torch.autograd.grad(-expected_reward, alphas))
    generator, baseline, estimates = torch.Generator().manual_seed(0), None, []
    for _ in range(steps):
        log_p, rewards = [], []
        for _ in range(samples):
            sample(net, "path", generator=generator)
            log_p.append(log_probability(ops))
            rewards.append(table[ops[0].active, ops[1].active])
        rewards = torch.stack(rewards)
        loss = surrogate(torch.stack(log_p), rewards, baseline_of(baseline, rewards))
        estimates.append(torch.cat(torch.autograd.grad(loss, alphas)))
        baseline = update_baseline(baseline, rewards, 0.9)
    return torch.stack(estimates).double(), exact.double()


def largest_z(estimates, exact):
    error = estimates.std(0) / math.sqrt(len(estimates))
    return ((estimates.mean(0) - exact).abs() / error).max().item()


@pytest.mark.parametrize("baseline_of", [lambda b, r: b, lambda b, r: None], ids=["moving average", "first step"])
def test_reinforce_is_unbiased(baseline_of):
    # Five components, |z| < 4.5: by chance less than once in 20,000 seeds.
    assert largest_z(*reinforce_estimates(baseline_of)) < 4.5


def test_the_test_of_bias_finds_one():
    assert largest_z(*reinforce_estimates(lambda b, r: r.mean())) > 4.5


# choosing a path


def test_choose_path_matches_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(1, 5, size=4)
        log_p = [np.log(rng.dirichlet(np.ones(n))) for n in sizes]
        times = [rng.uniform(0, 3, n) for n in sizes]
        if sizes[0] > 1:
            log_p[0][0] = -np.inf
        alive = [np.where(np.isfinite(p), t, np.inf) for p, t in zip(log_p, times, strict=True)]
        fastest = sum(t.min() for t in alive)
        budget = fastest * rng.uniform(1.0, 1.8)
        path = choose_path(log_p, times, budget)

        def total(rows, choice):
            return sum(row[j] for row, j in zip(rows, choice, strict=True))

        paths = [c for c in itertools.product(*map(range, sizes)) if total(alive, c) <= budget]
        assert total(alive, path) <= budget * (1 + 1e-9)
        assert total(log_p, path) == pytest.approx(max(total(log_p, c) for c in paths))


def test_choose_path_at_and_below_the_fastest():
    log_p, times = [[-0.1, -2.0], [-0.5, -1.0]], [[0.3, 0.1], [0.7, 0.2]]
    assert choose_path(log_p, times, 0.1 + 0.2) == [1, 1]
    assert choose_path(log_p, times, 1.0) == [0, 0]
    with pytest.raises(ValueError, match=r"at least the fastest path's 0\.3 ms"):
        choose_path(log_p, times, 0.29)


# the steps


def test_weight_step_touches_the_active_path_only_and_arch_step_alphas_only():
    net, (train_batches, valid) = ToyNet(), toy_loaders()
    search = Search(net, train_batches, valid, config(), toy_times(net))
    net.train()
    inputs, labels = next(iter(train_batches))
    before = {name: p.clone() for name, p in net.named_parameters()}
    search.weight_step((inputs, labels))
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    active = {f"{label}.candidates.{op.active}." for label, op in mixed_ops(net).items()}
    assert moved and all(name.startswith("classifier") or any(name.startswith(a) for a in active) for name in moved)
    assert all(any(name.startswith(a) for name in moved) for a in active if a != "second.candidates.2.")
    stateful = {id(p) for p, s in search.weight_optimizer.state.items() if s.get("momentum_buffer") is not None}
    assert stateful == {id(p) for name, p in net.named_parameters() if name in moved}

    before = {name: p.clone() for name, p in net.named_parameters()}
    search.arch_step((inputs, labels))
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"first.alpha", "second.alpha"}
    assert all(p.requires_grad for p in net.parameters())


def test_latency_term_adds_its_gradient():
    grads = []
    for times in (None, toy_times):
        net, (train_batches, valid) = ToyNet(), toy_loaders()
        search = Search(net, train_batches, valid, config(add_linear_weight=0.7), times and times(net))
        search.arch_step(next(iter(valid)))
        grads.append([alpha.grad.clone() for alpha in arch_parameters(net)])
    net = ToyNet()
    (0.7 * (toy_times(net)() - 2.0) / 2.0).backward()
    for without, with_term, alpha in zip(*grads, arch_parameters(net), strict=True):
        torch.testing.assert_close(with_term - without, alpha.grad, atol=1e-7, rtol=1e-5)


def test_the_log_keeps_no_graph():
    net, (train_batches, valid) = ToyNet(), toy_loaders()
    search = Search(net, train_batches, valid, config(), toy_times(net))
    search.weight_step(next(iter(train_batches)))
    search.arch_step(next(iter(valid)))
    noted = [value for _, _, values in search.journal._pending for value in values.values()]
    assert len(noted) == 3 + 5 and not any(getattr(value, "requires_grad", False) for value in noted)


def test_vectors_are_not_decayed():
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    optimizer = sgd(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in net.parameters()] == [0.5, 0, 0, 0]


def test_warm_up_and_the_rhythm_of_arch_steps(tmp_path):
    net, (train_batches, valid) = ToyNet(), toy_loaders()
    Search(net, train_batches, valid, config(warmup_epochs=1, epochs=1, arch_every=3), toy_times(net), tmp_path).fit()
    records = [json.loads(line) for line in (tmp_path / "search.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "weight"] == list(range(16))
    assert [r["step"] for r in records if r["kind"] == "arch"] == [8, 11, 14]
    assert (train_batches.served, valid.served) == (16, 3)
    arch = next(r for r in records if r["kind"] == "arch")
    assert {"loss", "ce", "top1", "latency", "entropy"} <= arch.keys()
    assert list((tmp_path / "tensorboard").iterdir())


# what it finds


class Seen(nn.Module):
    """A linear classifier of its group of features, of which it sees the first few."""

    def __init__(self, features, classes, seen):
        super().__init__()
        self.linear, self.seen = nn.Linear(features, classes), seen

    def forward(self, x):
        return self.linear(x * (torch.arange(x.shape[1]) < self.seen))


class Planted(nn.Module):
    """Logits are a sum over mixed ops, each with features of its own, of which the candidate `best` sees most."""

    LAYERS, FEATURES, CLASSES = 10, 4, 8

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        order = torch.Generator().manual_seed(5)
        seen = [torch.randperm(4, generator=order).tolist() for _ in range(self.LAYERS)]
        seen = [[(0, 1, 2, 4)[s] for s in row] for row in seen]
        self.ops = nn.ModuleList(
            MixedOp([Seen(self.FEATURES, self.CLASSES, s) for s in row], label=f"layer{i}")
            for i, row in enumerate(seen)
        )
        self.best = {f"layer{i}": row.index(4) for i, row in enumerate(seen)}
        self.fastest = {f"layer{i}": row.index(0) for i, row in enumerate(seen)}
        self.times = {f"layer{i}": [1.0 + s for s in row] for i, row in enumerate(seen)}

    def forward(self, x):
        return sum(op(group) for op, group in zip(self.ops, x.chunk(self.LAYERS, 1), strict=True))


def planted_search(mode, weight, epochs=30):
    net = Planted()
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(Planted.CLASSES, Planted.LAYERS * Planted.FEATURES, generator=generator)
    labels = torch.randint(0, Planted.CLASSES, (2048,), generator=generator)
    inputs = centres[labels] + 1.5 * torch.randn(2048, centres.shape[1], generator=generator)
    batches = Batches(inputs[:1024], labels[:1024], 64), Batches(inputs[1024:], labels[1024:], 64)
    settings = config(
        epochs=epochs, warmup_epochs=3, lr=0.2, label_smoothing=0.0, arch_every=1, arch_lr=0.05, mode=mode,
        add_linear_weight=weight, target_ms=20.0, samples=8, reward_exponent=weight, baseline_momentum=0.9,
    )  # fmt: skip
    Search(net, *batches, settings, Times(mixed_ops(net), net.times)).fit()
    return net


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "two", "reinforce"])
def test_search_finds_the_planted_optimum(mode):
    net = planted_search(mode, weight=0.0)
    found = {label: op.most_likely for label, op in mixed_ops(net).items()}
    assert sum(found[label] == best for label, best in net.best.items()) >= 0.9 * len(found), (found, net.best)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "two", "reinforce"])
def test_a_larger_latency_term_moves_it_to_the_faster_ones(mode):
    net = planted_search(mode, weight=20.0)
    found = {label: op.most_likely for label, op in mixed_ops(net).items()}
    assert sum(found[label] == fastest for label, fastest in net.fastest.items()) >= 0.9 * len(found), found


# repeating and resuming


@pytest.mark.parametrize("mode", ["full", "two", "reinforce"])
def test_same_seed_same_bits_after_20_steps(mode):
    states = []
    for seed in (0, 0, 1):
        net, (train_batches, valid) = ToyNet(), toy_loaders()
        search = Search(net, train_batches, valid, config(epochs=3, arch_every=1, mode=mode, seed=seed), toy_times(net))
        batches = itertools.cycle(zip(train_batches, valid, strict=False))
        net.train()
        for _ in range(20):
            (inputs, labels), valid_batch = next(batches)
            search.weight_step((inputs, labels))
            search.arch_step(valid_batch)
            search.step += 1
        states.append(state_of(search))
    assert_same_bits(states[0], states[1])
    assert not torch.equal(states[0]["first.alpha"], states[2]["first.alpha"])


@pytest.mark.parametrize("mode", ["full", "two", "reinforce"])
@pytest.mark.parametrize("interrupted_at", [8, 5], ids=["between epochs", "within an epoch"])
def test_resume_continues_to_the_same_bits(tmp_path, mode, interrupted_at):
    net, loaders = ToyNet(), toy_loaders()
    straight = Search(net, *loaders, config(mode=mode), toy_times(net), tmp_path / "straight").fit()

    net, loaders = ToyNet(), toy_loaders(interrupt_after=interrupted_at)
    with pytest.raises(KeyboardInterrupt, match=rf"after step {interrupted_at} of 16.*resume"):
        Search(net, *loaders, config(mode=mode), toy_times(net), tmp_path / "resumed").fit()
    torch.manual_seed(12345)  # another process has another random state
    net = ToyNet(seed=99)
    resumed = Search.resume(tmp_path / "resumed", net, *toy_loaders(), table=toy_times(net)).fit()

    assert_same_bits(state_of(straight), state_of(resumed))
    assert straight.history == resumed.history
    logs = [(tmp_path / name / "search.jsonl").read_text() for name in ("straight", "resumed")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_what_a_scheduler_sends_saves_the_running_step(tmp_path, number):
    net = ToyNet()
    straight = Search(net, *toy_loaders(), config(), toy_times(net), tmp_path / "straight").fit()
    net, loaders = ToyNet(), toy_loaders(interrupt_after=5)
    loaders[0].signal = number
    before = signal.getsignal(number)
    with pytest.raises(Preempted, match=rf"after step 5 of 16.*resume.*{number.name}") as stop:
        Search(net, *loaders, config(), toy_times(net), tmp_path / "resumed").fit()
    assert stop.value.code == 0 and signal.getsignal(number) == before
    net = ToyNet(seed=99)
    resumed = Search.resume(tmp_path / "resumed", net, *toy_loaders(), table=toy_times(net)).fit()
    assert_same_bits(state_of(straight), state_of(resumed))


def test_what_the_process_ignores_it_goes_on_ignoring(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        net, loaders = ToyNet(), toy_loaders(interrupt_after=5)
        loaders[0].signal = signal.SIGHUP
        assert Search(net, *loaders, config(), toy_times(net), tmp_path).fit().step == 16
    finally:
        signal.signal(signal.SIGHUP, before)


def test_resume_drops_records_that_the_checkpoint_does_not_know(tmp_path):
    net, loaders = ToyNet(), toy_loaders(interrupt_after=5)
    with pytest.raises(KeyboardInterrupt):
        Search(net, *loaders, config(), toy_times(net), tmp_path).fit()
    with open(tmp_path / "search.jsonl", "a") as file:
        file.write('{"step": 6, "kind": "weight", "loss": 1.0}\n{"step": 7, "ki')
    net = ToyNet()
    Search.resume(tmp_path, net, *toy_loaders(), table=toy_times(net)).fit()
    records = [json.loads(line) for line in (tmp_path / "search.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "weight"] == list(range(16))


def test_resume_says_what_does_not_fit(tmp_path):
    net, loaders = ToyNet(), toy_loaders()
    with pytest.raises(FileNotFoundError, match=r"checkpoints: no checkpoint in it"):
        Search.resume(tmp_path, net, *loaders)
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="not a checkpoint"):
        Search.resume(tmp_path, net, *loaders)
    (tmp_path / "checkpoint.pt").unlink()
    Search(net, *loaders, config(epochs=1), toy_times(net), tmp_path).fit()
    other = ToyNet()
    other.classifier = nn.Linear(8, 5)
    with pytest.raises(ValueError, match=r"\.pt does not fit the net.*classifier\.bias has shape \(4,\)"):
        Search.resume(tmp_path, other, *loaders, table=toy_times(other))
    assert load(tmp_path)[0]["step"] == 8
    assert not list(tmp_path.glob(".*"))


# pruning and errors


def test_pruned_candidates_never_come_back(tmp_path):
    net, loaders = ToyNet(), toy_loaders()
    with torch.no_grad():
        net.second.alpha.copy_(torch.tensor([0.0, 0.0, -6.0]))
    search = Search(net, *loaders, config(epochs=1, prune_below=0.05, mode="full"), toy_times(net), tmp_path).fit()
    assert net.second.pruned.tolist() == [False, False, True]
    assert all(math.isfinite(a) for a in [*net.first.alpha.tolist(), *net.second.alpha.tolist()[:2]])
    assert net.second.probabilities()[2] == 0
    assert math.isfinite(search.entropy().item())
    net2 = ToyNet()
    resumed = Search.resume(tmp_path, net2, *loaders, table=toy_times(net2))
    for step in range(20):
        resumed.step = step
        resumed.arch_step(next(iter(loaders[1])))
        assert net2.second.active != 2
    assert net2.second.pruned.tolist() == [False, False, True]


@pytest.mark.parametrize("kind", ["weight", "arch"])
def test_a_nan_stops_with_step_and_layer(kind):
    net, (train_batches, valid) = ToyNet(), toy_loaders()
    search = Search(net, train_batches, valid, config(), toy_times(net))
    search.step = 4
    with torch.no_grad():
        for candidate in net.second.candidates[:2]:
            candidate.depth_conv.conv.weight[0] = math.nan
            net.second.alpha[2] = -math.inf
    with pytest.raises(NonFiniteLoss, match=rf"nan at {kind} step 4.*second\.candidates\.\d\.depth_conv"):
        getattr(search, f"{kind}_step")(next(iter(valid)))


def test_a_nan_in_the_data_is_told_apart():
    net, (train_batches, valid) = ToyNet(), toy_loaders()
    inputs, labels = next(iter(valid))
    inputs[0, 0, 0, 0] = math.inf
    with pytest.raises(NonFiniteLoss, match="that of the input"):
        Search(net, train_batches, valid, config(), toy_times(net)).weight_step((inputs, labels))


# what comes after


def test_train_and_evaluate(tmp_path):
    supernet, (train_batches, valid) = ToyNet(), toy_loaders()
    net = derive(supernet, {"first": 0, "second": 1})
    before = evaluate(net, train_batches)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    evaluate(net, valid)
    assert_same_bits(state, net.state_dict())
    train(net, train_batches, TrainConfig(epochs=15, lr=0.05), log=tmp_path / "train.jsonl")
    after = evaluate(net, train_batches)
    assert after.loss < before.loss and after.top1 > before.top1
    logits = torch.cat([net.eval()(x) for x, _ in valid])
    labels = torch.cat([y for _, y in valid])
    result = evaluate(net, valid)
    assert result.top1 == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert result.top5 == 1 and result.images == len(labels)
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 15 * (8 + 1)
    assert not any(torch.equal(p, q) for p, q in zip(net.parameters(), derive(supernet).parameters(), strict=False))
    assert len(list(weight_parameters(net))) == len(list(net.parameters()))


def test_what_is_not_finite_is_named():
    """The diagnosis runs the net as it ran: hooks would turn off the fused op whose own sums overflow."""

    def stopped(change, inputs=None, labels=None, kind="weight", said=""):
        net, (batches, valid) = ToyNet(), toy_loaders()
        search = Search(net, batches, valid, config(), toy_times(net))
        first, second = next(iter(valid))
        change(net)
        with pytest.raises(NonFiniteLoss, match=said):
            batch = first if inputs is None else inputs(first), second if labels is None else labels(second)
            getattr(search, f"{kind}_step")(batch)

    def poisoned(net):
        with torch.no_grad():
            net.classifier.weight[0, 0] = math.inf

    def alpha(net):
        with torch.no_grad():
            net.second.alpha[1] = math.nan

    nothing = lambda net: None  # noqa: E731
    stopped(poisoned, said="that of classifier, whose weight is not finite")
    stopped(alpha, kind="arch", said="alpha of second is not finite")
    stopped(nothing, inputs=lambda x: x * 1e20, said=r"that of (first|second)")
    stopped(nothing, inputs=lambda x: x[:0], labels=lambda y: y[:0], said="the batch is empty")
    stopped(nothing, labels=lambda y: torch.full_like(y, -100), said="every label of the batch is -100")


def test_evaluation_stops_at_a_nan():
    net, (_, valid) = ToyNet(), toy_loaders()
    plain = derive(net)
    with torch.no_grad():
        plain.classifier.bias[0] = math.nan
    with pytest.raises(NonFiniteLoss, match=r"nan at evaluation step 0.*classifier, whose bias"):
        evaluate(plain, valid)


def test_net_table_and_data_speak_of_the_same_images():
    net, (batches, valid) = spaces.small(num_classes=4, in_channels=3, resolution=8), toy_loaders()
    for field, other in (("in_channels", 1), ("resolution", 16), ("num_classes", 7)):
        setattr(batches, field, other)
        with pytest.raises(ValueError, match=rf"train: the loader's {field} is {other}, expected the net's"):
            Search(net, batches, valid, config())
        delattr(batches, field)

    edited = copy.deepcopy(net)
    edited.first_conv = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU6())  # it tells no channels any more
    assert Search(edited, batches, valid, config()).total_steps == 16

    class Flat(LatencyTable):
        def lookup_all(self, shapes):
            return [1.0 for _ in shapes]

    latency = ExpectedLatency(net, Flat({}))
    search = Search(net, batches, valid, config(target_ms=10.0, objective="add_linear"), latency)
    for step, name in ((search.weight_step, "train"), (search.arch_step, "valid")):
        with pytest.raises(ValueError, match=rf"{name}: the images have shape \(3, 12, 12\), expected \(3, 8, 8\)"):
            step((torch.randn(2, 3, 12, 12), torch.zeros(2, dtype=torch.long)))
    with pytest.raises(ValueError, match="another net's mixed ops"):
        Search(copy.deepcopy(net), batches, valid, config(target_ms=10.0), latency)


@pytest.mark.parametrize("kind", ["weight", "arch"])
def test_a_gradient_that_is_not_finite_stops_before_the_optimizer(kind):
    net, (batches, valid) = ToyNet(), toy_loaders()
    search = Search(net, batches, valid, config(), toy_times(net))
    poisoned = net.classifier.bias if kind == "weight" else net.second.alpha
    poisoned.register_hook(lambda grad: grad * math.nan)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    name = "classifier.bias" if kind == "weight" else "second.alpha"
    with pytest.raises(NonFiniteLoss, match=f"that of {name} at {kind} step 0 is not finite"):
        getattr(search, f"{kind}_step")(next(iter(valid)))
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_one_of_several_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    net = ToyNet()
    with pytest.raises(ValueError, match="WORLD_SIZE: got 4 processes that know nothing of each other"):
        Search(net, *toy_loaders(), config(), toy_times(net))
    with pytest.raises(ValueError, match="WORLD_SIZE"):
        train(derive(net), toy_loaders()[0], TrainConfig(epochs=1))
