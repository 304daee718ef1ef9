"""A run of steps that can be stopped anywhere and gone on with to the same bits: what search and training share."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import told
from ..data.seeds import seed_of
from ..distributed.ranks import Ranks
from ..io.files import held
from ..io.state import load_state
from . import checkpoint
from .checkpoint import Checkpoints, Writer
from .interrupt import Interrupt
from .journal import Journal, length_before
from .memory import told_how_many_fit
from .progress import StepProgress, epoch_line, say
from .recipe import average, take_average
from .steps import Backward, shared_norms
from .waiting import Waiting

# What a loader may say of itself; on resume it must say the same.
OF_LOADERS = ("size", "batch_size", "seed", "shift", "num_classes", "in_channels", "resolution")


class Session:
    """Steps in epochs over a loader, with a log, checkpoints, progress and signals.

    A subclass has `kind`, which names its log and its checkpoints, before it calls `__init__` also net, config, ranks
    and backward, and says what a step is and what it keeps: `batches`, `run_step`, `own_state`, `restore_own`. `step`
    counts the steps that are done, `history` has a dict of means for each epoch. `out` None: nothing is written.

    Of several processes all decide alike when to save, since the log's means are over all, and rank 0 writes.
    """

    kind: str
    resumed_by: str
    net: nn.Module
    config: Any
    ranks: Ranks
    backward: Backward

    def __init__(self, loaders: Mapping[str, Any], epochs: int, out: Any, checkpoints: Checkpoints | None) -> None:
        self.loaders, self.epochs = loaders, epochs
        self.steps_per_epoch = len(next(iter(loaders.values())))
        self.step, self.total_steps = 0, self.steps_per_epoch * epochs
        for name, loader in loaders.items():
            self.ranks.require_same(f"batches of {name}", len(loader))
        self.ranks.require_same("config", self.config.to_dict())
        # Of the order of loaders that draw theirs from torch, and of what steps draw in several processes.
        self.seed = self.ranks.gather(torch.initial_seed() % 2**63)[0]
        self.history: list[dict[str, float]] = []
        self.journal = Journal(self.ranks.mean)
        self.waits = Waiting(loaders, speaks=self.ranks.first)
        self.average = None if self.config.ema_decay is None else average(self.net, self.config.ema_decay)
        self.checkpoints = checkpoints or Checkpoints()
        self.out = None if out is None else Path(out)
        self.path: Path | None = None  # of the checkpoint that it went on from
        self._fresh, self._saved_step, self._saved_at = True, 0, 0.0
        self._writer: Writer | None = None
        if self.out is not None:
            self._require_unused(self.out)

    # What a subclass says.

    def batches(self, epoch: int, position: int) -> Iterator[Any]:
        """What each `run_step` of an epoch takes, from a position on."""
        raise NotImplementedError

    def run_step(self, batches: Any, requests: Sequence[float]) -> list[float]:
        """One step; returns the sums of the requests over the processes."""
        raise NotImplementedError

    def own_state(self) -> dict[str, Any]:
        """What the subclass keeps beside net, step, log and generators."""
        raise NotImplementedError

    def restore_own(self, state: Mapping[str, Any], path: Path) -> None:
        raise NotImplementedError

    def require_same(self) -> None:
        """Raises ValueError where the processes have come apart; asked when the log is written."""

    def close_epoch(self, epoch: int) -> list[str]:
        """Ends an epoch; returns lines to print."""
        self.history.append({"epoch": epoch, **self.journal.close_epoch()})
        self.journal.write(self.step - 1, "epoch", self.history[-1])
        return [epoch_line(self.history[-1], self.epochs)]

    # Running.

    def fit(self) -> Any:
        """Runs all remaining steps, and saves as `checkpoints` says, at the end and at every stop.

        Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 save after the running step; then KeyboardInterrupt is raised, or Preempted
        (a SystemExit of code 0), and says how to go on. What a loader raises is raised after a save. Raises OSError
        where the folder cannot be written, and InUse (an OSError) where another process writes into it. With
        config.ema_decay the net has the averaged weights at the end, and `average.module` has them before.
        """
        if self.step < self.total_steps:
            self._run()
        if self.average is not None:
            take_average(self.net, self.average.module)
        return self

    def _run(self) -> None:
        with (
            Interrupt() as interrupt,  # the last to go: a signal must not end what is being written
            self._folder(),
            StepProgress(self.kind, self.total_steps, self.step, self.ranks.first) as progress,
            shared_norms(self.net, self.ranks, self.config.sync_norm),
        ):
            self.net.train()
            while self.step < self.total_steps:
                self._run_epoch(progress, interrupt)
            self._save_now()

    def _run_epoch(self, progress: StepProgress, interrupt: Interrupt) -> None:
        epoch, start = divmod(self.step, self.steps_per_epoch)
        source = self.batches(epoch, start)
        for position in range(start, self.steps_per_epoch):
            batches = self._next(source, position, interrupt)
            lines: list[str] = []
            newest = None
            with interrupt.whole_step():
                if self.ranks.several:  # a checkpoint has the generators of rank 0 alone
                    torch.manual_seed(seed_of(self.seed, self.step, self.ranks.rank))
                requests = [*interrupt.requests(), float(self._due())]
                with told_how_many_fit(self.net, batches, self.config.accumulate, self.backward.device):
                    *stops, saves = self.run_step(batches, requests)
                del batches  # while the next are fetched
                if self.average is not None:
                    self.average.update_parameters(self.net)
                self.step += 1
                if self.step % self.config.log_every == 0:
                    self.require_same()
                    newest = self.journal.flush() | {"data_wait": self.waits.take()}
                    self.journal.measure(self.step - 1, "time", {"data_wait": newest["data_wait"]})
                if self.step % self.steps_per_epoch == 0:
                    lines = self.close_epoch(epoch)
            stopping = interrupt.heed(stops, self.ranks.several)
            if stopping:
                message = self._stopped()
            elif saves or lines:
                self._save_soon()
            progress.update(self.step, newest)
            for line in lines if self.ranks.first else ():
                say(line)
            if stopping:
                raise interrupt.stop(message)

    def _next(self, source: Iterator[Any], position: int, interrupt: Interrupt) -> Any:
        """The next batches. What their loader raises is raised once the steps that are done are saved."""
        try:
            batches = next(source, None)
            if batches is None:
                raise ValueError(
                    f"{next(iter(self.loaders))}: gave {position} batches in an epoch, expected the "
                    f"{self.steps_per_epoch} of its length"
                )
            return batches
        except Exception as error:
            if self.ranks.several:  # the others are in their step, and a checkpoint needs all
                raise
            if interrupt.requested:  # the signal went to the workers too
                raise interrupt.stop(self._stopped()) from error
            self._save_now()
            raise

    # Saving. Who writes and when is decided here alone.

    @property
    def writes(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.out is not None and self.ranks.first

    def save(self) -> Path | None:
        """Writes the checkpoint that `resume` continues from exactly; returns its path once it is on the disk.

        Of several processes all must ask; those that do not write get None.
        """
        if self.out is None:
            raise ValueError(f"out: the {self.kind} has no folder, expected one to save a checkpoint in")
        state, path = self.state(), None
        if self.writes:
            with held(self.out):
                writer = self._writer or self._new_writer(self.out)
                writer.write(state, self.journal.sync)
                path = writer.wait()
        self._fresh, self._saved_step = False, self.step
        return path

    def discard(self) -> None:
        """Removes the checkpoints, of which nothing is needed any more."""
        if self.out is not None and self.writes:
            with held(self.out):
                checkpoint.remove(self.out, self.kind)

    def state(self) -> dict[str, Any]:
        """All that decides how the run goes on, between two steps."""
        return {
            "kind": self.kind,
            "step": self.step,
            "seed": self.seed,
            "config": self.config.to_dict(),
            "net": self.net.state_dict(keep_vars=True),  # they are copied at once
            "scaler": self.backward.scaler.state_dict(),
            "average": None if self.average is None else self.average.module.state_dict(),
            "history": self.history,
            "loaders": {name: _told_by(loader) for name, loader in self.loaders.items()},
            "rng": _generators(),
            **self.journal.state(),
            **self.own_state(),
        }

    def _new_writer(self, out: Path) -> Writer:
        return Writer(out, self.kind, self.checkpoints.keep, self._saved_step)

    def _due(self) -> bool:
        """Whether it is time to save after the step that begins; while an earlier write runs, it stays due."""
        if self._writer is None or self._writer.busy():
            return False
        every, step = self.checkpoints, self.step + 1
        by_steps = every.steps is not None and step // every.steps > self._saved_step // every.steps
        return by_steps or time.monotonic() - self._saved_at >= 60 * every.minutes

    def _save_soon(self) -> None:
        """Begins to write a checkpoint in the background, after one that is being written."""
        if self.out is None:
            return
        state = self.state()  # by all processes
        if self._writer is not None:
            self._writer.write(state, self.journal.sync)
        self._saved_step, self._saved_at = self.step, time.monotonic()

    def _save_now(self) -> None:
        """The same, if there is something new; it is on the disk when this returns."""
        if self._saved_step != self.step:
            self._save_soon()
        if self._writer is not None:
            self._writer.wait()

    def _stopped(self) -> str:
        """Saves, where there is a folder, and says how to go on."""
        stopped = f"{self.kind} stopped after step {self.step} of {self.total_steps}"
        if self.out is None:
            return stopped
        self._save_now()
        return f"{stopped}; {self.resumed_by.format(out=str(self.out))} continues it"

    @contextmanager
    def _folder(self) -> Iterator[None]:
        """Within, the folder is held, and log and checkpoints go into it."""
        if self.out is None or not self.writes:
            yield
            return
        with held(self.out):
            if self._fresh:
                self._require_unused(self.out)
            try:
                self.journal.open(self.out / f"{self.kind}.jsonl")
                self._writer = self._new_writer(self.out)
                self._writer.snapshot.reserve({"net": self.net.state_dict()}, 2.1)  # weights and their momentum
                self._fresh, self._saved_at = False, time.monotonic()
                yield
            finally:
                try:
                    if self._writer is not None:
                        self._writer.wait()
                finally:
                    self._writer = None
                    self.journal.close()

    def _require_unused(self, out: Path) -> None:
        found = checkpoint.newest(out, self.kind)
        if found is not None:
            raise ValueError(
                f"out: {out} holds an earlier {self.kind} ({found.relative_to(out)}); "
                f"{self.resumed_by.format(out=str(out))} continues it, and a new one needs another folder"
            )

    # Going on.

    def restore(self, out: str | Path, state: Mapping[str, Any], path: Path) -> None:
        """Takes up a state that was read from a checkpoint of a folder. Raises ValueError where it does not fit."""
        for name, said in state.get("loaders", {}).items():
            now = _told_by(self.loaders[name]) if name in self.loaders else {}
            for field in sorted(said.keys() & now.keys()):
                if said[field] != now[field]:
                    raise ValueError(
                        f"{path}: the {name} loader has {field} {now[field]}, expected {said[field]}, as the "
                        f"{self.kind} was started with"
                    )
        step, epochs = state["step"], len(state["history"])
        if step > self.total_steps or step // max(1, self.steps_per_epoch) != epochs:
            raise ValueError(
                f"{path}: step {step} after {epochs} epochs does not fit a {self.kind} of {self.total_steps} steps, "
                f"{self.steps_per_epoch} an epoch: expected the images and batches that it was started with"
            )
        self.ranks.require_same("the checkpoint", path.name)
        load_state(self.net, state["net"], str(path))
        if self.backward.scaler.is_enabled() and state.get("scaler"):
            self.backward.scaler.load_state_dict(state["scaler"])
        if self.average is not None and state.get("average"):
            load_state(self.average.module, state["average"], f"{path}: average")
            self.average.n_averaged.fill_(step)
        self.restore_own(state, path)
        _set_generators(state["rng"], path)
        self.out, self.path, self._fresh = Path(out), path, False
        self.seed = state.get("seed", self.seed)
        self.step, self.history = step, list(state["history"])
        self.journal.sums.update({name: list(total) for name, total in state["sums"].items()})
        name = f"{self.kind}.jsonl"
        known = state.get("log")
        self.journal.lengths = dict(known or {name: length_before(self.out / name, step)})
        self._saved_step = step if path.name != checkpoint.LEGACY else -1


def _told_by(loader: Any) -> dict[str, int]:
    said = {"batches": len(loader), **{name: told(loader, name) for name in OF_LOADERS}}
    return {name: value for name, value in said.items() if value is not None}


def _generators() -> dict[str, Any]:
    kind, keys, *rest = tuple(np.random.get_state())
    return {
        "torch": torch.get_rng_state(),
        "numpy": (kind, list(map(int, keys)), *rest),
        "python": tuple(list(part) if isinstance(part, tuple) else part for part in random.getstate()),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def _set_generators(rng: Any, path: Path) -> None:
    try:
        if isinstance(rng, Tensor):  # of a version before 0.3.0
            torch.set_rng_state(rng)
            return
        torch.set_rng_state(rng["torch"])
        np.random.set_state(tuple(rng["numpy"]))
        random.setstate(tuple(tuple(part) if isinstance(part, list) else part for part in rng["python"]))
        if rng["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(rng["cuda"])
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: rng must be the states of random generators ({error})") from error
