"""Batch norms over the images of several processes: what each would have of the whole batch in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..ops.batch_norm import shared_batch_norm


class SyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose statistics, in training, are those of the images of all processes of a group.

    x (B, C, H, W), of any floating type and on any device, but tried on the CPU alone; B may differ by process. group:
    the name that torch.distributed gives a process group (`ProcessGroup.group_name`). All processes must call it,
    forward and backward, in one order. In evaluation, and without a group, it is nn.BatchNorm2d. nn.SyncBatchNorm
    runs on GPUs alone. Blocks of the package with such norms run fused on the CPU, as with plain ones.
    """

    group: str = ""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.group):
            return super().forward(x)
        self._check_input_dim(x)
        momentum: Any = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:  # torch's cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        return shared_batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, momentum, self.eps, self.group
        )


@contextmanager
def synchronised(net: nn.Module, group: str) -> Iterator[None]:
    """Within, every nn.BatchNorm2d of net has the statistics of all processes of a group; afterwards each is as it was.

    The very modules stay, and their tensors: optimizers and state dicts do not notice. Raises ValueError for batch
    norms of another kind, which would have the statistics of their own process alone.
    """
    for name, module in net.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module) is not nn.BatchNorm2d:
            raise ValueError(
                f"net: {name} is a {type(module).__name__}, expected nn.BatchNorm2d to share the statistics of"
            )
    norms = [module for module in net.modules() if type(module) is nn.BatchNorm2d]
    for norm in norms:
        norm.__class__ = SyncBatchNorm2d
        norm.group = group  # type: ignore[assignment]
    try:
        yield
    finally:
        for norm in norms:
            norm.__class__ = nn.BatchNorm2d
            del norm.group
