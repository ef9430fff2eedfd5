"""What an attack asks of images, labels and users' functions, and what it says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latent_aug.images.conversion import advise_conversion
from latent_aug.images.samples import LABEL_KEYS

MAKE_TENSOR = "make a tensor of them, as torch.as_tensor(labels)"


def check_images(images: Any, channels: int) -> None:
    """Refuse images that an attack cannot work on.

    Args:
        images: The images of a batch.
        channels: The channels of the flow.

    Raises:
        RuntimeError: There are no gradients here.
        TypeError: They are integers.
        ValueError: They are no tensor (B, C, H, W), or have other channels.
    """
    if not isinstance(images, Tensor) or images.ndim != 4:
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"images must be a tensor (B, C, H, W), got {found}; call it as "
            "attack(images, labels), or attack.step(batch) with (images, labels) or a mapping, "
            "in the training step"
        )
    if not images.is_floating_point():
        raise TypeError(
            f"images must be floating point, as the model takes them, got {images.dtype}; "
            f"{advise_conversion(images.dtype)}"
        )
    if images.shape[1] != channels:
        raise ValueError(
            f"the flow maps images of {channels} channels, got {images.shape[1]}, "
            f"shape {tuple(images.shape)}; channels come before height and width; convert "
            "them, or pass flow= one of as many: 'glow-fashionmnist' of 1, 'glow-photographs' "
            "of 3"
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError("an attack needs gradients: call it outside torch.inference_mode()")


def check_labels(labels: Any, count: int, *, anything: bool) -> None:
    """Refuse labels that are not those of `count` images.

    Args:
        labels: The labels of a batch.
        count: The number of its images.
        anything: Accept what is no tensor, as a loss of the user's may.

    Raises:
        ValueError: There are none, or they are another number.
    """
    if labels is None:
        raise ValueError(
            "labels='true' needs labels: second in a tuple, or in a mapping under one of "
            f"{LABEL_KEYS}; name them with labels_getter= otherwise, or call "
            "attack(images, labels)"
        )
    if anything and not isinstance(labels, Tensor):
        return
    if not isinstance(labels, Tensor) or labels.ndim < 1 or len(labels) != count:
        second = "if they are not second in the batch, name labels_getter="
        raise ValueError(
            f"labels must be a tensor of {count} entries, got {describe_labels(labels)}; "
            f"{MAKE_TENSOR if is_listed(labels) else second}"
        )


def describe_labels(labels: Any) -> str:
    """Say in words what came as labels."""
    return str(tuple(labels.shape)) if isinstance(labels, Tensor) else type(labels).__name__


def is_listed(labels: Any) -> bool:
    """Whether labels are numbers in a list, a tuple or an array, which a tensor can be made of."""
    if isinstance(labels, (list, tuple)):
        return len(labels) > 0 and all(isinstance(label, Real) for label in labels)
    return isinstance(labels, np.ndarray)


def map_images(name: str, function: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """Call a user's function on images, and check what it gives.

    Args:
        name: The argument that the function is, for messages.
        function: Takes images (B, C, H, W).
        images: The images.

    Raises:
        TypeError: It is no function, or gives no tensor of floats.
        ValueError: It gives a tensor of another shape.
    """
    if not callable(function):
        raise TypeError(f"{name} must be callable or None, got {function!r}")
    with torch.no_grad():
        result = function(images)
    if not isinstance(result, Tensor):
        raise TypeError(f"{name} must give a tensor of images, got {type(result).__name__}")
    if not result.is_floating_point():
        raise TypeError(f"{name} must give floats in the range of its images, got {result.dtype}")
    if result.shape != images.shape:
        raise ValueError(
            f"{name} must give images of the shape {tuple(images.shape)} of its own, got "
            f"{tuple(result.shape)}"
        )
    return result.detach().as_subclass(Tensor).to(images)
