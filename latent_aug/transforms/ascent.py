"""Gradient ascent in a flow's latents: the loss that is raised, and the steps up it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_aug.transforms import functional as LF
from latent_aug.transforms.classifier import (
    check_targets,
    count_classes,
    is_multilabel,
    scale_up,
    widen,
)
from latent_aug.transforms.latents import Latents

Loss = Callable[[Tensor, Any], Tensor]

PREDICTED = "labels='predicted' gives loss= the predicted classes (B,)"
TRUE = "pass labels='true'"
DETACHED = "the loss has no gradient to the images: the model, forward= or loss= detaches it"


class Objective:
    """The loss that an attack raises, summed over the samples: each one's gradient is its own.

    Args:
        loss: The user's loss. None is cross-entropy in float64.
        labels: The labels of the batch, indices or probabilities for cross-entropy.
        predicted: Replace them by the classes that the model predicts at the first call.
        samples: The number of samples, if the model does not mix them, else None.
    """

    def __init__(
        self, loss: Loss | None, labels: Any, *, predicted: bool, samples: int | None
    ) -> None:
        self.loss, self.labels, self.samples = loss, labels, samples
        self.predicted, self.asks = predicted, predicted

    def __call__(self, logits: Tensor) -> Tensor:
        """Compute the loss, a scalar, of a model's output in float32 or float64."""
        if self.asks:
            self.labels, self.asks = predict_classes(logits), False
        if self.loss is None:
            # In float32 a sample classified with a margin above 16 has a loss of exactly 0, and
            # half of its gradient is lost. A fifth of a small training set can be like that.
            logits = widen(logits)
        if logits.requires_grad:
            each = logits.ndim > 0 and len(logits) == self.samples
            logits.register_hook(partial(scale_up, each=each))
        if self.loss is None:
            loss = F.cross_entropy(logits, check_targets(logits, self.labels), reduction="sum")
        else:
            loss = self._call(self.loss, logits)
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss must give a tensor, got {type(loss).__name__}")
        if not loss.requires_grad:
            raise ValueError(DETACHED)
        return loss.sum()

    def _call(self, loss: Loss, logits: Tensor) -> Tensor:
        """Call the user's loss, and say what it was given where it fails on predicted classes."""
        try:
            return loss(logits, self.labels)
        except (ValueError, RuntimeError, TypeError, IndexError) as error:
            if not self.predicted:
                raise
            raise ValueError(
                f"{PREDICTED}, and it fails: {error}; {TRUE}; for the divergence from the model's "
                "own prediction call consistency(images) of an attack without loss="
            ) from error


def predict_classes(logits: Tensor) -> Tensor:
    """Return the class (B,) with the greatest logit of each sample."""
    count_classes(logits, "labels='predicted' takes the largest; use labels='true'")
    return logits.detach().argmax(dim=1)


def refuse_several_predicted(loss: Loss | None) -> None:
    """Refuse a loss of several labels per image, as a prediction is one class.

    Raises:
        ValueError: It is one of torch's.
    """
    if is_multilabel(loss):
        raise ValueError(f"{PREDICTED}, and this loss= takes several labels per image; {TRUE}")


def ascend(
    latents: Latents,
    delta: Tensor,
    measure: Callable[[Tensor], Tensor],
    *,
    steps: int,
    alpha: LF.Size,
    eps: LF.Size,
    norm: LF.Norm,
    mask: Tensor | None,
) -> Tensor:
    """Move a perturbation of latents up a loss of the images, within the ball of radius eps.

    Args:
        latents: The images and their latents.
        delta: Where the ascent begins (B, C, H', W').
        measure: Computes the loss, a scalar, of images (B, C, H, W) like `latents.images`.
        steps: The number of steps.
        alpha: The step size, in the unit of eps.
        eps: The radius of the ball.
        norm: "linf", "l2" or "rms".
        mask: Ones where components may move.

    Raises:
        ValueError: The flow or the loss has no gradient.
    """
    for _ in range(steps):
        delta.requires_grad_(True)
        moved = latents.decode_with(delta)
        if not moved.requires_grad:
            name = f"{type(latents.transform.flow).__name__}.decode"
            raise ValueError(f"{name} detaches: it has no gradient")
        (grad,) = torch.autograd.grad(measure(moved), delta, allow_unused=True)
        if grad is None:
            raise ValueError(DETACHED)
        delta = LF.ascent_step(delta.detach(), grad, alpha, eps, norm, mask=mask)
    return delta


def warn_of_steps(alpha: tuple[float, float], eps: tuple[float, float], steps: int) -> None:
    """Warn of steps that cross the ball or do not get far in it, in an `__init__`.

    Args:
        alpha: The least and the greatest step size.
        eps: The least and the greatest radius.
        steps: The number of steps.
    """
    if alpha[1] > 2 * eps[1] > 0:
        warnings.warn(
            f"alpha={alpha[1]:g} is more than twice eps={eps[1]:g}: every step leads "
            "across the whole ball; alpha is usually half of eps, in the same norm",
            stacklevel=3,
        )
    if 2 * alpha[1] * steps < eps[0]:
        warnings.warn(
            f"{steps} steps of alpha={alpha[1]:g} do not get half as far as "
            f"eps={eps[0]:g}: alpha is usually half of eps",
            stacklevel=3,
        )
