"""Training and evaluation of a plain net: what comes after the search."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..distributed.ranks import Ranks
from . import checkpoint
from .agreement import share_out
from .batches import epoch_batches
from .checkpoint import Checkpoints
from .config import WeightConfig, check_numbers
from .diagnose import require_finite, require_finite_gradients
from .optim import cosine_of, optimizer_of, set_lr
from .parts import to_device
from .recipe import mix_of
from .session import Session
from .steps import Backward, Measured, step_of
from .waiting import Waiting


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


class Training(Session):
    """The training of a plain net, in place, on the device it is on; `fit()` runs it.

    loader: sized iterable of (inputs, labels); its `set_epoch(n)` is called where there is one. config: TrainConfig.
    out: folder for train.jsonl, tensorboard/ and train-checkpoints/, without those of another training; None: nothing
    is written. checkpoints: when to save beside epochs' ends and stops. Raises ValueError for an empty loader or a used
    folder, and NonFiniteLoss where a loss or a gradient is NaN or infinite.
    """

    kind = "train"
    resumed_by = "Training.resume({out!r}, ...) or `proxyless-fast train --resume`"

    def __init__(
        self,
        net: nn.Module,
        loader: Any,
        config: TrainConfig | None = None,
        out: str | Path | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.net, self.loader = net, loader
        self.config = config = config or TrainConfig()
        self.ranks = ranks = Ranks.current()
        if len(loader) == 0:
            raise ValueError("loader: got 0 batches, expected at least one")
        self.parameters = list(net.parameters())
        self.device = self.parameters[0].device
        share_out(loader, ranks)
        ranks.broadcast(net)
        self.loss = step_of(None, None, None, config.label_smoothing)
        self.mix = mix_of(config, net, loader, ranks)
        self.backward = Backward(self.parameters, ranks, self.device, config.precision, config.accumulate)
        self.optimizer, self.schedule = optimizer_of(config, self.parameters), cosine_of(config, loader, ranks)
        super().__init__({"loader": loader}, config.epochs, out, checkpoints)

    def batches(self, epoch: int, position: int) -> Iterator[Any]:
        return self.waits.over(epoch_batches(self.loader, epoch, position, self.seed), "loader")

    def run_step(self, batch: Any, requests: Sequence[float]) -> list[float]:
        """One step of all weights."""
        lr = self.schedule(self.step, self.total_steps)
        set_lr(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        # The host waits for an accelerator only where the log does.
        self._looks = self.device.type == "cpu" or (self.step + 1) % self.config.log_every == 0
        if self.mix is not None:
            batch = self.mix(self.seed, self.step, to_device(batch, self.device))
        measured = self.backward(batch, self._forward, self.parameters, requests=requests)
        if self._looks and not self.backward.scaler.is_enabled():
            require_finite_gradients(self.net, self.parameters, self.step, "train")
        self.backward.update(self.optimizer, self.config.clip_norm)
        self.journal.add(self.step, "train", **measured, lr=lr)
        return self.backward.requested

    def _forward(self, batch: Any) -> tuple[Tensor, Measured]:
        loss, measured = self.loss(self.net, batch)
        if self._looks:
            require_finite(loss, self.net, batch, self.step, "train")
        return loss, {"loss": loss, **measured}

    def own_state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict()}

    def restore_own(self, state: Mapping[str, Any], path: Path) -> None:
        checkpoint.load_optimizer(self.optimizer, state["optimizer"], f"{path}: optimizer")

    @classmethod
    def resume(cls, out: str | Path, net: nn.Module, loader: Any, checkpoints: Checkpoints | None = None) -> "Training":
        """The training of a folder as its newest whole checkpoint left it; see `Search.resume`."""
        state, path = checkpoint.load(out, cls.kind)
        training = cls(net, loader, checkpoint.config_of(TrainConfig, state, path), None, checkpoints)
        training.restore(out, state, path)
        return training


def train(net: nn.Module, loader: Any, config: TrainConfig | None = None, log: str | Path | None = None) -> nn.Module:
    """Trains net in place, from the weights it has, on the device they are on; returns it.

    loader, config: as `Training` takes them. log: a JSON-lines file to write, with tensorboard/ beside it; what was in
    it is replaced. There are no checkpoints: for those, use `Training`.
    """
    training = Training(net, loader, config)
    if log is not None and training.ranks.first:
        training.journal.open(Path(log))
    try:
        training.fit()
    finally:
        training.journal.close()
    return net


@torch.no_grad()
def evaluate(net: nn.Module, loader: Any) -> Accuracy:
    """Top-1, top-5 and loss of net in evaluation mode; its mode is put back.

    loader: iterable of (inputs, labels). Of several processes each evaluates its part, and all have the whole's result.
    Raises ValueError without images, and NonFiniteLoss where a batch's loss is NaN or infinite.
    """
    device, ranks = next(net.parameters()).device, Ranks.current()
    share_out(loader, ranks, repeat=False)  # each image counts once
    was_training = net.training
    net.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    try:
        for batch, (inputs, labels) in enumerate(Waiting().over(loader)):
            inputs, labels = inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)
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
