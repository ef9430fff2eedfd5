"""The share of each batch that an attack takes: it follows the classifier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latent_aug.transforms.classifier import count_classes, has_several

HIGHEST = 0.5  # of each batch, as Stutz et al. 2019
TARGET = 0.6  # skill on clean training images: 0 is chance, 1 is all right
STEP = 0.05  # from 0 to HIGHEST in ten batches
MEMORY = 0.8  # decay of the running mean, a batch
PROBED = 8  # one image in so many is looked at

FOLLOWS = "by default the share of attacked images follows the model's accuracy"
GIVE_P = "pass p=, the share of each batch to attack, such as p=0.5"


class AdaptiveShare:
    """A share that grows while a classifier has its clean training images right, and shrinks else.

    Right are enough if their share is `TARGET` of the way from chance to 1: 0.8 of two classes,
    0.64 of ten. So a classifier learns undisturbed at first, and one that does not learn is not
    attacked. One that has its first batch right is attacked at once. Later an accelerator is read
    one batch late, so that nothing waits for the current one.

    Attributes:
        value: The share, from 0 to `HIGHEST`. It begins at 0.
        skill: The running mean of the accuracy, from 0 at chance to 1.
        begun: Whether a batch was seen.

    Source: adaptive augmentation in StyleGAN2-ADA (Karras et al. 2020), with its target and, for
    two classes, its measure.
    """

    def __init__(self) -> None:
        self.value, self.skill = 0.0, 0.0
        self.begun = False
        self._latest: Tensor | None = None

    def update(self, hits: Tensor, classes: int) -> None:
        """Take note of which images (n,) the classifier has right, as zeros and ones.

        Example:
            >>> import torch
            >>> share = AdaptiveShare()
            >>> for right in (0.75, 1.0, 1.0):
            ...     share.update(torch.full((8,), right), classes=2)
            >>> share.value, round(share.skill, 3)
            (0.05, 0.68)
        """
        before = hits if hits.is_cpu or not self.begun else self._latest
        self._latest = hits
        if before is None or not len(before):
            return
        skill = (classes * float(before.mean()) - 1) / (classes - 1)
        if not self.begun:
            self.begun, self.skill = True, skill
            self.value = HIGHEST if skill > TARGET else 0.0
            return
        self.skill += (1 - MEMORY) * (skill - self.skill)
        moved = self.value + (STEP if self.skill > TARGET else -STEP)
        self.value = round(min(HIGHEST, max(0.0, moved)), 6)

    def select_probed(self, count: int, device: torch.device) -> Tensor:
        """Select the images of a batch to look at: all of the first, then evenly spread ones."""
        return torch.arange(0, count, PROBED if self.begun else 1, device=device)


def find_hits(logits: Tensor, labels: Any) -> Tensor:
    """Find which predictions are right, as zeros and ones. Labels of no class are left out.

    Args:
        logits: The logits (n, K), or (n, K, ...) with a class for each pixel.
        labels: The classes (n,), or (n, ...), or probabilities of the logits' shape.

    Raises:
        ValueError: The model gives no classes, or the labels are none.
    """
    classes = count_classes(logits, GIVE_P)
    shape = (len(logits), *logits.shape[2:])
    whole = isinstance(labels, Tensor) and labels.shape == logits.shape
    if whole and labels.is_cpu and has_several(labels):  # elsewhere a check is a sync
        raise ValueError(f"{FOLLOWS}, which needs one class an image, got several; {GIVE_P}")
    if not isinstance(labels, Tensor) or not (whole or labels.shape == shape):
        found = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(
            f"{FOLLOWS}, which needs class labels (B,) or probabilities of {classes} classes, got "
            f"{found}; {GIVE_P}"
        )
    right = (labels.argmax(dim=1) if whole else labels).to(logits.device)
    hits = logits.detach().argmax(dim=1) == right
    return hits[(right >= 0) & (right < classes)].float()  # ignored ones are -100, void ones 255
