"""A batch of any structure, cut by images: tensors, and tuples, lists and dicts of them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def count_images(batch: Any) -> int:
    """Images of a batch: the first dimension of its first tensor. Raises ValueError where there is none."""
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    raise ValueError(f"batch: got a {type(batch).__name__} without a tensor of images, expected one")


def split_batch(batch: Any, parts: int) -> list[Any]:
    """At most `parts` batches of about equal size, in order; none is empty, unless the batch is.

    Tensors whose first dimension is the number of images are cut, as are lists of one item per image; all else is
    passed on to each part. Raises ValueError for a tensor of another first dimension.
    """
    images = count_images(batch)
    parts = max(1, min(parts, images))
    if parts == 1:
        return [batch]
    edges = [images * i // parts for i in range(parts + 1)]
    return [_cut(batch, images, slice(a, b)) for a, b in pairwise(edges)]


def _cut(value: Any, images: int, part: slice) -> Any:
    if isinstance(value, Tensor):
        if value.dim() and value.shape[0] != images:
            raise ValueError(f"batch: got a tensor of shape {tuple(value.shape)}, expected {images} images first")
        return value[part] if value.dim() else value
    if isinstance(value, dict):
        return {key: _cut(item, images, part) for key, item in value.items()}
    if isinstance(value, list) and len(value) == images and not all(_has_images(item, images) for item in value):
        return value[part]
    if isinstance(value, (list, tuple)):
        items = [_cut(item, images, part) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _has_images(item: Any, images: int) -> bool:
    return isinstance(item, Tensor) and item.dim() > 0 and item.shape[0] == images


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device; copies from pinned memory are not waited for."""
    return pytree.tree_map(lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf, batch)
