"""Training and evaluation of a plain net: what comes after the search."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..distributed.ranks import Ranks
from .agreement import is_repeated, share_out
from .batches import epoch_batches
from .config import WeightConfig, check_numbers
from .diagnose import require_finite, require_finite_gradients
from .journal import Journal
from .optim import cosine_of, optimizer_of, set_lr
from .progress import note, progress_bar, report_epoch
from .steps import Backward, Measured, shared_norms, step_of


@dataclass(frozen=True)
class TrainConfig(WeightConfig):
    """Settings of the training of a derived net, of `WeightConfig` too; the defaults are the official ImageNet ones.

    epochs: passes over the images. log_every: steps between writes of the log. Raises ValueError on construction, with
    one sentence that names the field, its value and what was expected.
    """

    epochs: int = 150
    log_every: int = 10

    def __post_init__(self) -> None:
        self._check_weights()
        check_numbers(self, {"epochs": 0, "log_every": 1}, (), (), ())


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
    config, ranks = config or TrainConfig(), Ranks.current()
    if len(loader) == 0:
        raise ValueError("loader: got 0 batches, expected at least one")
    parameters = list(net.parameters())
    device = parameters[0].device
    share_out(loader, ranks)
    ranks.broadcast(net)
    loss_of = step_of(None, None, None, config.label_smoothing)
    backward = Backward(parameters, ranks, device, config.precision, config.accumulate)
    optimizer, schedule = optimizer_of(config, parameters), cosine_of(config, loader, ranks)
    journal = Journal(None if log is None or not ranks.first else Path(log), mean=ranks.mean)
    step, total = 0, config.epochs * len(loader)
    progress, task = progress_bar("train", total, shown=ranks.first)
    net.train()

    def forward(batch: Any) -> tuple[Tensor, Measured]:
        loss, measured = loss_of(net, batch)
        if looks:
            require_finite(loss, net, batch, step, "train")
        return loss, {"loss": loss, **measured}

    try:
        with progress, shared_norms(net, ranks, config.sync_norm):
            for epoch in range(config.epochs):
                for batch in epoch_batches(loader, epoch):
                    lr = schedule(step, total)
                    set_lr(optimizer, lr)
                    optimizer.zero_grad(set_to_none=True)
                    logged = (step + 1) % config.log_every == 0
                    looks = logged or device.type == "cpu"  # the host waits for an accelerator only where the log does
                    measured = backward(batch, forward, parameters)
                    if looks and not backward.scaler.is_enabled():
                        require_finite_gradients(net, parameters, step, "train")
                    backward.update(optimizer, config.clip_norm)
                    journal.add(step, "train", **measured, lr=lr)
                    step += 1
                    if logged:
                        progress.update(task, completed=step, note=note(journal.flush()))
                means = {"epoch": epoch, **journal.close_epoch()}
                journal.write(step - 1, "epoch", means)
                if ranks.first:
                    report_epoch(means, config.epochs)
    finally:
        journal.close()
    return net


@torch.no_grad()
def evaluate(net: nn.Module, loader: Any) -> Accuracy:
    """Top-1, top-5 and loss of net in evaluation mode; its mode is put back.

    loader: iterable of (inputs, labels). Of several processes each evaluates its part, and all have the whole's result.
    Raises ValueError without images, and NonFiniteLoss where a batch's loss is NaN or infinite.
    """
    device, ranks = next(net.parameters()).device, Ranks.current()
    share_out(loader, ranks)
    was_training = net.training
    net.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    try:
        for batch, (inputs, labels) in enumerate(loader):
            inputs, labels = inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            if is_repeated(loader, batch, ranks):
                continue
            logits = net(inputs).float()
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            loss = cross_entropy(logits, labels, reduction="sum")
            require_finite(loss, net, (inputs, labels), batch, "evaluation")
            sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss, loss.new_tensor(len(labels))]).double().cpu()
    finally:
        net.train(was_training)
    *totals, images = ranks.start_sum(sums.tolist()).wait()
    if images == 0:
        raise ValueError("loader: got no images, expected at least one")
    top1, top5, loss_mean = (total / images for total in totals)
    return Accuracy(top1, top5, loss_mean, int(images))
