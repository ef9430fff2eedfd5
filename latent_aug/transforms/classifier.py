"""The user's classifier under attack: its wrappers, its logits' gradient, its labels."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)

IGNORED = -100  # F.cross_entropy gives such labels no loss
OWN_LOSS = "pass loss=, e.g. one from F.binary_cross_entropy_with_logits"
SEVERAL_LABELS = f"for several labels per image {OWN_LOSS}"
ROUNDING = 0.01  # of a row's sum, in bfloat16
MULTILABEL = (
    nn.BCEWithLogitsLoss,
    nn.BCELoss,
    nn.MultiLabelSoftMarginLoss,
    nn.MultiLabelMarginLoss,
)
MULTILABEL_FUNCTIONS = (
    F.binary_cross_entropy_with_logits,
    F.binary_cross_entropy,
    F.multilabel_soft_margin_loss,
    F.multilabel_margin_loss,
)


def mixes_samples(model: nn.Module) -> bool:
    """Whether the samples of a batch act on each other: BatchNorm on the batch's statistics."""
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        and (module.training or module.running_mean is None)
        for module in model.modules()
    )


def has_company() -> bool:
    """Whether there are other processes that a model may talk to."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def talks(modules: Iterable[nn.Module], mode: str) -> bool:
    """Whether a pass under attack talks to other processes, which wait for it.

    SyncBatchNorm does in training mode, and all that FSDP shards.

    Args:
        modules: All modules that the pass goes through.
        mode: "eval" for evaluation mode, anything else for the mode that they are in.
    """
    from torch.distributed import fsdp  # it takes long to import

    return any(
        isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel))
        or (isinstance(module, nn.SyncBatchNorm) and module.training and mode != "eval")
        for module in modules
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


def widen(logits: Tensor) -> Tensor:
    """Convert logits to float64, except on MPS, which has none."""
    return logits if logits.device.type == "mps" else logits.double()


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
    """Whether labels (B, K, ...) give a sample several classes, or none.

    Floats do where a row does not sum to 1. Integers do where all are 0 or 1 as well.
    """
    if labels.ndim < 2 or labels.shape[1] < 2 or not len(labels):
        return False
    whole = not labels.is_floating_point()
    if whole and (labels.ndim > 2 or not bool(((labels == 0) | (labels == 1)).all())):
        return False
    sums = labels.double().sum(1)
    return bool(((sums - 1).abs() > ROUNDING).any())


def is_multilabel(loss: Any) -> bool:
    """Whether a loss is one of torch's that take zeros and ones (B, K), not classes (B,)."""
    loss = loss.func if isinstance(loss, partial) else loss
    return isinstance(loss, MULTILABEL) or loss in MULTILABEL_FUNCTIONS


def refuse_several(labels: Tensor, *, unless: str = "") -> None:
    """Refuse labels of several classes an image, and booleans.

    Args:
        labels: The labels of a batch.
        unless: What else to do about it, as the end of a message.

    Raises:
        ValueError: They are such.
    """
    if labels.dtype == torch.bool:
        raise ValueError(
            f"labels must be class indices or probabilities, got torch.bool; pass labels.long() "
            f"if they are classes 0 and 1; {SEVERAL_LABELS}{unless}"
        )
    if has_several(labels):
        raise ValueError(
            "labels (B, K) are probabilities of classes, and some of their rows do not sum to 1; "
            f"{SEVERAL_LABELS}{unless}"
        )


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
                "if they are not second in the batch, name labels_getter=; what is to be left out, "
                "as 255 is in masks, is -100 here"
            )
    return labels
