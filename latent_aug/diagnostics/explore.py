"""What `latent-aug explore` shows, computed: images, latents, perturbations, an attack by steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

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
CLASSES = (
    *("T-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MOST_BYTES = 8 * 2**20  # of an upload
MOST_PIXELS = 40_000_000
SIDES = (16, 128)  # of the images on the page
TEMPERATURES = (0.0, 0.3, 0.5, 0.7, 0.85, 1.0)
GREATEST_EPS = {"linf": 1.0, "rms": 1.0, "l2": 40.0}
Where = Literal["everywhere", "inside", "outside"]


@dataclass(frozen=True)
class Clothes:
    """The bundled classifier, and images of FashionMNIST that it was not trained on.

    Attributes:
        classifier: Images (B, 1, H, W) in [0, 1] to logits (B, 10), in evaluation mode.
        images: (N, 1, 28, 28) in [0, 1].
        labels: (N,).
        about: What it was trained on, and its accuracy.
    """

    classifier: nn.Module
    images: Tensor
    labels: Tensor
    about: str


@dataclass(frozen=True)
class Subject:
    """An image on the page with its latent.

    Attributes:
        flow: Its name or path.
        x: (1, C, H, W) in [0, 1].
        z: From `LatentPerturb.to_latents`.
        label: Of the clothes, if it is known.
    """

    flow: str
    x: Tensor
    z: Tensor
    label: int | None = None


@dataclass(frozen=True)
class Settings:
    """How to perturb.

    Attributes:
        eps: Size.
        norm: Of eps.
        level: Of the flow, 0 the finest; None for all.
        where: Relation to the box that may move.
        box: Left, top, right and bottom as shares of the image's sides.
        seed: Of the draws: the same one gives the same direction at each eps.
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
    """An image on its way up the loss; the 0th is the original."""

    number: int
    x: Tensor
    loss: float
    probabilities: Tensor  # (K,)


def clothes_classifier() -> nn.Sequential:
    """The architecture of the bundled classifier; 25,000 parameters."""
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
    model = clothes_classifier()
    model.load_state_dict(tensors)
    return Clothes(model.eval(), images, labels, about)


def flow_of(name: str) -> Flow:
    """The flow of this name.

    Raises:
        ValueError: It needs labels, which the page does not have.
    """
    flow = get_shared_flow(name)
    if flow.num_classes:
        raise ValueError(f"this page is for flows without classes, {name} has {flow.num_classes}")
    return flow


def examples_of(flow: Flow) -> tuple[Tensor, list[int | None]]:
    """Images (N, C, H, W) to begin with, and their labels: clothes, or samples of the flow."""
    if flow.channels == 1:
        clothes = load_clothes()
        return clothes.images, [*clothes.labels.tolist()]
    images = samples(flow, count=12, temperatures=[0.7])[0]
    return images, [None] * len(images)


@torch.no_grad()
def samples(
    flow: Flow, *, count: int, temperatures: Sequence[float] = TEMPERATURES, seed: int = 0
) -> Tensor:
    """The same latents at several temperatures, decoded: (T, count, C, H, W) in [0, 1]."""
    side = 28 if flow.channels == 1 else 32  # what the bundled flows were trained on
    size = flow.size or side + -side % flow.multiple
    drawn = [
        flow.sample(count, size=size, temperature=t, generator=torch.Generator().manual_seed(seed))
        for t in temperatures
    ]
    return torch.stack(drawn).nan_to_num()


def read_upload(path: str | Path, channels: int, side: int) -> Tensor:
    """An image file of unknown origin as (1, channels, side, side) in [0, 1].

    Raises:
        ValueError: It is too large, or no image.
    """
    path = Path(path)
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"the file has more than {MOST_BYTES // 2**20} MiB")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"the image has more than {MOST_PIXELS // 10**6} million pixels")
            image.load()
            check_mode(image)
            upright = ImageOps.exif_transpose(image)  # as a phone would show it
            # A page to look and try: what a grey flow would lose in colour is let go.
            pixels = to_uint8(upright.convert("L") if channels == 1 else upright, channels, side)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path.name} is not an image that can be read ({', '.join(FORMATS)})"
        ) from error
    return pixels[None] / 255


def subject_of(flow: str, x: Tensor, label: int | None = None) -> Subject:
    """Encode an image, once; moving a slider then costs one decode.

    Raises:
        ValueError: The flow does not map images of this size.
    """
    return Subject(flow, x, LatentPerturb(flow=flow).to_latents(x), label)


def mask_of(x: Tensor, settings: Settings) -> Tensor | None:
    """What may move of an image (1, C, H, W): zeros and ones (H, W); None for all."""
    if settings.where == "everywhere":
        return None
    height, width = x.shape[-2:]
    left, right = sorted((settings.box[0], settings.box[2]))
    top, bottom = sorted((settings.box[1], settings.box[3]))
    inside = torch.zeros(height, width, dtype=torch.uint8)
    rows = slice(round(top * height), round(bottom * height))
    inside[rows, round(left * width) : round(right * width)] = 1
    return inside if settings.where == "inside" else 1 - inside


def perturbed(subject: Subject, settings: Settings) -> Moved:
    """The image as `LatentPerturb` gives it."""
    transform = LatentPerturb(
        settings.eps,
        norm=settings.norm,
        flow=subject.flow,
        mask=mask_of(subject.x, settings),
        levels=settings.level,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    x = transform.from_latents(subject.z, subject.x)
    return Moved(x, transform.fallbacks > 0)


def attacked(
    subject: Subject, settings: Settings, *, alpha: float, steps: int
) -> Iterator[AttackStep]:
    """Each step of `LatentAdversarial` on the bundled classifier, the original first.

    An image without a label is attacked at what the classifier takes it for.

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
    yield measured(model, 0, subject.x, label)
    for number in range(1, steps + 1):  # from the start each time: the same draws, the same way
        attack = LatentAdversarial(
            model,
            eps=settings.eps,
            alpha=alpha,
            steps=number,
            norm=settings.norm,
            flow=subject.flow,
            mask=mask_of(subject.x, settings),
            levels=settings.level,
            generator=torch.Generator().manual_seed(settings.seed),
        )
        yield measured(model, number, attack(subject.x, torch.tensor([label])), label)


@torch.no_grad()
def measured(model: nn.Module, number: int, x: Tensor, label: int) -> AttackStep:
    """What the classifier says of an image."""
    logits = model(x).double()
    loss = F.cross_entropy(logits, torch.tensor([label])).item()
    return AttackStep(number, x, loss, logits.softmax(dim=1)[0])
