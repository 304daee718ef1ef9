"""What large batches need: learning rates that grow, other optimizers, clipping, half precision; and own tasks."""

import copy
import math

import pytest
import torch
from torch import nn

from proxyless_fast.distributed.ranks import Ranks
from proxyless_fast.search import Search, SearchConfig, TrainConfig, checkpoint, train
from proxyless_fast.search.optim import cosine_of
from proxyless_fast.supernet import derive, weight_parameters
from tests.search.test_search import ToyNet, config, toy_loaders, toy_times


class Sized:
    batch_size = 1024

    def __len__(self):
        return 100

    def shard(self, rank, world_size):
        pass


def test_the_learning_rate_grows_with_the_batch_and_gets_there_on_a_line():
    of = cosine_of(SearchConfig(lr=0.1, lr_batch=256, lr_warmup_epochs=5, target_ms=2.0), Sized(), Ranks())
    total = 1000
    assert of(0, total) == pytest.approx(0.1)
    assert of(250, total) == pytest.approx(0.25)
    assert of(500, total) == pytest.approx(0.4)
    assert of(750, total) == pytest.approx(0.2)
    assert of(1000, total) == pytest.approx(0.0, abs=1e-12)
    plain = cosine_of(SearchConfig(lr=0.1, target_ms=2.0), Sized(), Ranks())
    assert plain(250, total) == 0.5 * 0.1 * (1 + math.cos(math.pi * 0.25))
    with pytest.raises(ValueError, match="lr_warmup_epochs: got 5, 500 steps, expected less than all 500"):
        of(0, 500)
    with pytest.raises(ValueError, match="lr_batch: got it with a list that has no batch_size"):
        cosine_of(SearchConfig(lr_batch=256, target_ms=2.0), [], Ranks())


def fitted(folder=None, **changes):
    net = ToyNet()
    search = Search(net, *toy_loaders(), config(**changes), toy_times(net), folder)
    return search.fit()


@pytest.mark.parametrize("optimizer", ["lars", "lamb"])
def test_other_optimizers_leave_inactive_weights_alone(optimizer):
    net = ToyNet()
    search = Search(net, *toy_loaders(), config(optimizer=optimizer, weight_decay=0.5), toy_times(net))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    search.weight_step(next(iter(search.train)))
    active = {id(p) for p in search.active()}
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in net.named_parameters() if id(p) in active}


@pytest.mark.parametrize("changes", [{"optimizer": "lars"}, {"optimizer": "lamb"}, {"precision": "float16"}])
def test_a_resume_is_exact_with_what_they_keep(changes, tmp_path):
    whole = fitted(tmp_path / "whole", epochs=3, **changes)
    search = fitted(tmp_path / "stopped", epochs=3, **changes)
    newest, *earlier = checkpoint.paths(tmp_path / "stopped" / "checkpoints")
    assert earlier
    newest.unlink()
    net = ToyNet(seed=5)
    resumed = Search.resume(tmp_path / "stopped", net, *toy_loaders(), toy_times(net))
    assert resumed.step < search.step
    resumed.fit()
    for name, value in whole.net.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name


def test_gradients_are_clipped():
    net, norms = ToyNet(), []
    search = Search(net, *toy_loaders(), config(clip_norm=1e-3), toy_times(net))

    def look(*_):  # before the step: Nesterov's momentum is added in place
        norms.append(float(torch.stack([p.grad.norm() for p in search.weights if p.grad is not None]).norm()))

    search.weight_optimizer.register_step_pre_hook(look)
    search.weight_step(next(iter(search.train)))
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_keeps_weights_and_alphas_in_float32(precision):
    search = fitted(precision=precision)
    assert {p.dtype for p in search.net.parameters()} == {torch.float32}
    assert all(math.isfinite(value) for value in search.history[-1].values())
    assert search.backward.scaler.is_enabled() == (precision == "float16")


def test_a_step_that_overflows_is_left_out_and_the_scale_goes_down():
    net = ToyNet()
    search = Search(net, *toy_loaders(), config(precision="float16"), toy_times(net))
    batch = next(iter(search.train))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    hook = net.classifier.weight.register_hook(lambda grad: grad * math.inf)
    scale = search.backward.scaler.get_scale()
    search.weight_step(batch)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert search.backward.scaler.get_scale() < scale
    hook.remove()
    search.weight_step(batch)
    assert any(not torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_reinforce_in_float16_scales_what_it_unscales():
    found = []
    for precision in ("float32", "float16"):
        net = ToyNet()
        search = Search(net, *toy_loaders(), config(mode="reinforce", precision=precision, log_every=1), toy_times(net))
        search.backward.scaler.step = lambda optimizer: None  # look at the gradients before they are used
        search.arch_step(next(iter(search.valid)))
        found.append([op.alpha.grad for op in search.ops.values()])
    for full, half in zip(*found, strict=True):
        torch.testing.assert_close(half, full, rtol=0.2, atol=0.02)
    assert any(bool(grad.abs().max() > 0.01) for grad in found[0])


def test_training_takes_the_same():
    net = derive(ToyNet(), {"first": 0, "second": 1})
    parts, whole = copy.deepcopy(net), copy.deepcopy(net)
    for own in (parts, whole):
        for module in own.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train = lambda mode=True, module=module: module
                module.training = False
    loader = toy_loaders()[0]
    settings = {"epochs": 1, "lr": 0.05, "clip_norm": 1.0}
    train(whole, loader, TrainConfig(**settings))
    train(parts, loader, TrainConfig(**settings, accumulate=4))
    for p, q in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def regression(net, batch):
    outputs = net(batch["image"]).mean(1)
    error = (outputs - batch["target"]).square().mean()
    return error, {"closeness": -error.detach(), "spread": outputs.detach().std()}


class Dicts:
    """Batches of another structure."""

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return ({"image": images, "target": labels.float()} for images, labels in self.loader)


@pytest.mark.parametrize("mode", ["full", "two", "reinforce"])
def test_a_step_of_ones_own_for_batches_of_any_structure(mode):
    net = ToyNet()
    loaders = [Dicts(loader) for loader in toy_loaders()]
    search = Search(net, *loaders, config(mode=mode, accumulate=2), toy_times(net), step=regression).fit()
    assert {"weight_loss", "weight_closeness", "weight_spread"} <= search.history[-1].keys()
    assert any(bool(op.alpha.any()) for op in search.ops.values())


def test_loss_metric_optimizers_and_schedule_of_ones_own():
    net, seen = ToyNet(), []

    def right(outputs, targets):
        return (outputs.argmax(1) == targets).float().mean()

    search = Search(
        net, *toy_loaders(), config(), toy_times(net),
        loss=lambda outputs, targets: nn.functional.multi_margin_loss(outputs, targets), metric=right,
        weight_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1.0),
        arch_optimizer=lambda alphas: torch.optim.SGD(alphas, lr=0.1),
        schedule=lambda step, total: seen.append((step, total)) or 1e-3,
    )  # fmt: skip
    search.fit()
    assert seen == [(step, 16) for step in range(16)]
    assert {"weight_right", "arch_right"} <= search.history[-1].keys() and search.history[-1]["weight_lr"] == 1e-3
    assert isinstance(search.weight_optimizer, torch.optim.AdamW)
    assert {id(p) for p in weight_parameters(net)} == {id(p) for p in search.weights}


def test_a_step_and_a_loss_are_refused_together():
    net = ToyNet()
    with pytest.raises(ValueError, match="step: got it with a loss or a metric"):
        Search(net, *toy_loaders(), config(), toy_times(net), step=regression, loss=nn.functional.cross_entropy)


@pytest.mark.parametrize(
    ("said", "changes"),
    [
        ("optimizer: got 'adam', expected one of sgd, lars, lamb", {"optimizer": "adam"}),
        ("precision: got 'half', expected one of float32, bfloat16, float16", {"precision": "half"}),
        ("paths: got 'other', expected one of same, own", {"paths": "other"}),
        ("accumulate: got 0, expected an integer of at least 1", {"accumulate": 0}),
        ("clip_norm: got 0, expected a number above 0 or None", {"clip_norm": 0}),
        ("lr_batch: got 1.5, expected an integer of at least 1 or None", {"lr_batch": 1.5}),
        ("sync_norm: got 1, expected True or False", {"sync_norm": 1}),
        ("sync_norm: got True, expected False where each process draws its own", {"sync_norm": True, "paths": "own"}),
    ],
)
def test_settings_are_checked(said, changes):
    with pytest.raises(ValueError, match=f"SearchConfig.{said}"):
        config(**changes)
