"""Draw what a perturbation does to images at several sizes, and samples of its flow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from latent_aug.flows import Flow
from latent_aug.images.conversion import (
    image_size,
    pad_size,
    scale_size,
    select_shown_channels,
    to_batch,
)
from latent_aug.images.datasets import spread_indices
from latent_aug.images.samples import find_labels, get_image
from latent_aug.transforms.adversarial import LatentAdversarial
from latent_aug.transforms.random import LatentPerturb
from latent_aug.utils.arguments import require_range
from latent_aug.utils.randomness import use_seed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_IMAGES = 8
TEMPERATURES = (0.0, 0.5, 0.7, 1.0)
UNCHANGED = "unchanged: off the flow's data"
SAMPLES = 4  # at each temperature


def preview(
    transform: LatentPerturb | LatentAdversarial | Flow | str | Path,
    images: Any,
    labels: Tensor | None = None,
    *,
    eps: Sequence[float] | float | None = None,
    amplify: float = 4.0,
    temperatures: float | Sequence[float] = TEMPERATURES,
    seed: int = 0,
) -> Figure:
    """Draw what a perturbation does, to choose its eps by eye.

    Each row shows an image, and for each eps the perturbed image and the difference, amplified and
    on grey. The difference is called unchanged where the flow cannot perturb the image. Below are
    samples of the flow at several temperatures: the same latents, scaled.

    Args:
        transform: A `LatentPerturb` or a `LatentAdversarial`, which is left as it is. A `Flow`, or
            a name or path for `load_flow`, stands for a `LatentPerturb` with its defaults. An
            attack's callables are given `(image, label)`, as batches of one.
        images: A batch (B, C, H, W), a list or a data set of images, PIL or tensors, that the
            transform takes. Tuples that begin with an image do as well. Eight, evenly spread, are
            drawn.
        labels: Labels (B,), for a `LatentAdversarial` with true labels and for a conditional flow.
            By default they are second in the samples.
        eps: One size or several, in the transform's norm. By default half of its own eps, its own,
            and twice that.
        amplify: The factor of the differences.
        temperatures: The standard deviations of the sampled latents. None are drawn if empty.
        seed: The seed of perturbations and samples. The global generator is left as it is.

    Returns:
        A figure, to `savefig` or to show in a notebook.

    Raises:
        ValueError: There is no image, `eps` is out of range, or the labels are not as many as the
            images.
        TypeError: The transform has `normalize` and images are 8-bit, or `images` holds none.
        ModuleNotFoundError: matplotlib is missing: ``pip install 'latent-aug[train]'``.

    Source: the paper's Figure 3 shows originals, perturbed images and differences.

    Example:
        >>> import torch
        >>> from latent_aug import LatentPerturb, preview
        >>> images = torch.full((2, 1, 28, 28), 128, dtype=torch.uint8)
        >>> figure = preview(LatentPerturb(0.25, flow="glow-fashionmnist"), images)
        >>> figure.savefig("preview.png")  # doctest: +SKIP
    """
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")  # before the work, as matplotlib may be missing
    transform = check_transform(transform)
    check_images(images, labels)
    high = transform.eps[1]
    sizes = [high / 2, high, 2 * high]
    if eps is not None:
        sizes = [require_range("eps", size)[0] for size in make_list(eps)]
    rows = []
    for place in spread_indices(len(images), MOST_IMAGES):
        label = None if labels is None else labels[place][None]
        rows.append([*perturb_sample(images[place], label, transform, sizes, amplify, seed)])
    temperatures = make_list(temperatures)
    columns = len(rows[0])
    upper, lower = lay_out(figure, len(rows), columns, len(temperatures))
    grid = upper.subplots(len(rows), columns, squeeze=False)
    for number, row in enumerate(rows):
        for axes, (title, image) in zip(grid[number], row, strict=True):
            draw_image(axes, image, title if not number or title == UNCHANGED else "")
    if temperatures:
        _, original = rows[0][0]
        size = scale_size(image_size(original), transform.resolution)
        draw_samples(lower, transform.flow, size, temperatures, seed)
    return figure


def check_transform(transform: Any) -> LatentPerturb | LatentAdversarial:
    """Check the argument `transform`, and make a transform of a flow.

    Raises:
        TypeError: It is neither a transform nor a flow.
    """
    if isinstance(transform, (Flow, str, Path)):
        return LatentPerturb(flow=transform)
    if not isinstance(transform, (LatentPerturb, LatentAdversarial)):
        raise TypeError(
            "transform must be a LatentPerturb, a LatentAdversarial or a flow, got a "
            f"{type(transform).__name__}"
        )
    return transform


def perturb_sample(
    sample: Any,
    label: Tensor | None,
    transform: LatentPerturb | LatentAdversarial,
    sizes: Sequence[float],
    amplify: float,
    seed: int,
) -> Iterator[tuple[str, Tensor]]:
    """Yield titles and pictures (C, H, W): a sample's image, then two for each size.

    These two are the perturbed image and the difference.
    """
    image = get_image(sample)
    transform.normalization.check_dtype(image)
    original = to_picture(image, transform)
    yield "original", original
    if label is None and needs_label(transform):
        label = read_label(sample)
    given = (image, label)
    has_own_mask = isinstance(transform, LatentPerturb) and callable(transform.mask)
    if has_own_mask and isinstance(sample, (tuple, list)):
        given = (sample, None)  # the mask depends on the whole sample, its label included
    kind = transform.norm if transform.uses_norm else "eps"
    at = " at 32x32" if transform.fits_size else ""
    for size in sizes:
        with use_seed(seed, getattr(image, "device", torch.device("cpu"))):
            at_size = transform.with_eps(size)
            perturbed = to_picture(perturb_image(at_size, *given), transform)
        yield f"{kind} {size:.3g}{at}", perturbed
        title = UNCHANGED if at_size.fallbacks else f"difference times {amplify:g}"
        yield title, (perturbed - original) * amplify + 0.5


def lay_out(figure: Figure, rows: int, columns: int, temperatures: int) -> tuple[Any, Any]:
    """Divide a figure into a part for the images and one below it for samples, if there are any."""
    height = 1.3 * (rows + (temperatures > 0)) + 0.5
    width = max(1.3 * columns, 1.8 * temperatures)
    figure.set_size_inches(width, height)
    if not temperatures:
        return figure, None
    parts: Any = figure.subfigures(2, 1, height_ratios=[rows + 0.3, 1.3])
    return tuple(parts)


def make_list(numbers: float | Iterable[float]) -> list[float]:
    """Make a list of one number or of several."""
    return list(numbers) if isinstance(numbers, Iterable) else [numbers]


def check_images(images: Any, labels: Any) -> None:
    """Refuse anything but a batch, list or data set of images, and labels that do not fit."""
    if labels is not None and not isinstance(labels, Tensor):
        raise TypeError(
            f"labels must be a tensor (B,), got a {type(labels).__name__}; sizes are named, eps="
        )
    holds_some = hasattr(images, "__len__") and hasattr(images, "__getitem__")
    if isinstance(images, (str, Path)) or not holds_some:
        raise TypeError(
            "images must be a batch, a list or a data set of images (of a loader, its dataset), "
            f"got {type(images).__name__}"
        )
    if isinstance(images, Tensor) and images.ndim != 4:
        raise ValueError(
            f"images must be a batch (B, C, H, W), got a tensor of shape {tuple(images.shape)}; "
            "one image is image[None]"
        )
    if not len(images):
        raise ValueError("images must hold at least one image, got none")
    if labels is not None and labels.shape[:1] != (len(images),):
        raise ValueError(
            f"labels must be one for each of the {len(images)} images, got a tensor of shape "
            f"{tuple(labels.shape)}"
        )
    first = images[0]
    if isinstance(images, (tuple, list)) and isinstance(first, Tensor) and first.ndim == 4:
        raise ValueError("images must be images alone, got a batch: preview(transform, *batch)")
    if not isinstance(get_image(first), (Tensor, Image.Image)):
        raise TypeError(
            "images must be tensors, PIL images or tuples that begin with one, got a "
            f"{type(first).__name__}"
        )


def needs_label(transform: LatentPerturb | LatentAdversarial) -> bool:
    """Whether a transform asks for each image's label."""
    return bool(transform.flow.num_classes) or isinstance(transform, LatentAdversarial)


def read_label(sample: Any) -> Tensor | None:
    """Read the label of a sample (image, label) as a batch of one. None where there is none."""
    label = find_labels(sample) if isinstance(sample, (tuple, list)) else None
    if isinstance(label, Integral):
        return torch.tensor([int(label)], device="cpu")
    return label[None] if isinstance(label, Tensor) else None


def perturb_image(transform: Any, image: Any, label: Tensor | None) -> Any:
    """Perturb one image."""
    if isinstance(transform, LatentAdversarial):
        if isinstance(image, Tensor):  # in its own dtype, which may be the model's
            return transform(image[None], label)[0]
        x, restore = to_batch(image, transform.flow.channels)
        return restore(transform(x, label))
    return get_image(transform(image)) if label is None else transform(image, label)[0]


def to_picture(image: Any, transform: LatentPerturb | LatentAdversarial) -> Tensor:
    """Convert an image in the transform's units to (C, H, W) in [0, 1]."""
    x, _ = to_batch(image, transform.flow.channels)
    return transform.normalization.undo(x)[0].detach().cpu()


def draw_image(axes: Any, image: Tensor, title: str) -> None:
    """Draw an image (C, H, W) without ticks."""
    pixels = select_shown_channels(image).clamp(0, 1).permute(1, 2, 0)
    axes.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_axis_off()
    axes.set_title(title, fontsize=8)


@torch.no_grad()
def draw_samples(
    figure: Any, flow: Flow, size: tuple[int, int], temperatures: Sequence[float], seed: int
) -> None:
    """Draw one row: samples (H, W) of the same latents at each temperature."""
    axes = figure.subplots(1, len(temperatures), squeeze=False)[0]
    for place, temperature in zip(axes, temperatures, strict=True):
        # A user's flow may have a `sample` of its own, with other arguments.
        samples = Flow.sample(
            flow,
            SAMPLES,
            size=pad_size(size, flow),
            temperature=temperature,
            generator=torch.Generator().manual_seed(seed),
        ).cpu()
        draw_image(place, torch.cat(list(samples), dim=2), f"samples, temperature {temperature:g}")
