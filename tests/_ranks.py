"""Runs a function of a test module in several processes, joined by gloo, and gives back what each returned."""

import importlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent


def run_ranks(function: Callable, world_size: int, *arguments: Any, timeout_s: float = 240) -> list[Any]:
    """function(*arguments) in `world_size` processes with a default group of gloo: what it returned, by rank.

    function: at the top of its module. arguments and results: what torch.save takes. Raises RuntimeError with the
    output of a process that fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(arguments, Path(folder) / "arguments.pt")
        command = [sys.executable, "-m", "tests._ranks", function.__module__, function.__qualname__, folder]
        processes = [
            subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=environment(rank, world_size, port),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for port in [free_port()]
            for rank in range(world_size)
        ]
        try:
            outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
            if process.returncode:
                raise RuntimeError(f"rank {rank} ended with {process.returncode}:\n{output}")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun tells a process, which then leaves the cores to the others."""
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return {**os.environ, "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in given.items()}}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _main(module: str, name: str, folder: str) -> None:
    arguments = torch.load(Path(folder) / "arguments.pt", weights_only=False)
    torch.distributed.init_process_group("gloo")
    try:
        result = getattr(importlib.import_module(module), name)(*arguments)
        torch.save(result, Path(folder) / f"{torch.distributed.get_rank()}.pt")
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
