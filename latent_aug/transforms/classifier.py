"""The user's classifier under attack: its wrappers, its logits' gradient, its labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)

IGNORED = -100  # F.cross_entropy gives such labels no loss
OWN_LOSS = "pass loss=, e.g. one from F.binary_cross_entropy_with_logits"
SEVERAL_LABELS = f"for several labels an image {OWN_LOSS}"


def mixes_samples(model: nn.Module) -> bool:
    """Whether the samples of a batch act on each other: BatchNorm on the batch's statistics."""
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        and (module.training or module.running_mean is None)
        for module in model.modules()
    )


def unwrap(model: nn.Module) -> nn.Module:
    """Take a model out of DataParallel and DistributedDataParallel.

    Inside them every pass of an attack would talk to the other processes, and one without a
    backward pass there would leave them waiting. A compiled wrapper is opened too, and the module
    in it then runs uncompiled.
    """
    while True:
        inside = getattr(model, "_orig_mod", model)  # of torch.compile
        if not isinstance(inside, Wrappers):
            return model
        model = inside.module


def scale_up(grad: Tensor, each: bool) -> Tensor:
    """Scale the gradient of a model's output so that its greatest component is 256.

    In float16 small gradients would vanish on their way back. Ascent steps are normalized, so the
    factor changes nothing else.

    Args:
        grad: The gradient (B, ...).
        each: Scale each sample by itself. Where the model mixes samples, all must share a factor.
    """
    size = grad.abs()
    if each and grad.ndim > 1:
        size = size.amax(dim=tuple(range(1, grad.ndim)), keepdim=True)
    elif not each:
        size = size.amax()
    return grad / torch.where(size > 0, size, 1) * 256


def count_classes(logits: Tensor, advice: str) -> int:
    """Count the classes of logits (B, K, ...): K.

    Args:
        logits: The output of a model.
        advice: The end of the error's message.

    Raises:
        ValueError: There are fewer than two classes.
    """
    classes = logits.shape[1] if logits.ndim > 1 else 1
    if classes < 2:
        found = tuple(logits.shape)
        raise ValueError(f"logits (B, K) of at least 2 classes are needed, got {found}; {advice}")
    return classes


def has_several(labels: Tensor) -> bool:
    """Whether floating labels (B, K, ...) give a sample several ones, and zeros else."""
    binary = ((labels == 0) | (labels == 1)).all(1)
    return bool((binary & (labels.sum(1) > 1)).any())


def check_targets(logits: Tensor, labels: Tensor) -> Tensor:
    """Check labels, and convert them to what `F.cross_entropy` takes beside these logits.

    Raises:
        ValueError: They are neither indices of the logits' classes nor probabilities of them.
    """
    classes = count_classes(logits, OWN_LOSS)
    if labels.is_floating_point():
        if labels.shape != logits.shape:
            raise ValueError(
                f"labels must be integers (B,), or probabilities of the logits' shape "
                f"{tuple(logits.shape)}, got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        if labels.is_cpu and has_several(labels):  # elsewhere a check is a sync
            raise ValueError(
                "labels that are floating point are probabilities of classes, and in some several "
                f"are 1; {SEVERAL_LABELS}"
            )
        return labels.to(logits)
    if labels.shape != (len(logits), *logits.shape[2:]):
        raise ValueError(
            f"labels must be class indices (B,), got shape {tuple(labels.shape)} for logits "
            f"{tuple(logits.shape)}; probabilities are floating point, so call .float() on one-hot "
            f"labels; {SEVERAL_LABELS}; if they are not second in the batch, name labels_getter="
        )
    labels = labels.long()
    if labels.is_cpu and labels.numel():  # elsewhere a check is a sync
        wrong = labels[((labels < 0) & (labels != IGNORED)) | (labels >= classes)]
        if len(wrong):
            raise ValueError(
                f"labels must lie in 0 to {classes - 1}, the model's classes, got {int(wrong[0])}; "
                "if they are not second in the batch, name labels_getter="
            )
    return labels
