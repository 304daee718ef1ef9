"""One command on a GPU: correctness of every op, then every subject's steps, memory, passes and blocks; JSON out.

    python benchmarks/gpu.py                         all, at most about eight minutes
    python benchmarks/gpu.py --official PATH         with the official code, from a clone
    python benchmarks/gpu.py --only passes           one part: correctness, steps, largest, passes, blocks
    python benchmarks/gpu.py --batches 64 256 --dtypes bf16 --out runs/gpu.json

Needs torch, Triton and this package; exit code 2 and one sentence where there is no GPU, 1 where something is wrong.
Bf16 means autocast, as a search would run it. What does not fit into the time budget is left out and named.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpu_blocks
import gpu_correctness
import gpu_largest
import gpu_passes
import gpu_precompile
import gpu_steps
import torch
from gpu_run import DTYPES, SHARES, Cuda, Run, ceilings

import proxyless_fast as pf
from proxyless_fast.bench.baselines import Settings
from proxyless_fast.ops.triton import passes


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", choices=tuple(SHARES), help="one part; default: all")
    options.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048], help="of the steps")
    options.add_argument("--dtypes", choices=tuple(DTYPES), nargs="+", default=["bf16", "fp32"])
    options.add_argument("--official", metavar="PATH", help="a clone of mit-han-lab/proxylessnas, to measure it too")
    options.add_argument("--memory-gib", type=float, help="memory for the largest batch; default: all that is free")
    options.add_argument("--seconds", type=float, default=450, help="time budget; what does not fit is left out")
    options.add_argument("--out", type=Path, default=Path("runs/gpu.json"))
    return options


def compile_ahead(run: Run, parts: list[str], batch: int, dtypes: list[str]) -> None:
    """Have Triton's kernels compiled by all cores; what fails here is compiled, or fails, when it is launched."""
    if torch.version.hip is not None:
        return
    run.now("Triton's kernels are compiled")
    with run.surviving("compiling ahead"):
        count = gpu_precompile.precompile(
            run.device.table_architecture(), run.device.capability(), batch=batch,
            layers=[] if parts == ["correctness"] else None, dtypes=[DTYPES[name] for name in dtypes],
            checked=gpu_correctness.CHECKED if "correctness" in parts else [], checked_dtypes=list(DTYPES.values()),
            depthwise=not passes.stencils_built(),
        )  # fmt: skip
        run.console.print(f"{count} Triton kernels compiled in {run.clock() - run.start:.0f} s")


def measure(run: Run, parts: list[str], batches: list[int], dtypes: list[str], gib: float | None) -> int:
    """The parts in turn. Returns 1, with no more figures, where an op or a subject is wrong; else 0."""
    names = gpu_steps.subjects(run) if {"steps", "largest", "blocks"} & set(parts) else []
    say = run.console.print
    if "correctness" in parts:
        with run.part("correctness"):
            failures = gpu_correctness.measure(run)
            say(f"correctness: {len(failures)} failures", *failures, sep="\n  ")
        if failures:
            return 1  # no figure for an op that is wrong
    run.report["ceilings"] = found = ceilings(run)
    say(f"a copy: {found['copy_bytes_s'] / 1e9:.0f} GB/s; products: {found['bf16_flop_s'] / 1e12:.1f} TFLOP/s in bf16, "
        f"{found['fp32_flop_s'] / 1e12:.1f} in fp32")  # fmt: skip
    if "steps" in parts:
        with run.part("steps"):
            wrong = gpu_steps.correct(run, names, batches[0])
            run.report["gate"] = wrong
            if wrong is not None:
                print(f"bench-gpu: {wrong}", file=sys.stderr)
                return 1
            gpu_steps.measure(run, names, batches, dtypes)
        for table in gpu_steps.tables(run.report["steps"]):
            say(table)
    if "largest" in parts:
        with run.part("largest"):
            rows = gpu_largest.measure(run, names, max(16, batches[0] // 2), dtypes, gib)
        say(gpu_largest.table(rows))
    if "passes" in parts:
        with run.part("passes"):
            rows = gpu_passes.measure(run, batches[0], dtypes, found)
        say(gpu_passes.table(rows))
    if "blocks" in parts:
        with run.part("blocks"):
            gpu_blocks.measure(run, names, batches[0], dtypes)
        for table in gpu_blocks.tables(run.report["blocks"]):
            say(table)
    run.report["summary"] = [
        *gpu_steps.summary(run.report.get("steps", [])),
        *gpu_largest.summary(run.report.get("largest", [])),
        *gpu_passes.summary(run.report.get("passes", [])),
    ]
    say(*run.report["summary"], sep="\n")
    return 0


def main(argv: list[str] | None = None) -> int:
    options = parser()
    args = options.parse_args(argv)
    if min(args.batches) < 1:
        options.error(f"argument --batches: must be positive, got {min(args.batches)}")
    wrong = gpu_steps.official_clone(args.official)
    if wrong:
        options.error(wrong)
    if not torch.cuda.is_available():
        print("bench-gpu: torch sees no GPU here, so there is nothing to measure.", file=sys.stderr)
        return 2
    x, _, params = gpu_correctness.block_inputs(gpu_correctness.CHECKED[0], torch.float32)
    taken, why = pf.ops.can_run_mbconv(x, params, stride=gpu_correctness.CHECKED[0][6])
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
    with Run(device, settings, parts, args.seconds, args.out) as run:
        run.report |= device.describe() | {"build": pf.build_info(), "settings": settings.to_dict()}
        run.console.print({name: run.report[name] for name in (*device.describe(), "build")})
        try:
            compile_ahead(run, parts, args.batches[0], args.dtypes)
            code = measure(run, parts, args.batches, args.dtypes, args.memory_gib)
        finally:
            run.save()
        run.console.print(f"written: {args.out} ({run.report['seconds']:.0f} s)")
    return code


if __name__ == "__main__":
    sys.exit(main())
