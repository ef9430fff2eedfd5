"""Looking at a perturbation: what it does to images at several sizes, and what its flow draws."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from latent_aug.adversarial import LatentAdversarial
from latent_aug.arguments import number_range
from latent_aug.data import image_of, spread
from latent_aug.flows import Flow
from latent_aug.images import downscaled, fit_to_flow, to_batch
from latent_aug.structures import find_labels
from latent_aug.transforms import LatentPerturb

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
    places = spread(len(images), MOST_IMAGES)
    samples = [images[i] for i in places]
    chosen = [image_of(sample) for sample in samples]
    kinds = {getattr(image, "dtype", torch.uint8) for image in chosen}
    if transform.normalizes and torch.uint8 in kinds:
        raise TypeError("images are 8-bit, so they cannot be normalized: preview normalized floats")
    sizes = (
        around(transform.eps) if eps is None else [number_range("eps", e)[0] for e in several(eps)]
    )
    temperatures = several(temperatures)
    columns, rows = 1 + 2 * len(sizes), len(chosen)
    height = 1.3 * (rows + bool(temperatures)) + 0.5
    width = max(1.3 * columns, 1.8 * len(temperatures))
    figure = Figure(figsize=(width, height), layout="constrained")
    upper: Any = figure
    if temperatures:
        parts: Any = figure.subfigures(2, 1, height_ratios=[rows + 0.3, 1.3])
        upper, lower = parts
    grid = upper.subplots(rows, columns, squeeze=False)
    for row, image in enumerate(chosen):
        original = shown(image, transform)
        draw_image(grid[row, 0], original, "original" if row == 0 else "")
        own = label_of(samples[row]) if labels is None and needs_label(transform) else None
        given = (image, own if labels is None else labels[places[row]][None])
        of_sample = isinstance(transform, LatentPerturb) and callable(transform.mask)
        if of_sample and isinstance(samples[row], (tuple, list)):
            given = (samples[row], None)  # the mask is of the whole sample, its label included
        for column, size in enumerate(sizes):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                perturbed = shown(apply(transform.with_eps(size), *given), transform)
            difference = (perturbed - original) * amplify + 0.5
            kind = transform.norm if transform._norm_holds else "eps"
            names = (f"{kind} {size:.3g}", f"difference times {amplify:g}")
            draw_image(grid[row, 1 + 2 * column], perturbed, names[0] if row == 0 else "")
            draw_image(grid[row, 2 + 2 * column], difference, names[1] if row == 0 else "")
    if temperatures:
        like = shown(chosen[0], transform)[None]
        like = downscaled(like, getattr(transform, "resolution", None))
        draw_samples(lower, transform.flow, like, temperatures, seed)
    return figure


def several(numbers: float | Iterable[float]) -> list[float]:
    """Numbers, also where there is only one."""
    return list(numbers) if isinstance(numbers, Iterable) else [numbers]


def check_images(images: Any) -> None:
    """Refuse what is no batch, list or data set of images."""
    several = hasattr(images, "__len__") and hasattr(images, "__getitem__")
    if isinstance(images, (str, Path)) or not several:
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
        return torch.tensor([int(label)])
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
    shape = (SAMPLES, *fit_to_flow(like, flow).shape[1:])
    z = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weights = next(flow.parameters(), z)
    y = (
        torch.arange(SAMPLES, device=weights.device) % flow.num_classes
        if flow.num_classes
        else None
    )
    axes = figure.subplots(1, len(temperatures), squeeze=False)[0]
    for place, temperature in zip(axes, temperatures, strict=True):
        samples = flow.decode((temperature * z).to(weights.device), y).cpu()
        draw_image(place, torch.cat(list(samples), dim=2), f"samples, temperature {temperature:g}")
