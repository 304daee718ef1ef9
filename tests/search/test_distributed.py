"""A search in several processes is the search of one with the same batches: paths, weights, alphas, accuracy."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from proxyless_fast.data.memory import MemoryLoader
from proxyless_fast.distributed.ranks import Ranks
from proxyless_fast.search import Search, SearchConfig, TrainConfig, checkpoint, evaluate, train
from proxyless_fast.supernet import derive
from tests._ranks import environment, free_port, run_ranks
from tests.search.test_search import ToyNet, toy_times

pytestmark = pytest.mark.slow


class Images(MemoryLoader):
    """Random images of four classes, in a dtype of choice."""

    def __init__(self, images, seed, dtype, **options):
        draws = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 4, (images,), generator=draws)
        pixels = torch.randint(0, 200, (images, 3, 8, 8), generator=draws) + 13 * labels[:, None, None, None]
        half = torch.full((3,), 0.5)
        super().__init__(pixels.to(torch.uint8), labels, 24, mean=half, std=half, seed=seed, **options)
        self.dtype = dtype

    def batches_from(self, epoch, skip=0):
        for images, labels in super().batches_from(epoch, skip):
            yield images.to(self.dtype), labels


def searched(dtype, train_images=240, net=ToyNet, **changes):
    """Weights, alphas and path of each step of a search in this process or in all that there are."""
    settings = {"epochs": 2, "warmup_epochs": 0, "lr": 0.05, "arch_every": 2, "arch_lr": 0.01, "target_ms": 2.0}
    config = SearchConfig(**{**settings, "objective": "add_linear", "samples": 3, "log_every": 5, **changes})
    net = net().to(dtype)
    # 100 for the alphas: the last batch has four images.
    loaders = Images(train_images, 1, dtype, shuffle=True, drop_last=True, shift=1), Images(100, 2, dtype, shuffle=True)
    search, paths = Search(net, *loaders, config, toy_times(net)), []
    step = search.weight_step

    def watched(*arguments):
        found = step(*arguments)
        paths.append([op.active for op in search.ops.values()])
        return found

    search.weight_step = watched
    search.fit()
    values = {name: p.detach() for name, p in net.named_parameters()}
    return {"values": values, "paths": paths, "history": search.history, "sent": search.backward.gradients.bytes_sent}


def difference(ours, truth):
    return max(float((ours["values"][name] - value).abs().max()) for name, value in truth["values"].items())


@pytest.mark.parametrize(
    ("mode", "size", "dtype", "allowed"),
    [
        ("full", 2, torch.float32, 1e-5), ("full", 4, torch.float32, 1e-5), ("full", 4, torch.float64, 1e-10),
        ("two", 2, torch.float64, 1e-10), ("two", 4, torch.float32, 1e-5),
        ("reinforce", 2, torch.float32, 1e-5), ("reinforce", 4, torch.float64, 1e-10),
    ],
)  # fmt: skip
def test_weights_and_alphas_are_those_of_one_process(size, mode, dtype, allowed):
    options = {"mode": mode, "sync_norm": True, "clip_norm": 5.0}
    truth = searched(dtype, **options)
    assert len(truth["paths"]) == 20
    for ours in run_ranks(searched_here, size, dtype, options):
        assert ours["paths"] == truth["paths"]
        assert difference(ours, truth) <= allowed
        for mine, whole in zip(ours["history"], truth["history"], strict=True):
            assert mine["weight_loss"] == pytest.approx(whole["weight_loss"], rel=1e-4)


def searched_here(dtype, options):
    return searched(dtype, **options)


@pytest.mark.parametrize("size", [2, 4])
def test_paths_are_the_same_for_200_steps(size):
    first, *others = run_ranks(searched_here, size, torch.float32, {"epochs": 20})
    assert len(first["paths"]) == 200 and len({tuple(path) for path in first["paths"]}) > 3
    for other in others:
        assert other["paths"] == first["paths"]
        assert difference(other, first) == 0


def test_samples_of_reinforce_go_round():
    """Norms by process: each sample sees the whole batch in the one process that takes it, so all is as in one."""
    options = {"mode": "reinforce", "samples": 5, "warmup_epochs": 0, "lr": 1e-30, "weight_decay": 0.0}
    truth = searched(torch.float64, **options)
    for ours in run_ranks(searched_here, 2, torch.float64, options):
        assert difference(ours, truth) < 1e-10


def test_each_process_may_draw_its_own_path():
    first, second = run_ranks(searched_here, 2, torch.float32, {"paths": "own"})
    assert first["paths"] != second["paths"]
    assert difference(first, second) == 0


class FrozenNorms(ToyNet):
    def train(self, mode=True):
        return super().train(False)


def test_a_batch_in_parts_is_the_batch_where_norms_are_frozen():
    whole, parts = (searched(torch.float32, net=FrozenNorms, accumulate=n) for n in (1, 4))
    assert whole["paths"] == parts["paths"]
    assert difference(parts, whole) <= 1e-5


def test_a_batch_in_parts_in_several_processes():
    whole, several = run_ranks(both_ways, 2)[0]
    assert difference(several, whole) <= 1e-10


def test_parts_of_a_batch_that_processes_have_unlike_numbers_of_images_of():
    """Of the last batch one process has two images and the other one, and norms of both wait for each other."""
    first, second = run_ranks(uneven_parts, 2, timeout_s=60)
    assert first == second and first > 0


def uneven_parts():
    images = Images(27, 1, torch.float32, shuffle=True)
    net = ToyNet()
    Search(
        net, images, images, SearchConfig(epochs=1, warmup_epochs=0, arch_every=1, accumulate=2, sync_norm=True)
    ).fit()
    return sum(float(p.detach().abs().sum()) for p in net.parameters())


def both_ways():
    several = searched(torch.float64, net=FrozenNorms, accumulate=3)
    alone = Ranks.current
    Ranks.current = classmethod(lambda cls: _alone())
    try:
        return searched(torch.float64, net=FrozenNorms), several
    finally:
        Ranks.current = alone


def _alone():
    ranks = Ranks.__new__(Ranks)
    ranks.size, ranks.rank, ranks.norms = 1, 0, ""
    return ranks


def diverging():
    """The error of a search in which rank 1 has another alpha from step 7 on."""
    ranks, sample = Ranks.current(), Search._sample

    def drawn(self, mode, draw):
        if ranks.rank == 1 and self.step >= 7:
            with torch.no_grad():
                self.net.first.alpha[0] += 1
        return sample(self, mode, draw)

    Search._sample = drawn
    try:
        searched(torch.float32)
    except ValueError as error:
        return str(error)
    return "none"


def test_processes_that_part_are_told_by_rank_and_step():
    for said in run_ranks(diverging, 2):
        assert re.fullmatch(
            r"rank 1: digest of path and alphas at step 10 is \w{16}, expected \w{16} as of rank 0", said
        )


def same_batches():
    net = ToyNet()
    loaders = [
        torch.utils.data.DataLoader(list(zip(torch.randn(32, 3, 8, 8), torch.arange(32) % 4, strict=True)), 8)
    ] * 2
    try:
        Search(net, *loaders, SearchConfig(target_ms=2.0, objective="add_linear"), toy_times(net)).fit()
    except ValueError as error:
        return str(error)
    return "none"


def test_a_loader_that_gives_all_the_same_is_refused():
    for said in run_ranks(same_batches, 2):
        assert said.startswith("train: all 2 processes got the same batch, expected each its own part")


def unlike(what):
    """The error of a search whose processes were given different things."""
    rank = Ranks.current().rank
    loaders = [Images(96 + 24 * rank * (what == "batches of train"), 1, torch.float32), Images(48, 2, torch.float32)]
    config = SearchConfig(target_ms=2.0, objective="add_linear", lr=0.1 + rank * (what == "config"))
    net = ToyNet()
    try:
        Search(net, *loaders, config, toy_times(net))
    except ValueError as error:
        return str(error)
    return "none"


@pytest.mark.parametrize("what", ["batches of train", "config"])
def test_processes_that_were_given_different_things_are_told(what):
    for said in run_ranks(unlike, 2, what):
        assert said.startswith(f"rank 1: {what} is ")


def trained():
    """Weights and accuracy of a net that was trained, and evaluated on images that do not share out evenly."""
    torch.manual_seed(0)
    net = derive(ToyNet(), {"first": 0, "second": 1}).double()
    train(net, Images(96, 1, torch.float64, shuffle=True, drop_last=True), TrainConfig(epochs=2, sync_norm=True))
    return {"values": {name: p.detach() for name, p in net.named_parameters()}}, evaluate(
        net, Images(49, 2, torch.float64)
    )


@pytest.mark.parametrize("size", [2, 3])
def test_training_and_evaluation(size):
    truth, accuracy = trained()
    for ours, found in run_ranks(trained, size):
        assert difference(ours, truth) < 1e-10
        assert (found.images, found.top1, found.top5) == (49, accuracy.top1, accuracy.top5)
        assert found.loss == pytest.approx(accuracy.loss, rel=1e-6)  # logits are float32 there


class Dropped(ToyNet):
    """Draws numbers in every step, another in each process."""

    def forward(self, x):
        return super().forward(torch.dropout(x, 0.3, self.training))


def resumed(folder):
    """The weights of a search, and of one that lost its newest checkpoint, in processes that draw for themselves."""
    ranks, found = Ranks.current(), []
    for name in ("whole", "stopped"):
        loaders = [Images(n, n, torch.float32, shuffle=True, drop_last=True) for n in (96, 48)]
        config = SearchConfig(epochs=2, warmup_epochs=0, arch_every=2, target_ms=None, log_every=2)
        torch.manual_seed(0)
        search = Search(Dropped(), *loaders, config, None, f"{folder}/{name}").fit()
        if name == "stopped":
            if ranks.first:
                checkpoint.paths(Path(folder) / name / "checkpoints")[0].unlink()
            ranks.wait()
            torch.manual_seed(1)
            search = Search.resume(f"{folder}/{name}", Dropped(), *loaders)
            assert search.step < search.total_steps
            search.fit()
        found.append({"values": {key: p.detach() for key, p in search.net.named_parameters()}})
    return found


def test_what_each_process_draws_is_drawn_again_after_a_resume(tmp_path):
    for whole, again in run_ranks(resumed, 2, str(tmp_path)):
        assert difference(again, whole) == 0


LOST = """
import os, signal, torch
from tests.search.test_distributed import searched
from proxyless_fast.distributed.ranks import LostRank
from proxyless_fast.search import Search
torch.distributed.init_process_group("gloo")
step = Search.weight_step
def dying(self, *arguments):
    if self.step == 7 and torch.distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIG{signal})
    return step(self, *arguments)
Search.weight_step = dying
try:
    searched(torch.float32)
except LostRank as error:
    print("lost:", error, flush=True)
os._exit(3)
"""


@pytest.mark.parametrize("number", ["KILL", "STOP"])
def test_a_process_that_dies_or_hangs_ends_the_others_within_the_timeout(number):
    port = free_port()
    processes = []
    for rank in range(2):
        given = {**environment(rank, 2, port), "PROXYLESS_TIMEOUT_S": "8"}
        code = LOST.replace("{signal}", number).replace(
            '("gloo")', '("gloo", timeout=__import__("datetime").timedelta(seconds=8))'
        )
        processes.append(subprocess.Popen([sys.executable, "-c", code], env=given, stdout=subprocess.PIPE, text=True))
    begun = time.monotonic()
    try:
        said = processes[0].communicate(timeout=120)[0]
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert processes[0].returncode == 3 and "lost: rank 0 of 2: another process has ended or did not answer" in said
    assert time.monotonic() - begun < 60


def test_what_torchrun_starts_without_a_group_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE: got 2 processes that know nothing"):
        searched(torch.float32)
