"""Runs that are killed or asked to end at random moments, and go on: to every bit of what an uninterrupted run leaves.

`python -m tests.fuzz.kills [--seconds N] [--seed S] [--cases N] [--signals KILL,TERM,INT,HUP,USR1]`: searches of every
mode and trainings, with and without loader workers, checkpoints at every second step, so that many signals come during
a write. Prints what differs, keeps the folders and exits with 1.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from proxyless_fast import data
from proxyless_fast.search import Checkpoints, Search, SearchConfig, TrainConfig, Training, checkpoint, progress
from proxyless_fast.search.interrupt import Preempted
from proxyless_fast.supernet import derive
from tests.fuzz._command import from_command_line
from tests.search.test_search import ToyNet, toy_times

KINDS = ("full", "two", "reinforce", "train")
EVERY = 2  # steps between checkpoints
MOST = 4  # signals to one run


def write_images(folder: Path) -> None:
    """An image folder of four classes: 48 training images of 16x16 pixels."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 2)):
        for number in range(4 * count):
            place = folder / part / str(number % 4)
            place.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 99, (16, 16, 3)) + 39 * (number % 4)
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.png")


def run_once(images: Path, folder: Path, kind: str, workers: int) -> None:
    """Begins the run of a folder, or goes on with it, to its end; each step's number goes to a file beside it."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    net, every = ToyNet(), Checkpoints(steps=EVERY)
    splits = data.loaders(str(images), batch_size=8, resolution=8, valid_fraction=0.25, seed=3, workers=workers)
    holder = Training if kind == "train" else Search
    again = checkpoint.newest(folder, holder.kind) is not None
    run: Any
    if kind == "train":
        plain = derive(net)
        if again:
            run = Training.resume(folder, plain, splits.train, every)
        else:
            run = Training(plain, splits.train, TrainConfig(epochs=3, log_every=3), folder, every)
    elif again:
        run = Search.resume(folder, net, splits.train, splits.valid, toy_times(net), checkpoints=every)
    else:
        config = SearchConfig(
            epochs=2, warmup_epochs=1, arch_every=2, arch_lr=0.05, mode=kind, target_ms=2.0, objective="add_linear",
            samples=2, prune_below=0.2, log_every=3,
        )  # fmt: skip
        run = Search(net, splits.train, splits.valid, config, toy_times(net), folder, checkpoints=every)
    step = run.run_step

    def noted(*arguments: Any) -> Any:
        found = step(*arguments)
        with open(folder.with_suffix(".steps"), "a") as file:
            file.write(f"{run.step}\n")
        return found

    run.run_step = noted
    run.fit()


def start(images: Path, folder: Path, kind: str, workers: int) -> int:
    """The same in a process of its own; its id. A fork, since imports take longer than all else."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run_once(images, folder, kind, workers)
        code = 0
    except (KeyboardInterrupt, Preempted) as stop:
        code = 130 if isinstance(stop, KeyboardInterrupt) else 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(code)


def steps_of(folder: Path) -> list[int]:
    path = folder.with_suffix(".steps")
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def left_by(folder: Path, kind: str) -> dict[str, Any]:
    """All that a run left, so that two can be compared. A checkpoint's name has its digest."""
    name = "train" if kind == "train" else "search"
    loader = EventFileLoader(str(folder / "tensorboard" / f"events.out.tfevents.{name}"))
    events = [
        # of what is a time only that it was told
        (event.step, value.tag, "" if value.tag.startswith("time/") else str(value.tensor or value.simple_value))
        for event in loader.Load()
        for value in event.summary.value
    ]
    state, path = checkpoint.load(folder, name)
    earlier = checkpoint.paths(path.parent)[1:]
    return {
        # Of earlier checkpoints it is left to the speed of the disk which steps they are of.
        "files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p not in earlier),
        "number of checkpoints": len(earlier) <= Checkpoints.keep,  # one more, if it was killed at the very end
        "log": (folder / f"{name}.jsonl").read_bytes(),
        "events": events,
        "checkpoint": path.read_bytes(),
        "history": state["history"],
    }


def interrupted(images: Path, folder: Path, kind: str, workers: int, draw: random.Random, names: list[str], s: float):
    """A run that gets signals until it has ended; how many it got, by name, and what was wrong, or None."""
    sent: list[str] = []
    while True:
        before = checkpoint.newest(folder, "train" if kind == "train" else "search")
        done = len(steps_of(folder))
        child = start(images, folder, kind, workers)
        name = draw.choice(names)
        if len(sent) < MOST:
            deadline = time.monotonic() + draw.uniform(0, s)
            while (
                time.monotonic() < deadline and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
            ):
                time.sleep(0.001)
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                os.kill(child, getattr(signal, f"SIG{name}"))
                sent.append(name)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        steps = steps_of(folder)[done:]
        first = int(before.name.partition("-")[0]) if before is not None else 0
        if steps and steps != list(range(first, first + len(steps))):
            return sent, f"went on from step {steps[0]}, the checkpoint is of {first}"
        if ended in (0, 130) and steps and sent and ended == (130 if sent[-1] == "INT" else 0):
            now = checkpoint.newest(folder, "train" if kind == "train" else "search")
            if now is None or int(now.name.partition("-")[0]) != steps[-1] + 1:
                return sent, f"ended by {name} after step {steps[-1]}, the checkpoint is {now}"
        if ended > 0 and ended != 130:
            return sent, f"exit code {ended}"
        total = steps_of(folder)
        if ended == 0 and total and max(total) + 1 == TOTAL[kind]:
            return sent, None


TOTAL: dict[str, int] = {}


def main(seconds: float = 60.0, seed: int = 0, cases: int = sys.maxsize, signals: str = "") -> int:
    """Sends signals for so many seconds, or so many of them; 1 where a run ended otherwise than undisturbed, else 0."""
    torch.set_num_threads(1)
    above, draw = Path(tempfile.mkdtemp(prefix="fuzz_kills_")), random.Random(seed)
    names = (signals or "KILL").split(",")
    write_images(above / "images")
    progress.console.quiet = True
    wanted: dict[tuple[str, int], tuple[dict[str, Any], float]] = {}
    counts: dict[str, int] = {}
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end and sum(counts.values()) < cases:
        kind, workers = KINDS[number % len(KINDS)], (0, 2)[number // len(KINDS) % 2]
        if (kind, workers) not in wanted:
            folder, began = above / f"straight-{kind}-{workers}", time.monotonic()
            if os.waitpid(start(above / "images", folder, kind, workers), 0)[1]:
                return 1
            TOTAL[kind] = len(steps_of(folder))
            wanted[kind, workers] = left_by(folder, kind), time.monotonic() - began
        straight, takes = wanted[kind, workers]
        folder = above / str(number)
        sent, wrong = interrupted(above / "images", folder, kind, workers, draw, names, takes)
        if wrong is None:
            found = left_by(folder, kind)
            wrong = next((f"another {name}" for name in straight if found[name] != straight[name]), None)
        if wrong is not None:
            print(f"seed {seed}, run {number} ({kind}, {workers} workers) in {folder}, after {sent}: {wrong}")
            return 1
        for name in sent:
            counts[name] = counts.get(name, 0) + 1
        shutil.rmtree(folder)
        with contextlib.suppress(FileNotFoundError):
            folder.with_suffix(".steps").unlink()
        number += 1
    shutil.rmtree(above)
    print(f"seed {seed}: {number} runs, {json.dumps(counts)}")
    return 0


if __name__ == "__main__":
    from_command_line(main, __doc__, signals="which are sent, with commas (default: KILL)")
