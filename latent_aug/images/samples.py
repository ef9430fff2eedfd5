"""Batches as users structure them: where images and labels are, and the same with other images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from os import PathLike
from typing import Any

from torch import Tensor

IMAGE_KEYS = ("pixel_values", "image", "images", "img")
LABEL_KEYS = ("labels", "label")


def image_key(batch: Any) -> Any:
    """Where a batch keeps its images: a key, or 0 for a tuple or list."""
    if isinstance(batch, Mapping):
        key = named_images(batch)
        if key is None:
            raise ValueError(
                f"a batch must have exactly one of the keys {IMAGE_KEYS}, got "
                f"{list(batch.keys())}; rename it, or call attack(images, labels)"
            )
        return key
    if not isinstance(batch, (tuple, list)) or not batch:
        raise TypeError(
            "batch must be a tuple or list (images, labels, ...) or a mapping, got "
            f"{type(batch).__name__}; images alone are for attack(images, labels)"
        )
    return 0


def named_images(mapping: Mapping[Any, Any]) -> str | None:
    """The one of `IMAGE_KEYS` that a mapping has; None where it has none or several.

    A file's name under one of them does not count, nor does the last beside another.
    """
    no_images = (str, PathLike, type(None))
    found = [k for k in IMAGE_KEYS if k in mapping and not isinstance(mapping[k], no_images)]
    if len(found) == 2 and found[1] == IMAGE_KEYS[-1]:
        return found[0]
    return found[0] if len(found) == 1 else None


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
    """A mapping of the type of another, with these items in place of its own.

    One that cannot be written to gives a dict.

    Raises:
        TypeError: A copy of it shares its items with it, so they cannot be replaced in one only.
    """
    if not isinstance(mapping, MutableMapping):
        return {**mapping, **items}
    before = {key: mapping[key] for key in items if key in mapping}
    result = copy.copy(mapping)
    for key, value in items.items():
        result[key] = value
    changed = [key for key in before if mapping[key] is items[key] is not before[key]]
    if changed:
        for key in changed:
            mapping[key] = before[key]
        raise TypeError(
            f"copy.copy of a {type(mapping).__name__} shares its items with it: give it a "
            "__copy__ that copies them too, or pass a dict"
        )
    return result


def is_one_each(value: Any, count: int) -> bool:
    """Whether it holds `count` things or rows, one for each sample."""
    shape = getattr(value, "shape", None)  # of tensors and arrays
    if shape is not None:
        return len(shape) > 0 and shape[0] == count
    return isinstance(value, (tuple, list)) and len(value) == count


def rows(batch: Any, chosen: Tensor, count: int) -> Any:
    """The chosen samples of a batch of `count`.

    Tensors and arrays of so many rows lose the others. So do lists and tuples of so many things,
    a thing for each sample, but for the batch itself, and for those of tensors with so many rows
    each, such as a pair of targets: these are structures. What is left as it is: everything of
    another length.

    Args:
        batch: Tensors, arrays and lists in a tuple, list or mapping.
        chosen: Indices (n,).
        count: Samples in the batch.
    """
    if not isinstance(batch, (tuple, list)) and is_one_each(batch, count):
        return rows_of(batch, chosen, count)  # also of a mapping: a TensorDict has rows
    if isinstance(batch, Mapping):
        return with_items(batch, {k: rows_of(v, chosen, count) for k, v in batch.items()})
    if isinstance(batch, (tuple, list)):
        return like_sequence(batch, [rows_of(value, chosen, count) for value in batch])
    return batch


def rows_of(value: Any, chosen: Tensor, count: int) -> Any:
    """The same for one entry of a batch, such as its labels."""
    if not is_one_each(value, count):
        return rows(value, chosen, count) if isinstance(value, (Mapping, tuple, list)) else value
    if isinstance(value, (tuple, list)):
        if all(hasattr(part, "shape") and is_one_each(part, count) for part in value):
            return rows(value, chosen, count)
        return like_sequence(value, [value[i] for i in chosen.tolist()])
    return value[chosen.to(value.device) if isinstance(value, Tensor) else chosen.cpu().numpy()]
