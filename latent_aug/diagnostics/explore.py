"""Compute what `latent-aug explore` shows: images, latents, perturbations, an attack by steps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from latent_aug.flows import Flow
from latent_aug.flows.hub import get_shared_flow
from latent_aug.images.conversion import check_mode
from latent_aug.images.datasets import to_uint8
from latent_aug.transforms.adversarial import LatentAdversarial
from latent_aug.transforms.functional import Norm
from latent_aug.transforms.random import LatentPerturb

CLOTHES = Path(__file__).parent / "clothes.safetensors"  # by examples/train_clothes_classifier.py
PHOTOGRAPHS = tuple(Path(__file__).parent / f"{name}.jpg" for name in ("astronaut", "chelsea"))
CLASSES = (
    *("T-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MOST_BYTES = 8 * 2**20  # an upload may have
MOST_UPLOAD_PIXELS = 40_000_000
SIDES = (16, 128)  # of the images on the page
TEMPERATURES = (0.0, 0.3, 0.5, 0.7, 0.85, 1.0)
GREATEST_EPS = {"linf": 1.0, "rms": 1.0, "l2": 40.0}
Where = Literal["everywhere", "inside", "outside"]


@dataclass(frozen=True)
class Clothes:
    """The bundled classifier, and images of FashionMNIST that it was not trained on.

    Attributes:
        classifier: The model, images (B, 1, H, W) in [0, 1] to logits (B, 10), in evaluation mode.
        images: The images (N, 1, 28, 28) in [0, 1].
        labels: Their classes (N,).
        about: A sentence on its training data and its accuracy.
    """

    classifier: nn.Module
    images: Tensor
    labels: Tensor
    about: str


@dataclass(frozen=True)
class Subject:
    """An image on the page with its latent.

    Attributes:
        flow: The name or path of the flow.
        x: The image (1, C, H, W) in [0, 1].
        z: The latents, by `LatentPerturb.to_latents`.
        label: The class of clothes, if it is known.
        resolution: The shorter side of the copy that was encoded, or None for the image itself.
    """

    flow: str
    x: Tensor
    z: Tensor
    label: int | None = None
    resolution: int | None = None


@dataclass(frozen=True)
class Settings:
    """The settings of a perturbation.

    Attributes:
        eps: The size of the perturbation.
        norm: The norm of eps.
        level: The level of the flow that may move, 0 the finest, or None for all.
        where: Which pixels may move, inside or outside the box.
        box: Left, top, right and bottom as shares of the image's sides.
        seed: The seed of the draws. The same one gives the same direction at each eps.
    """

    eps: float = 0.25
    norm: Norm = "linf"
    level: int | None = None
    where: Where = "everywhere"
    box: tuple[float, float, float, float] = (0.25, 0.25, 0.75, 0.75)
    seed: int = 0


class Moved(NamedTuple):
    """A perturbed image (1, C, H, W), and whether the flow could not perturb it."""

    x: Tensor
    fell_back: bool


class AttackStep(NamedTuple):
    """An image on its way up the loss. The 0th is the original."""

    number: int
    x: Tensor
    loss: float
    probabilities: Tensor  # (K,)


def build_classifier() -> nn.Sequential:
    """Build the bundled classifier's architecture, of 25,000 parameters."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(1568, 10))


@lru_cache(maxsize=1)
def load_clothes() -> Clothes:
    """Read the bundled classifier and images."""
    with safe_open(CLOTHES, framework="pt") as file:
        about = file.metadata()["about"]
    tensors = load_file(CLOTHES)
    images, labels = tensors.pop("images") / 255, tensors.pop("labels").long()
    model = build_classifier()
    model.load_state_dict(tensors)
    return Clothes(model.eval(), images, labels, about)


@cache
def get_flow(name: str) -> Flow:
    """Get the flow of this name, always the same one, so that the hub is asked once.

    Raises:
        ValueError: It needs labels, which the page does not have.
    """
    flow = get_shared_flow(name)
    if flow.num_classes:
        raise ValueError(f"this page is for flows without classes, {name} has {flow.num_classes}")
    return flow


def make_examples(flow: Flow) -> tuple[Tensor, list[int | None]]:
    """Make images (N, C, H, W) to begin with, and their labels: clothes, or photographs."""
    if flow.channels == 1:
        clothes = load_clothes()
        return clothes.images, [*clothes.labels.tolist()]
    images = torch.cat([read_upload(path, flow.channels, SIDES[1]) for path in PHOTOGRAPHS])
    return images, [None] * len(images)


@torch.no_grad()
def sample_at_temperatures(
    flow: Flow, *, count: int, temperatures: Sequence[float] = TEMPERATURES, seed: int = 0
) -> Tensor:
    """Decode the same latents at several temperatures: (T, count, C, H, W) in [0, 1]."""
    side = 28 if flow.channels == 1 else 32  # what the bundled flows were trained on
    size = flow.size or side + -side % flow.multiple
    drawn = [
        flow.sample(count, size=size, temperature=t, generator=torch.Generator().manual_seed(seed))
        for t in temperatures
    ]
    return torch.stack(drawn).nan_to_num()


def read_upload(path: str | Path, channels: int, side: int) -> Tensor:
    """Read an image file of unknown origin as (1, channels, side, side) in [0, 1].

    Raises:
        ValueError: It is too large, or no image.
    """
    path = Path(path)
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"the file has more than {MOST_BYTES // 2**20} MiB")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_UPLOAD_PIXELS:
                raise ValueError(
                    f"the image has more than {MOST_UPLOAD_PIXELS // 10**6} million pixels"
                )
            image.load()
            check_mode(image)
            upright = ImageOps.exif_transpose(image)  # as a phone would show it
            # For a grey flow the colours are dropped: the page is for a look only.
            pixels = to_uint8(upright.convert("L") if channels == 1 else upright, channels, side)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path.name} is not an image that can be read ({', '.join(FORMATS)})"
        ) from error
    return pixels[None] / 255


def make_subject(
    flow: str, x: Tensor, label: int | None = None, resolution: int | None = None
) -> Subject:
    """Encode an image once. Moving a slider then costs one decode.

    Raises:
        ValueError: The flow does not map images of this size.
    """
    z = LatentPerturb(flow=flow, resolution=resolution).to_latents(x)
    return Subject(flow, x, z, label, resolution)


def build_box_mask(x: Tensor, settings: Settings) -> Tensor | None:
    """Build the mask (H, W) of an image (1, C, H, W): ones where it may move. None for all."""
    if settings.where == "everywhere":
        return None
    inside = torch.zeros(x.shape[-2:], dtype=torch.uint8)
    inside[find_box(x, settings)] = 1
    return inside if settings.where == "inside" else 1 - inside


def find_box(x: Tensor, settings: Settings) -> tuple[slice, slice]:
    """Find the rows and columns of an image (1, C, H, W) that are in the box."""
    height, width = x.shape[-2:]
    left, right = sorted((settings.box[0], settings.box[2]))
    top, bottom = sorted((settings.box[1], settings.box[3]))
    rows = slice(round(top * height), round(bottom * height))
    return rows, slice(round(left * width), round(right * width))


def perturb_subject(subject: Subject, settings: Settings) -> Moved:
    """Perturb an image as `LatentPerturb` does."""
    transform = LatentPerturb(
        settings.eps,
        norm=settings.norm,
        flow=get_flow(subject.flow),
        resolution=subject.resolution,
        mask=build_box_mask(subject.x, settings),
        levels=settings.level,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    x = transform.from_latents(subject.z, subject.x)
    return Moved(x, transform.fallbacks > 0)


def attack_subject(
    subject: Subject, settings: Settings, *, alpha: float, steps: int
) -> Iterator[AttackStep]:
    """Yield each step of `LatentAdversarial` on the bundled classifier, the original first.

    An image without a label is attacked at the class that the classifier predicts.

    Raises:
        ValueError: The image is not grey, as the classifier's are.
    """
    if subject.x.shape[1] != 1:
        raise ValueError(
            "the bundled classifier knows grey images of clothes: choose a flow of one channel, "
            "as glow-fashionmnist"
        )
    model = load_clothes().classifier
    with torch.no_grad():
        label = subject.label if subject.label is not None else int(model(subject.x).argmax())
    yield ask_classifier(model, 0, subject.x, label)
    for number in range(1, steps + 1):  # each time from the start, with the same draws
        attack = LatentAdversarial(
            model,
            eps=settings.eps,
            alpha=alpha,
            steps=number,
            norm=settings.norm,
            flow=get_flow(subject.flow),
            resolution=subject.resolution,
            labels="true",
            p=1.0,
            mask=build_box_mask(subject.x, settings),
            levels=settings.level,
            generator=torch.Generator().manual_seed(settings.seed),
        )
        yield ask_classifier(model, number, attack(subject.x, torch.tensor([label])), label)


@torch.no_grad()
def ask_classifier(model: nn.Module, number: int, x: Tensor, label: int) -> AttackStep:
    """Ask the classifier for its loss and probabilities at an image."""
    logits = model(x).double()
    loss = F.cross_entropy(logits, torch.tensor([label])).item()
    return AttackStep(number, x, loss, logits.softmax(dim=1)[0])


def write_code(
    subject: Subject, settings: Settings, *, alpha: float = 0.0, steps: int | None = None
) -> str:
    """Write the settings as Python: an attack where steps are given, else random noise.

    The seed is left out, as a training draws anew for each image.
    """
    arguments: dict[str, Any] = {
        "eps": round(settings.eps, 4),
        "norm": settings.norm,
        "flow": subject.flow,
    }
    if subject.resolution is not None:
        arguments["resolution"] = subject.resolution
    if settings.level is not None:
        arguments["levels"] = settings.level
    if steps is not None:
        arguments |= {"alpha": round(alpha, 4), "steps": steps, "labels": "true", "p": 1.0}
    call = "".join(
        f"    {name}={json.dumps(value) if isinstance(value, str) else value},\n"
        for name, value in arguments.items()
    )
    lines = []
    if settings.where != "everywhere":
        (rows, columns), inside = find_box(subject.x, settings), settings.where == "inside"
        height, width = subject.x.shape[-2:]
        box = f"{rows.start}:{rows.stop}, {columns.start}:{columns.stop}"
        lines = [f"mask = torch.{'zeros' if inside else 'ones'}({height}, {width})"]
        lines += [f"mask[{box}] = {int(inside)}"]
        call += "    mask=mask,\n"
    if steps is None:
        lines += [f"perturb = LatentPerturb(\n{call})", "image = perturb(image)"]
    else:
        lines += [f"attack = LatentAdversarial(\n    model,\n{call})", "batch = attack.step(batch)"]
    name = "LatentPerturb" if steps is None else "LatentAdversarial"
    torch_too = "import torch\n" if settings.where != "everywhere" else ""
    return f"{torch_too}from latent_aug import {name}\n\n" + "\n".join(lines) + "\n"
