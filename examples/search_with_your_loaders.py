"""A whole search on loaders of your own: profile this machine, search within a latency, derive, train, export."""

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

import proxyless_fast as pf

CLASSES, SIDE, BATCH = 4, 16, 32


def loader(images: int, seed: int) -> DataLoader:
    """Blobs of noise, brighter in one quarter than in the others: any sized iterable of (inputs, labels) will do."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (images,), generator=random)
    x = torch.randn(images, 3, SIDE, SIDE, generator=random)
    for quarter in range(CLASSES):
        top, left = SIDE // 2 * (quarter // 2), SIDE // 2 * (quarter % 2)
        x[labels == quarter, :, top : top + SIDE // 2, left : left + SIDE // 2] += 0.5
    return DataLoader(TensorDataset(x, labels), BATCH, shuffle=True, generator=random)


def main(out: Path) -> None:
    torch.manual_seed(0)
    train, valid, test = loader(320, 1), loader(160, 2), loader(160, 3)
    candidates = ("3x3_MBConv3", "5x5_MBConv6")
    net = pf.spaces.small(num_classes=CLASSES, in_channels=3, resolution=SIDE, candidates=candidates)
    table = pf.profile(net, threads=1, repeats=5)
    latency = pf.latency.ExpectedLatency(net, table)
    target = (latency.fastest + latency.slowest) / 2
    config = pf.SearchConfig(
        epochs=1, warmup_epochs=1, lr=0.1, arch_every=1, arch_lr=0.05, objective="add_linear", target_ms=target
    )
    search = pf.Search(net, train, valid, config, table, out=out).fit()

    choices = pf.search.most_probable_path(pf.mixed_ops(net), latency, target)
    derived = pf.derive(search.net, choices)
    pf.search.train(derived, train, pf.search.TrainConfig(epochs=2, lr=0.05))
    accuracy = pf.search.evaluate(derived, test)
    error = pf.export.onnx(derived, out / "net.onnx")
    measured = pf.latency.measure(out / "net.onnx", threads=1, repeats=5)
    print(f"target {target:.4f} ms, predicted {latency.of_choices(choices):.4f} ms, measured {measured:.4f} ms")
    print(f"top-1 {accuracy.top1:.1%} of {accuracy.images} images; ONNX differs from torch by {error:.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example"))
