"""The augmentations that are compared, by name: what they do to a batch of 8-bit images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from latent_aug import Glow, LatentAdversarial, LatentPerturb, load_flow
from latent_aug.batches import random_crop, random_flip

Augment = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""uint8 images (B, 3, H, W) and classes (B,) to floats in [0, 1] and classes or probabilities."""

Method = Callable[[nn.Module, int], Augment]
"""From the classifier and the number of classes."""

PEERS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    # On one 8-bit image, after crop and flip. Cutout's hole is 16 x 16, as in the paper.
    "cutout": lambda: v2.RandomErasing(p=1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0)),
    "randaugment": lambda: v2.RandAugment(),
    "trivialaugment": lambda: v2.TrivialAugmentWide(),
    "augmix": lambda: v2.AugMix(),
}
MIXES = {"mixup": v2.MixUp, "cutmix": v2.CutMix}


def method_of(settings: dict[str, Any], flows: Path | None = None) -> Method:
    """What a recipe names.

    Args:
        settings: "pixels": "none", "common" (crop and flip), or a peer's or mix's name, which
            comes after "common". "latent": arguments of LatentPerturb, "attack": of
            LatentAdversarial; "flow" among them. "flip": false leaves images unmirrored.
        flows: A folder in which a flow is looked for before the bundled ones.
    """
    return partial(build, settings, flows)


def build(settings: dict[str, Any], flows: Path | None, model: nn.Module, classes: int) -> Augment:
    """Pixels first, then the latent, then mixes."""
    pixels, flip = settings.get("pixels", "common"), settings.get("flip", True)
    latent = attack = mix = peer = None
    if "latent" in settings:
        latent = LatentPerturb(**with_flow(settings["latent"], flows))
    if "attack" in settings:
        attack = LatentAdversarial(model, **with_flow(settings["attack"], flows))
    if pixels in MIXES:
        mix = MIXES[pixels](alpha=1.0, num_classes=classes)
    elif pixels in PEERS:
        peer = PEERS[pixels]()
    elif pixels not in ("none", "common"):
        raise ValueError(f"pixels must be none, common, {[*PEERS, *MIXES]}, got {pixels!r}")

    def augment(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if pixels != "none":
            x = cropped_and_flipped(x, flip)
        if peer is not None:
            x = torch.stack([peer(image) for image in x])
        x = (x / 255).contiguous(memory_format=torch.channels_last)
        if latent is not None:
            x = latent(x)
        if attack is not None:
            x = attack(x, y)
        return mix(x, y) if mix is not None else (x, y)

    return augment


def cropped_and_flipped(x: Tensor, flip: bool) -> Tensor:
    """Zero-padded by 4, cropped back, mirrored with probability 1/2: the paper's A.2."""
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    return random_crop(random_flip(x, generator) if flip else x, 4, generator)


def with_flow(arguments: dict[str, Any], flows: Path | None) -> dict[str, Any]:
    """The flow loaded, with coupling networks in the precision asked for."""
    arguments = dict(arguments)
    dtype = arguments.pop("network_dtype", None)
    name = arguments.pop("flow", "glow-cifar10")
    flow = load_flow(flows / name if flows and (flows / name).is_dir() else name)
    assert isinstance(flow, Glow)
    if torch.cuda.is_available():
        flow = flow.to("cuda")
    flow.network_dtype = dtype and getattr(torch, dtype)
    return {**arguments, "flow": flow}
