"""A search whose losses are of a teacher's soft targets beside the labels, by a step of its own."""

import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils.data import DataLoader, TensorDataset

import proxyless_fast as pf

CLASSES, SIDE = 4, 16
TEMPERATURE, SOFT = 4.0, 0.7  # of the teacher's targets, and their share of the loss


def loader(images: int, seed: int) -> DataLoader:
    """Blobs of noise, brighter in one quarter than in the others."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (images,), generator=random)
    x = torch.randn(images, 3, SIDE, SIDE, generator=random)
    for quarter in range(CLASSES):
        top, left = SIDE // 2 * (quarter // 2), SIDE // 2 * (quarter % 2)
        x[labels == quarter, :, top : top + SIDE // 2, left : left + SIDE // 2] += 0.5
    return DataLoader(TensorDataset(x, labels), 32, shuffle=True, generator=random)


class Distillation:
    """The step: cross-entropy with labels, and the divergence from what a fixed teacher says of the same images."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher.eval().requires_grad_(False)

    def __call__(self, net: nn.Module, batch: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = batch
        logits, taught = net(images), self.teacher(images)
        soft = kl_div(
            log_softmax(logits / TEMPERATURE, 1),
            log_softmax(taught / TEMPERATURE, 1),
            reduction="batchmean",
            log_target=True,
        )
        loss = (1 - SOFT) * cross_entropy(logits, labels) + SOFT * TEMPERATURE**2 * soft
        chosen = logits.detach().argmax(1)
        # The first is the score, which REINFORCE takes for accuracy; the log has both.
        return loss, {
            "top1": (chosen == labels).double().mean(),
            "agreement": (chosen == taught.argmax(1)).double().mean(),
        }


def teacher_of(train: DataLoader) -> nn.Module:
    """A plain net, trained on the labels; usually it is one that is there already."""
    convolution = nn.Sequential(nn.Conv2d(3, 32, 5, 2, 2), nn.BatchNorm2d(32), nn.ReLU())
    net = nn.Sequential(convolution, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, CLASSES))
    return pf.search.train(net, train, pf.search.TrainConfig(epochs=5, lr=0.05))


if __name__ == "__main__":
    torch.manual_seed(0)
    train, valid, test = loader(320, 1), loader(160, 2), loader(160, 3)
    teacher = teacher_of(train)
    step = Distillation(teacher)
    net = pf.spaces.small(CLASSES, in_channels=3, resolution=SIDE, candidates=("3x3_MBConv3", "5x5_MBConv6"))
    config = pf.SearchConfig(epochs=4, warmup_epochs=2, lr=0.05, arch_every=2, arch_lr=0.05)
    search = pf.Search(net, train, valid, config, out=next(iter(sys.argv[1:]), None), step=step).fit()
    derived = pf.derive(search.net).eval()
    print({label: op.names[op.most_likely] for label, op in pf.mixed_ops(search.net).items()})
    with torch.no_grad():
        agreement = torch.stack([step(derived, batch)[1]["agreement"] for batch in test]).mean()
    accuracy = pf.search.evaluate(derived, test).top1
    taught = pf.search.evaluate(teacher, test).top1
    print(f"top-1 {accuracy:.1%} of the derived net, {taught:.1%} of the teacher; they agree on {agreement:.1%}")
