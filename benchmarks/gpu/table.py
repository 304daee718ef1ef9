"""Writes the generated tables of docs/: what the assembler says of every kernel, and the traffic model.

python -m benchmarks.gpu.table            both, into docs/generated/ (needs torch and triton; no GPU)
python -m benchmarks.gpu.table kernels    one of them: kernels, traffic
python -m benchmarks.gpu.table stacks     prints the kernels, of all layers and widths, that use the stack
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from . import fusion, model
from .compiled import Compiled, compile_launch
from .launches import RecordedLaunch, distinct, every_launch
from .traffic import CARDS

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "generated"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BATCH = 64


def by_configuration(dtype: torch.dtype, arch: int) -> list[RecordedLaunch]:
    """One launch, of the widest layer, for each kernel, row of the table of configurations, and epilogue."""

    def kind(launched: RecordedLaunch) -> tuple:
        c = launched.constants
        absent = tuple(a is None for a in launched.args)
        return (
            launched.name,
            tuple(launched.config.tile.items()),
            launched.config.warps,
            c.get("K"),
            c.get("MODE"),
            absent,
        )

    return distinct(every_launch(BATCH, dtype, arch)[::-1], kind)


def compile_all(arch: int, dtype: torch.dtype) -> list[tuple[RecordedLaunch, Compiled]]:
    with tempfile.TemporaryDirectory() as scratch:
        return [(launched, compile_launch(launched, arch, Path(scratch))) for launched in by_configuration(dtype, arch)]


def variant(launched: RecordedLaunch) -> str:
    """What of a kernel's options is on, in a word or two."""
    c, args = launched.constants, dict(zip(launched.kernel.arg_names, launched.args, strict=False))
    words = [str(c["MODE"])] if "MODE" in c else []
    words += [f"{c['K']}x{c['K']}"] if "K" in c else []
    if launched.name.endswith("_backward"):
        words += [name for name in ("dx", "dweight") if args.get(name) is not None]
    if launched.name == "depthwise" and args["partial"] is not None:
        words.append("with moments")
    if launched.name == "depthwise_backward" and args["partial"] is not None:
        words.append("taps too")
    return " ".join(words)


def kernel_table() -> str:
    lines = [
        "| kernel | | tile | warps, stages | bf16 sm_80 | bf16 sm_90 | fp32 sm_90 |",
        "|---|---|---|---|---|---|---|",
    ]
    found: dict[tuple, dict[str, str]] = {}
    for dtype_name, arch in (("bf16", 90), ("bf16", 80), ("fp32", 90)):
        for launched, code in compile_all(arch, DTYPES[dtype_name]):
            tile = " x ".join(str(v) for v in launched.config.tile.values())
            key = (launched.name, variant(launched), tile, f"{launched.config.warps}, {launched.config.stages}")
            spilled = f", **{code.stack} B of stack**" if code.stack else ""
            text = f"{code.registers} regs, {code.shared / 1024:.0f} KiB, {100 * code.occupancy:.0f} %{spilled}"
            found.setdefault(key, {})[f"{dtype_name} sm_{arch}"] = text
    for key, columns in sorted(found.items()):
        cells = [columns.get(name, "") for name in ("bf16 sm_80", "bf16 sm_90", "fp32 sm_90")]
        lines.append(f"| {' | '.join((f'`{key[0]}`', *key[1:]))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def model_table(dtype_name: str) -> str:
    rows = model.rows(BATCH, DTYPES[dtype_name])
    lines = [
        f"{dtype_name}, batch {BATCH}; MB and GFLOP of one step of a layer, the mean over its six MBConvs, each as the "
        "active one. Times: roofline, µs, ours `fast` / eager's.",
        "",
        "| layer | weight: eager MB | fast | lean | GFLOP eager, fast | A100 µs | H100 µs "
        "| arch: eager MB | fast | lean | GFLOP eager, fast | A100 µs | H100 µs | kept: eager MB | fast | lean |",
        "|---|" + "---|" * 15,
    ]
    counts: dict[str, int] = {}
    for r in rows:
        counts[r.layer] = counts.get(r.layer, 0) + 1
    for r in {r.layer: r for r in rows}.values():
        cells = [r.layer + (f" ({counts[r.layer]} of them)" if counts[r.layer] > 1 else "")]
        for step in ("weight", "arch"):
            cells += [f"{r.bytes[step, who] / 1e6:.0f}" for who in ("eager", "fast", "lean")]
            cells.append(f"{r.flops[step, 'eager'] / 1e9:.1f}, {r.flops[step, 'fast'] / 1e9:.1f}")
            cells += [
                f"{r.seconds[step, 'fast', card.name] * 1e6:.0f} / {r.seconds[step, 'eager', card.name] * 1e6:.0f}"
                for card in CARDS
            ]
        cells += [f"{r.kept[who] / 1e6:.0f}" for who in ("eager", "fast", "lean")]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| all 21 layers, of eager's | fast | lean |", "|---|---|---|"]
    for step in ("weight", "arch"):
        for peer, words in (("eager", ""), ("out of place", ", eager's ReLU6 out of place")):
            cells = " | ".join(f"{model.ratio(rows, step, who, peer):.3f}" for who in ("fast", "lean"))
            lines.append(f"| bytes of {'a weight' if step == 'weight' else 'an arch'} step{words} | {cells} |")
    lines.append(
        "| kept for backward | " + " | ".join(f"{model.kept_ratio(rows, w):.3f}" for w in ("fast", "lean")) + " |"
    )
    return "\n".join(lines)


def kernels_page() -> str:
    return f"""# What the assembler says of every Triton kernel

Written by `python -m benchmarks.gpu.table kernels`; [gpu.md](../gpu.md) explains it. Every kernel is compiled for every
row of `proxyless_fast/ops/gpu/host/table.py` that serves it, at the widest ImageNet layer of that row, batch {BATCH}.
Registers per thread, shared memory per block, resident warps of the multiprocessor's 64 by those two; bytes of stack
where there are any. Names are without their ending `_kernel`.

{kernel_table()}
"""


def cuda_part_table(dtype: torch.dtype) -> str:
    """Bytes and roofline time of a whole step with the CUDA C++ part, as a share of Triton alone and of eager."""
    eager = {step: sum(row.bytes[step, "eager"] for row in model.rows(BATCH, dtype)) for step in ("weight", "arch")}
    ways = " | ".join(f"{card.name} bytes | {card.name} roofline" for card in CARDS)
    lines = [f"| | {ways} |", "|---|" + "---|---|" * len(CARDS)]
    found = {card.name: [model.totals(BATCH, dtype, card, cuda) for cuda in (True, False)] for card in CARDS}
    for step in ("weight", "arch"):
        for policy in ("fast", "lean"):
            cells = []
            for with_cuda, alone in found.values():
                (moved, seconds), (all_bytes, all_seconds) = with_cuda[step, policy], alone[step, policy]
                cells.append(f"{moved / all_bytes:.3f} (of eager's: {moved / eager[step]:.3f})")
                cells.append(f"{seconds / all_seconds:.3f}")
            lines.append(f"| {step} step, `{policy}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def traffic_page() -> str:
    tables = "\n\n".join(model_table(dtype) for dtype in DTYPES)
    return f"""# A model of traffic and time

Written by `python -m benchmarks.gpu.table traffic`; [gpu.md](../gpu.md#the-traffic-model) explains it. **A model, not a
measurement.** Layers of the paper's ImageNet space at 224 x 224: channels in, channels out, input size, stride.

## Triton alone

{tables}

## With the CUDA C++ part

A step over all 21 layers, bf16, batch {BATCH}, as a share of what Triton alone moves and takes.

{cuda_part_table(torch.bfloat16)}

## Expand and depthwise in one kernel

Half precision, batch 64, e = 6: microseconds of two launches and of one by the roofline; bold where the one is taken.
`python -m benchmarks.gpu.fusion` prints this table alone.

{fusion.table()}
"""


def stacks() -> None:
    """Prints every kernel of every layer and width that has anything on the stack."""
    for arch in (80, 90):
        for name, dtype in DTYPES.items():
            launches, found = distinct(every_launch(BATCH, dtype, arch)), 0
            with tempfile.TemporaryDirectory() as scratch:
                for launched in launches:
                    code = compile_launch(launched, arch, Path(scratch))
                    if code.stack:
                        found += 1
                        print(f"sm_{arch} {name} {launched.name} {variant(launched)} {code}", flush=True)
            print(f"sm_{arch} {name}: {found} of {len(launches)} kernels", flush=True)


def main(names: list[str]) -> None:
    if "stacks" in names:
        stacks()
    for name, page in {"kernels": kernels_page, "traffic": traffic_page}.items():
        if name in names or not names:
            FOLDER.mkdir(exist_ok=True)
            (FOLDER / f"gpu-{name}.md").write_text(page())


if __name__ == "__main__":
    main(sys.argv[1:])
