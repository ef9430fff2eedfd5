"""LatentPerturb: random latent perturbation as a torchvision transform (Randomized-LA)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten  # as torchvision.transforms.v2 does
from torchvision import tv_tensors
from torchvision.transforms import v2

from latent_aug.flows import Flow
from latent_aug.images.conversion import (
    add_difference,
    decoded,
    downscaled,
    fit_to_flow,
    in_unit_range,
    to_batch,
)
from latent_aug.images.samples import is_one_each, like_sequence, named_images, with_items
from latent_aug.transforms import functional as LF
from latent_aug.transforms.labels import condition, labels_in
from latent_aug.transforms.latents import UsesFlow
from latent_aug.transforms.regions import Levels, Mask, movable, pixels_of, shrunk
from latent_aug.utils.arguments import (
    Range,
    require_choice,
    require_distance,
    require_positive,
    require_probability,
    require_range,
)


class Draw(NamedTuple):
    """What was drawn for images of one shape: noise in the latent, and whom it is for."""

    noise: Tensor  # (B, C, H, W), H and W padded to the flow's multiple
    chosen: Tensor  # (B,) bool
    pixels: Tensor | None  # (1 or B, 1, H, W) bool: the mask
    y: Tensor | None  # (B,) or (B, K): the labels, for a conditional flow

    def of_chosen(self) -> Draw:
        """The same for the chosen images only."""
        pixels, y = self.pixels, self.y
        if pixels is not None and len(pixels) > 1:
            pixels = pixels[self.chosen]
        if y is not None:
            y = y[self.chosen]
        return Draw(self.noise[self.chosen], self.chosen[self.chosen], pixels, y)


class LatentPerturb(UsesFlow, v2.Transform):
    """Move images a little in the latent space of a flow: x̃ = F⁻¹(F(x) + noise).

    Takes what v2 transforms take: PIL images, uint8 or float tensors, tv_tensors, alone or in any
    structure with labels, boxes and masks, which pass through; also whole batches
    (..., C, H, W). Of plain tensors the first is the image, as in v2; in a mapping that names it
    "pixel_values", "image", "images" or "img", that one (and a further tv_tensors.Image). Type,
    dtype, shape and device of the result are the input's. Floats lie in [0, 1]: put it before
    Normalize, or pass `normalize`. Sizes that the flow cannot map are padded and cropped back. All
    frames of a video get the same noise. Like other v2 transforms it ignores `.eval()`: use it in
    the training pipeline only.

    The flow is private to the transform: not among its parameters, not in its `state_dict`.
    Samples that are not finite, or that lie too far off the flow's data, as noisy ones may, come
    back as they were; `fallbacks` counts them in this process (not in loader workers).

    Args:
        eps: Size of the perturbation in standard deviations of the prior, or (low, high) to draw
            it per sample. `check_flow` suggests one for your images, `preview` shows it.
        norm: "linf" clips eps·N(0, I) to ±eps, "l2" scales it to the radius eps, "rms" to the
            radius eps·√d (one eps for all image sizes), None leaves it.
        flow: A `Flow`, or a name or path for `load_flow`.
        p: Probability that a sample is perturbed.
        clip: Greatest distance from the original image, in [0, 1] units: per pixel for "linf"
            and None, as l2 norm otherwise.
        away: Point every component of the noise away from the latent's origin.
        resolution: Perturb a copy of the image, downscaled to this many pixels on its shorter
            side, and add the upsampled difference: for photographs, which are larger than what
            the flow was trained on. Images no larger than that are perturbed as they are.
        normalize: v2.Normalize or (mean, std) that the images have been through already.
        mask: Perturb only where it is 1: zeros and ones (H, W), or (B, H, W) for batches; or a
            callable that takes the sample, as it comes to the transform, and returns one. Latents
            move at those pixels only, and the other pixels come back exactly as they were.
        levels: Perturb only these levels of the flow: 0 is the finest, -1 the coarsest; an
            integer or several. "rms" counts only what may move.
        labels_getter: Where a class-conditional flow finds the label: "default" looks second in
            a tuple or list, or in a dict under "labels" or "label"; a callable takes the sample.
            An index or probabilities, for one image or for each; it comes back untouched.
        generator: Where to draw from; torch's global generators by default. In loader workers it
            is re-seeded from the worker's seed; elsewhere the ranks of distributed training draw
            the same from generators of one seed, so seed it by rank.

    Raises:
        ValueError, TypeError: An argument, or an image's channels, dtype, or range, is not as
            described.

    Source: the paper's §2.1 (Randomized-LA); its CIFAR-10 settings are linf 0.25 and l2 10.
    `away` is in the authors' code only.

    Example:
        >>> import torch
        >>> from torchvision.transforms import v2
        >>> augment = v2.Compose([v2.RandomCrop(28, padding=2),
        ...                       LatentPerturb(eps=0.25, flow="glow-fashionmnist")])
        >>> image = torch.randint(256, (1, 28, 28), dtype=torch.uint8)
        >>> augment(image).dtype, augment(image).shape
        (torch.uint8, torch.Size([1, 28, 28]))
    """

    _transformed_types = (
        Image.Image,
        tv_tensors.Image,
        tv_tensors.Video,
        v2.functional.is_pure_tensor,
    )

    def __init__(
        self,
        eps: Range = 0.25,
        *,
        norm: str | None = "linf",
        flow: Flow | str | Path = "glow-cifar10",
        p: float = 1.0,
        clip: float | None = None,
        away: bool = False,
        resolution: int | None = None,
        normalize: Any = None,
        mask: Mask = None,
        levels: Levels = None,
        labels_getter: Any = "default",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.eps = require_range("eps", eps)
        self.norm = require_choice("norm", norm, ("linf", "l2", "rms", None))
        self.p = require_probability("p", p)
        self.clip = require_distance("clip", clip, self.norm)
        self.away = bool(away)
        self.resolution = None if resolution is None else require_positive("resolution", resolution)
        self._use(
            flow,
            normalize=normalize,
            mask=mask,
            levels=levels,
            labels_getter=labels_getter,
            generator=generator,
        )

    def forward(self, *inputs: Any) -> Any:
        """As every v2 transform does, with the whole sample at hand, where its mask may be."""
        sample: Any = inputs if len(inputs) > 1 else inputs[0]
        key = named_images(sample) if isinstance(sample, Mapping) else None
        if key is not None and isinstance(sample[key], (list, tuple)):
            return with_items(sample, {key: self._listed(sample, key)})
        if key is None:
            return self._images_in(sample, sample)
        marked = isinstance(sample[key], (tv_tensors.Image, tv_tensors.Video))
        if marked and isinstance(sample, dict):  # torchvision looks into no other mapping
            return self._images_in(sample, sample, of=(tv_tensors.Image, tv_tensors.Video))
        return with_items(sample, {key: self._images_in(sample[key], sample)})

    def _images_in(self, part: Any, sample: Any, of: tuple[type, ...] = (object,)) -> Any:
        """Each image in a part of the sample, found as v2 transforms find them, of some types."""
        flat, spec = tree_flatten(part)
        needed = self._needs_transform_list(flat)
        needed = [n and isinstance(value, of) for n, value in zip(needed, flat, strict=True)]
        images = [value for value, is_image in zip(flat, needed, strict=True) if is_image]
        params = self.make_params(images, sample)
        results = [
            self.transform(value, params) if is_image else value
            for value, is_image in zip(flat, needed, strict=True)
        ]
        return tree_unflatten(results, spec)

    def _listed(self, samples: Mapping[Any, Any], key: Any) -> Any:
        """Each image of a mapping of lists, as Hugging Face passes samples, with its own draw.

        What is not as many is of all of them, as the label of several views is.
        """
        images, count = samples[key], len(samples[key])
        several = {name for name, values in samples.items() if is_one_each(values, count)}
        each = (
            {name: values[i] if name in several else values for name, values in samples.items()}
            for i in range(count)
        )
        return like_sequence(images, [self.forward(sample)[key] for sample in each])

    def make_params(self, flat_inputs: list[Any], sample: Any = None) -> dict[str, Any]:
        """Draw for each shape of image in the sample; images of one shape share the draw."""
        if not flat_inputs:
            raise TypeError(
                "the sample holds no image: a PIL image, tensor or tv_tensors.Image is needed; "
                "put v2.ToImage() before this transform for NumPy arrays"
            )
        draws: dict[Any, Draw] = {}
        for image in flat_inputs:
            if self.normalizes and getattr(image, "dtype", torch.uint8) == torch.uint8:
                raise TypeError(
                    "images are 8-bit, so they cannot be normalized: leave normalize= out, and put "
                    "Normalize after this transform"
                )
            x, _ = to_batch(image, self.flow.channels)
            if x.numel() and kind(x, image) not in draws:
                draws[kind(x, image)] = self._draw(x, frames_of(image), sample)
        return {"draws": draws}

    @property
    def _norm_holds(self) -> bool:
        """Not for a `noise` of the user's own."""
        return type(self).noise is LatentPerturb.noise

    def noise(self, draws: Tensor, eps: LF.Size, mask: Tensor | None) -> Tensor:
        """What is added to the latents; override it for a perturbation of another shape.

        Args:
            draws: From N(0, I), (B, C, H, W).
            eps: Of the transform, or (B, 1, 1, 1) where it is drawn per sample.
            mask: Zeros and ones, broadcastable to the draws: what may move; None for all.
        """
        return LF.noise_of_norm(draws, eps, self.norm, mask=mask)

    @torch.no_grad()
    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Apply what was drawn; deterministic."""
        x, restore = to_batch(inpt, self.flow.channels)
        if not x.numel():
            return inpt
        draw: Draw = params["draws"][kind(x, inpt)]
        return restore(on_chosen(x, draw, lambda at, draw: self._perturb(x[at], draw)))

    @torch.no_grad()
    def to_latents(self, x: Tensor, labels: Any = None) -> Tensor:
        """Latents of images (B, C, H, W), float in [0, 1], padded to a size that the flow maps.

        Raises:
            ValueError: The transform has `normalize`.
        """
        self._refuse_normalized()
        small = downscaled(x, self.resolution)
        return self._encode(small, condition(self.flow, labels, len(x), x))

    @torch.no_grad()
    def from_latents(self, z: Tensor, x: Tensor, sample: Any = None) -> Tensor:
        """Perturb images whose latents are known already.

        Args:
            z: From `to_latents`.
            x: Images (B, C, H, W), float in [0, 1].
            sample: What `mask` and `labels_getter` look at.

        Raises:
            ValueError: The transform has `normalize`.
        """
        self._refuse_normalized()

        def perturb(at: Any, draw: Draw) -> Tensor:
            own = x[at]
            return self._perturb_from(z[at], downscaled(own, self.resolution), own, own, draw)

        return on_chosen(x, self._draw(x, 1, sample), perturb)

    def _refuse_normalized(self) -> None:
        if self.normalizes:
            raise ValueError("latents are of images in [0, 1]: leave normalize= out")

    def _draw(self, x: Tensor, frames: int, sample: Any) -> Draw:
        """Noise and choice for a batch (B, C, H, W) of clips of so many frames."""
        first = x[::frames]
        small = downscaled(first[:1], self.resolution)
        like = fit_to_flow(small, self.flow).expand(len(first), -1, -1, -1)
        pixels = pixels_of(self.mask, sample, first)
        mask = movable(self.flow, like, shrunk(pixels, small), self.levels)
        eps = self._draws.sample_between(*self.eps, len(first), x)
        draws = self._draws.sample_normal(like.shape, x)
        noise = self.noise(draws, eps, mask)
        if not self._norm_holds:
            noise = checked_noise(noise, draws, f"{type(self).__name__}.noise")
        chosen = self._draws.sample_uniform((len(first),), x) < self.p
        y = None
        if self.flow.num_classes:
            y = condition(self.flow, labels_in(sample, self.labels_getter), len(first), first)
        noise, chosen = noise.repeat_interleave(frames, 0), chosen.repeat_interleave(frames, 0)
        if pixels is not None and len(pixels) > 1:
            pixels = pixels.repeat_interleave(frames, 0)
        return Draw(noise, chosen, pixels, None if y is None else y.repeat_interleave(frames, 0))

    def _perturb(self, original: Tensor, draw: Draw) -> Tensor:
        """Perturb a batch in the units and at the size it came in."""
        x = self._unit_range(original)
        small = downscaled(x, self.resolution)
        return self._perturb_from(self._encode(small, draw.y), small, x, original, draw)

    def _perturb_from(
        self, z: Tensor, small: Tensor, x: Tensor, original: Tensor, draw: Draw
    ) -> Tensor:
        """The same from latents that are known, of x or of its downscaled copy."""
        noise = LF.away_from_origin(draw.noise, z) if self.away else draw.noise
        moved = decoded(self.flow.decode, z + noise, draw.y)
        if small is not x:
            moved = moved[..., : small.shape[-2], : small.shape[-1]]
            moved = add_difference(x, small, in_unit_range(moved))
        perturbed = self._to_image(moved, x, draw.pixels)
        return self._restore(perturbed, original, z, draw.pixels, draw.chosen)

    def extra_repr(self) -> str:
        """The arguments that matter, for `print`."""
        return self._describe()


def on_chosen(x: Tensor, draw: Draw, perturb: Callable[[Any, Draw], Tensor]) -> Tensor:
    """A batch with its chosen images replaced.

    Args:
        x: Images (B, C, H, W).
        draw: For them.
        perturb: From an index of images and their draw to what replaces them.
    """
    if x.is_cpu:  # there, a look at the draw costs nothing and may save the flow's work
        if not bool(draw.chosen.any()):
            return x
        if not bool(draw.chosen.all()):
            result = x.clone()
            result[draw.chosen] = perturb(draw.chosen, draw.of_chosen())
            return result
    return torch.where(draw.chosen[:, None, None, None], perturb(slice(None), draw), x)


def checked_noise(noise: Any, draws: Tensor, name: str) -> Tensor:
    """What a user's `noise` gave, at the draws' shape.

    Raises:
        TypeError, ValueError: It is no floating-point tensor, cannot be broadcast, or not finite.
    """
    if not isinstance(noise, Tensor) or not noise.is_floating_point():
        found = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
        raise TypeError(f"{name} must return a floating-point tensor, got {found}")
    if noise.is_cpu and not bool(noise.isfinite().all()):  # elsewhere a look is a sync
        raise ValueError(f"{name} returned values that are not finite")
    try:
        return noise.expand_as(draws)
    except RuntimeError as error:
        raise ValueError(
            f"{name} must return noise of its draws' shape {tuple(draws.shape)}, or one that "
            f"broadcasts to it, got {tuple(noise.shape)}"
        ) from error


def kind(x: Tensor, image: Any) -> tuple[Any, ...]:
    """What images of one sample must have in common to share a draw."""
    return (x.shape, x.dtype, x.device, frames_of(image))


def frames_of(image: Any) -> int:
    """Frames that share their noise: a video's, else 1."""
    return image.shape[-4] if isinstance(image, tv_tensors.Video) else 1
