"""Measure a flow on images: its density, its exactness, and what perturbations do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from latent_aug.flows import Flow
from latent_aug.images.conversion import from_float
from latent_aug.images.datasets import UInt8Images, stack_images
from latent_aug.transforms import functional as LF
from latent_aug.transforms.regions import split_latent
from latent_aug.utils.randomness import sample_normal

SETTINGS = (("linf", 0.1), ("linf", 0.25), ("linf", 0.4), ("l2", 10.0), ("l2", 20.0))


@torch.no_grad()
def measure_flow(
    flow: Flow,
    images: UInt8Images,
    *,
    settings: Sequence[tuple[str, float]] = SETTINGS,
    batch_size: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Bits/dim, exactness, whiteness and what perturbations do, on every image given.

    Args:
        flow: A trained flow.
        images: 8-bit images, with their classes for a class-conditional flow.
        settings: (norm, eps) of the random perturbations to try.
        batch_size: Images at a time.
        seed: The seed of dequantization noise and perturbations.
        progress: Show a progress bar.

    Returns:
        Figures that are ready for JSON, None where they are not finite.

        `images` is their number. `bits_per_dim` is None, too, for a flow without `log_prob`.
        `round_trip_max_error` is in units of [0, 1]. `uint8_identical` counts the images that come
        back byte for byte. `latent_mean` and `latent_std` have an entry a level, finest first.

        `perturbations` has an entry a setting. Its `fallbacks` is the share of samples that come
        back unchanged, its `mean_change` is in grey levels of 255. Its `saturated` is the share of
        pixel values that leave [0, 1] by more than one grey level. Its `smoothness` is how the
        changes of neighbouring pixels correlate: 0 where each pixel changes by noise of its own.
    """
    device = flow.device
    generator = torch.Generator(device).manual_seed(seed)
    bits: float | None = 0.0
    largest, identical = torch.zeros((), device=device), 0
    moments = [torch.zeros(3, dtype=torch.float64, device="cpu") for _ in range(flow.levels)]
    names = ("fallbacks", "mean_change", "saturated", "smoothness")
    perturbed = [dict.fromkeys(names, 0.0) for _ in settings]
    batches = load_batches(images, batch_size)
    for number, pixels in enumerate(tqdm(batches, disable=not progress, desc="measuring")):
        x = pixels.to(device, torch.float32) / 255
        y = images.get_classes(slice(number * batch_size, (number + 1) * batch_size))
        y = None if y is None else y.to(device)
        bits = add_bits(bits, flow, x, y, generator)
        z = flow.encode(x, y)
        back = flow.decode(z, y)
        largest = torch.maximum(largest, (back - x).abs().max())  # keeps NaN, as max() may not
        same = (from_float(back, torch.uint8) == pixels.to(device)).flatten(1).all(dim=1)
        identical += int(same.sum())
        for sums, level in zip(moments, split_latent(flow, z), strict=True):
            found = (level.numel(), level.sum().item(), level.square().sum().item())
            sums += torch.tensor(found, dtype=sums.dtype, device=sums.device)
        for figures, (norm, eps) in zip(perturbed, settings, strict=True):
            normal = sample_normal(z.shape, z, generator)
            noise = LF.noise_of_norm(normal, eps, norm)  # type: ignore[arg-type]
            moved = flow.decode(z + noise, y)
            for name, value in compare(moved, x, z).items():
                figures[name] += value.sum().item()
    count = len(images)
    return {
        "images": count,
        "bits_per_dim": None if bits is None else keep_finite(bits / count),
        "round_trip_max_error": keep_finite(largest.item()),
        "uint8_identical": identical,
        "latent_mean": [keep_finite(round(float(sums[1] / sums[0]), 3)) for sums in moments],
        "latent_std": [keep_finite(round(compute_std(sums), 3)) for sums in moments],
        "perturbations": [
            {"norm": norm, "eps": eps, **{k: v / count for k, v in figures.items()}}
            for figures, (norm, eps) in zip(perturbed, settings, strict=True)
        ],
    }


def add_bits(
    bits: float | None, flow: Flow, x: Tensor, y: Tensor | None, generator: torch.Generator
) -> float | None:
    """Add the bits/dim of a batch; None once the flow turns out to have no density."""
    if bits is None:
        return None
    try:
        return bits + float(flow.bits_per_dim(x, y, generator=generator).sum())
    except NotImplementedError:
        return None


def load_batches(images: UInt8Images, batch_size: int) -> Iterable[Tensor]:
    """Read batches of uint8 images in order."""
    own = torch.Generator()  # a loader draws its workers' seed even without workers
    batches = DataLoader(images, batch_size=batch_size, collate_fn=stack_images, generator=own)
    with torch.device("cpu"):  # its generator's, whatever the default device
        return iter(batches)


def compare(moved: Tensor, x: Tensor, z: Tensor) -> dict[str, Tensor]:
    """Compare perturbed images (B, C, H, W) with their originals: figures (B,) by name."""
    outside = (moved < -1 / 255) | (moved > 1 + 1 / 255)
    unusable = LF.is_unusable(moved, x, z)
    return {
        "fallbacks": unusable,
        "mean_change": torch.where(unusable, 0.0, average_change(moved, x)),
        "saturated": outside.float().mean(dim=(1, 2, 3)),
        "smoothness": correlate_neighbours(clamp_change(moved, x)),
    }


def correlate_neighbours(change: Tensor) -> Tensor:
    """Correlate the changes (B, C, H, W) of horizontal neighbours, without centring: (B,)."""
    left, right = change[..., :-1].flatten(1), change[..., 1:].flatten(1)
    return F.cosine_similarity(left, right)


def clamp_change(moved: Tensor, x: Tensor) -> Tensor:
    """Compute the change of each finite value after clamping to [0, 1]: x's shape."""
    return moved.nan_to_num().clamp(0, 1) - x


def average_change(moved: Tensor, x: Tensor) -> Tensor:
    """Average the absolute change of the pixels, in grey levels: (B,)."""
    return (clamp_change(moved, x).abs() * 255).mean(dim=(1, 2, 3))


def keep_finite(number: float) -> float | None:
    """Keep a number that JSON knows; None for others."""
    return number if math.isfinite(number) else None


def compute_std(sums: Tensor) -> float:
    """Compute a standard deviation from count, sum and sum of squares."""
    count, total, squares = sums
    return float((squares / count - (total / count) ** 2).clamp(min=0).sqrt())


def write_rows(figures: dict[str, Any]) -> Iterator[str]:
    """Write the perturbations as rows of a Markdown table."""
    flipped = any("flipped" in p for p in figures["perturbations"])
    more = " predictions flipped |" if flipped else ""
    yield "| norm | eps | fall back | mean change (grey levels) | out of range |" + more
    yield "|---|---|---|---|---|" + "---|" * flipped
    for p in figures["perturbations"]:
        yield (
            f"| {p['norm']} | {p['eps']:g} | {p['fallbacks']:.2%} | {p['mean_change']:.1f} | "
            f"{p['saturated']:.2%} |" + (f" {p['flipped']:.1%} |" if flipped else "")
        )
