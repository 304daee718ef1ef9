"""What a search needs before it starts: net, latency, data and processes that speak of the same images."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..checks import told, unwrapped
from ..distributed.ranks import Ranks, digest

FIELDS = ("in_channels", "resolution", "num_classes")


def share_out(loader: Any, ranks: Ranks, repeat: bool = True) -> None:
    """Loaders of this package give, from now on, each process its part of every batch; see their `shard`."""
    if ranks.several and hasattr(loader, "shard"):
        loader.shard(ranks.rank, ranks.size, repeat)


def global_batch(loader: Any, ranks: Ranks) -> int:
    """Images of a batch of all processes together. Raises ValueError where the loader does not say."""
    size = told(loader, "batch_size")
    if not isinstance(size, int):
        raise ValueError(
            f"lr_batch: got it with a {type(loader).__name__} that has no batch_size, expected one to scale by"
        )
    return size if hasattr(loader, "shard") else size * ranks.size


def require_own_batches(batch: Any, name: str, ranks: Ranks) -> None:
    """Raises ValueError where all processes have the very same batch: then none has its own part."""
    if ranks.several:
        found = ranks.gather(digest(leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)))
        if len(set(found)) == 1:
            raise ValueError(
                f"{name}: all {ranks.size} processes got the same batch, expected each its own part, as of torch's "
                "DistributedSampler"
            )


def require_agreement(net: nn.Module, loader: Any, name: str) -> None:
    """Raises ValueError where a loader says of its images or classes what the net says otherwise.

    net and loader are asked for in_channels, resolution and num_classes; what either does not tell cannot differ.
    """
    for field in FIELDS:
        ours, theirs = told(unwrapped(net), field), told(loader, field)
        if ours is not None and theirs is not None and ours != theirs:
            raise ValueError(f"{name}: the loader's {field} is {theirs}, expected the net's, {ours}")


def require_images(net: nn.Module, inputs: Any, name: str) -> None:
    """Raises ValueError where a batch of images is of other channels or another size than the net says."""
    channels, side = (told(unwrapped(net), field) for field in FIELDS[:2])
    if channels is None or side is None or not isinstance(inputs, Tensor) or inputs.dim() != 4:
        return
    if tuple(inputs.shape[1:]) != (channels, side, side):
        raise ValueError(
            f"{name}: the images have shape {tuple(inputs.shape[1:])}, expected {(channels, side, side)}, of which the "
            "net's latency is"
        )
