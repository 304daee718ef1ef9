"""Damaged and hostile files of every kind that is read: a good result or a documented error, soon and in little memory.

Tables (YAML), official configs, architectures and reports (JSON), weights (safetensors), checkpoints (torch.save).
Run it as `python -m tests.fuzz.files --seconds 60`.
"""

from __future__ import annotations

import copy
import io
import json
import math
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save

from proxyless_fast import export, spaces
from proxyless_fast.export import load_weights
from proxyless_fast.io import documents
from proxyless_fast.io.schemas import Report, check
from proxyless_fast.io.state import load_state
from proxyless_fast.latency import ExpectedLatency, LatencyTable, MissingKey
from proxyless_fast.search import checkpoint
from proxyless_fast.spaces.chain_net import supernet
from proxyless_fast.supernet import derive, mixed_ops
from tests.fuzz._checkpoints import content_of
from tests.fuzz._command import from_command_line

SECOND = 1.0  # of CPU time; nets that may be built get more, by their parameters
MEMORY = 96 << 20  # beside ten times the file, and a net that was built

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 7, 64, 65, 1.5, 3.0, 1e9, 1e39, -0.0, 10**30, 1 << 63, "", "3", "3%", "0x10",
    "1_000", "relu6", "h_swish", "ZeroLayer", "IdentityLayer", "MBConvLayer", "Zero", "99x99_MBConv6", "1x1_Conv", "<<",
    "é\ud800", "x" * 5000, [], {}, [3, 3], [[[]]], {"name": "ZeroLayer", "stride": 1},
    {"name": "ZeroLayer", "stride": 2},
)  # fmt: skip
WORDS = """.nan .inf -.inf -1 1e400 9e-05 5e-2 null ~ true NaN -Infinity 0x10 010 1_000 [ { ] } [[[[ {{{{ , : ? - & *
! | > &a *a <<: !!float !!python/object/apply:os.getcwd --- ... %YAML {a: "a": " ' # \ufeff \\ \\ud800"""
TOKENS: tuple[bytes, ...] = (
    *(word.encode() for word in WORDS.split()), b"\t", b"\n", b"\r\n", b" ", b"\0", b"\xff", b"9" * 100, b"[" * 5000,
    b"- " * 500, b"{a: " * 500, b'{"a":' * 500,
)  # fmt: skip
STATE: dict[str, Any] = {
    "step": 1, "config": {}, "weight_optimizer": {"state": {0: {"momentum_buffer": None}}, "param_groups": [{}]},
    "arch_optimizer": {"state": {}, "param_groups": []}, "baseline": None, "history": [{"epoch": 0}],
    "sums": {"loss": [1.0, 1]}, "rng": torch.get_rng_state(),
}  # fmt: skip
NAMES = {
    "table": "t.yaml", "official": "net.config", "architecture": "arch.json", "report": "report.json",
    "weights": "w.safetensors", "checkpoint": checkpoint.LEGACY,
}  # fmt: skip


def nets() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A small supernet, and a small net of cells."""
    torch.manual_seed(0)
    chain = supernet(
        num_classes=3, in_channels=1, resolution=8, first=(4, 1), first_block=4, stages=((8, 2, 2), (12, 3, 1)),
        last=16, candidates=("3x3_MBConv1", "5x5_MBConv2", "Zero"),
    )  # fmt: skip
    return chain, derive(spaces.cell(channels=4, cells_per_stage=1, resolution=8))


class Files:
    """Good files, what damages them, and what reads them."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.net, self.cell = nets()
        ops = mixed_ops(self.net)
        self.chain = derive(self.net, {label: i % 2 * (len(ops[label]) - 1) for i, label in enumerate(ops)})
        self.state = {name: value.clone() for name, value in self.chain.state_dict().items()}
        keys = sorted({s.key for layer in self.net.layers() for s in layer.choices if s is not None})
        header = {"overhead": 0.1, "path_error": 0.02, "device": "x", "threads": 1}
        config = export.official(self.chain)[0]
        report = {
            "space": {"name": "small", "resolution": 28, "num_classes": 10, "in_channels": 1},
            "data": {"name": "x", "batch_size": 8, "seed": 0, "valid_fraction": 0.5, "shift": 2},
            "profile": {"threads": 1, "fastest": 0.1, "slowest": 1.0, "seconds": 1.0},
            "search": {"target": 2.5, "target_source": "as given", "seconds": 1.0},
            "train": {"loss": [1.5], "seconds": 1.0},
        }
        entry = {"count": 3, "mean": 0.25, "var": 1e-5, "median": 0.2}
        self.good: dict[str, list[Any]] = {
            "table": [{"header": header, **{key: dict(entry) for key in keys}}],
            "official": [config, {**config, "resolution": 8}],
            "architecture": [export.architecture(self.chain), export.architecture(self.cell)],
            "report": [report],
        }

    def damaged(self, kind: str) -> bytes:
        """A file of a kind, damaged by its values, by its bytes, by both or not at all."""
        draw = self.draw
        if kind in self.good:
            content = copy.deepcopy(draw.choice(self.good[kind]))
            for _ in range(draw.choice((0, 1, 1, 1, 2, 5))):
                self.change(content)
            data = write_yaml(content) if kind == "table" and draw.random() < 0.5 else json.dumps(content).encode()
        else:
            data = self.weights() if kind == "weights" else self.checkpoint()
        return self.bytes(data) if draw.random() < 0.4 else data

    def change(self, content: Any) -> None:
        """Another value, key or length somewhere inside."""
        draw, node = self.draw, content
        while node:
            key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if isinstance(node[key], dict | list) and node[key] and draw.random() < 0.8:
                node = node[key]
                continue
            kind = draw.randrange(4)
            if kind == 0:
                del node[key]
            elif kind == 1 and isinstance(node, dict):
                node[draw.choice(("bias", "act_func", "mid_channels", "act", "resolution", "x", ""))] = self.value()
            elif kind == 1:
                node.insert(key, copy.deepcopy(draw.choice(node)))
            else:
                node[key] = self.value()
            return

    def value(self) -> Any:
        draw = self.draw
        if draw.random() < 0.2:
            return draw.choice((draw.randrange(1, 70), draw.uniform(-1, 2), math.nan, math.inf))
        return copy.deepcopy(draw.choice(VALUES))

    def bytes(self, data: bytes) -> bytes:
        """Bytes changed, left out, doubled, cut off or put in."""
        draw, changed = self.draw, bytearray(data)
        for _ in range(draw.choice((1, 1, 2, 4, 20))):
            place = draw.randrange(len(changed) + 1)
            kind = draw.randrange(6)
            if kind == 0 and changed:
                changed[min(place, len(changed) - 1)] = draw.randrange(256)
            elif kind == 1:
                del changed[place : place + draw.randrange(1, 40)]
            elif kind == 2:
                changed[place:place] = changed[place : place + draw.randrange(1, 400)]
            elif kind == 3 and draw.random() < 0.2:
                del changed[place:]
            else:
                changed[place : place + draw.choice((0, 0, 1, 4))] = draw.choice(TOKENS)
        return bytes(changed)

    def tensors(self) -> dict[Any, Any]:
        """A state dict with other tensors in it."""
        draw, state = self.draw, dict(self.state)
        for _ in range(draw.choice((0, 1, 1, 2))):
            name = draw.choice(list(state))
            value = state[name]
            change = draw.randrange(7)
            if change == 0:
                state[name] = value.half()
            elif change == 1:
                state[name] = value.to(draw.choice((torch.int8, torch.bool, torch.float64, torch.bfloat16)))
            elif change == 2:
                factors = (math.nan, math.inf, -1, 1e30) if value.is_floating_point() else (-1,)
                state[name] = value * draw.choice(factors)
            elif change == 3:
                state[name] = value.new_zeros(draw.choice(((), (1,), (0,), (3, 3))))
            elif change == 4:
                del state[name]
            elif change == 5:
                state[draw.choice(("extra", "module.x", ""))] = value
            else:
                state = {f"module.{key}": tensor for key, tensor in state.items()}
        return state

    def weights(self) -> bytes:
        data = save({name: value.contiguous().clone() for name, value in self.tensors().items()})
        if self.draw.random() < 0.5:
            return data
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        self.change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    def checkpoint(self) -> bytes:
        draw, file = self.draw, io.BytesIO()
        net: Any = self.tensors()
        if draw.random() < 0.2:
            net = draw.choice(({"state_dict": net}, [net], {**net, "first_conv.conv.weight": 3}, None, {3: 4}))
        state = {**STATE, "format": draw.choice((1, 1, 1, 2, "1")), "net": net}
        if draw.random() < 0.4:
            state[draw.choice(list(state))] = self.value()
        if draw.random() < 0.5:
            state = content_of({**{name: value for name, value in state.items() if name != "format"}, "net": net})
            if draw.random() < 0.5:
                state["values"] = self.bytes(state["values"].encode()).decode(errors="replace")
            if draw.random() < 0.2:
                state[draw.choice(("values", "buffers"))] = self.value()
        torch.save(state, file)
        if draw.random() < 0.4:
            return file.getvalue()
        changed = io.BytesIO()  # with right check sums, so that what is read is the damage
        packed = draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(changed, "w", packed) as new:
            for name in old.namelist():
                data = old.read(name)
                if name.endswith(".pkl") and draw.random() < 0.8:
                    data = self.bytes(data)
                if packed == zipfile.ZIP_DEFLATED and draw.random() < 0.003:
                    data += bytes(4 << 20)
                new.writestr(name, data)
        return changed.getvalue()

    # What reads them; each returns how many parameters it built.

    def read_table(self, path: Path) -> int:
        table = LatencyTable.load(path)
        table.save(path.with_suffix(".again"))
        again = LatencyTable.load(path.with_suffix(".again"))
        assert again.header == table.header and {k: again[k] for k in again} == {k: table[k] for k in table}
        expected = ExpectedLatency(self.net, table)
        assert 0 <= expected.fastest <= expected.slowest < math.inf, "a latency that is none"
        assert torch.isfinite(expected()), "an expected latency that is none"
        return 0

    def read_official(self, path: Path) -> int:
        return run(export.from_official(path))

    def read_architecture(self, path: Path) -> int:
        return run(export.load_architecture(path))

    def read_report(self, path: Path) -> int:
        check(Report, documents.read(path, "a report"), str(path))
        return 0

    def read_weights(self, path: Path) -> int:
        load_weights(self.chain, path)
        return self.finite()

    def read_checkpoint(self, path: Path) -> int:
        load_state(self.chain, checkpoint.read(path).get("net"), str(path))  # type: ignore[arg-type]
        return self.finite()

    def finite(self) -> int:
        for name, value in self.chain.state_dict().items():
            assert not value.is_floating_point() or torch.isfinite(value).all(), f"{name} is not finite"
        return 0


def run(net: Any) -> int:
    """The net's parameters; a small net must take an image, so widths that do not chain show."""
    parameters = sum(p.numel() for p in net.parameters())
    if parameters < 1 << 20:
        with torch.no_grad():
            output = net.eval()(torch.zeros(1, net.in_channels, 8, 8))
        assert output.shape == (1, net.num_classes), "a net of another shape"
    return parameters


def write_yaml(content: Mapping[str, Any]) -> bytes:
    try:
        return yaml.safe_dump(content).encode()
    except (yaml.YAMLError, UnicodeError, TypeError):
        return json.dumps(content).encode()


def try_one(read: Callable[[Path], int], path: Path) -> tuple[bool, str | None]:
    """Whether a file was taken; and what is wrong with how it was read, or None."""
    start, before, size = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, path.stat().st_size
    parameters, taken = 0, False
    try:
        parameters, taken = read(path), True
    except (ValueError, FileNotFoundError, MissingKey) as error:
        text = str(error)
        if not text.isprintable() or len(text) > 1000:
            return False, f"a message that is no sentence: {error!r}"[:1500]
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"[:1500]
    seconds, grown = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if seconds > SECOND + parameters / 1e7:
        return taken, f"took {seconds:.1f} s"
    return taken, f"took {grown >> 10} MB" if grown << 10 > MEMORY + 10 * size + 16 * parameters else None


def main(seconds: float = 60.0, seed: int = 0, cases: int = sys.maxsize, kinds: str = "") -> int:
    """Tries files of each kind in turn, for so many seconds or cases of each; 1 at the first wrong one, else 0."""
    warnings.simplefilter("ignore")
    draw = random.Random(seed)
    files, chosen = Files(draw), kinds.split(",") if kinds else list(NAMES)
    folder = Path(tempfile.mkdtemp(prefix="fuzz_files_"))
    tried, taken, slowest = 0, dict.fromkeys(chosen, 0), dict.fromkeys(chosen, 0.0)
    end = time.monotonic() + seconds
    while tried < cases and time.monotonic() < end:
        tried += 1
        for kind in chosen:
            path = folder / NAMES[kind]
            path.write_bytes(files.damaged(kind))
            start = time.monotonic()
            good, wrong = try_one(getattr(files, f"read_{kind}"), path)
            slowest[kind], taken[kind] = max(slowest[kind], time.monotonic() - start), taken[kind] + good
            if wrong:
                print(f"seed {seed}, case {tried} of {kind}: {path}: {wrong}")
                return 1
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    figures = (f"{kind} {taken[kind]:,} taken, the slowest {slowest[kind]:.2f} s" for kind in chosen)
    print(f"seed {seed}: {tried:,} files of each kind: {'; '.join(figures)}")
    return 0


if __name__ == "__main__":
    from_command_line(main, __doc__, kinds=f"of {','.join(NAMES)}; default: all")
