"""One command on a GPU: correctness of every op, then every subject's steps, memory, passes and blocks; JSON out.

    python -m benchmarks.gpu                         all, at most about eight minutes
    python -m benchmarks.gpu --official PATH         with the official code, from a clone
    python -m benchmarks.gpu --only passes           one part: correctness, steps, largest, passes, blocks
    python -m benchmarks.gpu --batches 64 256 --dtypes bf16 --out runs/gpu.json

Needs torch, Triton and this package; exit code 2 and one sentence where there is no GPU, 1 where something is wrong.
Bf16 means autocast, as a search would run it. What does not fit into the time budget is left out and named.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import proxyless_fast as pf
from proxyless_fast.bench.baselines import Settings
from proxyless_fast.ops.gpu.host import stencils

from . import blocks, correctness, largest, passes, precompile, steps
from .device import DTYPES, Cuda
from .session import SHARES, Session, ceilings


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--only", choices=tuple(SHARES), help="one part; default: all")
    options.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048], help="of the steps")
    options.add_argument("--dtypes", choices=tuple(DTYPES), nargs="+", default=["bf16", "fp32"])
    options.add_argument("--official", metavar="PATH", help="a clone of mit-han-lab/proxylessnas, to measure it too")
    options.add_argument("--memory-gib", type=float, help="memory for the largest batch; default: all that is free")
    options.add_argument("--seconds", type=float, default=450, help="time budget; what does not fit is left out")
    options.add_argument("--out", type=Path, default=Path("runs/gpu.json"))
    return options


def compile_ahead(session: Session, parts: list[str], batch: int, dtypes: list[str]) -> None:
    """Have Triton's kernels compiled by all cores; what fails here is compiled, or fails, when it is launched."""
    if torch.version.hip is not None:
        return
    session.now("Triton's kernels are compiled")
    with session.surviving("compiling ahead"):
        count = precompile.precompile(
            session.device.table_architecture(), session.device.capability(), batch=batch,
            layers=[] if parts == ["correctness"] else None, dtypes=[DTYPES[name] for name in dtypes],
            checked=correctness.CHECKED if "correctness" in parts else [], checked_dtypes=list(DTYPES.values()),
            depthwise=not stencils.are_built(),
        )  # fmt: skip
        session.console.print(f"{count} Triton kernels compiled in {session.clock() - session.start:.0f} s")


def measure(session: Session, parts: list[str], batches: list[int], dtypes: list[str], gib: float | None) -> int:
    """The parts in turn. Returns 1, with no more figures, where an op or a subject is wrong; else 0."""
    names = steps.subjects(session) if {"steps", "largest", "blocks"} & set(parts) else []
    say = session.console.print
    if "correctness" in parts:
        with session.part("correctness"):
            failures = correctness.measure(session)
            say(f"correctness: {len(failures)} failures", *failures, sep="\n  ")
        if failures:
            return 1  # no figure for an op that is wrong
    session.report["ceilings"] = found = ceilings(session)
    say(f"a copy: {found['copy_bytes_s'] / 1e9:.0f} GB/s; products: {found['bf16_flop_s'] / 1e12:.1f} TFLOP/s in bf16, "
        f"{found['fp32_flop_s'] / 1e12:.1f} in fp32")  # fmt: skip
    if "steps" in parts:
        with session.part("steps"):
            wrong = steps.correct(session, names, batches[0])
            session.report["gate"] = wrong
            if wrong is not None:
                print(f"bench-gpu: {wrong}", file=sys.stderr)
                return 1
            steps.measure(session, names, batches, dtypes)
        for table in steps.tables(session.report["steps"]):
            say(table)
    if "largest" in parts:
        with session.part("largest"):
            rows = largest.measure(session, names, max(16, batches[0] // 2), dtypes, gib)
        say(largest.table(rows))
    if "passes" in parts:
        with session.part("passes"):
            rows = passes.measure(session, batches[0], dtypes, found)
        say(passes.table(rows))
    if "blocks" in parts:
        with session.part("blocks"):
            blocks.measure(session, names, batches[0], dtypes)
        for table in blocks.tables(session.report["blocks"]):
            say(table)
    session.report["summary"] = [
        *steps.summary(session.report.get("steps", [])),
        *largest.summary(session.report.get("largest", [])),
        *passes.summary(session.report.get("passes", [])),
    ]
    say(*session.report["summary"], sep="\n")
    return 0


def main(argv: list[str] | None = None) -> int:
    options = parser()
    args = options.parse_args(argv)
    if min(args.batches) < 1:
        options.error(f"argument --batches: must be positive, got {min(args.batches)}")
    wrong = steps.official_clone(args.official)
    if wrong:
        options.error(wrong)
    if not torch.cuda.is_available():
        print("bench-gpu: torch sees no GPU here, so there is nothing to measure.", file=sys.stderr)
        return 2
    x, _, params = correctness.block_inputs(correctness.CHECKED[0], torch.float32)
    taken, why = pf.ops.can_run_mbconv(x, params, stride=correctness.CHECKED[0][6])
    if not taken:
        print(f"bench-gpu: the fused path is not taken on this GPU: {why}.", file=sys.stderr)
        return 2
    # As the official code has it, and everybody's float32 means float32.
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    settings = Settings(resolution=224, batch=args.batches[0], official=args.official, device="cuda")
    return benchmark(args, Cuda(), settings)


def benchmark(args: argparse.Namespace, device: Any, settings: Settings) -> int:
    """The run that the options ask for, on a device. Returns the exit code."""
    parts = [args.only] if args.only else list(SHARES)
    with Session(device, settings, parts, args.seconds, args.out) as session:
        session.report |= device.describe() | {"build": pf.build_info(), "settings": settings.to_dict()}
        session.console.print({name: session.report[name] for name in (*device.describe(), "build")})
        try:
            compile_ahead(session, parts, args.batches[0], args.dtypes)
            code = measure(session, parts, args.batches, args.dtypes, args.memory_gib)
        finally:
            session.save()
        session.console.print(f"written: {args.out} ({session.report['seconds']:.0f} s)")
    return code
