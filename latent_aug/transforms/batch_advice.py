"""The advice to perturb whole batches, where a loader's worker perturbs one image after another."""

from __future__ import annotations

import mmap
import warnings
from typing import Any

from torch import Tensor
from torch.utils.data import get_worker_info

from latent_aug.flows.base import Flow

MOST_ADVISED_PIXELS = 32 * 32
"""Up to this size an image costs three to five times as much alone as in a batch."""

PATIENCE = 64  # images before a word

_seen = mmap.mmap(-1, 1)  # forked workers share it, so one of them speaks, and once


def advise_batches(image: Any, latents: Tensor, flow: Flow) -> None:
    """Warn once that batches are faster, if these are single small images in a loader's worker.

    Args:
        image: What the transform was given.
        latents: The latents (B, C, H, W) that it perturbs.
        flow: Their flow. One that was compiled for this size needs no advice.
    """
    is_batch = isinstance(image, Tensor) and image.ndim > 3
    if is_batch or latents[0, 0].numel() > MOST_ADVISED_PIXELS or _seen[0] > PATIENCE:
        return
    compiled = getattr(flow, "compiled_sizes", ())
    if get_worker_info() is None or tuple(latents.shape[2:]) in compiled:
        return
    _seen[0] += 1
    if _seen[0] > PATIENCE:
        warnings.warn(
            "a loader's worker perturbs small images one at a time, which takes three to five "
            "times as long as whole batches: take LatentPerturb out of the data set's transform, "
            "and pass collate_fn=LatentCollate(perturb) to the DataLoader",
            stacklevel=2,
        )
