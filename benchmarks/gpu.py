"""One command on a GPU: every op checked on the device, then steps, memory and blocks against PyTorch; JSON out.

    python benchmarks/gpu.py                         all, at most about eight minutes
    python benchmarks/gpu.py --only correctness      one part: correctness, steps, blocks
    python benchmarks/gpu.py --batches 64 256 --dtypes bf16 --out runs/gpu.json

Needs torch, Triton and this package; exit code 2 and one sentence where there is no GPU, 1 where an op is wrong.
Bf16 means autocast, as a search would run it; channels_last and torch.compile are the peers, the official NCHW too.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import proxyless_fast as pf
from proxyless_fast.ops.mbconv import mbconv, mbconv_reference, probe

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLOOR = {"bf16": 4e-3, "fp16": 1e-3, "fp32": 2e-6}
EPS = 1e-3
#         batch, in, out, height, width, kernel, stride, expand
CHECKED = [
    (2, 6, 5, 9, 9, 5, 2, 3),
    (1, 8, 8, 7, 11, 7, 1, 6),
    (3, 16, 24, 33, 17, 3, 2, 6),
    (2, 5, 7, 6, 5, 3, 1, 1),
    (64, 24, 40, 56, 56, 5, 2, 6),
    (32, 96, 96, 14, 14, 7, 1, 6),
    (64, 192, 320, 7, 7, 7, 1, 6),
]
LAYERS = [  # in, out, size, stride of the distinct mixed layers of the ImageNet space
    (16, 24, 112, 2), (24, 24, 56, 1), (24, 40, 56, 2), (40, 40, 28, 1), (40, 80, 28, 2), (80, 80, 14, 1),
    (80, 96, 14, 1), (96, 96, 14, 1), (96, 192, 14, 2), (192, 192, 7, 1), (192, 320, 7, 1),
]  # fmt: skip


def block_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """x, the output's gradient, and float32 parameters of one block, on the GPU and channels-last."""
    b, ci, co, h, w, k, s, e = shape
    g = torch.Generator("cuda").manual_seed(sum(shape))

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device="cuda")

    def norm(c: int) -> list[Tensor]:
        return [torch.rand(c, generator=g, device="cuda") + 0.5, randn(c)]

    ch = ci * e
    params = [randn(ch, ci, 1, 1) / math.sqrt(ci), *norm(ch)] if e > 1 else []
    params += [randn(ch, 1, k, k) / k, *norm(ch), randn(co, ch, 1, 1) / math.sqrt(ch), *norm(co)]
    x, grad = randn(b, ci, h, w), randn(b, co, (h - 1) // s + 1, (w - 1) // s + 1)
    return *(t.to(dtype, memory_format=torch.channels_last) for t in (x, grad)), params  # type: ignore[return-value]


def gradients(run: Callable[..., Tensor], x: Tensor, grad: Tensor, params: list[Tensor]) -> list[Tensor]:
    x, params = x.detach().requires_grad_(), [p.detach().requires_grad_() for p in params]
    out = run(x, params)
    return [out.detach(), *torch.autograd.grad(out, [x, *params], grad.to(out.dtype))]


def check_block(shape: tuple[int, ...], name: str, policy: str) -> list[str]:
    """Names of what differs from float64 by more than twice the error of eager in the same dtype."""
    dtype, stride = DTYPES[name], shape[6]
    x, grad, params = block_inputs(shape, dtype)
    options: dict[str, Any] = {"stride": stride, "eps": EPS}
    half = [p.to(dtype) for p in params]  # both sides see the same rounded weights
    truth = gradients(
        lambda x, p: mbconv_reference(x, p, **options), x.double(), grad.double(), [p.double() for p in half]
    )
    eager = gradients(lambda x, p: mbconv_reference(x, p, **options), x, grad, half)
    ours = gradients(lambda x, p: mbconv(x, p, policy=policy, **options), x, grad, half)
    again = gradients(lambda x, p: mbconv(x, p, policy=policy, **options), x, grad, half)
    frozen = mbconv(x, [p.detach() for p in half], policy=policy, **options)  # no gradient: nothing kept
    leaf = x.detach().requires_grad_()
    (alone,) = torch.autograd.grad(mbconv(leaf, half, policy=policy, **options), leaf, grad)  # weights are frozen
    bad = [] if torch.equal(frozen, ours[0]) else ["forward without gradients"]
    bad += [] if (alone - ours[1]).norm() <= FLOOR[name] * ours[1].norm() else ["dx alone"]
    for i, (a, twice, b, t) in enumerate(zip(ours, again, eager, truth, strict=True)):
        error, allowed = ((v.double() - t).norm() / t.norm() for v in (a, b))
        label = ["out", "dx"][i] if i < 2 else f"gradient of parameter {i - 2}"
        bad += [f"{label}: {error:.1e}, eager {allowed:.1e}"] if not error <= 2 * allowed + FLOOR[name] else []
        bad += [] if torch.equal(a, twice) else [f"{label}: other bits the second time"]
    gates = probe(x, grad, [half, half], **options)
    gate, scale = (truth[0] * grad.double()).sum(), (truth[0] * grad.double()).norm()
    allowed = (eager[0].double() * grad.double()).sum() - gate
    if not ((gates.double() - gate).abs() <= 2 * allowed.abs() + FLOOR[name] * scale).all():
        bad.append(f"gates: {gates.tolist()}, {gate.item()} expected")
    return bad


def check_graph() -> list[str]:
    """A block's forward and backward in a CUDA graph gives the bits that it gives outside."""
    x, grad, params = block_inputs(CHECKED[4], torch.bfloat16)
    run = lambda: gradients(lambda x, p: mbconv(x, p, stride=2, eps=EPS), x, grad, params)  # noqa: E731
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    torch.cuda.synchronize()
    return [] if all(map(torch.equal, captured, expected)) else ["CUDA graph: other bits than outside"]


def check_stencils() -> list[str]:
    """The CUDA C++ stencils against Triton's depthwise kernels, where they are built."""
    from proxyless_fast.ops.triton import passes

    if not passes.stencils_built():
        return []
    bad = []
    chosen = passes.stencils
    for shape in CHECKED:
        x, grad, params = block_inputs(shape, torch.float32)
        both = []
        for use in (chosen, lambda *_: False):
            passes.stencils = use
            both.append(gradients(lambda x, p: mbconv(x, p, stride=shape[6], eps=EPS), x, grad, params))  # noqa: B023
        passes.stencils = chosen
        if any((a - b).norm() > 1e-5 * b.norm() + 1e-6 for a, b in zip(*both, strict=True)):
            bad.append(f"stencils differ from Triton's kernels at {shape}")
    return bad


def correctness() -> dict[str, Any]:
    failures = []
    for shape in CHECKED:
        for name in DTYPES:
            for policy in ("fast", "lean"):
                failures += [f"{shape} {name} {policy}: {text}" for text in check_block(shape, name, policy)]
    failures += check_graph() + check_stencils()
    checked = len(CHECKED) * len(DTYPES) * 2
    print(f"correctness: {checked} blocks, {len(failures)} failures", *failures, sep="\n  ", flush=True)
    return {"checked": checked, "failures": failures}


def milliseconds(run: Callable[[], Any], budget: float = 2.0) -> float:
    """Median of runs timed by events on the device, after warm-up, within about `budget` seconds."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times: list[float] = []
    end = time.monotonic() + budget
    while len(times) < 5 or (time.monotonic() < end and len(times) < 50):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


@contextmanager
def peak(result: dict[str, float]) -> Iterator[None]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    result["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20


def ceilings() -> dict[str, float]:
    """What this card does at best: bytes/s of a copy (read and write), FLOP/s of a bf16 product."""
    a = torch.randn(1 << 28, device="cuda")
    copy = milliseconds(lambda: a.clone(), 1.0)
    m = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = milliseconds(lambda: m @ m, 1.0)
    return {"copy_gb_s": 2 * a.nbytes / copy / 1e6, "matmul_tflop_s": 2 * 8192**3 / product / 1e9}


def step(net: nn.Module, kind: str, x: Tensor, labels: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """One weight or arch step without its optimizer, which is the same for all."""
    weights, alphas = list(pf.weight_parameters(net)), list(pf.arch_parameters(net))

    def run() -> None:
        for p in (*weights, *alphas):
            p.grad = None
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = nn.functional.cross_entropy(net(x), labels)
        loss.backward()

    for p in weights:
        p.requires_grad_(kind == "weight")
    for p in alphas:
        p.requires_grad_(kind == "arch")
    if alphas:
        pf.sample(net, "path" if kind == "weight" else "full", torch.Generator().manual_seed(0))
    return run


def build(who: str, kind: str) -> nn.Module | None:
    """The supernet as a peer or as ours; torch.compile gets one path, derived and fixed, which flatters it."""
    torch.manual_seed(0)
    net = pf.spaces.mobile().cuda()
    pf.set_policy(net, who if who in ("fast", "lean") else "off")
    if who != "NCHW":
        net = net.to(memory_format=torch.channels_last)
    if who == "compile":
        if kind == "arch":
            return None
        choices = pf.sample(net, "path", torch.Generator().manual_seed(0))
        return torch.compile(pf.derive(net, choices))  # type: ignore[return-value]
    return net


def steps(batches: list[int], names: list[str], end: float) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        for kind in ("weight", "arch"):
            for who in ("NCHW", "channels_last", "compile", "fast", "lean"):
                net = build(who, kind)
                for batch in batches if net is not None else []:
                    if time.monotonic() > end:
                        print("steps: out of time, the rest is left out", flush=True)
                        return rows
                    row: dict[str, Any] = {"dtype": name, "step": kind, "who": who, "batch": batch}
                    try:
                        x = torch.randn(batch, 3, 224, 224, device="cuda")
                        x = x if who == "NCHW" else x.contiguous(memory_format=torch.channels_last)
                        labels = torch.randint(1000, (batch,), device="cuda")
                        run = step(net, kind, x, labels, DTYPES[name])
                        with peak(row):
                            row["ms"] = milliseconds(run)
                    except torch.cuda.OutOfMemoryError:
                        print(f"  {name} {kind} {who} batch {batch}: out of memory", flush=True)
                        break
                    rows.append(row)
                    text = f"{row['ms']:9.2f} ms, {row['peak_mib']:8.0f} MiB"
                    print(f"  {name} {kind:6} {who:13} batch {batch:5}: {text}", flush=True)
                del net
                torch.cuda.empty_cache()
    return rows


def blocks(batch: int, names: list[str], end: float) -> list[dict[str, Any]]:
    """Forward, forward and backward, dX alone, and probe of the widest candidate of each layer."""
    rows = []
    for name in names:
        dtype = DTYPES[name]
        for ci, co, size, stride in LAYERS:
            if time.monotonic() > end:
                print("blocks: out of time, the rest is left out", flush=True)
                return rows
            x, grad, params = block_inputs((batch, ci, co, size, size, 7, stride, 6), dtype)
            options: dict[str, Any] = {"stride": stride, "eps": EPS}
            half = [p.to(dtype) for p in params]
            compiled = torch.compile(lambda x, p, o=options: mbconv_reference(x, p, **o), dynamic=False)
            runs: dict[str, Callable] = {
                "eager": lambda x, p, o=options: mbconv_reference(x, p, **o),
                "compile": compiled,
                "ours": lambda x, p, o=options: mbconv(x, p, **o),
            }
            row: dict[str, Any] = {"dtype": name, "batch": batch, "in": ci, "out": co, "size": size, "stride": stride}
            for who, run in runs.items():
                with torch.no_grad():
                    row[f"{who}_forward_ms"] = milliseconds(lambda r=run, x=x, p=half: r(x, p), 0.3)
                row[f"{who}_step_ms"] = milliseconds(lambda r=run, x=x, g=grad, p=half: gradients(r, x, g, p), 0.3)
            row["ours_probe_ms"] = milliseconds(lambda x=x, g=grad, p=half, o=options: probe(x, g, [p], **o), 0.3)
            rows.append(row)
            print(f"  {name} {ci}-{co} {size}² s{stride}: forward " + ", ".join(
                f"{who} {row[f'{who}_forward_ms']:.3f}" for who in runs) + "; step " + ", ".join(
                f"{who} {row[f'{who}_step_ms']:.3f}" for who in runs) + f"; probe {row['ours_probe_ms']:.3f} ms",
                flush=True)  # fmt: skip
    return rows


def summary(rows: list[dict[str, Any]]) -> None:
    """Speed-up over the best peer at equal batch, and the largest batch that fitted."""
    for dtype, kind in dict.fromkeys((r["dtype"], r["step"]) for r in rows):
        mine = [r for r in rows if (r["dtype"], r["step"]) == (dtype, kind)]
        for batch in sorted({r["batch"] for r in mine}):
            peers = [r["ms"] for r in mine if r["batch"] == batch and r["who"] not in ("fast", "lean")]
            ours = [r["ms"] for r in mine if r["batch"] == batch and r["who"] == "fast"]
            if peers and ours:
                print(f"{dtype} {kind} step, batch {batch}: {min(peers) / ours[0]:.2f}x the best peer's speed")
        largest = {
            who: max(r["batch"] for r in mine if r["who"] == who) for who in dict.fromkeys(r["who"] for r in mine)
        }
        print(f"{dtype} {kind} step, largest batch tried that fits: {largest}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("correctness", "steps", "blocks"), help="one part; default: all")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048], help="of the steps")
    parser.add_argument("--dtypes", choices=tuple(DTYPES), nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--seconds", type=float, default=450, help="time budget; what does not fit is left out")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench-gpu: torch sees no GPU here, so there is nothing to measure.", file=sys.stderr)
        return 2
    start = time.monotonic()
    x, _, params = block_inputs(CHECKED[0], torch.float32)
    taken, why = pf.ops.can_run_mbconv(x, params, stride=CHECKED[0][6])
    if not taken:
        print(f"bench-gpu: the fused path is not taken on this GPU: {why}.", file=sys.stderr)
        return 2
    result: dict[str, Any] = {
        "card": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30,
        "torch": torch.__version__,
        "build": pf.build_info(),
    }
    print(json.dumps(result, default=str), flush=True)
    wanted = (arguments.only,) if arguments.only else ("correctness", "blocks", "steps")
    if "correctness" in wanted:
        result["correctness"] = correctness()
        if result["correctness"]["failures"]:
            return 1  # no figure for an op that is wrong
    result["ceilings"] = ceilings()
    print(json.dumps(result["ceilings"]), flush=True)
    if "blocks" in wanted:
        # A third of the time, so that the steps, which matter most, have the rest.
        end = start + arguments.seconds * (0.45 if "steps" in wanted else 1)
        result["blocks"] = blocks(arguments.batches[0], arguments.dtypes, end)
    if "steps" in wanted:
        result["steps"] = steps(arguments.batches, arguments.dtypes, start + arguments.seconds)
        summary(result["steps"])
    result["seconds"] = time.monotonic() - start
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1, default=str) + "\n")
    print(f"written: {arguments.out} ({result['seconds']:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
