"""The one runner: every step kind and block, of every baseline, side by side in one run.

make bench                                   # or: proxyless-fast bench
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..io.files import atomic, require_writable
from ..report.ends import Parser, command_line, ended, say
from . import blocks, gate, linear, memory, steps
from .baselines import BASELINES, MODES, Settings
from .measure import MatmulRate, machine, machine_line

KINDS = (*MODES, "blocks", "memory", "linear")
COLUMNS = (
    "kind", "case", "baseline", "batch", "resolution", "samples", "p20", "p50", "p80", "flops", "limit_fraction",
    "saved_bytes", "peak_bytes",
)  # fmt: skip
USUAL = {"space": "mobile", "resolution": 112, "batch": 16, "steps": 5}
QUICK = {"space": "small", "resolution": 28, "batch": 8, "steps": 3}
EPILOG = """\
The default run takes some minutes on two cores. The figures of the paper's ImageNet supernet:

  python -m proxyless_fast.bench.run --resolution 224 --batch 32 --steps 5 --kinds weight full two blocks \\
      --official PATH --baselines all

where PATH is a clone of https://github.com/mit-han-lab/proxylessnas. The first run of the compiled baselines makes code
for every shape, which takes long; torch keeps it for the next one.

kinds
  weight          sample, forward, loss, backward, SGD step
  full, two       arch steps: sample, forward, loss, backward to the alphas, Adam step
  blocks          each block of the space: forward, backward, the input's gradient alone, probe
  memory          peak memory of an arch step against the number of candidates, beside DARTS
  linear          time of a step against the batch

baselines
"""


def parser() -> argparse.ArgumentParser:
    """The options of `make bench` and `proxyless-fast bench`."""
    listed = "\n".join(f"  {b.name:22}  {b.description}" for b in BASELINES.values())
    options = Parser(
        "proxyless-fast bench",
        description="Time and memory of search steps, beside every alternative, in one run. No figure is printed for a "
        "baseline whose loss or gradients are wrong: the run then ends with exit code 1 and says which.",
        epilog=EPILOG + listed,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = options.add_argument
    add("--space", choices=("mobile", "small"), help=f"the supernet (default: {USUAL['space']})")
    add("--resolution", type=_positive, help=f"side of the images (default: {USUAL['resolution']})")
    add("--batch", type=_positive, help=f"images of a step (default: {USUAL['batch']})")
    add("--steps", type=_positive, help=f"timed rounds of each kind (default: {USUAL['steps']})")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS[:-1]), help="what to measure (default: all but linear)")
    add(
        "--baselines",
        nargs="+",
        choices=(*BASELINES, "all"),
        metavar="NAME",
        help="what to measure it of (default: all but the compiled ones)",
    )
    add("--threads", type=_positive, default=torch.get_num_threads(), help="threads of torch (default: its own choice)")
    add("--official", metavar="PATH", help="a clone of mit-han-lab/proxylessnas, to measure its supernet too")
    add("--seed", type=int, default=0, help="of weights, data and paths (default: 0)")
    add("--out", metavar="DIR", default="runs/bench", help="gets bench.json and bench.csv (default: runs/bench)")
    add("--quick", action="store_true", help="a small space and few rounds, in a minute or two: does it all work?")
    return options


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


@command_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks. Returns 0; 1 where the correctness gate trips; 2, 70 and 130 as `report.ends.ended` says."""
    options = parser()
    args = options.parse_args(argv)
    for name, value in (QUICK if args.quick else USUAL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    names = _baselines(options, args)
    return ended("bench", lambda: _run(args, names), args.out)


def _run(args: argparse.Namespace, names: list[str]) -> int:
    require_writable(args.out)
    console = Console(width=None if sys.stdout.isatty() else 140, markup=False, emoji=False)
    torch.set_num_threads(args.threads)
    settings = Settings(args.space, args.resolution, args.batch, args.threads, args.official, args.seed)
    report: dict[str, Any] = {"machine": machine(), "settings": settings.to_dict(), "skipped": {}, "rows": []}
    console.print(machine_line(report["machine"]), highlight=False)
    try:
        measure(report, names, settings, args.kinds, args.steps, lambda text: console.print(text, style="dim"))
    except gate.GateError as error:
        return say("proxyless-fast bench", str(error), 1)
    for name, reason in report["skipped"].items():
        console.print(f"{name} was left out: {reason}", highlight=False)
    for table in tables(report["rows"]):
        console.print(table)
    if "limit_flops_per_second" in report:
        rate = report["limit_flops_per_second"]
        console.print(f"the limit is torch.mm 2048 x 2048 x 2048: {rate / 1e9:.0f} GFLOP/s", highlight=False)
    for path in write(report, Path(args.out)):
        console.print(f"wrote {path}", highlight=False)
    return 0


def _baselines(options: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    if args.official is not None and not (Path(args.official) / "search/models/super_nets").is_dir():
        options.error(f"argument --official: {args.official!r} holds no search/models/super_nets of proxylessnas")
    possible = {
        name: b
        for name, b in BASELINES.items()
        if not b.gpu and (not b.official or (args.official and args.space == "mobile"))
    }
    if args.baselines is None:
        return [name for name, baseline in possible.items() if not baseline.slow]
    if "all" in args.baselines:
        return list(possible)
    for name in args.baselines:
        if name not in possible:
            needs = "a GPU and `make bench-gpu`" if BASELINES[name].gpu else "--official PATH and --space mobile"
            options.error(f"argument --baselines: {name} needs {needs}")
    return list(dict.fromkeys(args.baselines))


def measure(
    report: dict[str, Any], names: list[str], settings: Settings, kinds: list[str], rounds: int, note: Callable
) -> None:
    """Fill the report's rows, kind by kind. Raises GateError before any figure of a baseline that is wrong."""
    rate = MatmulRate()
    step_kinds = [kind for kind in MODES if kind in kinds]
    if step_kinds:
        net = settings.net()
        state, paths = net.state_dict(), steps.draw_paths(net, rounds + 1, settings.seed)
        subjects = {}
        for name in names:
            subject = BASELINES[name].build(settings)
            subject.load(state)
            reason = steps.unfit(subject, settings, paths[0])
            if reason is None:
                subjects[name] = subject
            else:
                report["skipped"][name] = reason
        note("correctness: losses and gradients of every baseline")
        gate.check(subjects, settings, step_kinds, paths[0])
        note("warm-up: every candidate of every baseline")
        steps.warm_up(subjects, settings, step_kinds)
        for kind in step_kinds:
            note(f"{kind} step: {len(subjects)} baselines, {rounds} rounds")
            report["rows"] += steps.measure(subjects, settings, kind, paths, rate)
        del subjects
    if "blocks" in kinds:
        report["rows"] += blocks.measure(names, settings, rounds, rate, note)
    if step_kinds or "blocks" in kinds:
        report["limit_flops_per_second"] = rate.flops_per_second
    if "memory" in kinds:
        note("memory against candidates")
        report["rows"] += memory.measure(settings.batch, settings.threads)
    if "linear" in kinds:
        note("time against batch")
        report["rows"] += linear.measure(names, settings, rounds)


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """The rows as tables: one for each step kind, one each for blocks, memory and batch."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    shown = [_step_table(kind, [row for row in rows if row["kind"] == kind]) for kind in kinds if kind in MODES]
    if any(kind in blocks.KINDS for kind in kinds):
        shown.append(_block_table([row for row in rows if row["kind"] in blocks.KINDS]))
    if "memory" in kinds:
        shown.append(memory.table(rows))
    if "linear" in kinds:
        shown.append(linear.table(rows))
    return shown


def _step_table(kind: str, rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    title = f"{kind} step, {first['case']} space, {first['resolution']} x {first['resolution']}, batch {first['batch']}"
    shown = Table(title=title)
    for column in ("baseline", "p20 ms", "p50 ms", "p80 ms", "ours is", "GFLOP", "of limit", "kept MB", "peak MB"):
        shown.add_column(column, justify="left" if column == "baseline" else "right")
    ours = next((row["p50"] for row in rows if row["baseline"] == "ours"), None)
    for row in rows:
        shown.add_row(
            row["baseline"],
            *(f"{row[p] * 1e3:.1f}" for p in ("p20", "p50", "p80")),
            f"{row['p50'] / ours:.2f} x faster" if ours and BASELINES[row["baseline"]].peer else "",
            f"{row['flops'] / 1e9:.1f}",
            f"{row['limit_fraction']:.0%}",
            f"{row['saved_bytes'] / 1e6:.0f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
        )
    return shown


def _block_table(rows: list[dict[str, Any]]) -> Table:
    """By layer: milliseconds of all its candidates, speed-up over the best peer of each, and the lowest of these."""
    shown = Table(
        "layer", *blocks.KINDS, title="blocks: ms of all candidates, times faster than the best peer (lowest)"
    )
    times: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        layer = " ".join(row["case"].split()[:3])
        times.setdefault((layer, row["kind"], row["case"]), {})[row["baseline"]] = row["p50"]
    for layer in dict.fromkeys(key[0] for key in times):
        cells = []
        for kind in blocks.KINDS:
            found = [of for key, of in times.items() if key[:2] == (layer, kind)]
            peers = [[v for name, v in of.items() if BASELINES[name].peer] for of in found]
            pairs = [(of["ours"], min(p)) for of, p in zip(found, peers, strict=True) if "ours" in of and p]
            if pairs:
                ours, best = (sum(values) for values in zip(*pairs, strict=True))
                cells.append(f"{ours * 1e3:.1f}  {best / ours:.2f}x ({min(b / a for a, b in pairs):.2f})")
            else:
                cells.append(f"{sum(min(of.values()) for of in found) * 1e3:.1f}")
        shown.add_row(layer, *cells)
    return shown


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """bench.json, everything; bench.csv, the rows below a comment that names the machine."""
    whole, tidy = folder / "bench.json", folder / "bench.csv"
    with atomic(whole) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    text = io.StringIO(newline="")
    text.write(f"# {machine_line(report['machine'])}\n")
    rows = csv.DictWriter(text, COLUMNS, restval="")
    rows.writeheader()
    rows.writerows(report["rows"])
    with atomic(tidy) as temporary:
        temporary.write_bytes(text.getvalue().encode())
    return [whole, tidy]


if __name__ == "__main__":
    sys.exit(main())
