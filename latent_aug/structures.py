"""Batches as users structure them: where images and labels are, and the same with other images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

IMAGE_KEYS = ("pixel_values", "image", "images")
LABEL_KEYS = ("labels", "label")


def image_key(batch: Any) -> Any:
    """Where a batch keeps its images: a key, or 0 for a tuple or list."""
    if isinstance(batch, Mapping):
        found = [key for key in IMAGE_KEYS if key in batch]
        if len(found) != 1:
            raise ValueError(
                f"a batch must have one of the keys {IMAGE_KEYS}, got {list(batch.keys())}"
            )
        return found[0]
    if not isinstance(batch, (tuple, list)) or not batch:
        raise TypeError(f"batch must be a tuple, list or mapping, got {type(batch).__name__}")
    return 0


def find_labels(batch: Any) -> Any:
    """The labels of a sample or batch where they usually are; None where they are not."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in LABEL_KEYS if key in batch), None)
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None


def with_images(batch: Any, key: Any, images: Tensor) -> Any:
    """A container of the batch's type with other images; the batch itself stays."""
    if isinstance(batch, Mapping):
        return with_items(batch, {key: images})
    return like_sequence(batch, [images, *batch[1:]])


def like_sequence(sequence: Any, items: list[Any]) -> Any:
    """A tuple, named tuple or list of the type of another."""
    return type(sequence)(*items) if hasattr(sequence, "_fields") else type(sequence)(items)


def over_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A function on every tensor of nested tuples, lists and mappings; the rest stays."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return with_items(batch, {k: over_tensors(v, function) for k, v in batch.items()})
    if isinstance(batch, (tuple, list)):
        return like_sequence(batch, [over_tensors(value, function) for value in batch])
    return batch


def with_items(mapping: Any, items: Mapping[Any, Any]) -> Any:
    """A mapping of the type of another, with these items in place of its own."""
    result = copy.copy(mapping)
    for key, value in items.items():
        result[key] = value
    return result


def rows(batch: Any, chosen: Tensor, count: int) -> Any:
    """The chosen samples of a batch of `count`.

    Tensors of so many rows, and lists of so many things that are no containers themselves, lose
    the other samples; everything else stays.

    Args:
        batch: Tensors in nested tuples, lists and mappings.
        chosen: Indices (n,).
        count: Samples in the batch.
    """
    if isinstance(batch, Tensor):
        return batch[chosen.to(batch.device)] if batch.ndim and len(batch) == count else batch
    if isinstance(batch, Mapping):
        return with_items(batch, {k: rows(v, chosen, count) for k, v in batch.items()})
    if not isinstance(batch, (tuple, list)):
        return batch
    if len(batch) == count and not any(
        isinstance(v, (Tensor, Mapping, tuple, list)) for v in batch
    ):
        return like_sequence(batch, [batch[i] for i in chosen.tolist()])
    return like_sequence(batch, [rows(value, chosen, count) for value in batch])
