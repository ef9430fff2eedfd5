"""The predictions of a classifier that a perturbation flips."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from latent_aug.images.conversion import Normalization
from latent_aug.transforms.classifier import count_classes
from latent_aug.transforms.lending import lend

CHUNK = 50  # images at a time
MOST_ALIKE = 0.9  # the greatest share of predictions of one class


class Flips:
    """Predictions of a classifier, and how many of them a perturbation flips.

    Args:
        classifier: A model that gives logits.
        normalization: The normalization of its inputs.
        perturb: A function of eps that gives the perturbed images; 0 leaves them.
    """

    def __init__(
        self,
        classifier: nn.Module,
        normalization: Normalization,
        perturb: Callable[[float], Tensor],
    ) -> None:
        self.classifier, self.normalization, self.perturb = classifier, normalization, perturb
        self.before = self.predict(perturb(0.0))

    def measure_share(self, eps: float) -> float:
        """Measure the share of the predictions that this eps flips."""
        return float((self.predict(self.perturb(eps)) != self.before).float().mean())

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Predict the classes (B,) of images in [0, 1]."""
        x = x.to(next(self.classifier.parameters(), x).device)
        inputs = self.normalization.apply(x.nan_to_num().clamp(0, 1))
        with lend(self.classifier, "eval") as model:
            try:
                outputs = [model(part) for part in inputs.split(CHUNK)]
            except Exception as error:  # of the user's own code
                raise ValueError(
                    f"classifier fails on images of shape {tuple(inputs[:CHUNK].shape)}: "
                    f"{type(error).__name__}: {error}"
                ) from error
        if not all(isinstance(logits, Tensor) and logits.ndim == 2 for logits in outputs):
            raise TypeError(
                "classifier must take images (B, C, H, W) and return logits (B, classes), got "
                f"{describe_output(outputs[0])}; wrap it in a module that does"
            )
        count_classes(outputs[0], "wrap the classifier in a module that gives two")
        return torch.cat(outputs).argmax(dim=1)

    def explain_doubts(self) -> Iterator[str]:
        """Explain why the shares may say nothing."""
        alike = float(self.before.bincount().max()) / len(self.before)
        if len(self.before) > 1 and alike > MOST_ALIKE:
            yield (
                f"the classifier puts {alike:.0%} of the images into one class, so that flips say "
                "nothing: it is not trained, or its inputs need normalize"
            )


def describe_output(output: Any) -> str:
    """Say in words what a model returned."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    return f"a {type(output).__name__}"
