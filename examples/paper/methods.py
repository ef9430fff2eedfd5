"""The augmentations that are compared, by name: what they do to a batch of 8-bit images."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import vae_gan  # noqa: F401  # load_flow knows its flow from now on
from torch import Tensor, nn
from torchvision.transforms import v2

from latent_aug import Flow, LatentAdversarial, LatentPerturb, LatentSchedule, load_flow
from latent_aug.images.conversion import from_float
from latent_aug.training.batches import crop_images, flip_images

PEERS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    # From the classifier, which knows the images' mean; on one 8-bit image, after crop and flip.
    "cutout": lambda model: partial(cutout, colour=(255 * model.mean[0]).byte().cpu()),
    # Always whole, and black.
    "erasing": lambda _: v2.RandomErasing(p=1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0)),
    "randaugment": lambda _: v2.RandAugment(),
    "trivialaugment": lambda _: v2.TrivialAugmentWide(),
    "augmix": lambda _: v2.AugMix(),
}
MIXES = {"mixup": v2.MixUp, "cutmix": v2.CutMix}
PAPER = {"eps": 1.0, "alpha": 0.5, "steps": 3, "p": 1.0, "labels": "true"}  # for CIFAR-10
PRESETS = {
    # LatentAdversarial's own defaults, in place of the paper's settings.
    "default": {"eps": None, "alpha": None, "steps": 1, "p": None, "labels": None},
    # What the authors' code does where their text says otherwise.
    "official": {"labels": "predicted", "model_mode": "unchanged"},
    "official notebook": {"random_start": False},  # of MNIST and FashionMNIST
}


def make_method(settings: dict[str, Any], flows: Path | None = None) -> Method:
    """Build what a recipe names.

    Args:
        settings: "pixels": "none", "common" (crop and flip), or a peer's or mix's name, which
            comes after "common". "latent": arguments of LatentPerturb, "attack": of
            LatentAdversarial, by default the paper's. Among them are "flow" ("pixels" is PGD)
            and "preset", of PRESETS.
            "phases": pairs of epochs and one of these, scaled to the epochs of the run.
            "flip": false leaves images unmirrored. "latent first": true perturbs images before
            they are cropped and mirrored.
        flows: The folder in which a flow is looked for before the bundled ones.

    Raises:
        ValueError: A setting or preset is unknown.
    """
    known = {"pixels", "flip", "latent", "attack", "phases", "latent first"}
    if set(settings) - known:
        raise ValueError(f"settings must be of {sorted(known)}, got {sorted(settings)}")
    pixels = settings.get("pixels", "common")
    if pixels not in (places := ["none", "common", *PEERS, *MIXES]):
        raise ValueError(f"pixels must be one of {places}, got {pixels!r}")

    def method(model: nn.Module, classes: int) -> Augmentation:
        return Augmentation(
            make_schedule(settings, flows, model),
            model,
            classes,
            pixels=pixels,
            flip=settings.get("flip", True),
            latent_first=settings.get("latent first", False),
        )

    return method


class Augmentation:
    """uint8 images (B, C, H, W) and classes (B,) to floats in [0, 1] and classes or probabilities.

    Pixels, then the latent, unless the latent is first; then mixes.

    Args:
        perturb: Of the latent.
        model: The classifier, which knows the images' mean.
        classes: Their number.
        pixels: See `make_method`, as for the others.
        flip: Mirror half of the images.
        latent_first: Perturb before they are cropped and mirrored.
    """

    def __init__(
        self,
        perturb: LatentSchedule,
        model: nn.Module,
        classes: int,
        *,
        pixels: str = "common",
        flip: bool = True,
        latent_first: bool = False,
    ) -> None:
        self._perturb, self._latent_first = perturb, latent_first
        self._crop, self._flip = pixels != "none", flip
        self._peer = PEERS[pixels](model) if pixels in PEERS else None
        self._mix = MIXES[pixels](alpha=1.0, num_classes=classes) if pixels in MIXES else None

    def begin(self, share: float) -> None:
        """An epoch, before which this share of all was trained."""
        self._perturb.set_epoch(int(share * sum(epochs for epochs, _ in self._perturb.phases)))

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """A batch, augmented."""
        if self._latent_first:
            x, y = self._perturb(to_unit(x), y)
            x = from_float(x, torch.uint8)
        if self._crop:
            x = crop_and_flip(x, self._flip)
        if self._peer is not None:
            x = torch.stack([self._peer(image) for image in x.cpu()]).to(x.device)
        x = to_unit(x)
        if not self._latent_first:
            x, y = self._perturb(x, y)
        return self._mix(x, y) if self._mix is not None else (x, y)


Method = Callable[[nn.Module, int], Augmentation]
"""From the classifier and the number of classes."""


def to_unit(x: Tensor) -> Tensor:
    """8-bit images as floats in [0, 1]."""
    return (x / 255).contiguous(memory_format=torch.channels_last)


def make_schedule(settings: dict[str, Any], flows: Path | None, model: nn.Module) -> LatentSchedule:
    """Build what is done to the latent: "latent", "attack", or both in turn in "phases"."""
    phases = settings.get("phases", [[1, settings]])
    return LatentSchedule(
        [(epochs, make_perturbation(phase, flows, model)) for epochs, phase in phases]
    )


def make_perturbation(
    settings: dict[str, Any], flows: Path | None, model: nn.Module
) -> LatentPerturb | LatentAdversarial | None:
    """A single perturbation, if there is one."""
    channels = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    if "latent" in settings:
        return LatentPerturb(**read_arguments(settings["latent"], flows, channels.in_channels))
    if "attack" in settings:
        arguments = read_arguments(settings["attack"], flows, channels.in_channels)
        return LatentAdversarial(model, **PAPER | arguments)
    return None


class Pixels(Flow):
    """The identity: an attack on its latents is one on pixels, PGD."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The image."""
        return x

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """The image."""
        return z


def cutout(image: Tensor, colour: Tensor) -> Tensor:
    """16 x 16 about any pixel, cut off at the border, become one colour (DeVries, Taylor 2017)."""
    y, x = (int(torch.randint(size, ())) for size in image.shape[1:])
    image = image.clone()
    image[:, max(y - 8, 0) : y + 8, max(x - 8, 0) : x + 8] = colour
    return image


def crop_and_flip(x: Tensor, flip: bool) -> Tensor:
    """Zero-padded by 4, cropped back, mirrored with probability 1/2: the paper's A.2."""
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    if flip:
        x = flip_images(x, torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5)
    return crop_images(x, 4, torch.randint(0, 2 * 4 + 1, (2, len(x)), generator=generator))


def read_arguments(given: dict[str, Any], flows: Path | None, channels: int) -> dict[str, Any]:
    """Read arguments with the preset's, and the flow loaded, in the precision asked for."""
    arguments = dict(given)
    preset = arguments.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset must be one of {list(PRESETS)}, got {preset!r}")
    arguments = {**PRESETS.get(preset, {}), **arguments}
    name, dtype = arguments.pop("flow", None), arguments.pop("network_dtype", None)
    if name is None:
        raise ValueError(f"a perturbation names its flow, got {given}")
    if name == "pixels":
        return {**arguments, "flow": Pixels(channels)}
    return {**arguments, "flow": read_flow(name, flows, dtype)}


@cache
def read_flow(name: str, flows: Path | None, dtype: str | None) -> Flow:
    """Read once, so that the flow a run names is the one that it trained with."""
    flow = load_flow(flows / name if flows and (flows / name).is_dir() else name)
    if torch.cuda.is_available():
        flow = flow.to("cuda")
        flow.cuda_graphs = True
    flow.network_dtype = dtype and getattr(torch, dtype)
    return flow
