"""Flows that differ in one choice from the bundled ones, for `choose.py`.

Variants that `Glow` has no argument for are subclasses here: each overrides one thing, and none
is meant for use.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from latent_aug import Glow

EDGE = 0.05  # the logit is of [EDGE, 1 - EDGE], as RealNVP's, so that noisy ends stay inside


class LogitGlow(Glow):
    """A Glow of logit(x), scaled so that [0, 1] stays [0, 1]."""

    def to_logit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logits as [0, 1], and the log-determinant (B,)."""
        inner = EDGE + (1 - 2 * EDGE) * x
        highest = math.log((1 - EDGE) / EDGE)
        u = torch.logit(inner) / (2 * highest) + 0.5
        slope = (1 - 2 * EDGE) / (inner * (1 - inner) * 2 * highest)
        return u, slope.log().sum(dim=(1, 2, 3))

    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Latents of the logits."""
        return super().encode(self.to_logit(x)[0])

    def decode(self, z: Tensor, y: Tensor | None = None, **options: Any) -> Tensor:
        """Undo `encode`."""
        u = (super().decode(z, **options) - 0.5) * 2 * math.log((1 - EDGE) / EDGE)
        return (torch.sigmoid(u) - EDGE) / (1 - 2 * EDGE)

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Compute the density with the logit's log-determinant."""
        u, log_det = self.to_logit(x)
        return super().log_prob(u) + log_det

    def initialize(self, x: Tensor) -> None:
        """Initialize on logits."""
        super().initialize(self.to_logit(x)[0])


class StandardPriorGlow(Glow):
    """Priors stay N(0, I) instead of being learned per channel."""

    def requires_grad_(self, requires_grad: bool = True) -> StandardPriorGlow:
        """Set it for everything else."""
        super().requires_grad_(requires_grad)
        self.multiscale.q0.requires_grad_(False)
        return self


class SmoothedGlow(Glow):
    """Trained on images with Gaussian noise of two grey levels, against JPEG's artefacts."""

    noise = 2 / 255

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Compute the density of noisy images in training, else of the images themselves."""
        return super().log_prob(x + self.noise * torch.randn_like(x) if self.training else x)


SIZE = {"steps": 8, "hidden": 128}
SMALL = {"steps": 4, "hidden": 64}
COMMON = {"crop": 4}
WHOLE = {"crop": 0}
VARIANTS: dict[str, tuple[type[Glow], dict[str, Any], dict[str, Any]]] = {
    # name: class, its arguments, arguments of TrainConfig
    "reference": (Glow, {}, {}),
    "no crops": (Glow, {}, WHOLE),
    "logit": (LogitGlow, {}, {}),
    "K 4, H 64": (Glow, SMALL, {}),
    # What was left open, at the size of glow-cifar10-small and without crops.
    "small": (Glow, SMALL, WHOLE),
    "small, bound 2": (Glow, {**SMALL, "log_scale_bound": 2.0}, WHOLE),
    "small, bound 0.5": (Glow, {**SMALL, "log_scale_bound": 0.5}, WHOLE),
    "small, standard prior": (StandardPriorGlow, SMALL, WHOLE),
    "small, smoothed": (SmoothedGlow, SMALL, WHOLE),
    "small, no ema": (Glow, SMALL, {**WHOLE, "ema": 0.0}),
    "small, K 8, H 32": (Glow, {"steps": 8, "hidden": 32}, WHOLE),
    "small, K 2, H 128": (Glow, {"steps": 2, "hidden": 128}, WHOLE),
}


def new_flow(name: str) -> Glow:
    """The untrained flow of a variant."""
    torch.manual_seed(0)
    kind, arguments, _ = VARIANTS[name]
    return kind(3, **{**SIZE, **arguments})


def recipe(name: str) -> dict[str, Any]:
    """Its arguments of TrainConfig."""
    return {**COMMON, **VARIANTS[name][2]}
