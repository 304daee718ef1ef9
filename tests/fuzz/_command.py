"""The command line that all fuzzers share: python -m tests.fuzz.NAME [--seconds N] [--seed S] [--cases N]."""

import argparse
import sys
from collections.abc import Callable


def from_command_line(main: Callable[..., int], about: str | None, **more: str) -> None:
    """Exits with what main(seconds, seed, cases, ...) returns. more: further text options, with their help."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=sys.maxsize)
    for name, text in more.items():
        parser.add_argument(f"--{name}", default="", help=text)
    sys.exit(main(**vars(parser.parse_args())))
