"""Two search methods beside each other on equal terms: ProxylessNAS's arch step and the weighted sum of DARTS.

The registry of `proxyless_fast.bench` makes both from the same weights, holds their gradients against the definition
before anything is timed, and times them in turns. A method of your own is one more entry: see `register` there.
"""

import statistics
import time

import torch

import proxyless_fast as pf
from proxyless_fast.bench import baselines, gate, steps

ROUNDS = 5


def main() -> None:
    torch.set_num_threads(1)
    settings = baselines.Settings(space="small", resolution=16, batch=8, threads=1)
    state, data = settings.net().state_dict(), settings.data()
    paths = steps.draw_paths(settings.net(), ROUNDS + 1, seed=0)
    subjects = {}
    for name in ("ours", "darts"):
        subjects[name] = baselines.BASELINES[name].build(settings)
        subjects[name].load(state)
    gate.check(subjects, settings, ["full"], paths[0])  # raises where a loss or a gradient is wrong

    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for path in paths:
        for name, subject in subjects.items():
            images, labels = subject.images(data[0]), data[1]
            start = time.perf_counter()
            subject.step(images, labels, path, "full")
            seconds[name].append(time.perf_counter() - start)
    for name, subject in subjects.items():
        middle = statistics.median(seconds[name][1:])  # the first round warms up
        kept = steps.saved_bytes(subject, data, paths[0], "full")
        print(f"{name:6} {middle * 1e3:7.1f} ms a step, {kept / 1e6:6.1f} MB kept for backward")
    print(f"instruction set {pf.instruction_set()}, one thread")


if __name__ == "__main__":
    main()
