"""Runs that share a folder, a full disk or a stop: what is refused, what is kept, and how it is told."""

import contextlib
import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from proxyless_fast.io.files import LOCK, InUse, atomic, held
from proxyless_fast.search import Checkpoints, Search, TrainConfig, Training, checkpoint, progress
from proxyless_fast.search.interrupt import Interrupt
from proxyless_fast.supernet import derive
from tests.fuzz import run_folders
from tests.search.test_search import ToyNet, assert_same_bits, config, state_of, toy_loaders, toy_times

OFTEN = Checkpoints(steps=2)


def searched(folder, checkpoints=OFTEN, loaders=None, **changes):
    net = ToyNet()
    return Search(net, *(loaders or toy_loaders()), config(**changes), toy_times(net), folder, checkpoints=checkpoints)


def resumed(folder, loaders=None):
    net = ToyNet(seed=9)
    return Search.resume(folder, net, *(loaders or toy_loaders()), table=toy_times(net), checkpoints=OFTEN)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return searched(tmp_path_factory.mktemp("straight") / "run").fit()


# one folder, one run


def test_a_used_folder_is_refused_and_says_how_to_go_on(straight):
    with pytest.raises(ValueError, match=r"holds an earlier search \(checkpoints/.*Search\.resume\(.*another folder"):
        searched(straight.out)


def test_two_searches_that_begin_in_one_folder_do_not_overwrite_each_other(tmp_path):
    first, second = searched(tmp_path), searched(tmp_path)
    first.fit()
    with pytest.raises(ValueError, match="holds an earlier search"):
        second.fit()


HOLDER = (
    "import sys, time; from proxyless_fast.io.files import held\nwith held(sys.argv[1]): print(1, flush=True); input()"
)


def test_another_process_in_the_folder_is_named(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(InUse, match=rf"{tmp_path}: process {other.pid} writes into it"):
            searched(tmp_path).fit()
        ended, _, err = run_folders.run("derive", "--run", str(tmp_path))
        assert ended == 2 and f"process {other.pid} writes into it" in err and err.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
        other.kill()  # the system lets go
        other.wait()
        assert searched(tmp_path).fit().step == 16


def test_a_lock_nests_and_leaves_nothing_where_nothing_came_of_it(tmp_path):
    with held(tmp_path / "a"), held(tmp_path / "a" / ".." / "a"):
        assert (tmp_path / "a" / LOCK).read_text() == f"{os.getpid()}\n"
    assert not (tmp_path / "a").exists()


def test_what_killed_processes_left_is_cleared(tmp_path):
    searched(tmp_path).fit()
    left = [tmp_path / ".report.json.7.tmp", tmp_path / "checkpoints" / f".000000003.pt.{os.getpid()}.tmp"]
    own = tmp_path / ".mine.tmp"
    for path in (*left, own):
        path.write_bytes(b"x")
    with held(tmp_path):
        assert not any(path.exists() for path in left) and own.exists()


# a stop at any step


@pytest.mark.parametrize("at", range(1, 16, 2))
def test_a_loader_that_fails_loses_no_step(at, tmp_path, straight):
    class Failing:
        def __init__(self, loader):
            self.loader, self.left, self.set_epoch = loader, at, loader.set_epoch

        def __len__(self):
            return len(self.loader)

        def __iter__(self):
            for batch in self.loader:
                if self.left == 0:
                    raise ChildProcessError("a process that reads images was ended")
                self.left -= 1
                yield batch

    train, valid = toy_loaders()
    with pytest.raises(ChildProcessError, match="was ended"):
        searched(tmp_path, loaders=(Failing(train), valid)).fit()
    search = resumed(tmp_path)
    assert search.step == at
    assert_same_bits(state_of(search.fit()), state_of(straight))
    assert (tmp_path / "search.jsonl").read_bytes() == (straight.out / "search.jsonl").read_bytes()


def test_a_loader_shorter_than_it_says_is_an_error(tmp_path):
    class Short(list):
        def __len__(self):
            return super().__len__() + 2

    train, valid = toy_loaders()
    with pytest.raises(ValueError, match=r"train: gave 8 batches in an epoch, expected the 10 of its length"):
        searched(tmp_path, loaders=(Short(train), valid)).fit()
    assert checkpoint.load(tmp_path)[0]["step"] == 8


@pytest.mark.parametrize("own_generator", [False, True])
def test_a_loader_of_torch_is_resumed_within_an_epoch(tmp_path, own_generator, monkeypatch):
    """It draws its order, and a dropout its mask, from the process's generators."""

    class Noisy(ToyNet):
        def forward(self, x):
            noise = torch.rand(()) + float(np.random.rand())
            return super().forward(torch.nn.functional.dropout(x, 0.1)) + noise

    def loaders():
        generator = torch.Generator().manual_seed(5) if own_generator else None
        images, labels = zip(*toy_loaders()[0], strict=True)
        found = TensorDataset(torch.cat(images), torch.cat(labels))
        return [DataLoader(found, 8, shuffle=True, generator=generator) for _ in range(2)]

    def search(folder, stop):
        torch.manual_seed(3)
        np.random.seed(3)
        net = Noisy()
        found = Search(net, *loaders(), config(), toy_times(net), folder, checkpoints=OFTEN)
        if stop:
            step, count = found.run_step, itertools.count()
            found.run_step = lambda *a: [a, step(*a), stops.append(next(count) == 10)][1]
        return found

    stops = []
    monkeypatch.setattr(Interrupt, "heed", lambda self, requests, several: bool(stops and stops.pop()))
    straight = search(tmp_path / "straight", False).fit()
    with pytest.raises(KeyboardInterrupt, match="after step 11"):
        search(tmp_path / "stopped", True).fit()
    torch.manual_seed(99)
    np.random.seed(99)
    net = Noisy(seed=9)
    again = Search.resume(tmp_path / "stopped", net, *loaders(), table=toy_times(net)).fit()
    assert_same_bits(state_of(straight), state_of(again))
    assert straight.history == again.history


def test_a_training_goes_on_to_the_same_bits(tmp_path):
    def training(folder, **options):
        return Training(derive(ToyNet()), toy_loaders(**options)[0], TrainConfig(epochs=3, log_every=3), folder)

    straight = training(tmp_path / "straight").fit()
    with pytest.raises(KeyboardInterrupt, match=r"train stopped after step 11 of 24; Training\.resume.*train --resume"):
        training(tmp_path / "stopped", interrupt_after=11).fit()
    with pytest.raises(ValueError, match="holds an earlier train"):
        training(tmp_path / "stopped")
    found = Training.resume(tmp_path / "stopped", derive(ToyNet(seed=4)), toy_loaders()[0])
    assert found.step == 11
    assert_same_bits(state_of(found.fit()), state_of(straight))
    logs = [(tmp_path / name / "train.jsonl").read_bytes() for name in ("straight", "stopped")]
    assert logs[0] == logs[1]
    found.discard()
    assert not (tmp_path / "stopped" / "train-checkpoints").exists()


def test_checkpoints_come_as_asked_and_the_last_are_kept(tmp_path):
    written = []
    search = searched(tmp_path, Checkpoints(steps=3, keep=2))
    save = search._save_soon
    search._save_soon = lambda: [save(), search._writer.wait(), written.append(search.step)]
    search.fit()
    assert written == [3, 6, 8, 9, 12, 15, 16]
    assert [int(path.name[:9]) for path in checkpoint.paths(tmp_path / "checkpoints")] == [16, 15]
    for bad in ({"steps": 0}, {"minutes": 0}, {"minutes": float("nan")}, {"keep": 0}):
        with pytest.raises(ValueError, match=rf"Checkpoints\.{next(iter(bad))}: got"):
            Checkpoints(**bad)


# output that goes nowhere


def test_output_that_cannot_be_written_is_no_end(tmp_path, monkeypatch, straight):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(progress.console, "print", full)
    assert_same_bits(state_of(searched(tmp_path).fit()), state_of(straight))


# full disks


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_is_full_at_any_call_keeps_the_last_checkpoint(call, tmp_path, monkeypatch, straight):
    real, failed = getattr(os, call), 0
    for number in itertools.count():
        folder, calls = tmp_path / str(number), itertools.count()

        def full(*arguments, number=number, calls=calls):
            if next(calls) >= number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            try:
                searched(folder).fit()
                break
            except OSError as error:
                assert error.errno == errno.ENOSPC and "cannot be written" in str(error)
        failed += 1
        assert not list(folder.rglob("*.tmp"))
        again = resumed(folder) if checkpoint.newest(folder) else searched(folder)
        assert_same_bits(state_of(again.fit()), state_of(straight))
        assert (folder / "search.jsonl").read_bytes() == (straight.out / "search.jsonl").read_bytes()
    assert failed > 2  # of how many writes there were is left to the speed of the disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB, and a function that leaves so many bytes of it."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place]).returncode:
        pytest.skip("a file system can be mounted by root alone")

    def leave(count):
        (place / "filler").unlink(missing_ok=True)
        room = os.statvfs(place)
        (place / "filler").write_bytes(bytes(max(0, room.f_bavail * room.f_bsize - count)))

    yield place, leave
    subprocess.run(["umount", place], check=True)


def test_a_full_file_system_keeps_the_last_checkpoint(small_disk, straight):
    place, leave = small_disk
    refused = 0
    for count in range(0, 131_072, 4096):
        folder = place / "run"
        with contextlib.suppress(KeyboardInterrupt):
            searched(folder, loaders=toy_loaders(interrupt_after=5)).fit()
        before, _ = checkpoint.load(folder)
        leave(count)
        try:
            resumed(folder).fit()
        except OSError as error:
            assert error.errno == errno.ENOSPC and Path(error.filename).is_relative_to(folder)
            refused += 1
        state, _ = checkpoint.load(folder)
        assert state["step"] >= before["step"] and not list(folder.rglob("*.tmp"))
        leave(2 << 20)
        assert_same_bits(state_of(resumed(folder).fit()), state_of(straight)) if state["step"] < 16 else None
        lines = (folder / "search.jsonl").read_bytes()
        assert lines == (straight.out / "search.jsonl").read_bytes()
        shutil.rmtree(folder)
    assert refused > 3


@pytest.mark.slow
def test_every_stage_ends_on_a_full_file_system_with_one_sentence(small_disk, tmp_path):
    place, leave = small_disk
    made = tmp_path / "made"
    made.mkdir()
    run_folders.make(made)
    for stage, options in run_folders.STAGES.items():
        source = made / ("stopped" if stage == "search" else "finished")
        failed = 0
        for count in (0, 4096, 8192, 16_384, 65_536, 131_072):
            folder = shutil.copytree(source, place / "run")
            before = checkpoint.load(folder)[0]["step"]
            leave(count)
            code, _, err = run_folders.run(stage, "--run", str(folder), *options)
            assert (code, err.count("\n")) in ((0, 0), (2, 1)), (stage, count, err)
            failed += code == 2
            assert checkpoint.load(folder)[0]["step"] >= before
            json.loads((folder / "report.json").read_text())
            leave(2 << 20)
            assert run_folders.run(stage, "--run", str(folder), *options)[0] == 0, (stage, count)
            shutil.rmtree(folder)
        assert failed or stage == "report", stage
    assert not list(place.glob("**/.*"))


def test_a_file_is_whole_or_not_there_under_the_name_it_gets_late(tmp_path):
    with atomic(tmp_path / "a", lambda: tmp_path / "b") as temporary:
        temporary.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
