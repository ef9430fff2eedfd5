"""The share of each batch that an attack takes: it follows the classifier."""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from latent_aug.transforms.batch_checks import MAKE_TENSOR, describe_labels, is_listed
from latent_aug.transforms.classifier import count_classes, has_several

HIGHEST_SHARE = 0.5  # of each batch, as Stutz et al. 2019
MEMORY = 0.9  # decay of the running mean, a batch
DOUBT = 2.0  # standard errors below that mean: few images are looked at
PROBED = 8  # one image in so many is looked at

FOLLOWS = "by default the share of attacked images follows the model's accuracy"
GIVE_P = "pass p=, the share of each batch to attack, such as p=0.5"


class AdaptiveShare:
    """A share that grows as a classifier gets its clean training images right.

    It is ``HIGHEST_SHARE * (1 - chance / accuracy)``. Chance is what guessing classes gets, as
    often as they come. A classifier of ten classes is attacked on a quarter of each batch once it
    has a fifth right, one of two classes never on more than a quarter. With twice that share the
    images left alone would have as many right as chance has in a whole batch.

    Accuracy is that on clean training images, a running mean over batches, less two standard errors
    of it. Later than the first batch an accelerator is read one batch late, so that nothing waits
    for the current one.

    Attributes:
        value: The share, from 0 to `HIGHEST_SHARE`. It begins at 0.
        accuracy: The running mean of the accuracy.
        variance: The variance of that mean, in units of that of a single image.
        begun: Whether a batch was seen.

    Source: our own. That an augmentation follows a measure on the training images is in
    StyleGAN2-ADA (Karras et al. 2020).
    """

    def __init__(self) -> None:
        self.value, self.accuracy, self.variance = 0.0, 0.0, 0.0
        self.begun = False
        self._counts: list[float] = []  # of each class so far
        self._latest: Tensor | None = None
        self._looks = 0  # batches looked at so far

    def update(self, tally: Tensor) -> None:
        """Take note of what the classifier has right.

        Args:
            tally: From `count_right`.

        Example:
            >>> import torch
            >>> share = AdaptiveShare()
            >>> share.update(torch.tensor([300.0, 200.0, 200.0]))  # right, labels of two classes
            >>> share.accuracy, round(share.value, 3)
            (0.75, 0.147)
        """
        before = tally if tally.is_cpu or not self.begun else self._latest
        self._latest = tally
        if before is None:
            return
        right, *counts = before.tolist()
        seen = sum(counts)
        if not seen:
            return
        memory = MEMORY if self.begun else 0.0
        self.begun = True
        self.accuracy = memory * self.accuracy + (1 - memory) * right / seen
        self.variance = memory**2 * self.variance + (1 - memory) ** 2 / seen
        self._counts = [a + b for a, b in zip_longest(self._counts, counts, fillvalue=0.0)]
        chance = estimate_chance(self._counts)
        spread = max(0.0, self.accuracy * (1 - self.accuracy))  # rounding may lead below 0
        error = math.sqrt(spread * self.variance)
        sure = max(chance, self.accuracy - DOUBT * error)
        self.value = HIGHEST_SHARE * (1 - chance / sure) if sure else 0.0

    def select_probed(self, count: int, device: torch.device) -> Tensor:
        """Select the images of a batch to look at: all of the first, then evenly spread ones.

        The places move on from batch to batch, as a sampler may have an order of classes. At least
        two are looked at, as a single image may be too few for a model.
        """
        apart = max(1, min(PROBED, count // 2)) if self.begun else 1
        self._looks += 1
        return torch.arange(self._looks % apart, count, apart, device=device)


def estimate_chance(counts: list[float]) -> float:
    """Estimate what guessing classes gets, as often as they come: how often two labels agree.

    Example:
        >>> estimate_chance([2.0, 2.0])  # two of the six pairs
        0.3333333333333333
    """
    total = sum(counts)
    return sum(count * (count - 1) for count in counts) / max(1.0, total * (total - 1))


def count_right(logits: Tensor, labels: Any) -> Tensor:
    """Count what a classifier has right, and the labels of each class: (1 + K,).

    Labels of no class are left out, as -100 or 255 is in masks. An accelerator is not waited for.

    Args:
        logits: The logits (n, K), or (n, K, ...) with a class for each pixel.
        labels: The classes (n,), or (n, ...), or probabilities of the logits' shape.

    Raises:
        ValueError: The model gives no classes, or the labels are none.

    Example:
        >>> import torch
        >>> count_right(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0]))
        tensor([1., 2., 0.])
    """
    classes = count_classes(logits, GIVE_P)
    shape = (len(logits), *logits.shape[2:])
    whole = isinstance(labels, Tensor) and labels.shape == logits.shape
    if whole and labels.is_cpu and has_several(labels):  # elsewhere a check is a sync
        raise ValueError(f"{FOLLOWS}, which needs one class per image, got several; {GIVE_P}")
    if not isinstance(labels, Tensor) or not (whole or labels.shape == shape):
        advice = f"say where they are with labels_getter=, or {GIVE_P}"
        if isinstance(labels, Tensor):
            advice = GIVE_P
        elif is_listed(labels):
            advice = MAKE_TENSOR
        raise ValueError(
            f"{FOLLOWS}, which needs class labels (B,) or probabilities of {classes} classes, got "
            f"{describe_labels(labels)}; {advice}"
        )
    if not whole and labels.is_floating_point():
        raise ValueError(f"{FOLLOWS}, which needs integers (B,), got {labels.dtype}; {GIVE_P}")
    right = (labels.argmax(dim=1) if whole else labels).to(logits.device, torch.int64)
    counted = ((right >= 0) & (right < classes)).flatten().float()
    hits = (logits.detach().argmax(dim=1) == right).flatten() * counted
    counts = counted.new_zeros(classes)
    counts.index_add_(0, right.flatten().clamp(0, classes - 1), counted)
    return torch.cat([hits.sum()[None], counts])
