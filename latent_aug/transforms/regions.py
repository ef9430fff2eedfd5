"""What of a latent may move: a region of the image, levels of the flow."""

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
    """A `mask` argument: a tensor, something that takes a sample to one, or None.

    Raises:
        TypeError: It is none of these.
        ValueError: The flow's latents know no places.
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
    """A `levels` argument as indices from 0, or None for all.

    Raises:
        TypeError, ValueError: It is not an integer or some, or the flow has no such level.
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


def pixels_of(mask: Mask, sample: Any, x: Tensor) -> Tensor | None:
    """The mask of a sample as (1 or B, 1, H, W) booleans for its images x (B, C, H, W).

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
        raise ValueError(f"mask must be (H, W), (B, H, W) or (B, 1, H, W), got {shape(found)}")
    pixels = found.reshape(-1, 1, *found.shape[-2:])
    if pixels.shape[-2:] != x.shape[-2:] or len(pixels) not in (1, len(x)):
        raise ValueError(
            f"mask must have the size of its images, {shape(x)} as (B, C, H, W), got "
            f"{shape(found)}; put the transform after what resizes or crops both"
        )
    if pixels.is_cpu and bool((pixels != pixels.bool()).any()):  # elsewhere a check is a sync
        low, high = (float(value) for value in pixels.aminmax())
        raise ValueError(
            f"mask must be of zeros and ones, got values from {low:.3g} to {high:.3g}; compare "
            "where it has others, e.g. mask == 0"
        )
    return pixels.bool().to(x.device, non_blocking=True)


def shrunk(pixels: Tensor | None, small: Tensor) -> Tensor | None:
    """A mask at a downscaled copy's size: a pixel is in it where any part of it is."""
    if pixels is None or pixels.shape[-2:] == small.shape[-2:]:
        return pixels
    return F.adaptive_max_pool2d(pixels.float(), small.shape[-2:]).bool()


def shape(t: Tensor) -> tuple[int, ...]:
    """For messages: without the word torch.Size."""
    return tuple(t.shape)


def movable(
    flow: Flow, like: Tensor, pixels: Tensor | None, levels: tuple[int, ...] | None
) -> Tensor | None:
    """Zeros and ones, broadcastable to latents: what both choices let move; None for all.

    Args:
        flow: Its latents have an image's shape, coarse levels spread over their pixels' place.
        like: A latent (B, C, H, W), or one of that shape.
        pixels: From `pixels_of`; padded here as the images are.
        levels: From `check_levels`.
    """
    result = None if levels is None else level_mask(flow, like, levels)
    if pixels is None:
        return result
    below, right = like.shape[-2] - pixels.shape[-2], like.shape[-1] - pixels.shape[-1]
    region = F.pad(pixels.to(like.dtype), (0, right, 0, below), mode="replicate")
    return region if result is None else region * result


def level_mask(flow: Flow, like: Tensor, levels: tuple[int, ...]) -> Tensor:
    """Ones where a latent (1, C, H, W) holds one of the levels, zeros elsewhere."""
    parts = flow.split_levels(torch.zeros_like(like[:1]))
    if len(parts) != flow.levels:
        raise ValueError(
            f"{type(flow).__name__} says it has {flow.levels} levels, but its split_levels gives "
            f"{len(parts)}"
        )
    return flow.join_levels(
        [torch.full_like(part, float(level in levels)) for level, part in enumerate(parts)]
    )
