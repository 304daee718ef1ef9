"""Worker processes and signals: they outlive what is sent to all, and never their main process."""

import os
import signal
import subprocess
import sys
import time

import pytest

from proxyless_fast.data import folder

# A main process in a group of its own, whose loader gives batches for ever; it prints the pids of its workers.
MAIN = """
import itertools, multiprocessing, signal, sys, time
from PIL import Image
from proxyless_fast.data.folder import FolderLoader, train_transform

def slow(image):
    time.sleep(0.01)
    return train_transform(4)(image)

asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
loader = FolderLoader([(sys.argv[1], 0)] * 64, slow, 4, workers=2)
batches = itertools.chain.from_iterable(loader.batches_from(epoch) for epoch in itertools.count())
next(batches)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
while not asked:
    next(batches)
for _ in range(40):  # the epoch goes on, and another one starts
    next(batches)
print("done", flush=True)
{end}
"""


@pytest.fixture
def image(tmp_path):
    from PIL import Image

    path = tmp_path / "x.png"
    Image.new("RGB", (8, 8)).save(path)
    return str(path)


def start(image, end=""):
    command = [sys.executable, "-c", MAIN.replace("{end}", end), image]
    main = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    return main, [int(pid) for pid in main.stdout.readline().split()]


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids, seconds=30.0):
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


# Ends of a program: as usual, with the pass still open, by an exception, by sys.exit.
ENDS = ["", "sys.exit(0)", "keep = iter(loader); next(keep)", "del loader, batches"]


@pytest.mark.parametrize("end", ENDS)
def test_sigterm_to_all_processes_leaves_the_workers_to_the_main_process(image, end):
    main, pids = start(image, end)
    assert len(pids) == 2
    os.killpg(main.pid, signal.SIGTERM)
    out, error = main.communicate(timeout=60)
    assert (main.returncode, out, error) == (0, "done\n", "")
    assert gone(pids)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM])
def test_no_signal_that_asks_for_an_end_ends_a_worker(image, sent):
    main, pids = start(image)
    for pid in pids:
        os.kill(pid, sent)
    time.sleep(0.5)
    assert all(map(alive, pids))
    os.kill(main.pid, signal.SIGTERM)
    assert main.communicate(timeout=60) == ("done\n", "") and gone(pids)


@pytest.mark.parametrize("sent", [signal.SIGKILL])
def test_workers_do_not_outlive_their_main_process(image, sent):
    main, pids = start(image)
    os.kill(main.pid, sent)
    main.communicate(timeout=60)
    assert gone(pids)


def test_a_worker_that_is_killed_is_told_by_the_loader_alone(image):
    loader = folder.FolderLoader([(image, 0)] * 400, folder.train_transform(4), 1, workers=2)
    batches = iter(loader)
    next(batches)
    os.kill(loader._loader._iterator._workers[0].pid, signal.SIGKILL)
    time.sleep(0.2)  # the main process is at something else when the signal arrives
    with pytest.raises(ChildProcessError, match=r"was ended by the system .*: expected memory for workers=2$"):
        list(batches)


def test_signals_of_the_main_process_stay_as_they_were(image):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ()), signal.getsignal(signal.SIGCHLD)
    next(iter(folder.FolderLoader([(image, 0)] * 4, folder.train_transform(4), 2, workers=1)))
    assert (signal.pthread_sigmask(signal.SIG_BLOCK, ()), signal.getsignal(signal.SIGCHLD)) == before
