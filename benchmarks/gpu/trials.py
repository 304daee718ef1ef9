"""Candidates for a row of the table of configurations: which there are, what they launch, what the compiler says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from proxyless_fast.ops.gpu.host import configs, launch, stencils
from proxyless_fast.ops.gpu.host.configs import Config

from .compiled import compile_launch
from .launches import RecordedLaunch, distinct
from .passes import step
from .shapes import BlockShape
from .traffic import nbytes

OPERAND_DTYPES = {"half": torch.bfloat16, "float": torch.float32}
Launched = dict[BlockShape, list[RecordedLaunch]]
SHARED = {80: 163, 86: 99, 89: 99}  # KiB that a block may have; from sm_90 on 227
KERNELS = {  # the launches that a row of this name configures
    "gram": {"gram_partial"},
    "expand_once": {"expand_backward"},
    "expand_weight": {"expand_backward"},
    "rows": {"normalise", "pair_sums"},
}


class Place(NamedTuple):
    """A row of the table: architecture, kernel, operands, and the widths that it serves."""

    arch: int
    kernel: str
    operands: str
    limit: int

    def __str__(self) -> str:
        width = "any width" if self.limit == configs.WIDE else f"width {self.limit}"
        return f"sm_{self.arch} {self.kernel} {self.operands} {width}"

    @property
    def listed(self) -> list[tuple[int, Config]]:
        return configs.TABLE[self.arch][self.kernel][self.operands]

    @property
    def config(self) -> Config:
        return dict(self.listed)[self.limit]

    def replaced(self, config: Config) -> list[tuple[int, Config]]:
        return [(limit, config if limit == self.limit else old) for limit, old in self.listed]


def places(arch: int, kernels: list[str]) -> list[Place]:
    """The rows that an architecture is served by; one that is not in the table starts from the newest older one."""
    if arch not in configs.TABLE:
        older = configs.TABLE[max((a for a in configs.TABLE if a < arch), default=80)]
        configs.TABLE[arch] = {kernel: dict(rows) for kernel, rows in older.items()}
    rows = configs.TABLE[arch]
    return [Place(arch, k, o, limit) for k in kernels for o, listed in rows[k].items() for limit, _ in listed]


def neighbours(config: Config) -> list[Config]:
    """Today's row, then those that differ from it in one number or two; at most 60."""
    changes: list[tuple[str, int]] = []
    for name, size in config.tile.items():
        changes += [(name, size * 2), *([(name, size // 2)] if size > 8 else [])]
    changes += [("warps", n) for n in (2, 4, 8) if n != config.warps]
    changes += [("stages", n) for n in (1, 2, 3, 4) if n != config.stages]
    found = [config]
    for some in [*((c,) for c in changes), *combinations(changes, 2)]:
        new = dict(some)
        if len(new) == len(some):  # not twice the same number
            tile = {name: new.get(name, size) for name, size in config.tile.items()}
            found.append(
                Config(tile, new.get("warps", config.warps), new.get("stages", config.stages), config.programs)
            )
    return found


def words(config: Config) -> str:
    return f"{' x '.join(map(str, config.tile.values()))}, {config.warps} warps, {config.stages} stages"


@contextmanager
def serving(place: Place, config: Config, run: Callable[[RecordedLaunch, Callable[[], None]], None]) -> Iterator[None]:
    """Within, `config` stands in the row, and of all launches only the row's happen: as `run` does them."""
    original, seen = launch.run, []

    def choose(kernel, x, width, **at_most):
        operands = configs.operands(x.dtype)
        limit = next(
            limit for limit, _ in configs.TABLE[place.arch][kernel][operands] if configs.padded(width) <= limit
        )
        seen.append(Place(place.arch, kernel, operands, limit))
        return configs.config(kernel, x.dtype, width, place.arch, **at_most)

    def launched(kernel, grid, cfg, *args, **constants):
        names = KERNELS.get(place.kernel, {place.kernel})
        recorded = RecordedLaunch(kernel, grid, cfg, args, constants)
        if seen and seen[-1] == place and recorded.name in names:
            run(recorded, lambda: original(kernel, grid, cfg, *args, **constants))

    rows = mock.patch.dict(configs.TABLE[place.arch][place.kernel], {place.operands: place.replaced(config)})
    triton_alone = mock.patch.object(stencils, "can_take", lambda *_: False)
    with rows, triton_alone, mock.patch.object(launch, "config", choose), mock.patch.object(launch, "run", launched):
        yield


def steps(layer: BlockShape, dtype: torch.dtype, device: str) -> None:
    """Steps in which every kernel of a layer runs: a weight step for each kernel size, and an arch step."""
    for size in (3, 5, 7):
        step(replace(layer, kernel=size, expand=6), dtype, "weight", device)
    step(layer, dtype, "full", device)


def launches(place: Place, config: Config, layers: list[BlockShape]) -> Launched:
    """What the row launches in each layer that it serves, seen on meta tensors."""
    found = {}
    for layer in layers:
        here: list[RecordedLaunch] = []
        with serving(place, config, lambda launched, _, to=here: to.append(launched)):
            steps(layer, OPERAND_DTYPES[place.operands], "meta")
        if here:
            found[layer] = here
    return found


def trials(place: Place, layers: list[BlockShape]) -> Iterator[tuple[Config, Launched]]:
    """The candidates and their launches, today's row first, without those that launch what an earlier one does.

    There are such because a block is cut to the channels there are.
    """
    seen = set()
    for config in neighbours(place.config):
        launched = launches(place, config, layers)
        every = [one for some in launched.values() for one in some]
        key = tuple((one.name, *one.config.tile.values(), one.config.warps, one.config.stages) for one in every)
        if key not in seen:
            seen.add(key)
            yield config, launched


def verdict(place: Place, launched: Launched, today: Launched, scratch: Path) -> tuple[bool, str]:
    """Whether a candidate can be compared with today's row: it runs the same passes, and the compiler takes them.

    Of each variant of the kernel the widest is compiled. The words say why not, or what the compiler says.
    """

    def variant(one: RecordedLaunch) -> tuple:
        return one.name, tuple(a is None for a in one.args), one.constants.get("K"), one.constants.get("MODE")

    every = sorted((one for some in launched.values() for one in some), key=lambda one: -nbytes(one.args))
    if {layer: len(some) for layer, some in launched.items()} != {layer: len(some) for layer, some in today.items()}:
        return False, "runs other passes, which cannot be compared alone"
    if not every:
        return False, "serves no layer of the ImageNet space"
    said = []
    for one in distinct(every, variant):
        try:
            code = compile_launch(one, place.arch, scratch)
        except Exception as error:  # Triton raises all kinds: of its own, of MLIR, of the assembler
            return False, f"does not compile ({type(error).__name__})"
        said.append(f"{code.registers} registers, {code.shared >> 10} KiB")
        if code.stack:
            return False, f"spills {code.stack} bytes"
        if code.shared > SHARED.get(place.arch, 227) << 10:
            return False, f"needs {code.shared >> 10} KiB of shared memory"
    return True, "; ".join(dict.fromkeys(said))


def judged(place: Place, layers: list[BlockShape], scratch: Path) -> Iterator[tuple[Config, bool, str]]:
    """Every trial of a row with its verdict."""
    today = launches(place, place.config, layers)
    for config, launched in trials(place, list(today)):
        yield config, *verdict(place, launched, today, scratch)
