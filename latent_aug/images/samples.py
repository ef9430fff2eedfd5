"""Samples and batches as users structure them: find images and labels, replace, select rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from numbers import Number
from os import PathLike
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten  # as torchvision.transforms.v2 does
from torchvision import tv_tensors

IMAGE_KEYS = ("pixel_values", "image", "images", "img")
LABEL_KEYS = ("labels", "label")
MARKED = (Image.Image, tv_tensors.Image, tv_tensors.Video)  # images by their type alone


def get_image(sample: Any) -> Any:
    """Get the image of a sample, which is alone or first in a tuple."""
    return sample[0] if isinstance(sample, (tuple, list)) else sample


def get_image_key(batch: Any) -> Any:
    """Get the place of a batch's images: a key of a mapping, or 0 in a tuple or list.

    Raises:
        TypeError: The batch is of another type.
        ValueError: A mapping has its images under none or several of `IMAGE_KEYS`.
    """
    if isinstance(batch, Mapping):
        key = find_image_key(batch)
        if key is None:
            raise ValueError(
                f"a batch must have its images under exactly one of the keys {IMAGE_KEYS}, got "
                f"{list(batch.keys())}: rename the one that holds them"
            )
        return key
    if not isinstance(batch, (tuple, list)) or not batch:
        raise TypeError(
            "batch must be a tuple or list (images, labels, ...) or a mapping, got "
            f"{type(batch).__name__}"
        )
    return 0


def find_image_key(mapping: Mapping[Any, Any]) -> str | None:
    """Find the one of `IMAGE_KEYS` under which a mapping has its images.

    A file's name there does not count, nor does "img" beside another key. Several keys give None
    where all their values are images by type, so that none has to be chosen.

    Raises:
        ValueError: Several keys have values, and some are images by their key only.
    """
    no_images = (str, PathLike, type(None))
    found = [k for k in IMAGE_KEYS if k in mapping and not isinstance(mapping[k], no_images)]
    if len(found) == 2 and found[1] == "img":
        return found[0]
    if len(found) > 1 and not all(isinstance(mapping[key], MARKED) for key in found):
        raise ValueError(
            f"images must lie under one of the keys {IMAGE_KEYS}, got values under {found}: "
            "remove or rename those that the model does not see"
        )
    return found[0] if len(found) == 1 else None


def find_labels(batch: Any) -> Any:
    """Find the labels of a sample or batch at their usual place. None where there are none."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in LABEL_KEYS if key in batch), None)
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None


def replace_images(batch: Any, key: Any, images: Any) -> Any:
    """Make a container of the batch's type with other images. The batch itself stays."""
    if isinstance(batch, Mapping):
        return replace_items(batch, {key: images})
    return rebuild_sequence(batch, [images, *batch[1:]])


def rebuild_sequence(sequence: Any, items: list[Any]) -> Any:
    """Make a tuple, named tuple or list of the type of another."""
    return type(sequence)(*items) if hasattr(sequence, "_fields") else type(sequence)(items)


def replace_items(mapping: Any, items: Mapping[Any, Any]) -> Any:
    """Make a mapping of the type of another, with some other items.

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


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Call a function on every tensor of nested tuples, lists and mappings. The rest stays."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return replace_items(batch, {k: map_tensors(v, function) for k, v in batch.items()})
    if isinstance(batch, (tuple, list)):
        return rebuild_sequence(batch, [map_tensors(value, function) for value in batch])
    return batch


def flatten_structure(structure: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Flatten what torch's trees know, and mappings, tuples and lists of the user's own types.

    Returns:
        The leaves, and a function that makes the same structure of as many new ones.
    """
    nodes, spec = tree_flatten(structure)
    branches = [flatten_node(node) for node in nodes]

    def rebuild(leaves: list[Any]) -> Any:
        left = iter(leaves)
        return tree_unflatten([make([next(left) for _ in own]) for own, make in branches], spec)

    return [leaf for own, _ in branches for leaf in own], rebuild


def flatten_node(node: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Flatten a container whose type torch's trees do not know, or give the leaf that it is."""
    if isinstance(node, Mapping):
        keys = list(node)
        leaves, rebuild = flatten_structure([node[key] for key in keys])
        return leaves, lambda new: replace_items(node, dict(zip(keys, rebuild(new), strict=True)))
    if isinstance(node, (tuple, list)):
        leaves, rebuild = flatten_structure(list(node))
        return leaves, lambda new: rebuild_sequence(node, rebuild(new))
    return [node], lambda new: new[0]


def has_one_each(value: Any, count: int) -> bool:
    """Whether a value has `count` rows or entries, as one for each sample."""
    if isinstance(value, (tuple, list)):
        return len(value) == count
    return has_rows(value, count)


def has_rows(value: Any, count: int) -> bool:
    """Whether a tensor, an array or a mapping of such with a shape has `count` rows."""
    shape: Any = getattr(value, "shape", ())
    return len(shape) > 0 and shape[0] == count


def select_rows(batch: Any, chosen: Tensor, count: int) -> Any:
    """Select the chosen samples of a batch of `count`.

    Tensors and arrays of `count` rows lose the other rows. A tuple or list of `count` entries that
    `is_per_sample` loses the others' entries. The batch itself and other containers are structures:
    their entries are treated in the same way. All else belongs to the whole batch and stays.

    Args:
        batch: Tensors, arrays and lists in a tuple, list or mapping.
        chosen: The indices (n,) of the samples.
        count: The number of samples in the batch.
    """
    if isinstance(batch, (tuple, list)):
        return rebuild_sequence(batch, [select_entry(value, chosen, count) for value in batch])
    return select_entry(batch, chosen, count)


def select_entry(value: Any, chosen: Tensor, count: int) -> Any:
    """Select the chosen samples in one entry of a batch, such as its labels."""
    if has_rows(value, count):  # also of a mapping: a TensorDict has rows
        return value[chosen.to(value.device) if isinstance(value, Tensor) else chosen.cpu().numpy()]
    if isinstance(value, Mapping):
        items = {name: select_entry(entry, chosen, count) for name, entry in value.items()}
        return replace_items(value, items)
    if isinstance(value, (tuple, list)):
        if is_per_sample(value, count):
            return rebuild_sequence(value, [value[i] for i in chosen.tolist()])
        return rebuild_sequence(value, [select_entry(entry, chosen, count) for entry in value])
    return value


def is_per_sample(sequence: Any, count: int) -> bool:
    """Whether a tuple or list has an entry for each of `count` samples.

    Its length alone does not tell: (labels, other labels, share) may meet a batch of three. It is
    a structure if it is a named tuple, if its entries are of different kinds, or if all tensors in
    it have a row for each sample.
    """
    if len(sequence) != count or hasattr(sequence, "_fields"):
        return False
    if len({classify(entry) for entry in sequence if entry is not None}) > 1:
        return False
    arrays = list_arrays(sequence)
    return not arrays or not all(has_rows(array, count) for array in arrays)


def classify(entry: Any) -> str:
    """Name the kind of an entry. The entries of different samples are of one kind."""
    if isinstance(entry, Mapping):
        return "mapping"
    if isinstance(entry, (tuple, list)):
        return "sequence"
    if isinstance(entry, (str, bytes, PathLike)):
        return "text"
    if hasattr(entry, "shape"):
        return "array" if len(entry.shape) else "number"
    return "number" if isinstance(entry, Number) else "other"


def list_arrays(value: Any) -> list[Any]:
    """List the tensors and arrays with rows in nested tuples and lists."""
    if isinstance(value, (tuple, list)):
        return [array for entry in value for array in list_arrays(entry)]
    return [value] if classify(value) == "array" else []
