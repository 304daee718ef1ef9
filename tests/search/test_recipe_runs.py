"""Recipe and waiting within whole runs: a stop changes no bit, a loader that hangs loses no step."""

import itertools
import json
import time

import pytest
import torch

from proxyless_fast import spaces
from proxyless_fast.data.memory import MemoryLoader
from proxyless_fast.search import Search, SearchConfig, TrainConfig, Training
from proxyless_fast.search import session as sessions
from proxyless_fast.search.waiting import Waiting
from proxyless_fast.supernet import arch_parameters, derive

RECIPE = {"ema_decay": 0.9, "mixup": 0.2, "cutmix": 1.0}


def small_net():
    torch.manual_seed(0)
    return spaces.small(num_classes=3, in_channels=1, resolution=8)


class Stopping(MemoryLoader):
    """A loader that is interrupted (or whatever `what` does) before one of its batches, once."""

    what, at, given = None, None, 0

    def batches_from(self, epoch, skip=0):
        for batch in super().batches_from(epoch, skip):
            self.given += 1
            if self.given == self.at and self.what is not None:
                self.what()
            yield batch


def loader(count=32, **options):
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    half = torch.full((1,), 0.5)
    found = Stopping(images, torch.arange(count) % 3, 8, mean=half, std=half, num_classes=3, shuffle=True, shift=1)
    for name, value in options.items():
        setattr(found, name, value)
    return found


def interrupt():
    raise KeyboardInterrupt


def fail():
    raise OSError("gone")


def search(folder, **options):
    config = SearchConfig(epochs=1, warmup_epochs=1, arch_every=2, arch_lr=0.1, log_every=1, **RECIPE)
    return Search(small_net(), loader(**options), loader(16), config, out=folder)


def training(folder, **options):
    net = derive(small_net())
    return Training(net, loader(**options), TrainConfig(epochs=2, log_every=1, **RECIPE), folder)


def again(kind, folder):
    if kind is search:
        return Search.resume(folder, small_net(), loader(), loader(16))
    return Training.resume(folder, derive(small_net()), loader())


@pytest.mark.parametrize("kind", [search, training])
def test_a_stopped_run_with_every_recipe_ends_in_the_same_bits(kind, tmp_path):
    straight = kind(tmp_path / "straight").fit()
    with pytest.raises(OSError, match="gone"):
        kind(tmp_path / "stopped", what=fail, at=6).fit()
    torch.manual_seed(99)  # another process
    resumed = again(kind, tmp_path / "stopped")
    assert resumed.step == 5
    resumed.fit()
    for one, other in ((straight.net, resumed.net), (straight.average.module, resumed.average.module)):
        theirs = other.state_dict()
        for name, value in one.state_dict().items():
            assert torch.equal(value, theirs[name]), name
    name = f"{kind.__name__.replace('training', 'train')}.jsonl"
    assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


def test_at_the_end_the_net_has_the_averaged_weights_and_its_own_alphas(tmp_path):
    found = search(tmp_path).fit()
    averaged = dict(found.average.module.named_parameters())
    alphas = {id(alpha) for alpha in arch_parameters(found.net)}
    for name, value in found.net.named_parameters():
        assert torch.equal(value, averaged[name]) == (id(value) not in alphas), name


@pytest.mark.parametrize("field", RECIPE)
def test_each_part_of_the_recipe_changes_what_is_trained(field):
    def trained(**options):
        net = derive(small_net())
        Training(net, loader(), TrainConfig(epochs=1, **options)).fit()
        return torch.cat([value.detach().flatten() for value in net.parameters()])

    assert torch.equal(trained(), trained())
    assert not torch.equal(trained(), trained(**{field: RECIPE[field]}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("ema_decay", 1.0), ("ema_decay", 0), ("mixup", -1.0), ("cutmix", float("nan")), ("cutmix", None)],
)
@pytest.mark.parametrize("kind", [SearchConfig, TrainConfig])
def test_wrong_values_are_named(kind, field, value):
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.{field}: got .* expected a number"):
        kind(**{field: value})


def test_mixing_needs_to_know_the_classes():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    batches = [(torch.rand(4, 1, 8, 8), torch.arange(4) % 3)]
    with pytest.raises(ValueError, match=r"mixup: got 0\.2, expected it with a net or a loader that has num_classes"):
        Training(net, batches, TrainConfig(epochs=1, mixup=0.2))


def test_a_loader_that_hangs_ends_the_run_and_no_step_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(sessions, "Waiting", lambda *a, **k: Waiting(*a, timeout=0.5, **k))
    hanging = training(tmp_path, what=lambda: time.sleep(1000), at=6)
    with pytest.raises(TimeoutError, match=r"^loader: the loader gave no batch for 0\.5 s, expected one$"):
        hanging.fit()
    assert again(training, tmp_path).step == 5


def test_the_share_of_waiting_is_in_tensorboard_and_beside_the_bar(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shares = itertools.count(1)
    monkeypatch.setattr(Waiting, "take", lambda self: next(shares) / 100)
    training(tmp_path).fit()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(event.step, round(event.value, 2)) for event in events.Scalars("time/data_wait")]
    assert found == [(step, (step + 1) / 100) for step in range(8)]
    records = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert not any("data_wait" in record for record in records)  # a clock differs from run to run
