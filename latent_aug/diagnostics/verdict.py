"""Judge a flow by its figures on images: it suits them, is usable, or is not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Grade = Literal["suits", "usable", "not usable"]
GRADES: tuple[Grade, ...] = ("suits", "usable", "not usable")  # best first

SUITING_STD, USABLE_STD = (0.7, 1.4), (0.2, 4.5)  # the prior's standard deviation is 1
SUITING_FALLBACKS, USABLE_FALLBACKS = 0.001, 0.05  # shares of the images
SUITING_SMOOTHNESS, USABLE_SMOOTHNESS = 0.3, 0.15
"""Correlations of neighbouring pixels' changes. The bundled flows reach 0.47 on clothes and 0.9 on
photographs. A flow that was trained for five steps has 0.08."""

MANY_OUT_OF_RANGE = 0.05  # share of the pixel values
RAW_BITS = 8.0  # bits/dim of the uncompressed images


@dataclass(frozen=True)
class Finding:
    """One thing that the figures show.

    Args:
        text: The finding, one sentence.
        grade: The best grade that it allows; "suits" makes it a mere remark.
    """

    text: str
    grade: Grade


def choose_grade(findings: Iterable[Finding]) -> Grade:
    """The worst grade of the findings; "suits" if there are none."""
    return max((finding.grade for finding in findings), key=GRADES.index, default="suits")


def interpret_figures(figures: dict[str, Any], at_eps: dict[str, Any]) -> Iterator[Finding]:
    """Findings that follow from the figures alone.

    Args:
        figures: The result of `measure_flow`.
        at_eps: The one of its `perturbations` that is meant to be used.
    """
    if None in (*figures["latent_std"], figures["round_trip_max_error"]):
        text = "the flow takes images to values that are not finite, or back to such"
        yield Finding(text, "not usable")
    yield from compare_bytes(figures["images"], figures["uint8_identical"])
    yield from judge_fallbacks(at_eps["fallbacks"])
    bits = figures["bits_per_dim"]
    if bits is not None and bits > RAW_BITS:
        text = f"the flow needs {bits:.1f} bits/dim, the uncompressed images {RAW_BITS:g}"
        yield Finding(text, "not usable")
    yield from judge_scale([std for std in figures["latent_std"] if std is not None])
    yield from judge_smoothness(at_eps["smoothness"])
    if at_eps["saturated"] > MANY_OUT_OF_RANGE:
        text = (
            f"{at_eps['saturated']:.1%} of all pixel values leave [0, 1] at eps "
            f"{at_eps['eps']:g} and are clamped, as is usual for mostly black or white images"
        )
        yield Finding(text, "suits")


def compare_bytes(count: int, identical: int) -> Iterator[Finding]:
    """Find images that encoding and decoding do not give back."""
    if identical < count:
        few = count - identical <= USABLE_FALLBACKS * count
        text = f"{count - identical} of {count} images do not come back byte for byte"
        yield Finding(text, "usable" if few else "not usable")


def judge_fallbacks(share: float) -> Iterator[Finding]:
    """Find too many images that stay as they are."""
    if share > SUITING_FALLBACKS:
        grade: Grade = "usable" if share <= USABLE_FALLBACKS else "not usable"
        text = f"{share:.1%} of the images cannot be perturbed and stay as they are"
        yield Finding(text, grade)


def judge_scale(stds: list[float]) -> Iterator[Finding]:
    """Find latents whose scale is not that of the prior.

    Args:
        stds: The standard deviation of the latents at each level, finest first.
    """
    low, high = SUITING_STD
    if all(low <= std <= high for std in stds):
        return
    reasons = []
    if max(stds) > high:
        reasons.append("the images lie off what the flow was trained on")
    if min(stds) < low:
        reasons.append(
            "the images are plainer or less noisy than those, or the flow was trained too briefly"
        )
    usable = all(USABLE_STD[0] <= std <= USABLE_STD[1] for std in stds)
    text = (
        f"latents are not of the prior's scale: standard deviations {stds}, expected {low} to "
        f"{high}; {'; '.join(reasons)}"
    )
    yield Finding(text, "usable" if usable else "not usable")


def judge_smoothness(smoothness: float) -> Iterator[Finding]:
    """Find perturbations that are mere noise on each pixel."""
    if smoothness >= SUITING_SMOOTHNESS:
        return
    grade: Grade = "usable" if smoothness >= USABLE_SMOOTHNESS else "not usable"
    text = (
        "a perturbation is noise, pixel by pixel: the changes of neighbours correlate by "
        f"{smoothness:.2f}; the flow was trained too briefly or is too small"
    )
    yield Finding(text, grade)
