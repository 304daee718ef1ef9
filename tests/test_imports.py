"""Imports point one way: docs/architecture.md, "The house". A wrong one is named by file and line."""

import ast
import importlib
import pkgutil
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import proxyless_fast

PACKAGE = Path(proxyless_fast.__file__).parent
REPOSITORY = PACKAGE.parent

# From the bottom up. A room imports from rooms below it and, beside itself, from none on its own floor. The package's
# own face, `proxyless_fast`, stands where it is listed: above all that it shows.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("_deprecated", "checks", "io"),
    ("_C",),
    ("ops",),
    ("candidates",),
    ("costs",),
    ("distributed",),
    ("reading",),
    ("fusion",),
    ("blocks",),
    ("gates",),
    ("mixed",),
    ("supernet",),
    ("spaces", "data", "cuda_graphs", "planning"),
    ("export",),
    ("latency",),
    ("search",),
    ("report",),
    ("__init__",),
    ("bench",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    """The top-level room of a dotted module name of the package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_of(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, relative imports resolved, also inside functions."""
    here = module_of(path, package).split(".")
    if path.name != "__init__.py":
        here = here[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            whole = source == package.name  # `from . import x`: each name may be a room
            yield from ((node.lineno, f"{source}.{alias.name}" if whole else source) for alias in node.names)


def faults(package: Path) -> list[str]:
    """What points the wrong way in a package, as "file:line: sentence"."""
    found = []
    for path in sorted(package.rglob("*.py")):
        mine = room_of(module_of(path, package))
        where = path.relative_to(package.parent)
        if mine not in FLOOR:
            found.append(f"{where}:1: the room {mine!r} stands on no floor of tests/test_imports.py")
            continue
        for line, name in imported(path, package):
            if name.split(".")[0] in ("benchmarks", "tests"):
                found.append(f"{where}:{line}: the package imports {name}, which is not installed with it")
            if name.split(".")[0] != package.name:
                continue
            theirs = room_of(name)
            if theirs not in FLOOR:
                theirs = "__init__"  # a public name of the package's face
            if theirs != mine and FLOOR[theirs] >= FLOOR[mine]:
                found.append(f"{where}:{line}: {mine} imports {name}, and stands below or beside it")
    return found


def test_imports_point_one_way():
    assert not faults(PACKAGE), "\n".join(faults(PACKAGE))


@pytest.mark.parametrize(
    ("room", "text", "said"),
    [
        ("ops/conv.py", "import torch\n\nfrom ..mixed import MixedOp\n", "ops/conv.py:3: ops imports"),
        ("gates.py", "def late():\n    from . import mixed\n", "gates.py:2: gates imports"),
        ("io/files.py", "from ..ops import gram\n", "io/files.py:1: io imports"),
        ("search/loop.py", "import proxyless_fast as pf\n", "search/loop.py:1: search imports"),
        ("search/loop.py", "from benchmarks import gpu\n", "search/loop.py:1: the package imports benchmarks"),
        ("attic.py", "", "attic.py:1: the room 'attic' stands on no floor"),
    ],
)
def test_a_wrong_import_is_named_by_file_and_line(tmp_path, room, text, said):
    package = tmp_path / "proxyless_fast"
    path = package / room
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert len(faults(package)) == 1 and f"proxyless_fast/{said}" in faults(package)[0]


def test_no_circle_within_a_room():
    """Modules of one package import each other without a circle; a package's __init__ only gathers."""
    edges: dict[str, dict[str, str]] = {}
    files = {module_of(path, PACKAGE): path for path in PACKAGE.rglob("*.py")}
    for module, path in files.items():
        for line, name in imported(path, PACKAGE):
            for target in (name, name.rpartition(".")[0]):
                if target in files and target != module and not module.startswith(target + "."):
                    edges.setdefault(module, {})[target] = f"{path.relative_to(REPOSITORY)}:{line}"
                    break
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        if module in way:
            circle = way[way.index(module) :]
            places = (edges[a][b] for a, b in zip(circle, (*circle[1:], module), strict=True))
            pytest.fail(f"an import circle: {', '.join(places)}")
        if module not in done:
            for target in edges.get(module, {}):
                visit(target, (*way, module))
            done.add(module)

    for module in files:
        visit(module, ())


def modules() -> Iterator[types.ModuleType]:
    for info in pkgutil.walk_packages(proxyless_fast.__path__, "proxyless_fast."):
        kernels = info.name.startswith("proxyless_fast.ops.gpu.")  # import Triton, which not every machine has
        if not kernels and not info.name.endswith("__main__"):
            yield importlib.import_module(info.name)


def test_no_name_hides_a_module():
    """`import proxyless_fast.ops.mbconv as m` gives the module, and so does every other."""
    for module in modules():
        holder, _, name = module.__name__.rpartition(".")
        assert getattr(importlib.import_module(holder), name) is module, (
            f"{holder} has another {name!r} than its module"
        )


def test_tests_and_benchmarks_leave_sys_path_alone():
    for folder in ("tests", "benchmarks", "examples"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                changed = line.lstrip().startswith("sys.path")
                assert not changed, f"{path.relative_to(REPOSITORY)}:{number}: sys.path is changed"
