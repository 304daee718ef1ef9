"""`proxyless-fast bench`: the benchmarks of the repository, which are not part of the installed package."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path


def bench(arguments: Sequence[str]) -> int:
    """Runs `benchmarks.run` of the checkout that this package lies in.

    Raises FileNotFoundError where the package was installed without its repository.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "run.py").is_file():
        raise FileNotFoundError(
            f"{root / 'benchmarks'}: no such folder, expected a clone of the repository with the package installed "
            "from it (pip install --no-build-isolation -e .)"
        )
    sys.path.insert(0, str(root))
    return importlib.import_module("benchmarks.run").main(list(arguments))
