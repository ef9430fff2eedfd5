"""Does a flow suit a user's images, and which eps does."""

from __future__ import annotations

import copy
import math
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latent_aug.diagnostics.flips import CHUNK, Flips
from latent_aug.diagnostics.measure import average_change, measure_flow, write_rows
from latent_aug.diagnostics.verdict import Finding, Grade, choose_grade, interpret_figures
from latent_aug.flows import ConditionalDenseFlow, Flow, Glow
from latent_aug.flows.hub import load_flow
from latent_aug.images.conversion import Normalization, fit_to_flow, from_float
from latent_aug.images.datasets import (
    UInt8Images,
    check_dataset,
    check_size,
    open_images,
    pair_with_classes,
    read_images,
    spread_indices,
    to_uint8,
)
from latent_aug.transforms import functional as LF
from latent_aug.transforms.random import LatentPerturb
from latent_aug.utils.arguments import require_choice, require_number, require_positive
from latent_aug.utils.randomness import sample_normal

GREY_LEVELS = 10.0
"""Mean change of a pixel that a suggested eps aims at; linf 0.25 makes about that on CIFAR-10."""

CALIBRATED_ON = 200  # images
LARGE = 64  # pixels a side, above which a copy is advised
FEW = 100  # images below which figures are rough
LOWEST_EPS, HIGHEST_EPS = 1e-3, 1e3  # eps
TUNING_STEPS, TUNING_BATCH = 1000, 64  # of the advised fine-tuning
TIMED = 32  # images of the step that its time is estimated by


@dataclass(frozen=True)
class FlowCheck:
    """The result of `check_flow`.

    Attributes:
        figures: The result of `measure_flow`. With a classifier each perturbation has its
            `flipped`, the share of predictions that change.
        norm: The norm of the suggested eps.
        eps: The suggested eps.
        by_change: The eps that changes pixels by the asked number of grey levels on average,
            or `HIGHEST_EPS` if none does.
        by_flips: The greatest eps that flips no more than the asked share of the classifier's
            predictions, `LOWEST_EPS` if there is none, which limits nothing. None without a
            classifier.
        findings: What the figures show, each with the best grade that it allows.
        remedy: The way to a flow that suits: for a flow of the package the command that fine-tunes
            it.
        minutes: An estimate of the time that the remedy takes on this machine. None where the flow
            suits, or cannot be trained here.
    """

    figures: dict[str, Any]
    norm: LF.Norm
    eps: float
    by_change: float
    by_flips: float | None
    findings: tuple[Finding, ...]
    remedy: str
    minutes: float | None = None

    @property
    def grade(self) -> Grade:
        """The worst grade of the findings: "suits", "usable" at that eps, or "not usable"."""
        return choose_grade(self.findings)

    @property
    def fits(self) -> bool:
        """Whether the flow suits the images."""
        return self.grade == "suits"

    @property
    def problems(self) -> tuple[str, ...]:
        """Findings that keep the flow from suiting the images, one sentence each."""
        return tuple(found.text for found in self.findings if found.grade != "suits")

    @property
    def at_eps(self) -> dict[str, Any]:
        """The figures of the perturbation of the suggested eps."""
        return pick_perturbation(self.figures, self.eps)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Findings that are no problem, one sentence each."""
        return tuple(found.text for found in self.findings if found.grade == "suits")

    def __str__(self) -> str:
        f = self.figures
        bits, few = f["bits_per_dim"], f["images"] < FEW
        largest = f["round_trip_max_error"]
        error = "not finite" if largest is None else f"greatest error {largest:.1e}"
        lines = [
            f"{f['images']} images, "
            + ("no bits/dim" if bits is None else f"{bits:.3f} bits/dim")
            + (": few, so that all of this is rough" if few else ""),
            f"round trip: {error}, {f['uint8_identical']} of {f['images']} images byte for byte",
            f"latents' mean a level, finest first: {f['latent_mean']}",
            f"latents' standard deviation (the prior's is 1): {f['latent_std']}",
            *write_rows(f),
            *([] if self.eps >= HIGHEST_EPS else [self.suggestion]),
            self.verdict,
        ]
        return "\n".join(lines)

    @property
    def suggestion(self) -> str:
        """The suggested eps, and what it follows from."""
        line = f"suggested for LatentPerturb: norm={self.norm!r}, eps={self.eps:.3g}"
        if self.by_flips is None:
            return line
        return f"{line} (by change {self.by_change:.3g}, by label flips {self.by_flips:.3g})"

    @property
    def verdict(self) -> str:
        """The findings, a line each, and the conclusion."""
        lines = [f"- {finding.text}" for finding in self.findings]
        return "\n".join([*lines, self.conclusion])

    @property
    def conclusion(self) -> str:
        """The grade, with what to do about it."""
        took = ""
        if self.minutes is not None:
            took = f" (about {max(1, round(self.minutes))} min on this machine)"
        if self.grade == "suits":
            return "The flow suits these images."
        if self.grade == "usable":
            return (
                f"The flow is usable on these images at {self.norm} eps {self.eps:.3g}. "
                f"Fine-tuning helps{took}: {self.remedy}"
            )
        return f"The flow is not usable on these images as it is{took}: {self.remedy}"


def check_flow(
    flow: Flow | str | Path,
    images: Any,
    *,
    norm: LF.Norm = "linf",
    grey_levels: float = GREY_LEVELS,
    classifier: nn.Module | None = None,
    flips: float = 0.05,
    normalize: Any = None,
    size: int | None = None,
    count: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> FlowCheck:
    """Does a flow suit your images, and which eps would? Look here before you train with it.

    The answer has three grades. "suits": take it. "usable": it works at the suggested eps, and
    fine-tuning it on your images helps. "not usable": it does not perturb them sensibly.

    Args:
        flow: A `Flow`, or a name or path for `load_flow`. A flow of classes takes them as its
            training does, from `targets` or (image, class) samples.
        images: Your images, or tuples that begin with one, or the path of a folder or tar of
            them. Images are PIL, uint8, or float in [0, 1]. Sides that are not multiples of the
            flow's `multiple` are padded as the transforms do. The figures are of the padded images,
            the suggested eps is of what is left after cropping back.
        norm: The norm of the suggested eps: "linf", "l2" or "rms".
        grey_levels: Mean absolute change of a pixel, of 255, that the suggested eps aims at.
        classifier: Your trained model. The suggested eps then also flips no more than `flips` of
            its predictions. What it shows of an untrained one is a remark, as the flow is not to
            blame.
        flips: Greatest share of predictions that may flip.
        normalize: v2.Normalize or (mean, std) that the classifier's inputs go through. The images
            come without it, in [0, 1].
        size: Resize and crop the images to this side.
        count: At most this many images, spread over the data set, are looked at. Eps and
            flips are found on up to 200 of them.
        seed: The seed of dequantization noise and perturbations.
        progress: Show a progress bar.

    Returns:
        Figures, a suggested eps, findings and a grade. Print it to read it.

    Raises:
        ValueError: The images have other channels than the flow, or a size that it does not map.
            There is no flow of that name. An argument is out of range.
        TypeError: `flow` is no flow, `classifier` no module, or it returns no logits.
        FileNotFoundError: No such images, or a directory that holds no flow.
        OSError: An image cannot be read.

    Source: bits/dim as in Kingma & Dhariwal 2018. The paper chooses eps by validation accuracy.

    Example:
        >>> import torch
        >>> images = torch.full((4, 1, 28, 28), 100, dtype=torch.uint8)
        >>> found = check_flow("glow-fashionmnist", images)
        >>> found.eps > 0, found.figures["uint8_identical"]
        (True, 4)
    """
    check_arguments(norm, grey_levels, flips, normalize, classifier)
    loaded = load_flow(flow) if isinstance(flow, (str, Path)) else flow
    if not isinstance(loaded, Flow):
        raise TypeError(f"flow must be a Flow, a name or a path, got a {type(loaded).__name__}")
    if isinstance(images, (str, Path)):
        images = open_images(images)
    check_dataset("images", images)
    pixels = read_images(loaded, images, size, keep_bytes=0)
    require_positive("count", count)
    check_size(pixels, loaded)
    chosen, y = pixels.read_some(count)
    few = spread_indices(len(chosen), CALIBRATED_ON)
    perturb = make_perturber(loaded, chosen[few], None if y is None else y[few], norm, seed)
    counter = None
    if classifier is not None:
        counter = Flips(classifier, Normalization(normalize, loaded.channels), perturb)
    eps, by_change, by_flips = suggest_eps(perturb, counter, grey_levels, flips)
    figures = measure_flow(
        loaded,
        read_images(loaded, pair_with_classes(pad_images(chosen, loaded), y)),
        settings=[(norm, factor * eps) for factor in (0.5, 1.0, 2.0)],
        seed=seed,
        progress=progress,
    )
    findings = [*interpret_figures(figures, pick_perturbation(figures, eps))]
    if by_change >= HIGHEST_EPS:
        text = f"no eps changes pixels by {grey_levels:g} grey levels on average"
        findings.append(Finding(text, "not usable"))
    if counter is not None:
        for perturbation in figures["perturbations"]:
            perturbation["flipped"] = counter.measure_share(perturbation["eps"])
        doubts = [*counter.explain_doubts(), *explain_lowest(by_flips, flips)]
        findings += [Finding(text, "suits") for text in doubts]
    suits = choose_grade(findings) == "suits"
    findings += advise_copy(pixels, loaded)
    return FlowCheck(
        figures,
        norm,
        eps,
        by_change,
        by_flips,
        tuple(findings),
        word_remedy(loaded, pixels),
        None if suits else estimate_minutes(loaded, chosen, min(TUNING_BATCH, len(pixels))),
    )


def suggest_eps(
    perturb: Callable[[float], Tensor], counter: Flips | None, grey_levels: float, flips: float
) -> tuple[float, float, float | None]:
    """Suggest an eps, and give the greatest by change and by flips that it comes from.

    Args:
        perturb: A function of eps that gives the perturbed images. 0 leaves them.
        counter: The predictions of a classifier, or None.
        grey_levels: The greatest mean absolute change of a pixel, of 255.
        flips: The greatest share of predictions that may flip.
    """
    x = perturb(0.0)
    by_change = find_greatest(
        lambda eps: float(average_change(perturb(eps), x).mean()) <= grey_levels
    )
    if counter is None:
        return by_change, by_change, None
    by_flips = find_greatest(lambda eps: counter.measure_share(eps) <= flips)
    return min(by_change, by_flips) if by_flips > LOWEST_EPS else by_change, by_change, by_flips


def explain_lowest(by_flips: float | None, flips: float) -> Iterator[str]:
    """Explain why no eps flips few enough predictions, where none does."""
    if by_flips is not None and by_flips <= LOWEST_EPS:
        yield (
            f"no eps flips {flips:.0%} or less of the predictions, not even {LOWEST_EPS:g}, which "
            "nobody sees: the classifier is not trained, or its inputs need normalize; the "
            "suggested eps is by change alone"
        )


def pick_perturbation(figures: dict[str, Any], eps: float) -> dict[str, Any]:
    """Pick the perturbation of an eps from the result of `measure_flow`."""
    return next(found for found in figures["perturbations"] if found["eps"] == eps)


def estimate_minutes(flow: Flow, pixels: Tensor, batch_size: int) -> float | None:
    """Estimate the minutes that fine-tuning on such uint8 images takes on this machine.

    It is None for a flow that `latent-aug train` does not train.
    """
    if not isinstance(flow, (Glow, ConditionalDenseFlow)):
        return None
    trained = copy.deepcopy(flow).requires_grad_(True).train()
    x = fit_to_flow(pixels[:TIMED].to(flow.device, torch.float32) / 255, flow)
    y = torch.zeros(len(x), dtype=torch.long, device=x.device) if flow.num_classes else None
    seconds = []
    with torch.enable_grad():
        for _ in range(2):  # the first one warms up
            started = time.perf_counter()
            loss = -trained.log_prob(x, y).mean()
            loss.backward()
            float(loss.detach())  # waits for an accelerator
            seconds.append(time.perf_counter() - started)
    return seconds[-1] / len(x) * batch_size * TUNING_STEPS / 60


def check_arguments(
    norm: Any, grey_levels: float, flips: float, normalize: Any, classifier: Any
) -> None:
    """Check the arguments of `check_flow` that need no look at flow or images.

    Raises:
        ValueError, TypeError: One is out of range or of another type.
    """
    require_choice("norm", norm, ("linf", "l2", "rms"))
    if not require_number("grey_levels", grey_levels) > 0:
        raise ValueError(f"grey_levels must be above 0, got {grey_levels!r}")
    if not 0 < require_number("flips", flips) < 1:
        raise ValueError(f"flips must lie in (0, 1), got {flips!r}")
    if normalize is not None and classifier is None:
        raise ValueError(
            "normalize is of the classifier's inputs, and there is no classifier; images come in "
            "[0, 1], before Normalize"
        )
    if not isinstance(classifier, (nn.Module, type(None))):
        raise TypeError(f"classifier must be an nn.Module, got a {type(classifier).__name__}")


def pad_images(pixels: Tensor, flow: Flow) -> Tensor:
    """Pad uint8 images (B, C, H, W) where the flow does not map their sides."""
    if not any(side % flow.multiple for side in pixels.shape[2:]):
        return pixels
    parts = [fit_to_flow(part.float() / 255, flow) for part in pixels.split(CHUNK)]
    return torch.cat([from_float(part, torch.uint8) for part in parts])


def advise_copy(images: UInt8Images, flow: Flow) -> Iterator[Finding]:
    """Remark how large images are perturbed by a copy of the size that was looked at."""
    height, width = images.shape[1:]
    if flow.size is not None:
        return
    if images.size is None and min(height, width) > LARGE:
        text = (
            f"the images are {height}x{width}: a flow that was trained on small ones perturbs them "
            "by a copy, with resolution=32 in the transform; look at that with size=32, or "
            "--size 32"
        )
        yield Finding(text, "suits")
    elif images.size and min(to_uint8(images.read(0), images.channels).shape[1:]) > images.size:
        text = (
            f"the images were resized to {images.size} pixels for this: where the transform gets "
            f"them larger, give it resolution={images.size}"
        )
        yield Finding(text, "suits")


def word_remedy(flow: Flow, images: UInt8Images) -> str:
    """Say what to do about a flow that does not suit the images that were looked at."""
    if not isinstance(flow, (Glow, ConditionalDenseFlow)):
        return (
            "train it on them, see that decode undoes encode, and whiten its latents (mean 0, "
            "standard deviation 1)."
        )
    name = flow.loaded_from[0] if flow.loaded_from else "FLOW"
    size, sides = images.size, images.shape[1:]
    if any(side % flow.multiple for side in sides):  # training does not pad
        size = min(sides) + -min(sides) % flow.multiple
    options = f"--size {size} " if size else ""
    needed = "with their classes" if flow.num_classes else "labels not needed"
    return (
        f"fine-tune it on them, {needed}, with `latent-aug train DATA --init "
        f"{shlex.quote(name)} {options}--output DIRECTORY --lr 5e-4 --steps {TUNING_STEPS}`, or "
        "use another."
    )


def make_perturber(
    flow: Flow, pixels: Tensor, y: Tensor | None, norm: LF.Norm, seed: int
) -> Callable[[float], Tensor]:
    """Make a function of eps that perturbs uint8 images by it, always with the same draws.

    Images that the flow cannot perturb are decoded all the same.
    """
    transform = LatentPerturb(0.0, norm=norm, flow=flow)
    images = pixels.to(flow.device, torch.float32) / 255
    classes = [None] * len(images) if y is None else y.to(flow.device).split(CHUNK)
    parts = [
        transform.encode(part, y=own)
        for part, own in zip(images.split(CHUNK), classes, strict=False)
    ]
    shape = (len(images), *parts[0].z.shape[1:])
    draws = sample_normal(shape, parts[0].z, torch.Generator().manual_seed(seed)).split(CHUNK)

    @torch.no_grad()
    def perturb(eps: float) -> Tensor:
        noises = [LF.noise_of_norm(own, eps, norm) for own in draws]
        return torch.cat(
            [part.decode_with(noise) for part, noise in zip(parts, noises, strict=True)]
        )

    return perturb


def find_greatest(holds: Callable[[float], bool]) -> float:
    """Find the greatest eps for which something holds that larger ones break, within 2 %.

    `LOWEST_EPS` where it holds for none, `HIGHEST_EPS` where it holds for all.
    """
    low, high = LOWEST_EPS, HIGHEST_EPS
    if holds(high):
        return high
    while high / low > 1.02:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return float(f"{low:.3g}")
