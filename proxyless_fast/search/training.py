"""Training and evaluation of a plain net: what comes after the search."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .agreement import require_one_process
from .batches import epoch_batches
from .config import check_numbers
from .diagnose import require_finite, require_finite_gradients
from .journal import Journal
from .optim import set_cosine_lr, sgd
from .progress import note, progress_bar, report_epoch


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the training of a derived net; the defaults are the official ImageNet ones (batches of 256).

    SGD with Nesterov momentum, cosine from lr to 0 over all epochs, no decay of vectors (batch norms and biases).
    Raises ValueError on construction, with one sentence that names the field, its value and what was expected.
    """

    epochs: int = 150
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 4e-5
    label_smoothing: float = 0.1
    log_every: int = 10

    def __post_init__(self) -> None:
        check_numbers(self, {"epochs": 0, "log_every": 1}, ("lr",), ("weight_decay",), ("momentum", "label_smoothing"))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Accuracy:
    """Fractions of images whose label is the largest, or one of the five largest, of the logits; mean cross-entropy."""

    top1: float
    top5: float
    loss: float
    images: int


def train(net: nn.Module, loader: Any, config: TrainConfig | None = None, log: str | Path | None = None) -> nn.Module:
    """Trains net in place, from the weights it has, on the device they are on; returns it.

    loader: sized iterable of (inputs, labels); its `set_epoch(n)` is called where there is one. log: a JSON-lines file
    to write, with tensorboard/ beside it. Raises ValueError for an empty loader, and NonFiniteLoss where the loss is
    NaN or infinite.
    """
    require_one_process()
    config = config or TrainConfig()
    if len(loader) == 0:
        raise ValueError("loader: got 0 batches, expected at least one")
    parameters = list(net.parameters())
    device = parameters[0].device
    optimizer = sgd(parameters, config.lr, config.momentum, config.weight_decay)
    journal = Journal(None if log is None else Path(log))
    step, total = 0, config.epochs * len(loader)
    progress, task = progress_bar("train", total)
    net.train()
    try:
        with progress:
            for epoch in range(config.epochs):
                for inputs, labels in epoch_batches(loader, epoch):
                    inputs, labels = inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                    lr = set_cosine_lr(optimizer, config.lr, step, total)
                    optimizer.zero_grad(set_to_none=True)
                    logits = net(inputs)
                    loss = cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
                    logged = (step + 1) % config.log_every == 0
                    looks = logged or device.type == "cpu"  # the host waits for an accelerator only where the log does
                    if looks:
                        require_finite(loss, net, inputs, labels, step, "train")
                    loss.backward()
                    if looks:
                        require_finite_gradients(net, parameters, step, "train")
                    optimizer.step()
                    top1 = (logits.detach().argmax(1) == labels).float().mean()
                    journal.add(step, "train", loss=loss, top1=top1, lr=lr)
                    step += 1
                    if logged:
                        progress.update(task, completed=step, note=note(journal.flush()))
                means = {"epoch": epoch, **journal.close_epoch()}
                journal.write(step - 1, "epoch", means)
                report_epoch(means, config.epochs)
    finally:
        journal.close()
    return net


@torch.no_grad()
def evaluate(net: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> Accuracy:
    """Top-1, top-5 and loss of net in evaluation mode; its mode is put back.

    Raises ValueError without images, and NonFiniteLoss where a batch's loss is NaN or infinite.
    """
    device = next(net.parameters()).device
    was_training = net.training
    net.eval()
    sums, images = torch.zeros(3, dtype=torch.float64), 0
    try:
        for batch, (inputs, labels) in enumerate(loader):
            inputs, labels = inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            logits = net(inputs).float()
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            loss = cross_entropy(logits, labels, reduction="sum")
            require_finite(loss, net, inputs, labels, batch, "evaluation")
            sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss]).double().cpu()
            images += len(labels)
    finally:
        net.train(was_training)
    if images == 0:
        raise ValueError("loader: got no images, expected at least one")
    top1, top5, loss_mean = (sums / images).tolist()
    return Accuracy(top1, top5, loss_mean, images)
