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
from latent_aug.batches import cropped, flipped
from latent_aug.images import from_float

Augment = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""uint8 images (B, C, H, W) and classes (B,) to floats in [0, 1] and classes or probabilities."""

Method = Callable[[nn.Module, int], Augment]
"""From the classifier and the number of classes."""

OWN_FLOWS = Path(__file__).parent / "flows"  # that runs share, and that take long to train

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
PRESETS = {
    # What the authors' code does where their text says otherwise.
    "official": {"labels": "predicted", "model_mode": "unchanged"},
    "official notebook": {"random_start": False},  # of MNIST and FashionMNIST
}


def method_of(settings: dict[str, Any], flows: Path | None = None) -> Method:
    """What a recipe names.

    Args:
        settings: "pixels": "none", "common" (crop and flip), or a peer's or mix's name, which
            comes after "common". "latent": arguments of LatentPerturb, "attack": of
            LatentAdversarial; among them "flow" ("pixels" is PGD) and "preset", of PRESETS.
            "phases": pairs of epochs and one of these, scaled to the epochs of the run.
            "flip": false leaves images unmirrored. "latent first": true perturbs images before
            they are cropped and mirrored.
        flows: A folder in which a flow is looked for before those beside the recipes and the
            bundled ones.
    """
    return partial(build, settings, flows)


def build(settings: dict[str, Any], flows: Path | None, model: nn.Module, classes: int) -> Augment:
    """Pixels, then the latent, unless the latent is first; then mixes."""
    pixels, flip = settings.get("pixels", "common"), settings.get("flip", True)
    mix = peer = None
    perturb = perturbation_of(settings, flows, model)
    latent_first = settings.get("latent first", False)
    if pixels in MIXES:
        mix = MIXES[pixels](alpha=1.0, num_classes=classes)
    elif pixels in PEERS:
        peer = PEERS[pixels](model)
    elif pixels not in ("none", "common"):
        raise ValueError(f"pixels must be none, common, {[*PEERS, *MIXES]}, got {pixels!r}")

    def unit(x: Tensor) -> Tensor:
        return (x / 255).contiguous(memory_format=torch.channels_last)

    def augment(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if latent_first:
            x, y = perturb(unit(x), y)
            x = from_float(x, torch.uint8)
        if pixels != "none":
            x = cropped_and_flipped(x, flip)
        if peer is not None:
            x = torch.stack([peer(image) for image in x.cpu()]).to(x.device)
        x = unit(x)
        if not latent_first:
            x, y = perturb(x, y)
        return mix(x, y) if mix is not None else (x, y)

    total = sum(epochs for epochs, _ in perturb.phases)
    augment.begin = lambda share: perturb.set_epoch(int(share * total))  # type: ignore[attr-defined]
    return augment


def perturbation_of(
    settings: dict[str, Any], flows: Path | None, model: nn.Module
) -> LatentSchedule:
    """Of the latent: "latent" or "attack", or one after the other in "phases"."""
    phases = settings.get("phases", [[1, settings]])
    return LatentSchedule([(epochs, one(phase, flows, model)) for epochs, phase in phases])


def one(
    settings: dict[str, Any], flows: Path | None, model: nn.Module
) -> LatentPerturb | LatentAdversarial | None:
    """A single perturbation, if there is one."""
    channels = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    if "latent" in settings:
        return LatentPerturb(**arguments_of(settings["latent"], flows, channels.in_channels))
    if "attack" in settings:
        arguments = arguments_of(settings["attack"], flows, channels.in_channels)
        return LatentAdversarial(model, **arguments)
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


def cropped_and_flipped(x: Tensor, flip: bool) -> Tensor:
    """Zero-padded by 4, cropped back, mirrored with probability 1/2: the paper's A.2."""
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    if flip:
        x = flipped(x, torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5)
    return cropped(x, 4, torch.randint(0, 2 * 4 + 1, (2, len(x)), generator=generator))


def arguments_of(given: dict[str, Any], flows: Path | None, channels: int) -> dict[str, Any]:
    """With the preset's, and the flow loaded, its networks in the precision asked for."""
    arguments = {**PRESETS.get(given.get("preset", ""), {}), **given}
    arguments.pop("preset", None)
    dtype = arguments.pop("network_dtype", None)
    name = arguments.pop("flow", "glow-cifar10")
    if name == "pixels":
        return {**arguments, "flow": Pixels(channels)}
    return {**arguments, "flow": flow_of(name, flows, dtype)}


@cache
def flow_of(name: str, flows: Path | None, dtype: str | None) -> Flow:
    """Read once, so that the flow a run names is the one that it trained with."""
    folders = [folder / name for folder in (flows, OWN_FLOWS) if folder is not None]
    flow = load_flow(next((folder for folder in folders if folder.is_dir()), name))
    if torch.cuda.is_available():
        flow = flow.to("cuda")
        flow.cuda_graphs = True
    flow.network_dtype = dtype and getattr(torch, dtype)
    return flow
