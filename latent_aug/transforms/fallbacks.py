"""Count the images that a flow cannot perturb, and warn where these are many."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

ENOUGH = 8  # images to warn after where none of them could be perturbed
JUDGED, MANY = 200, 0.1  # images to warn after where more than this share could not


class FallbackCounter:
    """Counts images that came back as they were, on their device. Read it with `int`.

    Attributes:
        tried: The number of images so far, or None once the first ones are judged.
    """

    def __init__(self) -> None:
        self.counts: dict[torch.device, Tensor] = {}
        self.tried: int | None = 0

    def __getstate__(self) -> dict[str, Any]:  # an accelerator's counts stay in this process
        counts = {device: n for device, n in self.counts.items() if device.type == "cpu"}
        return {"counts": counts, "tried": self.tried}

    def add(self, count: Tensor, tried: int = 0) -> None:
        """Add a 0-d tensor, the count among so many images, without waiting for its device."""
        before = self.counts.get(count.device)
        self.counts[count.device] = count if before is None else before + count
        if self.tried is not None and count.is_cpu:  # elsewhere a look would wait
            self.tried += tried
            self._judge(int(self.counts[count.device]), self.tried)

    def _judge(self, fallbacks: int, tried: int) -> None:
        """Warn once if all or many of the first images came back as they were."""
        useless = fallbacks == tried >= ENOUGH
        if useless or (tried >= JUDGED and fallbacks > MANY * tried):
            warnings.warn(
                f"{fallbacks} of {tried} images so far came back as they were: the flow "
                "cannot perturb them. They are far off the data that the flow was trained on, as "
                "noisy images are, or not finite, as in an attack the model's gradient may be; "
                "see `fallbacks`",
                stacklevel=2,
            )
        if useless or tried >= JUDGED:
            self.tried = None

    def __int__(self) -> int:
        return sum(int(count) for count in self.counts.values())
