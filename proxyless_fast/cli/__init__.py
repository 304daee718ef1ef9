"""Command line: every wrong input ends with exit code 2 and one sentence, every fault of ours with 70 and another."""

import logging
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from ..distributed.ranks import Ranks, joined, launched, restarted
from ..io.files import held, require_writable
from ..report import print_report
from ..report.ends import command_line, ended
from ..search.checkpoint import newest
from ..search.progress import console
from . import checks, stages
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
TOGETHER = ("search", "train", "eval")  # stages that the processes of torchrun share


@command_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns its exit code: 0, 2 for wrong input, 70 for a fault of ours, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["bench"]:  # has options of its own
        from ..bench.run import main as bench  # imports much that no other command needs

        return bench(arguments[1:])
    args = build_parser().parse_args(arguments)
    rank = int(os.environ.get("RANK", "0")) if launched() else 0
    with _messages(quiet=rank > 0):
        name = f"{args.command} (rank {rank})" if rank else args.command
        return ended(name, lambda: _run(args, name), args.run)


def _run(args: Namespace, name: str) -> int:
    """Runs a command, in each process of torchrun: what none can do for the others is done by the first alone.

    What ended it is said before the processes part, which takes its time where one of them is gone.
    """
    with joined():
        return ended(name, lambda: _run_joined(args, Run(args.run, Ranks.current())), args.run)


def _run_joined(args: Namespace, run: Run) -> None:
    start = time.perf_counter()
    if args.command == "report":
        if not run.report():
            raise FileNotFoundError(f"{run.report_file}: no such file, expected the report of an earlier stage")
        if run.writes:
            print_report(run.report(), run.folder)
        return
    if args.command == "plan":
        checks.check(args)
        return stages.plan(run, args)
    # What a stage would meet after its work is told before it.
    checks.check(args)
    require_writable(run.folder)
    run.report()
    with held(run.folder) if run.writes else nullcontext():
        run.ranks.wait()
        if restarted():
            _go_on_after_restart(args, run)
        _run_stage(args.command, run, args)
        if args.command == "search" and args.all:
            _run_rest(run, args)
            run.record("total", {"seconds": round(time.perf_counter() - start, 2)})
            if run.writes:
                print_report(run.report(), run.folder)


def _go_on_after_restart(args: Namespace, run: Run) -> None:
    """torchrun starts again with the same arguments: they ask for what a checkpoint, if there is one, goes on with."""
    kind = "train" if args.command == "train" else "search"
    if args.command in ("search", "train") and newest(run.folder, kind) is not None:
        args.resume = True
        if args.command == "search":
            args.target, args.table, args.no_latency = None, None, False


def _run_rest(run: Run, args: Namespace) -> None:
    """The stages after the search; of a run that is gone on with, those that it has not ended."""
    ended = run.report() if args.resume else {}
    for stage in ("derive", "train", "eval", "export"):
        if stage not in ended:
            _run_stage(stage, run, args)


def _run_stage(name: str, run: Run, args: Namespace) -> None:
    if name in TOGETHER:
        CHAIN[name](run, args)
    else:
        run.alone(CHAIN[name], run, args)


@contextmanager
def _messages(quiet: bool) -> Iterator[None]:
    """What is logged is printed; of the package, also what is no warning. quiet: nothing but errors is."""
    handler, root, own = logging.StreamHandler(sys.stdout), logging.getLogger(), logging.getLogger("proxyless_fast")
    handler.setFormatter(logging.Formatter("%(message)s"))
    level, console.quiet = own.level, quiet
    if quiet:
        handler.setLevel(logging.ERROR)
    root.addHandler(handler)
    own.setLevel(logging.INFO)
    try:
        yield
    finally:
        console.quiet = False
        root.removeHandler(handler)
        own.setLevel(level)
