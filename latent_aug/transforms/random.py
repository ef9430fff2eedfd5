"""LatentPerturb: random latent perturbation as a torchvision transform (Randomized-LA)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from latent_aug.flows import Flow
from latent_aug.images.conversion import (
    image_size,
    make_stand_in,
    pad_size,
    scale_size,
    to_batch,
)
from latent_aug.images.samples import (
    MARKED,
    find_image_key,
    flatten_structure,
    has_one_each,
    rebuild_sequence,
    replace_images,
    replace_items,
)
from latent_aug.transforms import functional as LF
from latent_aug.transforms.batch_advice import advise_batches
from latent_aug.transforms.labels import prepare_labels, read_labels
from latent_aug.transforms.latents import LatentTransform, run_uncompiled
from latent_aug.transforms.regions import Levels, Mask, build_mask, read_region, take_rows
from latent_aug.utils.arguments import Range, require_choice

MASK_MODES = ("1", "L", "P", "I", "F")  # what the modes of PIL masks begin with
Kind = tuple[torch.Size, torch.dtype, torch.device, int]


class Draw(NamedTuple):
    """The draw for a batch of images: noise in the latent, and which images it is for."""

    noise: Tensor  # (B, C, H, W), H and W padded to the flow's multiple
    chosen: Tensor  # (B,) bool
    region: Tensor | None  # (1 or B, 1, H, W) bool: the mask
    y: Tensor | None  # (B,) or (B, K): the labels, for a conditional flow

    def take(self, rows: Tensor) -> Draw:
        """Take some rows, by booleans (B,) or indices (n,)."""
        y = None if self.y is None else self.y[rows]
        return Draw(self.noise[rows], self.chosen[rows], take_rows(self.region, rows), y)


class LatentPerturb(LatentTransform, v2.Transform):
    """Move images a little in the latent space of a flow: x̃ = F⁻¹(F(x) + noise).

    It takes what v2 transforms take: PIL images, uint8 or float tensors and tv_tensors. They may be
    alone, in any structure, or whole batches (..., C, H, W). Labels, boxes and masks pass through.
    So does a PIL mask in (image, mask) whose mode is not the image's. Of plain tensors the first
    is the image, as in v2. In (list of images, list of targets) each image has a draw of its own.
    In a mapping the image is under "pixel_values", "image", "images" or "img", and a further
    tv_tensors.Image counts too. Type, dtype, shape and device of the result are the input's.

    Floats lie in [0, 1]: put it before Normalize, or pass `normalize`. Sizes that the flow cannot
    map are padded and cropped back. All frames of a video get the same noise. Like other v2
    transforms it ignores `.eval()`: use it in the training pipeline only.

    The flow is private to the transform: not among its parameters, not in its `state_dict`.
    Some samples come back as they were: those that are not finite, or that lie too far off the
    flow's data, as noisy ones may. `fallbacks` counts them, in loader workers too.

    Args:
        eps: Size of the perturbation in standard deviations of the prior, or (low, high) to draw
            it per sample. `check_flow` suggests one for your images, `preview` shows it.
        norm: "linf" clips eps·N(0, I) to ±eps. "l2" scales it to the radius eps. "rms" scales it
            to the radius eps·√d, so that one eps suits all image sizes. None leaves it.
        flow: A `Flow`, or a name or path for `load_flow`.
        p: Probability that a sample is perturbed.
        clip: Greatest distance from the original image, in [0, 1] units: per pixel for "linf"
            and None, as l2 norm otherwise. Rounding to 8 bits comes after it.
        away: Point every component of the noise away from the latent's origin.
        resolution: Perturb a copy of the image, downscaled to this many pixels on its shorter
            side, and add the upsampled difference. This is for photographs, which are larger than
            what the flow was trained on. Images no larger than that are perturbed as they are.
        normalize: v2.Normalize or (mean, std) that the images have been through already.
        mask: Zeros and ones, (H, W) or for batches (B, H, W), or a callable that takes the whole
            sample and returns them. Latents move only at the pixels where it is 1. The other
            pixels come back exactly as they were.
        levels: The levels of the flow to perturb, an integer or several: 0 is the finest, -1 the
            coarsest. By default all move. "rms" counts only what may move.
        labels_getter: The place of the label that a class-conditional flow needs. "default" looks
            second in a tuple or list, or in a mapping under "labels" or "label". A callable takes
            the sample and returns it. It is an index or probabilities, for one image or for each.
        generator: The generator to draw from, by default torch's global ones. In loader workers it
            is re-seeded from the worker's seed. Elsewhere the ranks of distributed training draw
            the same from generators of one seed, so seed it by rank.

    Raises:
        ValueError, TypeError: An argument, or an image's channels, dtype, or range, is not as
            described.

    Source: the paper's §2.1 (Randomized-LA), with linf 0.25 and l2 10 on CIFAR-10. `away` is in the
    authors' code only.

    Example:
        >>> import torch
        >>> from torchvision.transforms import v2
        >>> augment = v2.Compose(
        ...     [v2.RandomCrop(28, padding=2), LatentPerturb(eps=0.25, flow="glow-fashionmnist")]
        ... )
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
        flow: Flow | str | Path = "glow-photographs",
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
        super().__init__(
            flow,
            eps=eps,
            norm=require_choice("norm", norm, ("linf", "l2", "rms", None)),
            p=p,
            clip=clip,
            resolution=resolution,
            normalize=normalize,
            mask=mask,
            levels=levels,
            labels_getter=labels_getter,
            generator=generator,
        )
        self.away = bool(away)
        if self.uses_norm:
            self._warn_of_size(
                dissolves=2.0,
                slight=1.0,  # a grey level
                usual="usual are 0.25 for 'linf' and 'rms', 10 for 'l2' at 32x32; see `check_flow`",
            )

    @run_uncompiled
    def forward(self, *inputs: Any) -> Any:
        """Perturb the images of a sample, as every v2 transform does.

        The whole sample is at hand here, with the labels and the mask that may be in it.
        """
        sample: Any = inputs if len(inputs) > 1 else inputs[0]
        if isinstance(sample, Mapping):
            return self._perturb_mapping(sample, sample)
        if begins_with_images(sample, self.flow.channels):
            return self._perturb_first(sample)
        if isinstance(sample, (tuple, list)) and sample and has_image_key(sample[0]):
            return self._perturb_mappings(sample)
        return self._perturb_part(sample, sample)

    def _perturb_mapping(self, part: Mapping[Any, Any], sample: Any) -> Any:
        """Perturb what lies under the image's key in a mapping, which the sample is or begins with.

        A mapping without such a key is looked through as a tuple is.
        """
        key = find_image_key(part)
        if key is None:
            return self._perturb_part(part, sample)
        if isinstance(part[key], (list, tuple)):
            return replace_items(part, {key: self._perturb_listed(part, key)})
        marked = (tv_tensors.Image, tv_tensors.Video)
        if isinstance(part[key], marked):
            return self._perturb_part(part, sample, marked)
        return replace_items(part, {key: self._perturb_part(part[key], sample)})

    def _perturb_mappings(self, sample: Any) -> Any:
        """Perturb the mappings with an image in a tuple or list, each with a draw of its own.

        What lies beside the only one belongs to it, as its label.
        """
        places = [place for place, part in enumerate(sample) if has_image_key(part)]
        parts = list(sample)
        for place in places:
            part = parts[place]
            parts[place] = self._perturb_mapping(part, sample if len(places) == 1 else part)
        return rebuild_sequence(sample, parts)

    def _perturb_part(self, part: Any, sample: Any, types: tuple[type, ...] = (object,)) -> Any:
        """Perturb the images in a part of the sample, found as v2 transforms find them.

        Only images of these types are perturbed.
        """
        flat, rebuild = flatten_structure(part)
        first = None if isinstance(part, Mapping) else find_tensor_before_masks(flat)
        if first is None:
            masks = {id(mask) for mask in find_pil_masks(part)}
            needed = [
                needs and isinstance(value, types) and id(value) not in masks
                for needs, value in zip(self._needs_transform_list(flat), flat, strict=True)
            ]
        else:
            needed = [value is first for value in flat]
        images = [value for value, is_image in zip(flat, needed, strict=True) if is_image]
        params = self.make_params(images, sample)
        results = [
            self.transform(value, params) if is_image else value
            for value, is_image in zip(flat, needed, strict=True)
        ]
        return rebuild(results)

    def _perturb_first(self, sample: Any) -> Any:
        """Perturb each of the images that a sample begins with, as batches of detection do.

        What lies beside an image goes with it where it has one entry for each.
        """
        images, *others = sample
        results = []
        for i, image in enumerate(images):
            own = (v[i] if has_one_each(v, len(images)) else v for v in others)
            results.append(self.forward((image, *own))[0])
        return replace_images(sample, 0, rebuild_sequence(images, results))

    def _perturb_listed(self, samples: Mapping[Any, Any], key: Any) -> Any:
        """Perturb each image of a mapping of lists, as Hugging Face passes samples.

        Each image has its own draw. A value whose length differs from the number of images belongs
        to the whole sample, such as one label for several views.
        """
        images, count = samples[key], len(samples[key])
        several = {name for name, values in samples.items() if has_one_each(values, count)}
        each = (
            {name: values[i] if name in several else values for name, values in samples.items()}
            for i in range(count)
        )
        return rebuild_sequence(images, [self.forward(sample)[key] for sample in each])

    def make_params(self, flat_inputs: list[Any], sample: Any = None) -> dict[str, Any]:
        """Draw for each kind of image in the sample, which the images of one kind share.

        The images are not read: a draw depends on their shape, dtype and device alone.
        """
        if not flat_inputs:
            raise TypeError(
                "the sample holds no image: a PIL image, tensor or tv_tensors.Image is needed; "
                "put v2.ToImage() before this transform for NumPy arrays"
            )
        draws: dict[Kind, Draw] = {}
        for image in flat_inputs:
            self.normalization.check_dtype(image)
            like = make_stand_in(image, self.flow.channels)
            kind = find_kind(like, image)
            if like.numel() and kind not in draws:
                draws[kind] = self._draw(like, count_frames(image), sample)
        return {"draws": draws}

    @property
    def uses_norm(self) -> bool:
        """Whether `noise` is this class's own, which goes by `norm`."""
        return type(self).noise is LatentPerturb.noise

    def noise(self, draws: Tensor, eps: LF.Size, mask: Tensor | None) -> Tensor:
        """Turn draws into the noise that is added to the latents.

        Override it for a perturbation of another shape.

        Args:
            draws: Standard normal draws (B, C, H, W).
            eps: The transform's eps, or (B, 1, 1, 1) where it is drawn per sample.
            mask: Zeros and ones that broadcast to the draws: ones where components may move.
                None lets all move.
        """
        return LF.noise_of_norm(draws, eps, self.norm, mask=mask)

    @torch.no_grad()
    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Apply a draw to an image, without drawing anything."""
        images, restore = to_batch(inpt, self.flow.channels)
        if not images.numel():
            return inpt
        kind = find_kind(images, inpt)
        if kind not in params["draws"]:
            raise ValueError(
                "params must be drawn by make_params for images of the same shape (B, C, H, W), "
                f"dtype, device and frames, {kind}, got those for {[*params['draws']]}"
            )
        draw = params["draws"][kind]
        advise_batches(inpt, draw.noise, self.flow)
        return restore(self._apply_draw(images, draw))

    def to_latents(self, x: Tensor, labels: Any = None) -> Tensor:
        """Encode images (B, C, H, W), float in [0, 1], padded to a size that the flow maps.

        Raises:
            ValueError: The transform has `normalize`.
        """
        self._refuse_normalized()
        return self.encode(x, y=prepare_labels(self.flow, labels, len(x), x)).z

    @torch.no_grad()
    def from_latents(self, z: Tensor, x: Tensor, sample: Any = None) -> Tensor:
        """Perturb images whose latents are known already.

        Args:
            z: The latents, from `to_latents`.
            x: The images (B, C, H, W), float in [0, 1].
            sample: The sample that `mask` and `labels_getter` look at.

        Raises:
            ValueError: The transform has `normalize`.
        """
        self._refuse_normalized()
        return self._apply_draw(x, self._draw(x, 1, sample), z)

    def _refuse_normalized(self) -> None:
        if self.normalizes:
            raise ValueError("latents are of images in [0, 1]: leave normalize= out")

    def _draw(self, like: Tensor, frames: int, sample: Any) -> Draw:
        """Draw noise for a batch, and which of its images are perturbed.

        Args:
            like: A tensor of the batch's shape (B, C, H, W), dtype and device. It is not read.
            frames: The number of images in a row that share a draw.
            sample: The sample that `mask` and `labels_getter` look at.
        """
        like = like[::frames]
        count, channels = like.shape[:2]
        size = scale_size(image_size(like), self.resolution)
        z = like.new_empty(()).expand(count, channels, *pad_size(size, self.flow))
        region = read_region(self.mask, sample, like, frames=frames)
        mask = build_mask(self.flow, z, region, self.levels, size=size)
        eps = self._draws.sample_between(*self.eps, count, like)
        draws = self._draws.sample_normal(z.shape, like)
        noise = self.noise(draws, eps, mask)
        if not self.uses_norm:
            noise = check_noise(noise, draws, f"{type(self).__name__}.noise")
        chosen = self._draws.sample_uniform((count,), like) < self.p
        y = None
        if self.flow.num_classes:
            y = prepare_labels(self.flow, read_labels(sample, self.labels_getter), count, like)
        draw = Draw(noise, chosen, region, y)
        if frames == 1:
            return draw
        return draw.take(torch.arange(count, device=like.device).repeat_interleave(frames))

    def _apply_draw(self, images: Tensor, draw: Draw, z: Tensor | None = None) -> Tensor:
        """Replace the chosen images of a batch by perturbed ones, from latents z if known."""
        chosen = draw.chosen
        if not images.is_cpu:  # a look at what is chosen would wait for the device
            return torch.where(chosen[:, None, None, None], self._perturb(images, draw, z), images)
        if not bool(chosen.any()):
            return images.clone()
        if bool(chosen.all()):
            return self._perturb(images, draw, z)
        known = None if z is None else z[chosen]
        result = images.clone()
        result[chosen] = self._perturb(images[chosen], draw.take(chosen), known)
        return result

    def _perturb(self, images: Tensor, draw: Draw, z: Tensor | None) -> Tensor:
        """Perturb all images of a batch."""
        latents = self.encode(images, y=draw.y, region=draw.region, z=z)
        noise = LF.away_from_origin(draw.noise, latents.z) if self.away else draw.noise
        return latents.perturb(noise, counted=draw.chosen)

    def extra_repr(self) -> str:
        """List the arguments that matter, for `print`."""
        return self.list_settings()


def check_noise(noise: Any, draws: Tensor, name: str) -> Tensor:
    """Check what a user's `noise` returned, and expand it to the draws' shape.

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


def begins_with_images(sample: Any, channels: int) -> bool:
    """Whether a tuple or list begins with a list of images, each of a sample of its own.

    So are images beside a list of targets, and plain tensors of the flow's channels. Other images
    in a list are several of one sample.
    """
    first = sample[0] if isinstance(sample, (tuple, list)) and sample else None
    if not isinstance(first, (tuple, list)) or not first:
        return False
    others = [value for value in sample[1:] if isinstance(value, (tuple, list))]
    is_plain = all(v2.functional.is_pure_tensor(t) and t.ndim >= 3 for t in first)
    if any(has_one_each(value, len(first)) for value in others):
        return is_plain or all(isinstance(t, (Image.Image, tv_tensors.Image)) for t in first)
    return is_plain and all(t.shape[-3] == channels for t in first)


def has_image_key(part: Any) -> bool:
    """Whether a part of a sample is a mapping that says where its image is."""
    return isinstance(part, Mapping) and find_image_key(part) is not None


def find_tensor_before_masks(values: list[Any]) -> Tensor | None:
    """Find the plain tensor that is the image, as what comes after it may be its PIL masks.

    torchvision would take the masks for images. None where it is right.
    """
    images = [
        value
        for value in values
        if isinstance(value, MARKED) or (v2.functional.is_pure_tensor(value) and value.ndim >= 3)
    ]
    marked = [value for value in images if isinstance(value, MARKED)]
    are_masks = all(
        isinstance(value, Image.Image) and value.mode.startswith(MASK_MODES) for value in marked
    )
    return images[0] if marked and are_masks and images[0] is not marked[0] else None


def find_pil_masks(sample: Any) -> list[Image.Image]:
    """Find the PIL masks of a sample: images without colour, after one of another mode.

    In a mapping they may also come before it, where it has colours. A list holds masks alone or
    none.

    Raises:
        TypeError: There are several images of the same mode, and all but the first could be masks.
    """
    found = list(list_marked(sample))
    modes = [find_mode(images) for images in found]
    coloured = [mode for mode in modes if not mode.startswith(MASK_MODES)]
    first = coloured[0] if isinstance(sample, Mapping) and coloured else next(iter(modes), "")
    if modes.count(first) > 1 and first.startswith(MASK_MODES):
        raise TypeError(
            f"two PIL images of mode {first} may be an image and its mask: wrap a mask in "
            "tv_tensors.Mask, and pass two images as a list"
        )
    return [
        image
        for images, mode in zip(found, modes, strict=True)
        if mode.startswith(MASK_MODES) and mode != first
        for image in images
    ]


def find_mode(images: list[Any]) -> str:
    """Find the PIL mode that images have in common, or nothing."""
    modes = {image.mode if isinstance(image, Image.Image) else "" for image in images}
    return modes.pop() if len(modes) == 1 else ""


def list_marked(sample: Any) -> Iterator[list[Any]]:
    """List what is an image by its type in nested tuples and mappings, those of a list together."""
    if isinstance(sample, MARKED):
        yield [sample]
    elif isinstance(sample, list):
        if images := [part for part in sample if isinstance(part, MARKED)]:
            yield images
    elif isinstance(sample, (tuple, Mapping)):
        for part in sample.values() if isinstance(sample, Mapping) else sample:
            yield from list_marked(part)


def find_kind(batch: Tensor, image: Any) -> Kind:
    """Find what images of one sample must have in common to share a draw."""
    return batch.shape, batch.dtype, batch.device, count_frames(image)


def count_frames(image: Any) -> int:
    """Count the frames that share their noise: a video's, else 1."""
    return image.shape[-4] if isinstance(image, tv_tensors.Video) else 1
