"""Convert everything that pipelines call an image to float batches (B, C, H, W), and back.

The core of the package works on float batches in [0, 1]. Here PIL images, uint8 and float
tensors, single images and videos become such batches, and the results become what came in.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms, tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from latent_aug.flows import Flow
from latent_aug.images.orientation import make_exif, read_orientation

GREY_MODES = ("1", "L", "LA", "La")  # of PIL
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
PIL_MODES = {1: "L", 3: "RGB"}  # by a flow's channels
GREY_TOLERANCE = 8  # levels between the channels of a grey that JPEG may make
BEFORE_NORMALIZE = (
    "divide 8-bit values by 255; put the transform before Normalize, or pass normalize= with its "
    "mean and std"
)
WRONG_NORMALIZE = (
    "these are what undoing normalize= gives, so the images have been through another one, or none"
)
LOWEST_PIXEL, HIGHEST_PIXEL = -0.5, 1.5  # bicubic resizing overshoots [0, 1] by less than this
ERASED = 0.05  # share of a normalized image's values that RandomErasing may put outside


def to_batch(image: Any, channels: int) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Convert an image of any kind to a float batch (B, channels, H, W).

    The second result is a function that takes such a batch back to what came in: its dtype, shape,
    type, attributes and PIL mode. It rounds where the input was uint8 or PIL. PIL images other than
    L, LA, RGB, RGBA and the last two with premultiplied alpha come back in the flow's mode, with
    their alpha if they have one. In L and RGB the pixels of a transparent colour stay as they are.
    They keep the orientation that is in their EXIF.

    Raises:
        ValueError: The channels are not the flow's.
        TypeError: The dtype or PIL mode cannot be read as an image in [0, 1].
    """
    check_image(image, channels)
    if isinstance(image, Image.Image):
        return pil_to_batch(image, channels)
    pixels = image.as_subclass(Tensor)

    def restore(batch: Tensor) -> Any:
        return wrap_like(from_float(batch.reshape(pixels.shape), pixels.dtype), image)

    return to_float(pixels).reshape(batch_shape(pixels)), restore


def make_stand_in(image: Any, channels: int) -> Tensor:
    """Make an empty tensor of the shape, dtype and device that `to_batch` would give.

    It takes no memory, and the image is not read: for drawing noise before anything is converted.

    Raises:
        ValueError, TypeError: As `to_batch`.
    """
    check_image(image, channels)
    if isinstance(image, Image.Image):
        pixel = torch.empty((), dtype=torch.float32, device="cpu")
        return pixel.expand(1, channels, image.height, image.width)
    pixel = to_float(image.as_subclass(Tensor).new_empty(()))
    return pixel.expand(batch_shape(image))


def select_shown_channels(images: Tensor) -> Tensor:
    """Select the channels of images (..., C, H, W) that a picture shows: three, or else one."""
    return images[..., : 3 if images.shape[-3] >= 3 else 1, :, :]


def batch_shape(pixels: Tensor) -> tuple[int, ...]:
    """(B, C, H, W) of a tensor (..., C, H, W)."""
    count = math.prod(pixels.shape[:-3])  # -1 would be ambiguous for an empty batch
    return (count, *pixels.shape[-3:])


def check_image(image: Any, channels: int) -> None:
    """Refuse what a flow of so many channels cannot take, as `to_batch` says."""
    if isinstance(image, Image.Image):
        check_pil(image, channels)
        return
    if not isinstance(image, Tensor):
        raise TypeError(
            f"an image must be a PIL image or a tensor, got {type(image).__name__}: put "
            "v2.ToImage() before for NumPy arrays"
        )
    check_dimensions(image)
    if image.shape[-3] != channels:
        raise ValueError(
            f"the flow maps images of {channels} channels, got a tensor of {image.shape[-3]} "
            f"channels, shape {tuple(image.shape)}; channels come before height and width; "
            "convert it, or choose another flow"
        )
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(
            f"images must be uint8 or floating point, got {image.dtype}; "
            f"{advise_conversion(image.dtype)}"
        )


def check_dimensions(image: Tensor) -> None:
    """Refuse a tensor of fewer than three dimensions."""
    if image.ndim < 3:
        raise ValueError(
            f"an image has the shape (..., C, H, W), got a tensor of shape {tuple(image.shape)}; "
            "the first plain tensor of a sample is taken as its image, so put images before "
            "labels, or wrap them in tv_tensors.Image"
        )


def advise_conversion(dtype: torch.dtype) -> str:
    """Say how images of a dtype become floating point in [0, 1], as the end of a message."""
    if dtype in (torch.uint8, torch.uint16):
        return "convert them with v2.ToDtype(torch.float32, scale=True)"
    if dtype == torch.bool:
        return "convert them with .float()"
    return "divide them by their greatest possible value: for 8-bit values images.float() / 255"


def check_pil(image: Image.Image, channels: int) -> None:
    """Refuse a PIL image that a flow of so many channels cannot take."""
    if channels not in PIL_MODES:
        raise ValueError(
            f"the flow maps images of {channels} channels, got a PIL image ({image.mode}): pass a "
            "tensor, or choose a flow of 1 or 3 channels"
        )
    check_mode(image)
    if channels == 1 and image.mode not in GREY_MODES:
        raise ValueError(
            f"the flow maps images of 1 channel, got a PIL image of mode {image.mode}; "
            "convert it with v2.Grayscale(), or choose a flow of 3 channels"
        )


def pil_to_batch(image: Image.Image, channels: int) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Convert a PIL image to a batch of one, and keep its alpha aside."""
    own, orientation = image.mode, read_orientation(image)
    image = convert_premultiplied(image)
    alpha = read_alpha(image)
    has_key = alpha is not None and own in ("L", "RGB")
    pixels = pil_to_uint8(image, PIL_MODES[channels])

    def restore(batch: Tensor) -> Image.Image:
        result: Image.Image = tvf.to_pil_image(from_float(batch[0], torch.uint8))
        if own in ("L", "LA", "La"):
            result = result.convert("L")
        if has_key:
            result = keep_key(result, image)
        elif alpha is not None:
            result.putalpha(alpha)
        if own in PREMULTIPLIED:
            result = result.convert(own)
        result.info |= make_exif(orientation)
        return result

    return to_float(pixels)[None], restore


def convert_premultiplied(image: Image.Image) -> Image.Image:
    """Convert a PIL image whose colours are multiplied by its alpha to one where they are not."""
    return image.convert(PREMULTIPLIED.get(image.mode, image.mode))


def read_alpha(image: Image.Image) -> Image.Image | None:
    """Read the alpha of a PIL image: a channel, a palette's, or a transparent colour's."""
    palette = image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")
    if image.mode in ("LA", "PA", "RGBA") or palette or "transparency" in image.info:
        return image.convert("RGBA").getchannel("A")
    return None


def keep_key(result: Image.Image, image: Image.Image) -> Image.Image:
    """Keep the pixels of an image's transparent colour, and this colour to them."""
    before, after = pil_to_uint8(image, image.mode), pil_to_uint8(result, image.mode)
    result.info["transparency"] = image.info["transparency"]
    clear, hit = (tvf.pil_to_tensor(i.convert("RGBA"))[3:] == 0 for i in (image, result))
    after = torch.where(hit, after ^ 1, after)  # one level beside it
    kept: Image.Image = tvf.to_pil_image(torch.where(clear, before, after))
    kept.info["transparency"] = image.info["transparency"]
    return kept


def pil_to_uint8(image: Image.Image, mode: str) -> Tensor:
    """Convert a PIL image to another mode, as uint8 (C, H, W) without alpha."""
    image = convert_premultiplied(image)
    if image.mode == "P" and read_alpha(image) is not None:
        image = image.convert("RGBA")  # it has no direct way to RGB
    with torch.device("cpu"):  # torchvision's tensors follow the default device
        return tvf.pil_to_tensor(image.convert(mode))


def check_mode(image: Image.Image) -> None:
    """Refuse PIL images whose values have no fixed range: PIL would cut them off at 255.

    Raises:
        TypeError: The image is of such a mode, "I" or "F".
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise TypeError(
            f"PIL mode {image.mode} has no fixed range; scale the image's values to 8 bits and "
            "convert it to L or RGB"
        )


def has_colour(image: Image.Image) -> bool:
    """Whether a PIL image loses something as a grey one. An RGB image may hold greys only."""
    if image.mode in GREY_MODES:
        return False
    pixels = pil_to_uint8(image, "RGB").short()
    return bool((pixels.amax(dim=0) - pixels.amin(dim=0)).max() > GREY_TOLERANCE)


def is_tv_tensor(image: Any) -> bool:
    """Whether a tensor is of a type of torchvision's."""
    return isinstance(image, tv_tensors.TVTensor)


def wrap_like(result: Tensor, image: Tensor) -> Tensor:
    """Give a tensor the type of an image, a subclass of Tensor, and copies of its attributes."""
    kind = type(image)
    if kind in (Tensor, nn.Parameter):
        return result
    wrapped = result.as_subclass(kind)
    wrapped.__dict__.update({name: copy.copy(value) for name, value in vars(image).items()})
    return wrapped


def to_float(pixels: Tensor) -> Tensor:
    """Convert uint8 to float32 in [0, 1], float16 and bfloat16 to float32. The rest stays."""
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    return pixels if pixels.dtype in (torch.float32, torch.float64) else pixels.float()


def from_float(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo `to_float`: clamp and round to uint8, or cast."""
    if dtype == torch.uint8:
        return (x.clamp(0, 1) * 255).round().to(dtype)
    return x.to(dtype)


def check_range(x: Tensor, remedy: str = BEFORE_NORMALIZE, allowed: float = 0.0) -> None:
    """Refuse images with pixels far outside [0, 1].

    Each sample is judged alone. One with NaN or infinite values passes.

    Args:
        x: Images (B, C, H, W).
        remedy: The end of the error's message: how to get images in range.
        allowed: The share of a sample's values that may lie outside.

    Raises:
        ValueError: More than that share of a sample is below -0.5 or above 1.5.
    """
    if x.numel() == 0:
        return
    low, high = x.flatten(1).aminmax(dim=1)
    finite = low.isfinite() & high.isfinite()
    far = finite & ((low < LOWEST_PIXEL) | (high > HIGHEST_PIXEL))
    if allowed and bool(far.any()):
        outside = ((x < LOWEST_PIXEL) | (x > HIGHEST_PIXEL)).flatten(1).float().mean(1)
        far &= outside > allowed
    if bool(far.any()):
        raise ValueError(
            f"images must lie in [0, 1], got values from {low[far].min():.3g} to "
            f"{high[far].max():.3g}; {remedy}"
        )


def pad_size(size: tuple[int, int], flow: Flow) -> tuple[int, int]:
    """Round a size (H, W) up to one that the flow maps.

    Raises:
        ValueError: The flow maps one size only, and this is another.
    """
    if flow.size is not None and size != tuple(flow.size):
        raise ValueError(
            f"the flow maps images of size {flow.size} only, got {size}: resize them, or use "
            "another flow"
        )
    height, width = size
    return height + -height % flow.multiple, width + -width % flow.multiple


def fit_to_flow(x: Tensor, flow: Flow) -> Tensor:
    """Pad images (replicate, right and bottom) to a size that the flow maps.

    Raises:
        ValueError: The flow maps one size only, and x has another.
    """
    size = image_size(x)
    padded = pad_size(size, flow)
    below, right = padded[0] - size[0], padded[1] - size[1]
    return F.pad(x, (0, right, 0, below), mode="replicate") if below or right else x


def image_size(x: Tensor) -> tuple[int, int]:
    """Height and width of images (..., H, W)."""
    height, width = x.shape[-2:]
    return height, width


def clamp_finite(x: Tensor) -> Tensor:
    """Clamp to [0, 1], but turn infinite values into NaN, so that their sample falls back later."""
    return torch.where(x.isfinite(), x.clamp(0, 1), math.nan)


def scale_size(size: tuple[int, int], resolution: int | None) -> tuple[int, int]:
    """Scale a size (H, W) down so that its shorter side is `resolution`, never up."""
    shorter = min(size)
    if resolution is None or shorter <= resolution:
        return size
    height, width = (max(1, round(side * resolution / shorter)) for side in size)
    return height, width


def downscale(x: Tensor, resolution: int | None) -> Tensor:
    """Make a copy whose shorter side has so many pixels, or give x itself where it has no more."""
    size = scale_size(image_size(x), resolution)
    if size == image_size(x):
        return x
    return F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)


def add_difference(x: Tensor, small: Tensor, perturbed: Tensor) -> Tensor:
    """Change x as its downscaled copy `small` was changed: the difference, upsampled, is added."""
    difference = F.interpolate(perturbed - small, x.shape[-2:], mode="bicubic", align_corners=False)
    return x + difference


class Normalization:
    """Per-channel (x - mean) / std, as v2.Normalize does, and its inverse.

    Args:
        normalize: A v2.Normalize, a (mean, std) pair, or None for images in [0, 1].
        channels: The number of channels of the images.

    Raises:
        TypeError: `normalize` is something else.
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

    def check_dtype(self, image: Any) -> None:
        """Refuse an 8-bit image, PIL or tensor, where images should come normalized.

        Raises:
            TypeError: The image is one.
        """
        if self.mean_std is not None and getattr(image, "dtype", torch.uint8) == torch.uint8:
            raise TypeError(
                "images are 8-bit, so they cannot be normalized: leave normalize= out, and put "
                "Normalize after this transform"
            )

    def undo(self, x: Tensor) -> Tensor:
        """Convert normalized images to [0, 1]."""
        if self.mean_std is None:
            return x
        mean, std = self._place(x)
        return x * std + mean

    def apply(self, x: Tensor) -> Tensor:
        """Convert images in [0, 1] to normalized ones."""
        if self.mean_std is None:
            return x
        mean, std = self._place(x)
        return (x - mean) / std

    def __getstate__(self) -> dict[str, Any]:
        return {"mean_std": self.mean_std, "_placed": {}}  # an accelerator's stay in this process

    def _place(self, x: Tensor) -> Tensor:
        """Get mean and std (2, C, 1, 1) on x's device, copied there once."""
        assert self.mean_std is not None
        key = (x.device, x.dtype)
        if key not in self._placed:
            self._placed[key] = self.mean_std.to(x)[..., None, None]
        return self._placed[key]
