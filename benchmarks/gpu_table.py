"""Writes the tables of docs/gpu.md: what the assembler says of every kernel, and the traffic model.

python benchmarks/gpu_table.py            both, into docs/gpu.md (needs torch and triton; no GPU)
python benchmarks/gpu_table.py kernels    one of them: kernels, model
python benchmarks/gpu_table.py stacks     prints the kernels, of all layers and widths, that use the stack
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import gpu_model as model
import torch
from gpu_launches import Compiled, Launch, compile_launch, distinct, every_launch

DOCS = Path(__file__).resolve().parents[1] / "docs" / "gpu.md"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BATCH = 64


def by_configuration(dtype: torch.dtype, arch: int) -> list[Launch]:
    """One launch, of the widest layer, for each kernel, row of the table of configurations, and epilogue."""

    def kind(launched: Launch) -> tuple:
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


def compiled(arch: int, dtype: torch.dtype) -> list[tuple[Launch, Compiled]]:
    with tempfile.TemporaryDirectory() as scratch:
        return [(launched, compile_launch(launched, arch, Path(scratch))) for launched in by_configuration(dtype, arch)]


def variant(launched: Launch) -> str:
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
        for launched, code in compiled(arch, DTYPES[dtype_name]):
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
                for card in model.CARDS
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


def write(name: str, text: str) -> None:
    """Replace what stands between the marks of table `name`."""
    mark = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
    docs, n = re.subn(mark, lambda m: m[1] + text + m[2], DOCS.read_text(), flags=re.DOTALL)
    if n != 1:
        sys.exit(f"docs/gpu.md: the marks of table {name!r} were expected once, found {n} times")
    DOCS.write_text(docs)


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
    if "kernels" in names or not names:
        write("kernels", kernel_table())
    if "model" in names or not names:
        write("model", "\n\n".join(model_table(dtype) for dtype in DTYPES))


if __name__ == "__main__":
    main(sys.argv[1:])
