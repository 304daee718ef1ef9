"""What the loaders give alone, beside what steps take: python -m benchmarks.loader [--workers 0 1 2] [--size 500 375].

Images are generated JPEG files, once in a folder of classes and once in a shard, decoded, cut and normalised as for
training; of images in memory (uint8, as of IDX files) batches are moved, mirrored and normalised. Each loader runs for
some seconds after its first batches, in turns, and its best round counts. A weight step of the paper's net tells which
of them would keep it waiting. Exit code 2 for wrong options.
"""

import argparse
import io
import os
import platform
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import proxyless_fast as pf
from proxyless_fast.data.memory import MemoryLoader
from proxyless_fast.latency.profiler import _processor


def generate(folder: Path, images: int, width: int, height: int) -> None:
    """A data set of so many training images, as files and as a shard: noise over a ramp, as large as photographs."""
    draw, ramp = np.random.default_rng(0), np.linspace(0, 200, width)[None, :, None]
    for kind in ("files", "shards"):
        for part in ("train", "val"):
            (folder / kind / part / ("0" if kind == "files" else ".")).mkdir(parents=True, exist_ok=True)
    for part, count in (("train", images), ("val", 1)):
        with tarfile.open(folder / "shards" / part / "0.tar", "w") as tar:
            for number in range(count):
                buffer = io.BytesIO()
                coarse = draw.integers(0, 56, (height // 4 + 1, width // 4 + 1, 3)).repeat(4, 0).repeat(4, 1)
                Image.fromarray((ramp + coarse[:height, :width]).astype(np.uint8)).save(buffer, "JPEG", quality=90)
                (folder / "files" / part / "0" / f"{number}.jpg").write_bytes(buffer.getvalue())
                for suffix, content in (("jpg", buffer.getvalue()), ("cls", b"0")):
                    info = tarfile.TarInfo(f"{number}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def endless(loader) -> Iterator:
    epoch = 0
    while True:
        yield from loader.batches_from(epoch)
        epoch += 1


def rate(batches: Iterator, seconds: float) -> float:
    """Images per second that come, over at least so many seconds."""
    start, images = time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        images += len(next(batches)[1])
    return images / (time.perf_counter() - start)


def step_rate(batch: int, resolution: int, device: str, seconds: float) -> float:
    """Images per second that weight steps of the paper's net take, without a loader."""
    net = pf.spaces.mobile(num_classes=1000, resolution=resolution).to(device, memory_format=torch.channels_last)
    images, labels = torch.randn(batch, 3, resolution, resolution), torch.zeros(batch, dtype=torch.long)
    images = images.contiguous(memory_format=torch.channels_last)
    search = pf.Search(net, [(images, labels)], [(images, labels)], pf.SearchConfig(epochs=1))
    batches = [images.to(device), labels.to(device)]

    def steps() -> Iterator:
        while True:
            search.weight_step(batches)
            search.journal.flush()  # waits for the device
            yield batches

    source = steps()
    next(source)
    return rate(source, seconds)


def make_loaders(place: Path, args: argparse.Namespace) -> dict[tuple[str, int], Any]:
    """By kind and number of workers, on data sets that are generated in a folder."""
    os.environ["XDG_CACHE_HOME"] = str(place)
    generate(place, args.images, *args.size)
    loaders: dict[tuple[str, int], Any] = {}
    for kind in ("files", "shards"):
        for workers in args.workers:
            splits = pf.data.loaders(place / kind, args.batch, args.resolution, 0.0, workers=workers)
            loaders[kind, workers] = splits.train
    pixels = torch.zeros(args.images, 3, args.resolution, args.resolution, dtype=torch.uint8)
    half = torch.full((3,), 0.5)
    options: dict[str, Any] = {"mean": half, "std": half, "shuffle": True, "shift": 2, "drop_last": True}
    loaders["memory", 0] = MemoryLoader(pixels, torch.zeros(args.images, dtype=torch.long), args.batch, **options)
    return loaders


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", type=int, nargs=2, default=(500, 375), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each loader in each round")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if min(args.images // args.batch, args.resolution, *args.size, args.rounds) < 1 or min(args.workers) < 0:
        parser.error("expected positive sizes, at least a batch of images, and workers of at least 0")
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    print(f"{_processor()}, {threads}, torch {torch.__version__}, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as place:
        loaders = make_loaders(Path(place), args)
        best = dict.fromkeys(loaders, 0.0)
        for _ in range(args.rounds):
            for name, loader in loaders.items():
                batches = endless(loader)
                for _ in range(2 + 4 * name[1]):  # what workers have made ready
                    next(batches)
                best[name] = max(best[name], rate(batches, args.seconds))
    step = step_rate(args.batch, args.resolution, args.device, 2 * args.seconds)
    print(
        f"JPEG files of {args.size[0]}x{args.size[1]}, to {args.resolution}x{args.resolution}, batches of {args.batch}"
    )
    for (kind, workers), images in best.items():
        verdict = f"{images / step:6.2f} x a weight step: {'binds' if images < step else 'keeps up'}"
        print(f"  {kind:<7} {workers:>2} workers  {images:>9,.0f} images/s   {verdict}")
    print(f"  weight steps of spaces.mobile on {args.device}: {step:,.0f} images/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
