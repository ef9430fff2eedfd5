"""Labels in the form that a class-conditional flow takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latent_aug.flows import Flow
from latent_aug.images.samples import LABEL_KEYS, find_labels


def read_labels(sample: Any, getter: Any) -> Any:
    """Read the labels of a sample or batch by a `labels_getter`. None where it has none."""
    if callable(getter):
        return getter(sample)
    return find_labels(sample)


@torch.no_grad()
def prepare_labels(flow: Flow, labels: Any, count: int, like: Tensor) -> Tensor | None:
    """Convert labels to the y of a flow's `encode` and `decode`. None if it is unconditional.

    Args:
        flow: The flow, which is conditional if its `num_classes` is above 0.
        labels: A class index or probabilities for one image, or for each: an integer, or a
            tensor (), (B,), (K,) or (B, K). One index serves several images of the same sample.
        count: The number of images.
        like: A tensor of the dtype and on the device that y needs.

    Raises:
        ValueError: The flow needs labels and there are none, or they do not fit.
    """
    if not flow.num_classes:
        return None
    if labels is None:
        raise ValueError(
            "a class-conditional flow needs the label beside the image: second in a tuple, or in "
            f"a mapping under one of {LABEL_KEYS}, or found by labels_getter=; a pipeline that "
            "sees images alone leaves it to LatentCollate or LatentLoader, which see labels too"
        )
    try:
        y = torch.as_tensor(labels, device=like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"labels must be class indices or probabilities, got {labels!r}"
        ) from error
    soft = y.is_floating_point()
    if y.ndim == (1 if soft else 0) and (not soft or count == 1):
        y = y[None]
    fits = y.shape[1:] == ((flow.num_classes,) if soft else ())
    if y.ndim < 1 or not fits or len(y) not in (1, count):
        raise ValueError(
            f"labels must be indices ({count},) or probabilities ({count}, {flow.num_classes}) "
            f"for a flow of {flow.num_classes} classes, got {y.dtype} of shape {tuple(y.shape)}"
        )
    if not soft and y.is_cpu and bool(((y < 0) | (y >= flow.num_classes)).any()):
        raise ValueError(
            f"labels must lie in 0 to {flow.num_classes - 1}, the flow's classes, got {y.tolist()}"
        )
    y = y.to(like.dtype) if soft else y.long()
    return y.expand(count, *y.shape[1:])
