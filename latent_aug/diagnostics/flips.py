"""Which of a classifier's predictions a perturbation flips."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from latent_aug.images.conversion import Normalization
from latent_aug.transforms.classifier import count_classes
from latent_aug.transforms.lending import lend

CHUNK = 50  # images at a time
MOST_ALIKE = 0.9  # share of the predictions that may be of one class


class Flips:
    """Predictions of a classifier, and how many of them a perturbation flips.

    Args:
        classifier: Gives logits.
        normalization: Of its inputs.
        moved: From eps to the perturbed images; 0 leaves them.
    """

    def __init__(
        self,
        classifier: nn.Module,
        normalization: Normalization,
        moved: Callable[[float], Tensor],
    ) -> None:
        self.classifier, self.normalization, self.moved = classifier, normalization, moved
        self.before = self.predict(moved(0.0))

    def share(self, eps: float) -> float:
        """Of the predictions that this eps flips."""
        return float((self.predict(self.moved(eps)) != self.before).float().mean())

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The classes (B,) of images in [0, 1]."""
        x = x.to(next(self.classifier.parameters(), x).device)
        inputs = self.normalization.apply(x.nan_to_num().clamp(0, 1))
        with lend(self.classifier, "eval") as model:
            try:
                outputs = [model(part) for part in inputs.split(CHUNK)]
            except RuntimeError as error:
                raise ValueError(
                    f"classifier fails on images of shape {tuple(inputs[:CHUNK].shape)}: {error}"
                ) from error
        if not all(isinstance(logits, Tensor) and logits.ndim == 2 for logits in outputs):
            raise TypeError(
                "classifier must take images (B, C, H, W) and return logits (B, classes), got "
                f"{shape_of(outputs[0])}; wrap it in a module that does"
            )
        count_classes(outputs[0], "wrap the classifier in a module that gives two")
        return torch.cat(outputs).argmax(dim=1)

    def explain_doubts(self) -> Iterator[str]:
        """Reasons why the shares say nothing."""
        alike = float(self.before.bincount().max()) / len(self.before)
        if len(self.before) > 1 and alike > MOST_ALIKE:
            yield (
                f"the classifier puts {alike:.0%} of the images into one class, so that flips say "
                "nothing: it is not trained, or its inputs need normalize"
            )


def shape_of(output: Any) -> str:
    """What a model returned, in words."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    return f"a {type(output).__name__}"
