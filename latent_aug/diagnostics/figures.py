"""Looking at a perturbation: what it does to images at several sizes, and what its flow draws."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from latent_aug.flows import Flow
from latent_aug.images.conversion import downscaled, fit_to_flow, to_batch
from latent_aug.images.datasets import image_of, spread
from latent_aug.images.samples import find_labels
from latent_aug.transforms.adversarial import LatentAdversarial
from latent_aug.transforms.random import LatentPerturb
from latent_aug.utils.arguments import require_range
from latent_aug.utils.randomness import use_seed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_IMAGES = 8
TEMPERATURES = (0.0, 0.5, 0.7, 1.0)
SAMPLES = 4  # of each temperature


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

    A row for each image: the original, and for each eps what becomes of it and the difference,
    amplified, on grey. Below, samples of the flow, at several temperatures: the same latents,
    scaled.

    Args:
        transform: A `LatentPerturb`, or a `LatentAdversarial`; it is left as it is. Of a `Flow`, or
            a name or path for `load_flow`, a `LatentPerturb` with its defaults. An attack's
            callables are given `(image, label)`, as batches of one.
        images: A batch (B, C, H, W), a list or a data set of images, PIL or tensors, that the
            transform takes, or of tuples that begin with one; eight of them, evenly spread, are
            drawn.
        labels: (B,), for a `LatentAdversarial` with true labels, and for a conditional flow; by
            default those second in the samples.
        eps: Sizes to draw, or one, in the transform's norm; half of its own, its own, and twice
            that if None.
        amplify: Factor of the differences.
        temperatures: Standard deviations of the sampled latents; none are drawn if empty.
        seed: Of perturbations and samples; the global generator is left as it is.

    Returns:
        A figure, to `savefig` or to show in a notebook.

    Raises:
        ValueError: There is no image, or `eps` is out of range.
        TypeError: The transform has `normalize`, and images are 8-bit; or images are none.
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
    transform = checked(transform, images, labels)
    sizes = around(transform.eps)
    if eps is not None:
        sizes = [require_range("eps", size)[0] for size in several(eps)]
    rows = []
    for place in spread(len(images), MOST_IMAGES):
        label = None if labels is None else labels[place][None]
        rows.append([*pictures_of(images[place], label, transform, sizes, amplify, seed)])
    temperatures = several(temperatures)
    columns = len(rows[0])
    upper, lower = laid_out(figure, len(rows), columns, len(temperatures))
    grid = upper.subplots(len(rows), columns, squeeze=False)
    for number, row in enumerate(rows):
        for axes, (title, image) in zip(grid[number], row, strict=True):
            draw_image(axes, image, "" if number else title)
    if temperatures:
        _, original = rows[0][0]
        like = downscaled(original[None], getattr(transform, "resolution", None))
        draw_samples(lower, transform.flow, like, temperatures, seed)
    return figure


def checked(transform: Any, images: Any, labels: Any) -> LatentPerturb | LatentAdversarial:
    """What perturbs; a flow does with the defaults.

    Raises:
        TypeError: One of the arguments is of another type.
    """
    if isinstance(transform, (Flow, str, Path)):
        transform = LatentPerturb(flow=transform)
    if not isinstance(transform, (LatentPerturb, LatentAdversarial)):
        raise TypeError(
            "transform must be a LatentPerturb, a LatentAdversarial or a flow, got a "
            f"{type(transform).__name__}"
        )
    check_images(images)
    if labels is not None and not isinstance(labels, Tensor):
        raise TypeError(
            f"labels must be a tensor (B,), got a {type(labels).__name__}; sizes are named, eps="
        )
    return transform


def pictures_of(
    sample: Any,
    label: Tensor | None,
    transform: LatentPerturb | LatentAdversarial,
    sizes: Sequence[float],
    amplify: float,
    seed: int,
) -> Iterator[tuple[str, Tensor]]:
    """A sample's image, then each perturbation of it and the difference: titles and (C, H, W)."""
    image = image_of(sample)
    if transform.normalizes and getattr(image, "dtype", torch.uint8) == torch.uint8:
        raise TypeError("images are 8-bit, so they cannot be normalized: preview normalized floats")
    original = shown(image, transform)
    yield "original", original
    if label is None and needs_label(transform):
        label = label_of(sample)
    given = (image, label)
    of_sample = isinstance(transform, LatentPerturb) and callable(transform.mask)
    if of_sample and isinstance(sample, (tuple, list)):
        given = (sample, None)  # the mask is of the whole sample, its label included
    kind = transform.norm if transform._norm_holds else "eps"
    for size in sizes:
        with use_seed(seed, getattr(image, "device", torch.device("cpu"))):
            perturbed = shown(apply(transform.with_eps(size), *given), transform)
        yield f"{kind} {size:.3g}", perturbed
        yield f"difference times {amplify:g}", (perturbed - original) * amplify + 0.5


def laid_out(figure: Figure, rows: int, columns: int, temperatures: int) -> tuple[Any, Any]:
    """A figure's part for the images, and that for samples below it, if there are any."""
    height = 1.3 * (rows + (temperatures > 0)) + 0.5
    width = max(1.3 * columns, 1.8 * temperatures)
    figure.set_size_inches(width, height)
    if not temperatures:
        return figure, None
    parts: Any = figure.subfigures(2, 1, height_ratios=[rows + 0.3, 1.3])
    return tuple(parts)


def several(numbers: float | Iterable[float]) -> list[float]:
    """Numbers, also where there is only one."""
    return list(numbers) if isinstance(numbers, Iterable) else [numbers]


def check_images(images: Any) -> None:
    """Refuse what is no batch, list or data set of images."""
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
    first = images[0]
    if isinstance(images, (tuple, list)) and isinstance(first, Tensor) and first.ndim == 4:
        raise ValueError("images must be images alone, got a batch: preview(transform, *batch)")
    if not isinstance(image_of(first), (Tensor, Image.Image)):
        raise TypeError(
            "images must be tensors, PIL images or tuples that begin with one, got a "
            f"{type(first).__name__}"
        )


def around(eps: tuple[float, float]) -> list[float]:
    """Half of a range's end, itself and twice that."""
    return [eps[1] / 2, eps[1], 2 * eps[1]]


def needs_label(transform: LatentPerturb | LatentAdversarial) -> bool:
    """Whether it asks for each image's label."""
    return bool(transform.flow.num_classes) or isinstance(transform, LatentAdversarial)


def label_of(sample: Any) -> Tensor | None:
    """The label of a sample (image, label) as one of a batch; None where there is none."""
    label = find_labels(sample) if isinstance(sample, (tuple, list)) else None
    if isinstance(label, Integral):
        return torch.tensor([int(label)], device="cpu")
    return label[None] if isinstance(label, Tensor) else None


def apply(transform: Any, image: Any, label: Tensor | None) -> Any:
    """Perturb one image."""
    if isinstance(transform, LatentAdversarial):
        x, restore = to_batch(image, transform.flow.channels)
        return restore(transform(x, label))
    return image_of(transform(image)) if label is None else transform(image, label)[0]


def shown(image: Any, transform: Any) -> Tensor:
    """An image in the transform's units as (C, H, W) in [0, 1]."""
    x, _ = to_batch(image, transform.flow.channels)
    unit: Callable[[Tensor], Tensor] = transform._normalization.undo
    return unit(x)[0].detach().cpu()


def draw_image(axes: Any, image: Tensor, title: str) -> None:
    """An image (C, H, W) without ticks."""
    axes.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_axis_off()
    axes.set_title(title, fontsize=8)


@torch.no_grad()
def draw_samples(
    figure: Any, flow: Flow, like: Tensor, temperatures: Sequence[float], seed: int
) -> None:
    """One row: the same latents at each temperature."""
    height, width = fit_to_flow(like, flow).shape[-2:]
    axes = figure.subplots(1, len(temperatures), squeeze=False)[0]
    for place, temperature in zip(axes, temperatures, strict=True):
        # A user's flow may have a `sample` of its own, with other arguments.
        samples = Flow.sample(
            flow,
            SAMPLES,
            size=(height, width),
            temperature=temperature,
            generator=torch.Generator().manual_seed(seed),
        ).cpu()
        draw_image(place, torch.cat(list(samples), dim=2), f"samples, temperature {temperature:g}")
