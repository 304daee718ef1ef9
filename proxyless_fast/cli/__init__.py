"""Command line: every wrong input ends with exit code 2 and one sentence."""

import logging
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence

from ..report import print_report
from . import stages
from .parser import build_parser
from .run import Run

CHAIN: dict[str, Callable] = {
    "profile": stages.profile,
    "search": stages.search,
    "derive": stages.derive,
    "train": stages.train,
    "eval": stages.eval,
    "export": stages.export,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns its exit code: 0, 2 for wrong input, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["bench"]:  # has options of its own
        from ..bench.run import main as bench  # imports much that no other command needs

        return bench(arguments[1:])
    args = build_parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    logging.getLogger("proxyless_fast").setLevel(logging.INFO)
    try:
        _run(args)
    except KeyboardInterrupt as error:
        return _say(args.command, str(error) or "stopped", 130)
    except LookupError as error:
        # str() of a plain KeyError would be the repr of its message.
        plain = type(error) is KeyError and error.args
        return _say(args.command, str(error.args[0] if plain else error), 2)
    except (ValueError, OSError) as error:
        return _say(args.command, str(error), 2)
    return 0


def _run(args: Namespace) -> None:
    start, run = time.perf_counter(), Run(args.run)
    if args.command == "report":
        if not run.report():
            raise FileNotFoundError(f"{run.report_file}: no such file, expected the report of an earlier stage")
        print_report(run.report(), run.folder)
        return
    CHAIN[args.command](run, args)
    if args.command == "search" and args.all:
        for stage in ("derive", "train", "eval", "export"):
            CHAIN[stage](run, args)
        run.record("total", {"seconds": round(time.perf_counter() - start, 2)})
        print_report(run.report(), run.folder)


def _say(command: str, message: str, code: int) -> int:
    print(f"proxyless-fast {command}: {' '.join(message.split())}", file=sys.stderr)
    return code
