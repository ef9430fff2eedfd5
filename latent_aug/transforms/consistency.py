"""Consistency on unlabelled images: what a model pays where its prediction changes."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_aug.transforms.classifier import count_classes, widen

ONE_CLASS = (
    "consistency compares distributions over classes; a sigmoid's logit z is the logits (0, z), "
    "as torch.cat([torch.zeros_like(z), z], dim=1)"
)


def make_targets(
    logits: Tensor, *, threshold: float = 0.0, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Turn the logits (B, K, ...) of clean images into the predictions that are to be kept.

    Args:
        logits: The model's output, in float32 or float64.
        threshold: The least probability of the likeliest class with which a sample counts.
        temperature: The logits are divided by it. 0 keeps only the likeliest class.

    Returns:
        Probabilities (B, K, ...) in float64, on MPS in float32, and whether each sample counts
        (B, ...). Those whose prediction is not a number do, so that the loss shows it.

    Raises:
        ValueError: There are fewer than two classes.

    Source: the threshold is FixMatch's (Sohn et al. 2020), and with the temperature UDA's (Xie et
    al. 2020). Both take the confidence before it is sharpened.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.8, 0.2], [0.9, 0.1]]).log()
        >>> targets, counted = make_targets(logits, threshold=0.85, temperature=0.5)
        >>> targets.round(decimals=2)
        tensor([[0.9400, 0.0600],
                [0.9900, 0.0100]], dtype=torch.float64)
        >>> counted
        tensor([False,  True])
    """
    count_classes(logits, ONE_CLASS)
    logits = widen(logits.detach())
    confidence, classes = logits.softmax(dim=1).max(dim=1, keepdim=True)
    if temperature:
        targets = (logits / temperature).softmax(dim=1)
    else:
        targets = torch.zeros_like(logits).scatter_(1, classes, 1.0)
    return targets, ~(confidence.squeeze(1) < threshold)


def measure_change(
    logits: Tensor, targets: Tensor, counted: Tensor, *, entropy: float = 0.0
) -> Tensor:
    """Compute the divergence from the targets to a prediction, averaged over all samples.

    Args:
        logits: The model's output (B, K, ...) at the perturbed images. Classes may be ruled out
            by -inf.
        targets: Probabilities, as many.
        counted: Which samples (B, ...) count. The others have a loss of 0, and are averaged over.
        entropy: The weight of the prediction's entropy, which is added.

    Returns:
        The Kullback-Leibler divergence KL(targets, prediction), and the entropy, in nats: a scalar,
        which is 0 for no samples.

    Source: Miyato et al. 2018, equation 5. Entropy: Grandvalet and Bengio 2004.

    Example:
        >>> import torch
        >>> targets = torch.tensor([[0.5, 0.5]])
        >>> logits = torch.tensor([[0.9, 0.1]]).log()
        >>> measure_change(logits, targets, torch.tensor([True]))
        tensor(0.5108)
    """
    likely = widen(logits).log_softmax(dim=1)
    missed = torch.where(targets == 0, 0.0, targets * likely)  # also where that is 0 · -inf
    each = (torch.xlogy(targets, targets) - missed).sum(dim=1)
    if entropy:
        possible = likely.masked_fill(likely == -torch.inf, 0.0)
        each = each - entropy * (possible.exp() * possible).sum(dim=1)
    total = torch.where(counted, each, 0.0).sum()
    return (total / max(1, each.numel())).to(logits.dtype)
