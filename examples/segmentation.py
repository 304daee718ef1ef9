"""Segmentation with searched blocks that keep the resolution: a loss and a metric in place of the classifier's."""

import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader

import proxyless_fast as pf

SIDE, CLASSES, WIDTH = 32, 3, 16
CANDIDATES = ("3x3_MBConv3", "5x5_MBConv3", "7x7_MBConv3", "Zero")


def example(number: int) -> tuple[Tensor, Tensor]:
    """Noise with a disc and a rectangle that differ from it in texture alone; its labels, int64 (SIDE, SIDE)."""
    random = torch.Generator().manual_seed(number)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    across, down, left, top = torch.randint(8, 20, (4,), generator=random).tolist()
    labels = torch.zeros(SIDE, SIDE, dtype=torch.int64)
    labels[(x - across) ** 2 + (y - down) ** 2 < 49] = 1
    labels[top : top + 10, left : left + 10] = 2
    stripes = torch.stack([torch.zeros_like(x), (x % 2) * 2 - 1, (y % 2) * 2 - 1]).gather(0, labels[None])
    return stripes + 0.5 * torch.randn(3, SIDE, SIDE, generator=random), labels


class Segmenter(nn.Module):
    """Images (B, 3, SIDE, SIDE) to logits (B, CLASSES, SIDE, SIDE): residual mixed ops at half the resolution."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 4, 2, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU6())
        self.blocks = nn.ModuleList(
            pf.MixedOp({name: pf.candidate(name, WIDTH, WIDTH, 1) for name in CANDIDATES}, label=f"block {i}")
            for i in range(blocks)
        )
        self.head = nn.Conv2d(WIDTH, CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = x + block(x)
        return interpolate(self.head(x), size=images.shape[-2:], mode="bilinear", align_corners=False)


def overlaps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each image and class, (B, CLASSES): pixels in both prediction and truth, and pixels in either."""
    found, true = (torch.nn.functional.one_hot(t, CLASSES).bool() for t in (logits.argmax(1), labels))
    return (found & true).sum((1, 2)), (found | true).sum((1, 2))


def miou(logits: Tensor, labels: Tensor) -> Tensor:
    """A mean over images, so that parts of a batch add up. A class that is neither there nor found counts as 1."""
    both, either = overlaps(logits, labels)
    return torch.where(either > 0, both / either.clamp(min=1), 1.0).mean()


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of pixels, those of objects twice as heavy as the ground: there is more of the ground."""
    weight = logits.new_tensor([1.0] + [2.0] * (CLASSES - 1))
    return cross_entropy(logits, labels, weight, reduction="none").mean()


if __name__ == "__main__":
    torch.manual_seed(0)
    train, valid, test = (
        DataLoader([example(i) for i in range(start, start + count)], 16, shuffle=start == 0)
        for start, count in ((0, 160), (1000, 80), (2000, 80))
    )
    config = pf.SearchConfig(epochs=5, warmup_epochs=2, lr=0.05, arch_every=2, arch_lr=0.05)
    search = pf.Search(Segmenter(), train, valid, config, out=next(iter(sys.argv[1:]), None), loss=loss, metric=miou)
    derived = pf.derive(search.fit().net).eval()
    print({label: op.names[op.most_likely] for label, op in pf.mixed_ops(search.net).items()})
    with torch.no_grad():
        both, either = (sum(counts).sum(0) for counts in zip(*(overlaps(derived(x), y) for x, y in test), strict=True))
    print(f"mIoU {(both / either).mean():.3f} of the derived net, over all pixels of the test images")
