"""An anchor-free detector with a searched backbone: `step=` gives loss and score of a batch of any structure.

Here it is images and a list of a dict for each. `accumulate=2` cuts tensors by their first dimension, and lists.
"""

import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, softplus
from torch.utils.data import DataLoader
from torchvision.ops import box_iou, generalized_box_iou_loss

import proxyless_fast as pf

SIDE, STRIDE, GRID, CLASSES = 32, 4, 8, 2


def example(number: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Noise with a red rectangle in its left half, a blue one in its right half, or both."""
    random = torch.Generator().manual_seed(number)
    classes = torch.tensor(([0], [1], [0, 1])[number % 3])
    corner = torch.randint(1, 6, (len(classes), 2), generator=random) + torch.stack([16 * classes, 6 + 0 * classes], 1)
    size = torch.randint(6, 10, (len(classes), 2), generator=random)
    image = 0.3 * torch.randn(3, SIDE, SIDE, generator=random)
    for kind, (x, y), (wide, high) in zip(classes.tolist(), corner.tolist(), size.tolist(), strict=True):
        image[2 * kind, y : y + high, x : x + wide] += 1
    return image, {"boxes": torch.cat([corner, corner + size], 1).float(), "classes": classes}


def collate(examples: list) -> tuple[Tensor, list[dict[str, Tensor]]]:
    return torch.stack([image for image, _ in examples]), [target for _, target in examples]


class Detector(nn.Module):
    """Images (B, 3, SIDE, SIDE) to (B, GRID², 1 + CLASSES + 4): of each cell a confidence, classes, and a box."""

    def __init__(self) -> None:
        super().__init__()
        names = ("3x3_MBConv3", "7x7_MBConv3")
        blocks = [{name: pf.candidate(name, *shape) for name in names} for shape in ((16, 24, 2), (24, 24, 1))]
        stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.layers = nn.Sequential(stem, *map(pf.MixedOp, blocks), nn.Conv2d(24, 5 + CLASSES, 1))
        y, x = torch.meshgrid(*[STRIDE * (torch.arange(GRID) + 0.5)] * 2, indexing="ij")
        self.register_buffer("centres", torch.stack([x, y], 2).reshape(GRID**2, 2))

    def forward(self, images: Tensor) -> Tensor:
        confidence, sides = self.layers(images).flatten(2).transpose(1, 2).split([1 + CLASSES, 4], 2)
        before, after = (STRIDE * softplus(sides)).chunk(2, 2)  # from a cell's centre to the box's corners
        return torch.cat([confidence, self.centres - before, self.centres + after], 2)


def step(net: nn.Module, batch: tuple) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and mean IoU of each object with the best of as many boxes as there are objects, the surest ones."""
    losses, overlaps = [], []
    for found, target in zip(net(batch[0]), batch[1], strict=True):
        confidence, classes, boxes = found[:, 0], found[:, 1 : 1 + CLASSES], found[:, -4:]
        centres = (target["boxes"][:, :2] + target["boxes"][:, 2:]) / 2
        cells = (centres // STRIDE).long() @ torch.tensor([1, GRID])
        surety = binary_cross_entropy_with_logits(confidence, torch.zeros(GRID**2).index_fill(0, cells, 1))
        place = generalized_box_iou_loss(boxes[cells], target["boxes"], reduction="mean")
        losses.append(surety + place + cross_entropy(classes[cells], target["classes"]))
        surest = boxes[confidence.topk(len(cells)).indices].detach()
        overlaps.append(box_iou(target["boxes"], surest).amax(1).mean())
    return torch.stack(losses).mean(), {"mean_iou": torch.stack(overlaps).mean()}


if __name__ == "__main__":
    torch.manual_seed(0)
    train, valid, test = (
        DataLoader([example(i) for i in range(start, start + count)], 16, shuffle=start == 0, collate_fn=collate)
        for start, count in ((0, 192), (1000, 96), (2000, 96))
    )
    config = pf.SearchConfig(epochs=8, warmup_epochs=2, lr=0.02, arch_every=2, arch_lr=0.05, accumulate=2)
    search = pf.Search(Detector(), train, valid, config, out=next(iter(sys.argv[1:]), None), step=step).fit()
    derived = pf.derive(search.net).eval()
    print({label: op.names[op.most_likely] for label, op in pf.mixed_ops(search.net).items()})
    scores = [step(derived, batch)[1]["mean_iou"] for batch in test]
    print(f"mean IoU {torch.stack(scores).mean():.3f} of the derived net")
