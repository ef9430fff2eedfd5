"""What the random and the adversarial perturbation have in common: a flow and images for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latent_aug import functional as LF
from latent_aug.flows import Flow
from latent_aug.hub import HeldFlow
from latent_aug.images import FallbackCounter, Normalization, check_range, fit_to_flow
from latent_aug.randomness import Draws


class UsesFlow:
    """Holds a flow privately, takes images to it and back, and counts what it cannot perturb."""

    norm: LF.Norm | None
    clip: float | None

    def _use(
        self, flow: Flow | str | Path, normalize: Any, generator: torch.Generator | None
    ) -> None:
        """Take the arguments that both perturbations share.

        Raises:
            NotImplementedError: The flow is class-conditional.
        """
        self._held = HeldFlow(flow)
        if self.flow.num_classes:
            raise NotImplementedError("class-conditional flows are not supported yet")
        self._normalization = Normalization(normalize, self.flow.channels)
        self._draws = Draws(generator)
        self._fallbacks = FallbackCounter()
        self._checked_devices: set[torch.device] = set()

    @property
    def flow(self) -> Flow:
        """The flow; shared, so treat it as read-only."""
        return self._held.flow

    @property
    def fallbacks(self) -> int:
        """Samples that came back as they were, because the flow could not perturb them.

        Counted in this process: what happens in a DataLoader's workers is not seen here. Look
        at it with ``num_workers=0``.
        """
        return int(self._fallbacks)

    def _unit_range(self, images: Tensor) -> Tensor:
        """A float batch in the user's units as one in [0, 1], its range checked."""
        x = self._normalization.undo(images)
        if x.is_cpu or x.device not in self._checked_devices:  # elsewhere a check is a sync
            check_range(x)
            self._checked_devices.add(x.device)
        return x.clamp(0, 1)

    def _encode(self, x: Tensor) -> Tensor:
        """Latents of images in [0, 1], padded to a size that the flow maps."""
        return self.flow.encode(fit_to_flow(x, self.flow))

    def _image_at(self, z: Tensor, x: Tensor) -> Tensor:
        """The image of a latent, of x's size, in the user's units, within `clip` of x."""
        decoded = self.flow.decode(z)[..., : x.shape[-2], : x.shape[-1]].clamp(0, 1)
        return self._normalization.apply(LF.clip_change(decoded, x, self.clip, self.norm))

    def _restore_unusable(self, perturbed: Tensor, original: Tensor, z: Tensor) -> Tensor:
        """Fall back where the flow failed, and count it."""
        result, count = LF.restore_unusable(perturbed, original, z)
        self._fallbacks.add(count)
        return result
