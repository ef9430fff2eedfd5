"""What the random and the adversarial perturbation have in common: a flow and images for it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latent_aug.flows import Flow, Glow
from latent_aug.flows.hub import HeldFlow
from latent_aug.images.conversion import (
    ERASED,
    WRONG_NORMALIZE,
    FallbackCounter,
    Normalization,
    check_range,
    encoded,
    fit_to_flow,
    in_unit_range,
)
from latent_aug.transforms import functional as LF
from latent_aug.transforms.regions import Levels, Mask, check_levels, check_mask
from latent_aug.utils.arguments import require_range
from latent_aug.utils.randomness import Draws

if TYPE_CHECKING:
    from typing_extensions import Self

ENOUGH = 8  # first samples, none of which could be perturbed, before a warning
JUDGED, MANY = 200, 0.1  # first samples, and the share of them that may not be perturbed


class UsesFlow:
    """Holds a flow privately, takes images to it and back, and counts what it cannot perturb."""

    _dissolves_at = 2.0  # eps of "linf", "rms" and None at which the bundled flows' images dissolve
    _usual_eps = "usual are 0.25 for 'linf' and 'rms', 10 for 'l2' at 32x32; see `check_flow`"
    _slight_below = 1.0  # "l2" radius that moves pixels of a 32 x 32 image by a grey level

    eps: tuple[float, float]
    p: float
    norm: LF.Norm | None
    clip: float | None

    def _use(
        self,
        flow: Flow | str | Path,
        *,
        normalize: Any,
        mask: Mask,
        levels: Levels,
        labels_getter: Any,
        generator: torch.Generator | None,
    ) -> None:
        """Take the arguments that both perturbations share."""
        if labels_getter != "default" and not callable(labels_getter):
            raise TypeError(f"labels_getter must be 'default' or callable, got {labels_getter!r}")
        self._held, self.labels_getter = HeldFlow(flow), labels_getter
        self._normalization = Normalization(normalize, self.flow.channels)
        # In a tuple a mask that is a network stays out of a transform's parameters, as the flow.
        self._mask, self.levels = (check_mask(mask, self.flow),), check_levels(levels, self.flow)
        self._draws = Draws(generator)
        self._fallbacks = FallbackCounter()
        self._checked_devices: set[torch.device] = set()
        if self._norm_holds:
            self._warn_of_size(whole=mask is None and levels is None)

    @property
    def _norm_holds(self) -> bool:
        """Whether eps and norm say how large a perturbation is."""
        return True

    def _warn_of_size(self, *, whole: bool) -> None:
        """Say so where eps looks like that of another norm."""
        eps = self.eps[1]
        if self.norm != "l2" and eps >= self._dissolves_at:
            warnings.warn(
                f"eps={eps:g} with norm={self.norm!r} moves every component of a latent by about "
                "that many standard deviations, and images dissolve. Only a radius, as of "
                f"norm='l2', is as large; {self._usual_eps}",
                stacklevel=4,
            )
        slight = self.norm == "l2" and 0 < eps <= self._slight_below
        if slight and whole and isinstance(self.flow, Glow):  # another's latents may be few
            warnings.warn(
                f"eps={eps:g} with norm='l2' is the length of the whole perturbation, spread over "
                f"all components of a latent: it hardly changes an image; {self._usual_eps}",
                stacklevel=4,
            )

    @property
    def flow(self) -> Flow:
        """The flow; shared, so treat it as read-only."""
        return self._held.flow

    @property
    def mask(self) -> Mask:
        """What was given as mask."""
        return self._mask[0]

    @property
    def has_generator(self) -> bool:
        """Whether it draws from a generator of its own."""
        return self._draws.generator is not None

    @property
    def normalizes(self) -> bool:
        """Whether images come normalized."""
        return self._normalization.mean_std is not None

    @property
    def fallbacks(self) -> int:
        """Samples that came back as they were, because the flow could not perturb them.

        Counted since the start, in this process: what happens in a DataLoader's workers is not
        seen here. Look at it with ``num_workers=0``.
        """
        return int(self._fallbacks)

    def with_eps(self, eps: float) -> Self:
        """A copy that perturbs every sample by this eps: p is 1, and no `generator` is left.

        Its counts are its own.
        """
        result = self.with_generator(None)
        result.eps, result.p = require_range("eps", eps), 1.0
        return result

    def with_generator(self, generator: torch.Generator | None) -> Self:
        """A copy that draws from this generator, with counts of its own."""
        result = copy.copy(self)
        result._draws, result._fallbacks = Draws(generator), FallbackCounter()
        return result

    def _unit_range(self, images: Tensor) -> Tensor:
        """A float batch in the user's units as one in [0, 1], its range checked."""
        x = self._normalization.undo(images)
        if x.is_cpu or x.device not in self._checked_devices:  # elsewhere a check is a sync
            if self.normalizes:
                check_range(x, WRONG_NORMALIZE, allowed=ERASED)
            else:
                check_range(x)
            self._checked_devices.add(x.device)
        return x.clamp(0, 1)

    def _encode(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Latents of images in [0, 1], padded to a size that the flow maps."""
        return encoded(self.flow, fit_to_flow(x, self.flow), y)

    def _to_image(self, decoded: Tensor, x: Tensor, pixels: Tensor | None) -> Tensor:
        """What the flow decoded as an image beside x: in the user's units, at most `clip` away."""
        decoded = in_unit_range(decoded[..., : x.shape[-2], : x.shape[-1]])
        if pixels is not None:
            decoded = torch.where(pixels, decoded, x)
        return self._normalization.apply(LF.clip_change(decoded, x, self.clip, self.norm))

    def _restore(
        self,
        perturbed: Tensor,
        original: Tensor,
        z: Tensor,
        pixels: Tensor | None,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """Put the original back where the flow failed, and count it, and outside the mask.

        Of samples that are not `chosen` (B,) nothing is wanted, so they do not count.
        """
        result, count = LF.restore_unusable(perturbed, original, z, counted=chosen)
        self._fallbacks.add(count)
        if self._fallbacks.tried is not None and count.is_cpu:  # elsewhere a look is a sync
            self._warn_of_fallbacks(len(z), int(self._fallbacks.counts[count.device]))
        return result if pixels is None else torch.where(pixels, result, original)

    def _warn_of_fallbacks(self, count: int, fallbacks: int) -> None:
        """Say so, once, where all or many of the first samples came back as they were."""
        tried = (self._fallbacks.tried or 0) + count
        useless = fallbacks == tried >= ENOUGH
        if useless or (tried >= JUDGED and fallbacks > MANY * tried):
            warnings.warn(
                f"{fallbacks} of {tried} images so far came back as they were: the flow "
                "cannot perturb them. They are far off the data that the flow was trained on, as "
                "noisy images are, or not finite, as in an attack the model's gradient may be; "
                "see `fallbacks`",
                stacklevel=2,
            )
        self._fallbacks.tried = None if useless or tried >= JUDGED else tried

    def _describe(self, *more: str) -> str:
        """The arguments that matter, those named and those shared, for `print`."""
        loaded = self.flow.loaded_from
        norm = ("norm",) if self._norm_holds else ()
        values = {name: getattr(self, name) for name in ("eps", *more, *norm)}
        values = {name: v[0] if is_point(v) else v for name, v in values.items()}
        values["flow"] = loaded[0] if loaded else type(self.flow).__name__
        values |= {name: getattr(self, name) for name in ("p", "clip", "levels")}
        values["resolution"] = getattr(self, "resolution", None)
        shown = {name: v for name, v in values.items() if v is not None or name == "norm"}
        given = {"normalize": self.normalizes, "mask": self.mask is not None}
        long = [f"{name}=..." for name, there in given.items() if there]
        return ", ".join([*(f"{name}={value!r}" for name, value in shown.items()), *long])


def is_point(value: Any) -> bool:
    """Whether a (low, high) range is one number."""
    return isinstance(value, tuple) and value[0] == value[1]
