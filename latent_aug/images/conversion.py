"""Everything that pipelines call an image, as (B, C, H, W) floats, and back again.

The core of the package works on float batches in [0, 1]. Here PIL images, uint8 and float
tensors, single images and videos become such batches, and the results become what came in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import transforms, tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from latent_aug.flows import Flow
from latent_aug.images.orientation import exif_of, orientation_of

GREY_MODES = ("1", "L", "LA")  # of PIL
GREY_TOLERANCE = 8  # levels between the channels of a grey that JPEG may make
BEFORE_NORMALIZE = (
    "divide 8-bit values by 255; put the transform before Normalize, or pass normalize= with its "
    "mean and std"
)
WRONG_NORMALIZE = (
    "these are what undoing normalize= gives, so the images have been through another one, or none"
)
LOWEST, HIGHEST = -0.5, 1.5  # bicubic resizing overshoots [0, 1] by less than this
ERASED = 0.05  # of a normalized image's values: RandomErasing's noise puts less than this outside


def to_batch(image: Any, channels: int) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """An image of any kind as a float batch (B, channels, H, W), and the way back.

    The way back rounds to uint8 where the input was uint8 or PIL, and gives its dtype, shape,
    type and PIL mode. PIL images other than L, LA, RGB and RGBA come back in the flow's mode,
    with their alpha if they have one. They keep the orientation that is in their EXIF.

    Raises:
        ValueError: The channels are not the flow's.
        TypeError: The dtype or PIL mode cannot be read as an image in [0, 1].
    """
    if isinstance(image, Image.Image):
        return pil_to_batch(image, channels)
    if image.ndim < 3:
        raise ValueError(
            f"an image has the shape (..., C, H, W), got a tensor of shape {tuple(image.shape)}; "
            "the first plain tensor of a sample is taken as its image, so put images before "
            "labels, or wrap them in tv_tensors.Image"
        )
    if image.shape[-3] != channels:
        raise ValueError(
            f"the flow maps images of {channels} channels, got a tensor of {image.shape[-3]} "
            f"channels, shape {tuple(image.shape)}; channels come before height and width; "
            "convert it, or choose another flow"
        )
    pixels = image.as_subclass(Tensor)
    if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
        raise TypeError(
            f"images must be uint8 or floating point, got {pixels.dtype}; "
            "convert with v2.ToDtype(torch.float32, scale=True)"
        )

    def restore(batch: Tensor) -> Any:
        result = from_float(batch.reshape(pixels.shape), pixels.dtype)
        return tv_tensors.wrap(result, like=image) if is_tv_tensor(image) else result

    count = math.prod(pixels.shape[:-3])  # -1 would be ambiguous for an empty batch
    return to_float(pixels).reshape(count, *pixels.shape[-3:]), restore


def pil_to_batch(image: Image.Image, channels: int) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """A PIL image in the flow's mode as a batch of one; alpha is kept aside."""
    own, mode = image.mode, {1: "L", 3: "RGB"}.get(channels)
    if mode is None:
        raise ValueError(f"the flow maps images of {channels} channels, got a PIL image ({own})")
    check_mode(image)
    if mode == "L" and own not in GREY_MODES:
        raise ValueError(
            f"the flow maps images of 1 channel, got a PIL image of mode {own}; "
            "convert it with v2.Grayscale(), or choose a flow of 3 channels"
        )
    transparent = own in ("LA", "PA", "RGBA") or (own == "P" and "transparency" in image.info)
    alpha = image.convert("RGBA").getchannel("A") if transparent else None
    pixels, orientation = pil_to_uint8(image, mode), orientation_of(image)

    def restore(batch: Tensor) -> Image.Image:
        result: Image.Image = tvf.to_pil_image(from_float(batch[0], torch.uint8))
        if own in ("L", "LA"):
            result = result.convert("L")
        if alpha is not None:
            result.putalpha(alpha)
        result.info |= exif_of(orientation)
        return result

    return to_float(pixels)[None], restore


def pil_to_uint8(image: Image.Image, mode: str) -> Tensor:
    """A PIL image in another mode, as uint8 (C, H, W); alpha is left out."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # it has no direct way to RGB
    with torch.device("cpu"):  # torchvision's tensors follow the default device
        return tvf.pil_to_tensor(image.convert(mode))


def check_mode(image: Image.Image) -> None:
    """Refuse PIL images whose values have no fixed range: PIL would cut them off at 255.

    Raises:
        TypeError: Its mode is one of these.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise TypeError(
            f"PIL mode {image.mode} has no fixed range; scale the image's values to 8 bits and "
            "convert it to L or RGB"
        )


def has_colour(image: Image.Image) -> bool:
    """Whether greys would lose something: a PIL image may be stored in RGB and hold greys only."""
    if image.mode in GREY_MODES:
        return False
    with torch.device("cpu"):  # torchvision's tensors follow the default device
        pixels = tvf.pil_to_tensor(image.convert("RGB")).short()
    return bool((pixels.amax(dim=0) - pixels.amin(dim=0)).max() > GREY_TOLERANCE)


def is_tv_tensor(image: Any) -> bool:
    """Whether the type of a tensor must be given back to its result."""
    return isinstance(image, tv_tensors.TVTensor)


def to_float(pixels: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1]; float16 and bfloat16 to float32; float32 and float64 as is."""
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    return pixels if pixels.dtype in (torch.float32, torch.float64) else pixels.float()


def from_float(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo `to_float`: clamp and round to uint8, or cast."""
    if dtype == torch.uint8:
        return (x.clamp(0, 1) * 255).round().to(dtype)
    return x.to(dtype)


def check_range(x: Tensor, remedy: str = BEFORE_NORMALIZE, allowed: float = 0.0) -> None:
    """Refuse finite pixels far outside [0, 1]; each sample is judged alone, NaN ones pass.

    Args:
        x: Images (B, C, H, W).
        remedy: What to do about it, for the error.
        allowed: Share of a sample's values that may lie there.

    Raises:
        ValueError: More than that share of a sample is below -0.5 or above 1.5.
    """
    if x.numel() == 0:
        return
    low, high = x.flatten(1).aminmax(dim=1)
    finite = low.isfinite() & high.isfinite()
    far = finite & ((low < LOWEST) | (high > HIGHEST))
    if allowed and bool(far.any()):
        outside = ((x < LOWEST) | (x > HIGHEST)).flatten(1).float().mean(1)
        far &= outside > allowed
    if bool(far.any()):
        raise ValueError(
            f"images must lie in [0, 1], got values from {low[far].min():.3g} to "
            f"{high[far].max():.3g}; {remedy}"
        )


def fit_to_flow(x: Tensor, flow: Flow) -> Tensor:
    """Pad (replicate, right and bottom) to the flow's multiple.

    Raises:
        ValueError: The flow maps one size only, and x has another.
    """
    height, width = x.shape[-2:]
    if flow.size is not None and (height, width) != tuple(flow.size):
        raise ValueError(f"the flow maps images of size {flow.size} only, got {(height, width)}")
    below, right = -height % flow.multiple, -width % flow.multiple
    return F.pad(x, (0, right, 0, below), mode="replicate") if below or right else x


def in_unit_range(decoded: Tensor) -> Tensor:
    """Clamped to [0, 1]; what is infinite becomes NaN, so that its sample falls back later."""
    return torch.where(decoded.isfinite(), decoded.clamp(0, 1), math.nan)


def encoded(flow: Flow, x: Tensor, y: Tensor | None) -> Tensor:
    """Latents of images in [0, 1] of a size that the flow maps, whatever autocast is on.

    Raises:
        TypeError, ValueError: What the flow gives is no tensor of the images' shape.
    """
    name = f"{type(flow).__name__}.encode"
    with torch.autocast(x.device.type, enabled=False):  # in bfloat16 a flow is no inverse
        z = flow.encode(x, y)
    if not isinstance(z, Tensor):
        raise TypeError(f"{name} must return a tensor, got {type(z).__name__}")
    if z.shape != x.shape:
        raise ValueError(
            f"{name} must return latents of the images' shape {tuple(x.shape)}, got "
            f"{tuple(z.shape)}"
        )
    return z


def decoded(decode: Callable[..., Tensor], z: Tensor, y: Tensor | None) -> Tensor:
    """Images by a flow's `decode`, whatever autocast is on."""
    with torch.autocast(z.device.type, enabled=False):
        return decode(z, y)


def downscaled(x: Tensor, resolution: int | None) -> Tensor:
    """A copy whose shorter side has so many pixels; x itself where that is no less than it has."""
    height, width = x.shape[-2:]
    shorter = min(height, width)
    if resolution is None or shorter <= resolution:
        return x
    size = [max(1, round(side * resolution / shorter)) for side in (height, width)]
    return F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)


def add_difference(x: Tensor, small: Tensor, perturbed: Tensor) -> Tensor:
    """X changed as its downscaled copy `small` was: the difference, upsampled, is added."""
    difference = F.interpolate(perturbed - small, x.shape[-2:], mode="bicubic", align_corners=False)
    return x + difference


class Normalization:
    """Per-channel (x - mean) / std, as v2.Normalize does, and its inverse.

    Args:
        normalize: A v2.Normalize, a (mean, std) pair, or None for images in [0, 1].
        channels: Of the images.

    Raises:
        TypeError: It is something else.
        ValueError: The numbers are not finite, std is not above 0, or the count is wrong.
    """

    def __init__(self, normalize: Any, channels: int) -> None:
        self.mean_std: Tensor | None = None
        self._placed: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        if normalize is None:
            return
        if isinstance(normalize, (v2.Normalize, transforms.Normalize)):
            normalize = (normalize.mean, normalize.std)
        try:
            mean, std = (
                torch.as_tensor(v, dtype=torch.float64, device="cpu").reshape(-1) for v in normalize
            )
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                "normalize must be a v2.Normalize, a (mean, std) pair or None (of a timm config c: "
                f"(c['mean'], c['std'])), got {normalize!r}"
            ) from error
        for values in (mean, std):
            if len(values) not in (1, channels) or not bool(values.isfinite().all()):
                raise ValueError(
                    f"normalize needs finite values for mean and std, one each or one for each of "
                    f"the flow's {channels} channel(s), got {normalize!r}"
                )
        if not bool((std > 0).all()):
            raise ValueError(f"normalize needs a std above 0, got {normalize!r}")
        self.mean_std = torch.stack([mean.expand(channels), std.expand(channels)])

    def undo(self, x: Tensor) -> Tensor:
        """Normalized to [0, 1]."""
        if self.mean_std is None:
            return x
        mean, std = self._like(x)
        return x * std + mean

    def apply(self, x: Tensor) -> Tensor:
        """[0, 1] to normalized."""
        if self.mean_std is None:
            return x
        mean, std = self._like(x)
        return (x - mean) / std

    def __getstate__(self) -> dict[str, Any]:
        return {"mean_std": self.mean_std, "_placed": {}}  # an accelerator's stay in this process

    def _like(self, x: Tensor) -> Tensor:
        """Mean and std (2, C, 1, 1) on x's device, copied there once."""
        assert self.mean_std is not None
        key = (x.device, x.dtype)
        if key not in self._placed:
            self._placed[key] = self.mean_std.to(x)[..., None, None]
        return self._placed[key]


class FallbackCounter:
    """Counts samples that fell back to their original, on their device; read with `int`.

    Attributes:
        tried: Samples so far, until the first ones are judged; None then.
    """

    def __init__(self) -> None:
        self.counts: dict[torch.device, Tensor] = {}
        self.tried: int | None = 0

    def __getstate__(self) -> dict[str, Any]:  # an accelerator's counts stay in this process
        counts = {device: n for device, n in self.counts.items() if device.type == "cpu"}
        return {"counts": counts, "tried": self.tried}

    def add(self, count: Tensor) -> None:
        """Add a 0-d tensor without waiting for its device."""
        before = self.counts.get(count.device)
        self.counts[count.device] = count if before is None else before + count

    def __int__(self) -> int:
        return sum(int(count) for count in self.counts.values())
