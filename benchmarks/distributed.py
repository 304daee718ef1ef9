"""What several processes of one search send and wait for, beside DistributedDataParallel, and a model of many of them.

    python -m benchmarks.distributed                # bytes and times of 2 processes on this machine (gloo, loopback)
    python -m benchmarks.distributed --processes 4
    python -m benchmarks.distributed model          # 1 to 1,024 ranks from measured parts: a model, not a measurement

Each process has one thread. Payload: bytes of gradients handed to torch.distributed in a weight step. Wire: what the
loopback interface carried, all processes together; a ring all-reduce of n processes sends 2 (n - 1) times its payload.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import proxyless_fast as pf
from proxyless_fast.bench.measure import machine, machine_line
from proxyless_fast.distributed.gradients import GradientSum
from proxyless_fast.distributed.norms import synchronised
from proxyless_fast.distributed.ranks import Ranks
from proxyless_fast.supernet import ActiveParameters

CARRIED = Path("/sys/class/net/lo/statistics/tx_bytes")
SPACES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "small": (lambda: pf.spaces.small(), 32),
    "mobile 64": (lambda: pf.spaces.mobile(resolution=64), 16),
}
KINDS = ("ours", "ours, sync norms", "DDP, unused found")


def steps_of(kind: str, net: nn.Module, batch: int) -> tuple[Callable[[int], None], Callable[[], float]]:
    """(one weight step's gradients, payload so far) of a net in a process of the default group."""
    ranks, active = Ranks.current(), ActiveParameters(net)
    side = net.resolution  # type: ignore[union-attr]
    x = torch.randn(batch, net.in_channels, side, side)  # type: ignore[arg-type]
    labels = torch.randint(0, net.num_classes, (batch,))  # type: ignore[arg-type]
    for op in pf.mixed_ops(net).values():
        op.alpha.requires_grad_(False)
    if kind.startswith("DDP"):
        sent = [0.0]
        whole = DistributedDataParallel(net, find_unused_parameters=True)

        def count(state, bucket):  # DDP wants no other annotations than its own
            sent[0] += bucket.buffer().numel() * bucket.buffer().element_size()
            work = dist.all_reduce(bucket.buffer().div_(ranks.size), async_op=True)
            return work.get_future().then(lambda future: future.value()[0])

        whole.register_comm_hook(None, count)

        def step(number: int) -> None:
            pf.sample(net, generator=torch.Generator().manual_seed(number))
            cross_entropy(whole(x), labels).backward()

        return step, lambda: sent[0]
    sums = GradientSum(pf.weight_parameters(net), ranks)

    def ours(number: int) -> None:
        pf.sample(net, generator=torch.Generator().manual_seed(number))
        total = ranks.start_sum([batch])
        sums.expect(active())
        (cross_entropy(net(x), labels) * batch).backward()
        sums.finish(total.wait()[0])

    return ours, lambda: float(sums.bytes_sent)


def figures_of(kind: str, net: nn.Module, batch: int, steps: int) -> dict[str, float]:
    """Bytes and milliseconds of a weight step's gradients in this process."""
    step, payload = steps_of(kind, net, batch)
    taken = []
    for number in range(3):
        step(number)
        net.zero_grad(set_to_none=True)
    active = ActiveParameters(net)
    dist.barrier()
    before, carried, path = payload(), int(CARRIED.read_text()), 0
    for number in range(steps):
        start = time.perf_counter()
        step(100 + number)
        taken.append(time.perf_counter() - start)
        path += sum(p.numel() * p.element_size() for p in active())
        net.zero_grad(set_to_none=True)
    dist.barrier()
    return {
        "payload": (payload() - before) / steps,
        "wire": (int(CARRIED.read_text()) - carried) / steps,
        "path": path / steps,
        "ms": 1e3 * statistics.median(taken),
        "all": sum(p.numel() * p.element_size() for p in pf.weight_parameters(net)),
    }


def measured(rank: int, processes: int, port: int, kind: str, space: str, steps: int, out: str) -> None:
    """One process: its figures of a kind of step, as JSON, from rank 0."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    make, batch = SPACES[space]
    net = make().train()
    # Once for all steps, as a search does: each time every block would be read anew.
    with synchronised(net, Ranks.current().norms) if "sync" in kind else nullcontext():
        figures = figures_of(kind, net, batch, steps)
    if rank == 0:
        Path(out).write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def messages(rank: int, processes: int, port: int, out: str) -> None:
    """One process: microseconds of an all-reduce of one number, and GB/s of one of 16 MB, from rank 0."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    seconds = []
    for count, repeats in ((1, 300), (4 << 20, 15)):
        values, taken = torch.ones(count), []
        for _ in range(repeats):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(values)
            taken.append(time.perf_counter() - start)
        seconds.append(statistics.median(taken))
    sent = 2 * (processes - 1) / processes * (16 << 20)  # by each process of a ring
    if rank == 0:
        Path(out).write_text(json.dumps({"us": 1e6 * seconds[0], "GB/s": sent / seconds[1] / 1e9}))
    dist.barrier()
    dist.destroy_process_group()


def run(processes: int, function: Callable, *arguments: Any) -> dict[str, float]:
    """What rank 0 of some processes measured."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    out = Path("build") / "distributed.json"
    out.parent.mkdir(exist_ok=True)
    mp.spawn(function, (processes, port, *arguments, str(out)), processes)
    return json.loads(out.read_text())


def compare(processes: int, steps: int) -> Table:
    """Bytes and times of a weight step's gradients, by space and kind."""
    shown = Table(
        "space",
        "kind",
        "payload / path",
        "payload MB",
        "path MB",
        "all MB",
        "wire MB",
        "ms",
        title=f"{processes} processes",
    )
    for space in SPACES:
        for kind in KINDS[: 3 if processes > 1 else 1]:
            f = run(processes, measured, kind, space, steps)
            megabytes = [f"{f[name] / 1e6:.2f}" for name in ("payload", "path", "all", "wire")]
            shown.add_row(space, kind, f"{f['payload'] / f['path']:.3f}", *megabytes, f"{f['ms']:.0f}")
    return shown


def model(step_ms: float, path_mb: float, all_mb: float, latency_us: float, gbit: float, hidden: float) -> Table:
    """Weight steps of 1 to 1,024 ranks: `docs/scaling.md` has where each figure comes from."""
    shown = Table("ranks", "path alone, ms", "efficiency", "every candidate, ms", "efficiency", title="a model")
    for ranks in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        cells = []
        for megabytes in (path_mb, all_mb):
            ring = 2 * (ranks - 1) / ranks * megabytes * 8e3 / (gbit * 1e3) if ranks > 1 else 0.0  # ms
            waits = 2 * (ranks - 1) * latency_us / 1e3 if ranks > 1 else 0.0
            total = step_ms + max(0.0, ring + waits - hidden * step_ms)
            cells += [f"{total:.0f}", f"{step_ms / total:.0%}"]
        shown.add_row(str(ranks), *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("bytes", "model"), default="bytes", help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default: %(default)s)")
    for name, value, text in (
        ("step-ms", 54.0, "one rank's weight step"), ("path-mb", 16.3, "gradients of a path"),
        ("all-mb", 64.1, "gradients of all candidates"), ("latency-us", 67.0, "one message between two hosts"),
        ("gbit", 11.1, "per second and host"), ("hidden", 0.0, "share of a step during which messages go"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=float, default=value, help=f"{text} (default: %(default)s)")
    args = parser.parse_args()
    console = Console()
    if args.what == "model":
        console.print(model(args.step_ms, args.path_mb, args.all_mb, args.latency_us, args.gbit, args.hidden))
        return
    console.print(compare(args.processes, args.steps))
    if args.processes > 1:
        found = run(args.processes, messages)
        console.print(
            f"an all-reduce of one number: {found['us']:.0f} us; of 16 MB: {found['GB/s']:.2f} GB/s sent a process"
        )
    console.print(machine_line(machine()))


if __name__ == "__main__":
    main()
