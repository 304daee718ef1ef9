"""What the usual ImageNet recipes do beside the images' own augmentation: mixed batches, averaged weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..checks import told, unwrapped
from ..data.recipe import need_timm
from ..data.seeds import seeded
from ..supernet import arch_parameters

_MIX = 0x313C  # keeps these random streams apart from those of paths and batches


def mix_of(config: Any, net: nn.Module, loader: Any, ranks: Any) -> Mix | None:
    """The mixing that a config asks for, or None. Raises ValueError where nothing tells the number of classes."""
    if not (config.mixup or config.cutmix):
        return None
    classes = told(unwrapped(net), "num_classes") or told(loader, "num_classes")
    if classes is None:
        name = "mixup" if config.mixup else "cutmix"
        raise ValueError(
            f"{name}: got {getattr(config, name)}, expected it with a net or a loader that has num_classes"
        )
    return Mix(config.mixup, config.cutmix, classes, ranks.rank)


class Mix:
    """Mixup and cutmix of training batches, by timm: images of one batch in pairs, labels as probabilities.

    mixup, cutmix: their alphas, 0 for none; where both are given, each batch is mixed by one of them. What is drawn is
    a pure function of (seed, step, rank). Raises ImportError without timm.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int, rank: int = 0) -> None:
        self.rank, self.num_classes = rank, num_classes
        self._mix = need_timm("mixup").Mixup(mixup, cutmix, label_smoothing=0.0, num_classes=num_classes)

    def __call__(self, seed: int, step: int, batch: Any) -> tuple[Tensor, Tensor]:
        """(images, labels), mixed: float (B, C, H, W), and probabilities (B, classes) in the images' type.

        batch: images and labels, int64 (B,); it is left as it was. Of an odd one the last image stays as it is, since
        they are mixed in pairs.
        """
        images, labels = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
        shapes = [list(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in (images, labels)]
        if not (isinstance(images, Tensor) and isinstance(labels, Tensor) and images.dim() == 4 and labels.dim() == 1):
            raise ValueError(
                f"mixup: got a batch of {shapes[0]} and {shapes[1]}, expected images (B, C, H, W) and labels (B,)"
            )
        images, pairs = images.clone(), len(labels) // 2 * 2
        targets = torch.nn.functional.one_hot(labels, self.num_classes).to(images.dtype)
        if pairs:
            with seeded(_MIX, seed, step, self.rank):
                mixed, probabilities = self._mix(images[:pairs], labels[:pairs])
            images[:pairs], targets[:pairs] = mixed, probabilities.to(images.dtype)
        return images, targets


def average(net: nn.Module, decay: float) -> AveragedModel:
    """An exponential average of a net's weights and running statistics; `update_parameters(net)` after each step.

    Its `module` is the averaged net, and its state_dict all of its state: a run that goes on from it averages to the
    same bits.
    """
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


@torch.no_grad()
def take_average(net: nn.Module, averaged: nn.Module) -> None:
    """Gives a net the weights and running statistics of an average of it; alphas, masks and counts stay its own."""
    own = {id(alpha) for alpha in arch_parameters(net)}
    theirs = averaged.state_dict()
    for name, value in net.state_dict(keep_vars=True).items():
        if id(value) not in own and value.is_floating_point():
            value.copy_(theirs[name])
