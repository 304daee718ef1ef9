"""Waiting for batches: its share, the one hint, and the end where none comes."""

import logging
import os
import signal
import threading
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from proxyless_fast.search import waiting
from proxyless_fast.search.waiting import Waiting


class Clock:
    """Time that passes only where it is said to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(waiting.time, "perf_counter", lambda: self.now)

    def batches(self, seconds, count=40):
        for _ in range(count):
            self.now += seconds
            yield torch.zeros(8, 3), torch.zeros(8)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_the_share_is_of_the_time_since_the_last_call(clock):
    waits = Waiting()
    batches = waits.over(clock.batches(1.0))
    shares = []
    for step in (3.0, 1.0, 0.0, 9.0):
        for _ in range(4):
            next(batches)
            clock.now += step
        shares.append(waits.take())
    assert shares == [0.25, 0.5, 1.0, 0.1]
    assert Waiting().take() == 0.0


def test_two_loaders_share_one_clock(clock):
    waits = Waiting()
    train, valid = waits.over(clock.batches(1.0), "train"), waits.over(clock.batches(2.0), "valid")
    for _ in range(4):
        next(train)
        next(valid)
        clock.now += 3.0
    assert waits.take() == 0.5


class Loader:
    workers = 2


def test_a_loader_that_binds_is_said_once_and_not_for_its_start(clock, caplog):
    waits = Waiting({"train": Loader()})
    slow = waits.over(clock.batches(0.5), "train")
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            for _ in range(4):
                next(slow)
                clock.now += 0.5
            waits.take()
    (record,) = caplog.records
    assert record.getMessage() == (
        "the loader is what the steps wait for, 50 % of the time: it gives 8 images/s; more --workers (train has 2), "
        "or smaller images, would help"
    )


def test_a_loader_that_keeps_up_is_not_spoken_of(clock, caplog):
    waits = Waiting()
    quick = waits.over(clock.batches(0.1))
    with caplog.at_level(logging.WARNING):
        for _ in range(30):
            next(quick)
            clock.now += 0.9
            waits.take()
    assert not caplog.records


class Asleep(Dataset):
    def __getitem__(self, index):
        time.sleep(1000)

    def __len__(self):
        return 4


def sleeping():
    yield 1
    time.sleep(1000)


def locked():
    yield 1
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def reading_a_pipe_that_nobody_writes(folder):
    yield 1
    os.mkfifo(folder / "pipe")
    (folder / "pipe").read_bytes()


def retrying():
    yield 1
    while True:
        try:
            time.sleep(1000)
        except TimeoutError:
            time.sleep(1000)


@pytest.mark.parametrize("source", [sleeping, locked, reading_a_pipe_that_nobody_writes, retrying])
def test_a_loader_that_hangs_ends_in_one_sentence(source, tmp_path):
    batches = source(tmp_path) if "pipe" in source.__name__ else source()
    waited = Waiting(timeout=0.3).over(batches, "train")
    assert next(waited) == 1
    with pytest.raises(TimeoutError, match=r"^train: the loader gave no batch for 0\.3 s, expected one$"):
        next(waited)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_users_data_loader_that_hangs_ends_in_one_sentence(workers):
    with pytest.raises(TimeoutError, match=r"^valid: the loader gave no batch for 0\.5 s, expected one$"):
        next(Waiting(timeout=0.5).over(DataLoader(Asleep(), num_workers=workers), "valid"))


def test_alarms_are_put_back(monkeypatch):
    heard = []
    before = signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
    try:
        assert list(Waiting(timeout=0.2).over(range(3))) == [0, 1, 2]
        time.sleep(0.3)
        assert not heard and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        signal.setitimer(signal.ITIMER_REAL, 0.2)  # someone else's
        assert next(Waiting(timeout=0.1).over(iter([time.sleep(0.0)]))) is None
        time.sleep(0.4)
        assert heard
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_other_threads_may_wait_too():
    found = []
    thread = threading.Thread(target=lambda: found.extend(Waiting(timeout=5).over(range(3))))
    thread.start()
    thread.join()
    assert found == [0, 1, 2]


class Killed(Dataset):
    def __getitem__(self, index):
        if index == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return index

    def __len__(self):
        return 64


class Wrong(Dataset):
    def __getitem__(self, index):
        raise RuntimeError("the user's own words")

    def __len__(self):
        return 4


def test_a_users_worker_that_is_killed_is_told_by_the_loader_alone():
    waited = Waiting().over(DataLoader(Killed(), num_workers=1), "train")
    next(waited)
    time.sleep(0.5)  # torch's own handler would raise here
    with pytest.raises(ChildProcessError, match=r"^a process that reads images was ended by the system"):
        list(waited)


def test_what_a_users_data_set_raises_stays_what_it_is():
    with pytest.raises(RuntimeError, match="the user's own words"):
        list(Waiting().over(DataLoader(Wrong(), num_workers=1)))
