"""The command line under torchrun: one run of all processes, which a lost process interrupts and does not change."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from proxyless_fast.search import checkpoint
from tests.fuzz.run_folders import write_data

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
OPTIONS = [
    "--candidates", "3x3_MBConv1", "5x5_MBConv1", "--batch-size", "8", "--epochs", "30", "--warmup-epochs", "1",
    "--arch-every", "2", "--log-every", "2", "--repeats", "2", "--checkpoint-steps", "5",
    "--sync-norm", "--train-epochs", "1",
]  # fmt: skip


def torchrun(folder, *more, processes=2, launcher=(), command="search"):
    """A command in several processes, begun."""
    options = [
        "--nproc-per-node",
        str(processes),
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        *launcher,
    ]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *options,
            "-m",
            "proxyless_fast",
            command,
            "--folder",
            str(folder),
            *more,
        ],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PROXYLESS_TIMEOUT_S": "30"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process, code=0):
    said = process.communicate(timeout=240)[0]
    assert process.returncode == code, said
    return said


def worker(rank, folder):
    """The process id of a rank, once there is a checkpoint to go on from."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if list(folder.glob("checkpoints/*.pt")):
            for place in Path("/proc").glob("[0-9]*"):
                try:
                    command, given = (place / "cmdline").read_bytes(), (place / "environ").read_bytes()
                except OSError:
                    continue
                if str(folder).encode() in command and f"\0RANK={rank}\0".encode() in given:
                    return int(place.name)
        time.sleep(0.02)
    raise TimeoutError(folder)


def state_of(folder):
    state, _ = checkpoint.load(folder)
    return {name: value for name, value in state.items() if name not in ("log", "rng")}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Images, and the folder of a run of two processes that nothing interrupted."""
    folder = tmp_path_factory.mktemp("torchrun")
    write_data(folder / "data")
    said = finished(torchrun(folder / "whole", "--all", "--data", str(folder / "data"), *OPTIONS))
    assert said.count("epoch 3 of 31") == 1 and said.count("eval: top-1") == 1  # one process prints
    return folder


def test_a_lost_process_ends_the_others_and_a_restart_ends_bitwise_as_without(made):
    folder = made / "killed"
    process = torchrun(
        folder,
        "--all",
        "--data",
        str(made / "data"),
        "--table",
        str(made / "whole" / "latency.yaml"),
        *OPTIONS,
        launcher=["--max-restarts", "3"],
    )
    os.kill(worker(1, folder), signal.SIGKILL)
    finished(process)
    assert equal(state_of(folder), state_of(made / "whole"))
    lines = [(made / name / "search.jsonl").read_text() for name in ("whole", "killed")]
    assert lines[0] == lines[1]
    assert not list(folder.rglob("*.tmp"))


def test_a_lost_process_without_restarts_is_told(made):
    folder = made / "lost"
    process = torchrun(folder, "--data", str(made / "data"), "--table", str(made / "whole" / "latency.yaml"), *OPTIONS)
    os.kill(worker(1, folder), signal.SIGKILL)
    said = finished(process, 1)
    told = (
        r"proxyless-fast search: (rank 0 of 2: another process has ended or did not answer|search stopped after step)"
    )
    assert re.search(told, said), said  # by the closed connection, or by torchrun's SIGTERM, whichever comes first


def test_a_preempted_run_is_saved_by_one_and_ends(made):
    folder = made / "preempted"
    process = torchrun(folder, "--data", str(made / "data"), "--table", str(made / "whole" / "latency.yaml"), *OPTIONS)
    worker(0, folder)
    process.send_signal(signal.SIGTERM)
    assert re.search(r"search stopped after step \d+ of 62; .* continues it \(SIGTERM\)", finished(process, 1))


@pytest.mark.parametrize("processes", [1, 3])
def test_another_number_of_processes_goes_on_with_the_same_batches(made, processes):
    folder = shutil.copytree(made / "whole", made / f"resumed {processes}")
    *later, _ = checkpoint.paths(folder / "checkpoints")
    for path in later:  # the last steps once more
        path.unlink()
    if processes == 1:
        command = [sys.executable, "-m", "proxyless_fast", "search", "--run", str(folder), "--resume"]
        subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    else:
        finished(torchrun(folder, "--resume", processes=processes))
    ours, whole = state_of(folder), state_of(made / "whole")
    assert ours["step"] == whole["step"]
    trained = [name for name in whole["net"] if "running_" not in name and "num_batches" not in name]
    assert all(torch.allclose(ours["net"][name], whole["net"][name], atol=1e-4) for name in trained)
