"""Restrict what of a latent may move: to a region of the image, to levels of the flow.

A user's `mask` marks pixels of an image. Checked and of the images' shape it is called a region.
With the levels it becomes a mask of the latent, as `transforms.functional` takes one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_aug.flows import Flow

Mask = Tensor | Callable[[Any], Tensor] | None
Levels = int | Sequence[int] | None


def check_mask(mask: Any, flow: Flow) -> Mask:
    """Check a `mask` argument: a tensor, a callable that takes a sample and returns one, or None.

    Raises:
        TypeError: It is none of these.
        ValueError: The flow's latents have no places that belong to the image's.
    """
    if mask is not None and not flow.spatial:
        raise ValueError(
            f"mask must be None with a {type(flow).__name__}: what moves in its latents moves "
            "anywhere in the image; use a Glow"
        )
    if mask is None or callable(mask) or isinstance(mask, Tensor):
        return mask
    raise TypeError(
        "mask must be a tensor (H, W), or a callable that takes the sample and returns one, "
        f"got {type(mask).__name__}"
    )


def check_levels(levels: Any, flow: Flow) -> tuple[int, ...] | None:
    """Convert a `levels` argument to indices from 0, or None for all.

    Raises:
        TypeError: It is neither an integer nor a list of integers.
        ValueError: The flow has no such level.
    """
    if levels is None:
        return None
    chosen = list(levels) if isinstance(levels, (tuple, list, range)) else [levels]
    if any(isinstance(level, bool) or not isinstance(level, Integral) for level in chosen):
        raise TypeError(f"levels must be an integer or a list of integers, got {levels!r}")
    if not chosen or any(not -flow.levels <= level < flow.levels for level in chosen):
        raise ValueError(
            f"levels must be among 0 (finest) to {flow.levels - 1} (coarsest) for this flow, "
            f"got {levels!r}"
        )
    return tuple(sorted({int(level) % flow.levels for level in chosen}))


def read_region(mask: Mask, sample: Any, x: Tensor, *, frames: int = 1) -> Tensor | None:
    """Read the mask of a sample as booleans (1 or B, 1, H, W).

    Args:
        mask: The mask, checked by `check_mask`.
        sample: The sample that a callable mask is given.
        x: Images (B, C, H, W), or a tensor of their shape and device. Of a video one frame.
        frames: The number of frames of each video.

    Raises:
        TypeError: The callable gave no tensor.
        ValueError: The mask's shape is not that of the images, or it is not of zeros and ones.
    """
    if mask is None:
        return None
    found = mask(sample) if callable(mask) else mask
    if not isinstance(found, Tensor):
        raise TypeError(
            f"mask must return a tensor (H, W), got {type(found).__name__}; wrap masks of a sample "
            "in tv_tensors.Mask"
        )
    found = found.as_subclass(Tensor)
    if not 2 <= found.ndim <= 4 or (found.ndim == 4 and found.shape[1] != 1):
        raise ValueError(
            f"mask must be (H, W), (B, H, W) or (B, 1, H, W), got {tuple(found.shape)}"
        )
    region = found.reshape(-1, 1, *found.shape[-2:])
    if frames > 1 and len(region) == frames * len(x) != len(x):
        raise ValueError(
            f"mask must be one (H, W) for all {frames} frames of a video, as they share their "
            f"noise, got {tuple(found.shape)}: for the places that any frame has return "
            "mask.amax(0)"
        )
    if region.shape[-2:] != x.shape[-2:] or len(region) not in (1, len(x)):
        raise ValueError(
            f"mask must have the size of its images, {tuple(x.shape)} as (B, C, H, W), got "
            f"{tuple(found.shape)}; put the transform after what resizes or crops both"
        )
    if region.is_cpu and bool((region != region.bool()).any()):  # elsewhere a check is a sync
        low, high = (float(value) for value in region.aminmax())
        raise ValueError(
            f"mask must be of zeros and ones, got values from {low:.3g} to {high:.3g}; compare "
            "where it has others, e.g. mask == 0"
        )
    return region.bool().to(x.device, non_blocking=True)


def build_mask(
    flow: Flow,
    z: Tensor,
    region: Tensor | None,
    levels: tuple[int, ...] | None,
    *,
    size: tuple[int, int] | None = None,
) -> Tensor | None:
    """Build the mask of a latent: zeros and ones that broadcast to it, or None if all may move.

    Args:
        flow: The flow of the latent, which spreads coarse levels over their pixels' place.
        z: The latent (B, C, H, W), or a tensor of its shape, dtype and device.
        region: The pixels that may move, by `read_region`. They are padded here as the images are.
        levels: The levels that may move, by `check_levels`.
        size: The size (H, W) of the image that was encoded, where that is a downscaled copy.
    """
    mask = None if levels is None else mark_levels(flow, z, levels)
    if region is None:
        return mask
    if size is not None and size != tuple(region.shape[-2:]):
        # A pixel of the copy may move where any part of it may.
        region = F.adaptive_max_pool2d(region.float(), size)
    below, right = z.shape[-2] - region.shape[-2], z.shape[-1] - region.shape[-1]
    padded = F.pad(region.to(z.dtype), (0, right, 0, below), mode="replicate")
    return padded if mask is None else padded * mask


def take_rows(region: Tensor | None, rows: Tensor) -> Tensor | None:
    """Take the rows of a region that belong to some images. One row that serves all stays."""
    return region if region is None or len(region) == 1 else region[rows]


def mark_levels(flow: Flow, z: Tensor, levels: tuple[int, ...]) -> Tensor:
    """Make a mask (1, C, H, W) of ones where a latent like z holds one of the levels."""
    parts = split_latent(flow, torch.zeros_like(z[:1]))
    return flow.join_levels(
        [torch.full_like(part, float(level in levels)) for level, part in enumerate(parts)]
    )


def split_latent(flow: Flow, z: Tensor) -> list[Tensor]:
    """Split a latent by a flow's `split_levels`.

    Raises:
        ValueError: It gives another number of levels than the flow says it has.
    """
    parts = flow.split_levels(z)
    if len(parts) != flow.levels:
        raise ValueError(
            f"{type(flow).__name__} says it has {flow.levels} levels, but its split_levels gives "
            f"{len(parts)}"
        )
    return parts
