"""What the usual ImageNet recipes do beside the images' own augmentation: mixed batches, averaged weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..data.recipe import need_timm
from ..data.seeds import seeded

_MIX = 0x313C  # keeps these random streams apart from those of paths and batches


class Mix:
    """Mixup and cutmix of training batches, by timm: images of one batch in pairs, labels as probabilities.

    mixup, cutmix: their alphas, 0 for none; where both are given, each batch is mixed by one of them. What is drawn is
    a pure function of (seed, step, rank). Raises ImportError without timm.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int, seed: int, rank: int = 0) -> None:
        self.seed, self.rank, self.num_classes = seed, rank, num_classes
        self._mix = need_timm("mixup").Mixup(mixup, cutmix, label_smoothing=0.0, num_classes=num_classes)

    def __call__(self, step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(images, labels), mixed: float (B, C, H, W), and probabilities (B, classes) in the images' type.

        labels: int64 (B,). The batch that came is left as it was. Of an odd one the last image stays as it is, since
        they are mixed in pairs.
        """
        if images.dim() != 4 or labels.dim() != 1:
            raise ValueError(
                f"mixup: got images of shape {tuple(images.shape)} and labels of shape {tuple(labels.shape)}, expected "
                "(B, C, H, W) and (B,)"
            )
        images, pairs = images.clone(), len(labels) // 2 * 2
        targets = torch.nn.functional.one_hot(labels, self.num_classes).to(images.dtype)
        if pairs:
            with seeded(_MIX, self.seed, step, self.rank):
                mixed, probabilities = self._mix(images[:pairs], labels[:pairs])
            images[:pairs], targets[:pairs] = mixed, probabilities.to(images.dtype)
        return images, targets


def average(net: nn.Module, decay: float) -> AveragedModel:
    """An exponential average of a net's weights and running statistics; `update_parameters(net)` after each step.

    Its `module` is the averaged net, and its state_dict all of its state: a run that goes on from it averages to the
    same bits.
    """
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
