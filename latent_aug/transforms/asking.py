"""How a user's model is asked for the logits of perturbed images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from latent_aug.images.conversion import to_float
from latent_aug.images.samples import replace_images, select_rows

Forward = Callable[[nn.Module, Any], Tensor]  # from a model and a batch to logits
Ask = Callable[[nn.Module, Tensor], Tensor]  # from a model and images to logits


def build_ask(forward: Forward | None, batch: Any, key: Any, chosen: Tensor | None = None) -> Ask:
    """Build the function that asks a model for the logits of images.

    Args:
        forward: The user's way to ask it, None for model(images). It alone is given a batch: this
            one with the images replaced, and without the rows that are not `chosen`.
        batch: The batch that the images are of.
        key: The place of the images in it.
        chosen: The indices (n,) of the samples that are asked about. None for all.
    """
    if forward is None:
        return lambda model, images: check_logits(model(images))
    part = batch if chosen is None else select_rows(batch, chosen, len(batch[key]))
    return lambda model, images: check_logits(forward(model, replace_images(part, key, images)))


def check_logits(logits: Any) -> Tensor:
    """Check what a model gave, and convert it to float32 at least.

    Raises:
        TypeError: It is no tensor.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"a tensor of logits is needed, got {type(logits).__name__}; pass a forward= that "
            "takes them out, e.g. lambda model, batch: model(batch[0]).logits, or "
            "model(**batch).logits for mappings"
        )
    return to_float(logits)
