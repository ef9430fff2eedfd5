"""LatentPerturb: random latent perturbation as a torchvision transform (Randomized-LA)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from latent_aug import functional as LF
from latent_aug.arguments import Range, distance, number_range, one_of, probability
from latent_aug.flows import Flow
from latent_aug.images import fit_to_flow, to_batch
from latent_aug.perturbation import UsesFlow


class Draw(NamedTuple):
    """What was drawn for images of one shape: noise in the latent, and whom it is for."""

    noise: Tensor  # (B, C, H, W), H and W padded to the flow's multiple
    chosen: Tensor  # (B,) bool


class LatentPerturb(UsesFlow, v2.Transform):
    """Move images a little in the latent space of a flow: x̃ = F⁻¹(F(x) + noise).

    Takes what v2 transforms take: PIL images, uint8 or float tensors, tv_tensors, alone or in any
    structure with labels, boxes and masks, which pass through; also whole batches
    (..., C, H, W). Type, dtype, shape and device of the result are the input's. Floats lie in
    [0, 1]: put it before Normalize, or pass `normalize`. Sizes that the flow cannot map are
    padded and cropped back. All frames of a video get the same noise. Like other v2 transforms
    it ignores `.eval()`: use it in the training pipeline only.

    The flow is private to the transform: not among its parameters, not in its `state_dict`.
    Samples that are not finite, or that lie too far off the flow's data to be decoded exactly,
    come back as they were; `fallbacks` counts them in this process (not in loader workers).

    Args:
        eps: Size of the perturbation in standard deviations of the prior, or (low, high) to draw
            it per sample.
        norm: "linf" clips eps·N(0, I) to ±eps, "l2" scales it to the radius eps, "rms" to the
            radius eps·√d (one eps for all image sizes), None leaves it.
        flow: A `Flow`, or a name or path for `load_flow`.
        p: Probability that a sample is perturbed.
        clip: Greatest distance from the original image, in [0, 1] units: per pixel for "linf"
            and None, as l2 norm otherwise.
        away: Point every component of the noise away from the latent's origin.
        resolution: Not available yet.
        normalize: v2.Normalize or (mean, std) that the images have been through already.
        labels_getter: Reserved for class-conditional flows, which are not supported yet.
        generator: Where to draw from; torch's global generators by default. In loader workers it
            is re-seeded from the worker's seed.

    Raises:
        ValueError, TypeError: An argument, or an image's channels, dtype, or range, is not as
            described.
        NotImplementedError: `resolution`, or a class-conditional flow.

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
        labels_getter: Any = "default",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if resolution is not None:
            raise NotImplementedError("resolution is not available yet; resize before, or omit it")
        self.eps = number_range("eps", eps)
        self.norm = one_of("norm", norm, ("linf", "l2", "rms", None))
        self.p = probability("p", p)
        self.clip = distance("clip", clip)
        self.away = bool(away)
        if labels_getter != "default":
            raise NotImplementedError("labels_getter is for class-conditional flows, to come")
        self._use(flow, normalize, generator)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw for each shape of image in the sample; images of one shape share the draw."""
        if not flat_inputs:
            raise TypeError(
                "the sample holds no image: a PIL image, tensor or tv_tensors.Image is needed; "
                "put v2.ToImage() before this transform for NumPy arrays"
            )
        draws: dict[Any, Draw] = {}
        for image in flat_inputs:
            x, _ = to_batch(image, self.flow.channels)
            if x.numel() and kind(x, image) not in draws:
                draws[kind(x, image)] = self._draw(x, frames_of(image))
        return {"draws": draws}

    @torch.no_grad()
    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Apply what was drawn; deterministic."""
        x, restore = to_batch(inpt, self.flow.channels)
        if not x.numel():
            return inpt
        draw: Draw = params["draws"][kind(x, inpt)]
        if x.is_cpu:  # there, a look at the draw costs nothing and may save the flow's work
            if not bool(draw.chosen.any()):
                return restore(x)
            if not bool(draw.chosen.all()):
                result = x.clone()
                result[draw.chosen] = self._perturb(x[draw.chosen], draw.noise[draw.chosen])
                return restore(result)
        perturbed = self._perturb(x, draw.noise)
        return restore(torch.where(draw.chosen[:, None, None, None], perturbed, x))

    def _draw(self, x: Tensor, frames: int) -> Draw:
        """Noise and choice for a batch (B, C, H, W) of clips of so many frames."""
        count = len(x) // frames
        shape = (count, *fit_to_flow(x[:1], self.flow).shape[1:])
        eps = self._draws.between(*self.eps, count, x)
        noise = LF.noise_of_norm(self._draws.normal(shape, x), eps, self.norm)
        chosen = self._draws.uniform((count,), x) < self.p
        return Draw(noise.repeat_interleave(frames, 0), chosen.repeat_interleave(frames, 0))

    def _perturb(self, original: Tensor, noise: Tensor) -> Tensor:
        """Perturb a batch in the units and at the size it came in."""
        x = self._unit_range(original)
        z = self._encode(x)
        if self.away:
            noise = LF.away_from_origin(noise, z)
        return self._restore_unusable(self._image_at(z + noise, x), original, z)

    def extra_repr(self) -> str:
        """The arguments that matter, for `print`."""
        eps = self.eps[0] if self.eps[0] == self.eps[1] else self.eps
        name = self.flow.loaded_from[0] if self.flow.loaded_from else type(self.flow).__name__
        return f"eps={eps}, norm={self.norm!r}, flow={name!r}, p={self.p}"


def kind(x: Tensor, image: Any) -> tuple[Any, ...]:
    """What images of one sample must have in common to share a draw."""
    return (x.shape, x.dtype, x.device, frames_of(image))


def frames_of(image: Any) -> int:
    """Frames that share their noise: a video's, else 1."""
    return image.shape[-4] if isinstance(image, tv_tensors.Video) else 1
