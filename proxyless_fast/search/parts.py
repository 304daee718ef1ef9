"""A batch of any structure, cut by images: tensors, and tuples, lists and dicts of them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def count_images(batch: Any) -> int:
    """Images of a batch: the first dimension of its first tensor. Raises ValueError where there is none."""
    return _images(batch).shape[0]


def split_batch(batch: Any, parts: int) -> list[Any]:
    """At most `parts` batches of about equal size, in order; none is empty, unless the batch is.

    Tensors whose first dimension is the number of images are cut, as are lists of one item per image; all else is
    passed on to each part. A batch is left whole where a list of as many tensors as images could be either one of an
    item per image or one of tensors to be cut. Raises ValueError for a tensor of another first dimension.
    """
    first = _images(batch)
    images = len(first)
    parts = max(1, min(parts, images))
    edges = [images * i // parts for i in range(parts + 1)]
    try:
        return [batch] if parts == 1 else [_cut(batch, first, slice(a, b)) for a, b in pairwise(edges)]
    except _EitherWay:
        return [batch]


class _EitherWay(Exception):
    """A list can be cut in two ways."""


def _images(batch: Any) -> Tensor:
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf
    raise ValueError(f"batch: got a {type(batch).__name__} without a tensor of images, expected one")


def _cut(value: Any, first: Tensor, part: slice) -> Any:
    images = len(first)
    if isinstance(value, Tensor):
        if value.dim() and value.shape[0] != images:
            raise ValueError(f"batch: got a tensor of shape {tuple(value.shape)}, expected {images} images first")
        return value[part] if value.dim() else value
    if isinstance(value, dict):
        return {key: _cut(item, first, part) for key, item in value.items()}
    if isinstance(value, list) and len(value) == images and not _holds(value, first):
        if all(isinstance(item, Tensor) and item.dim() and len(item) == images for item in value):
            raise _EitherWay
        return value[part]
    if isinstance(value, (list, tuple)):
        items = [_cut(item, first, part) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _holds(value: list, first: Tensor) -> bool:
    """Whether a list is the batch that holds the images, and none of an item per image."""
    return any(leaf is first for leaf in pytree.tree_leaves(value))


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device; copies from pinned memory are not waited for."""
    return pytree.tree_map(lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf, batch)
