"""Measures candidates for every row of the table of configurations on this GPU, and writes the fastest into it.

    python -m benchmarks.gpu.tune                      all rows of this card's architecture; the better part of an hour
    python -m benchmarks.gpu.tune --kernels expand     some kernels' rows, by the table's names
    python -m benchmarks.gpu.tune --dry-run            without a GPU: the candidates, and what the compiler says of each

A candidate differs from today's row in one or two of its numbers: a block size halved or doubled, other warps, other
stages. Those that do not compile, spill, need too much shared memory or make other passes run are dropped; the others
are timed on the widest layer of the ImageNet space that the row serves, and the best of them on all its layers, by the
sum of the row's own launches (what adds up their partial sums is not counted). The table decides how reductions are cut
into programs, so a tuned table gives other bits, if again always the same.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from proxyless_fast.bench.baselines import Settings
from proxyless_fast.ops.gpu.host import configs, table
from proxyless_fast.ops.gpu.host.configs import Config

from .device import Cuda
from .launches import RecordedLaunch
from .session import Session
from .shapes import BlockShape, imagenet
from .trials import OPERAND_DTYPES, Place, judged, launches, places, serving, steps, words

BATCH = 64
FINALISTS = 5
GAIN = 0.02  # a candidate that is faster by less than this does not replace a row


def seconds(session: Session, place: Place, config: Config, layers: list[BlockShape]) -> float:
    """The sum of the row's launches over these layers, each alone and cold; infinite where the device refuses."""
    total = 0.0

    def timed(_: RecordedLaunch, call: Callable[[], None]) -> None:
        nonlocal total
        call()
        total += session.median(call, 0.01, cold=True)

    try:
        with serving(place, config, timed):
            for layer in layers:
                steps(layer, OPERAND_DTYPES[place.operands], session.settings.device)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # what the launcher refuses, such as too many registers for so many warps
        return float("inf")
    return total


def fastest(
    session: Session, place: Place, layers: list[BlockShape], scratch: Path, say: Callable[[str], None]
) -> Config:
    """The row's winner."""
    served = sorted(launches(place, place.config, layers), key=lambda s: -s.ch * s.batch * s.size**2)
    taken = [config for config, good, _ in judged(place, served, scratch) if good]
    if not served or not taken:
        say(f"{place}: kept, nothing to measure")
        return place.config
    first = sorted(taken, key=lambda c: seconds(session, place, c, served[:1]))[:FINALISTS]
    times = {index: seconds(session, place, c, served) for index, c in enumerate(first)}
    today = seconds(session, place, place.config, served)
    best = min(times, key=lambda index: times[index])
    better = times[best] < (1 - GAIN) * today
    outcome = f"{words(first[best])} takes {times[best] / today:.2f} of its time" if better else "kept"
    say(f"{place}: {words(place.config)}, {today * 1e6:.0f} µs; {outcome} ({len(taken)} candidates)")
    return first[best] if better else place.config


def rewritten(rows: tuple[table.Row, ...], place: Place, config: Config) -> tuple[table.Row, ...]:
    """The rows with a winner in its place. What another architecture had from there by default, it gets as its own."""
    before = configs.table_of(rows)

    def written(arch: int, listed: list[tuple[int, Config]]) -> list[table.Row]:
        head = arch, place.kernel, place.operands
        return [(*head, None if limit == configs.WIDE else limit, *c) for limit, c in listed]

    def mine(row: table.Row) -> bool:
        return row[:3] == (place.arch, place.kernel, place.operands)

    first = next((i for i, row in enumerate(rows) if mine(row)), len(rows))
    out = [row for row in rows if not mine(row)]
    out[first:first] = written(place.arch, place.replaced(config))
    for arch in sorted(before.keys() - {place.arch}):
        kept = before[arch][place.kernel][place.operands]
        if configs.table_of(out)[arch][place.kernel][place.operands] != kept:
            out += written(arch, kept)
    return tuple(out)


def render(text: str, sources: dict[int, str], rows: tuple[table.Row, ...]) -> str:
    """table.py, as `text` has it, with these sources and rows."""
    head, rest = text.split("SOURCES = {\n")
    between = rest[rest.index("}\n") : rest.index(" = (\n")]
    lines = [f'    {arch}: "{said}",\n' for arch, said in sorted(sources.items())]
    listed = []
    for arch, kernel, operands, limit, tile, warps, stages, programs in rows:
        sizes = ", ".join(f'"{name}": {size}' for name, size in tile.items())
        listed.append(f'    ({arch}, "{kernel}", "{operands}", {limit}, {{{sizes}}}, {warps}, {stages}, {programs}),\n')
    return f"{head}SOURCES = {{\n{''.join(lines)}{between} = (\n{''.join(listed)})\n"


def tune(session: Session, arch: int, kernels: list[str], card: str, layers: list[BlockShape], path: Path) -> None:
    """Row after row, each written when it is known, so that an interrupted run keeps what it found."""
    rows, sources = table.ROWS, dict(table.SOURCES)
    sources[arch] = f"measured on {card}, {datetime.date.today()}: {', '.join(kernels)}"
    with tempfile.TemporaryDirectory() as scratch:
        for place in places(arch, kernels):
            with session.surviving(str(place)):
                winner = fastest(session, place, layers, Path(scratch), session.console.print)
                rows = rewritten(rows, place, winner)
                configs.TABLE[arch][place.kernel][place.operands] = place.replaced(winner)
                temporary = path.with_suffix(".part")
                temporary.write_text(render(path.read_text(), sources, rows))
                temporary.replace(path)


def listing(arch: int, kernels: list[str], layers: list[BlockShape], say: Callable[[str], None]) -> None:
    """Every candidate of every row with the compiler's verdict."""
    with tempfile.TemporaryDirectory() as scratch:
        for place in places(arch, kernels):
            say(str(place))
            for config, taken, why in judged(place, layers, Path(scratch)):
                say(f"  {words(config)}: {'' if taken else 'dropped, '}{why}")


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = list(configs.TABLE[90])
    options.add_argument("--kernels", nargs="+", choices=known, default=known, metavar="NAME", help=", ".join(known))
    options.add_argument("--dry-run", action="store_true", help="list candidates; without a GPU for sm_90")
    args = options.parse_args(argv)
    device: Any = Cuda() if torch.cuda.is_available() else None
    arch = 90 if device is None else device.capability()
    layers = list(dict.fromkeys(imagenet(BATCH)))
    if args.dry_run:
        listing(arch, args.kernels, layers, lambda text: print(text, flush=True))
        return 0
    if device is None:
        print("tune-gpu: torch sees no GPU here, so there is nothing to measure.", file=sys.stderr)
        return 2
    settings = Settings(resolution=224, batch=BATCH, device="cuda")
    session = Session(device, settings, [], 0, Path("runs/tune.json"), Console(highlight=False))
    with suppress(KeyboardInterrupt):
        tune(session, arch, args.kernels, torch.cuda.get_device_name(), layers, Path(str(table.__file__)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
