"""The user's classifier under attack.

It is borrowed without a trace, the gradient of its logits is scaled, and its labels are checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)

IGNORED = -100  # F.cross_entropy gives such labels no loss
OWN_LOSS = "pass loss=, e.g. one from F.binary_cross_entropy_with_logits"
SEVERAL_LABELS = f"for several labels an image {OWN_LOSS}"


@contextmanager
def lend(model: nn.Module, mode: str) -> Iterator[nn.Module]:
    """Lend a model to an attack, and put back its modes, buffers, flags and caches.

    Its parameters require no gradients meanwhile. A compiled model would compute them all, and
    autocast would keep casts of them, without gradients, for the user's own forward pass.

    Args:
        model: The user's model, perhaps in DataParallel or DistributedDataParallel.
        mode: "eval" for evaluation mode, anything else for the mode that the model is in.

    Raises:
        ValueError: The model is lazy and has not seen a batch.
    """
    model = unwrap(model)
    if any(nn.parameter.is_lazy(t) for t in (*model.parameters(), *model.buffers())):
        raise ValueError("the model has uninitialized lazy layers: run one batch through it first")
    wanting = [p for p in model.parameters() if p.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    tables = [
        (module, dict(module._buffers), set(module._non_persistent_buffers_set))
        for module in model.modules()
    ]
    contents = [(b, b.clone()) for b in model.buffers() if not is_expanded(b)]
    kept = [(module, read_attributes(module)) for module in model.modules()]
    try:
        for parameter in wanting:
            parameter.requires_grad_(False)
        if mode == "eval":
            # Not by eval(): where it is overridden it may do more, as merging LoRA weights does.
            for module in model.modules():
                module.training = module.training and keeps_training(module)
        yield model
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training
        for buffer, content in contents:
            # .data leaves the version counter alone: a forward pass of the user's that waits for
            # its backward pass may have saved this buffer.
            buffer.data.copy_(content)
        for module, buffers, non_persistent in tables:
            restore_table(module, buffers, non_persistent)
        for module, attributes in kept:
            restore_attributes(module, attributes)


def read_attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Read the public attributes of a module, with copies of their dicts and lists.

    A module such as LeViT keeps part of a forward pass in them, outside its buffers. All of them
    are read, because a cache and its key belong together. Private attributes are left out: they
    hold machinery that a first pass may set up.
    """
    return {
        name: (value, copy_content(value))
        for name, value in vars(module).items()
        if not name.startswith("_")
    }


def copy_content(value: Any) -> dict[Any, Any] | list[Any] | None:
    """Copy a dict or a list. None for anything else."""
    if isinstance(value, dict):
        return dict(value)
    return list(value) if isinstance(value, list) else None


def restore_attributes(module: nn.Module, before: dict[str, tuple[Any, Any]]) -> None:
    """Put public attributes of a module back. Dicts and lists stay the same objects.

    An attribute that has become a submodule, a parameter or a buffer stays one. New attributes
    stay too, because a private one may say that they are there.
    """
    tables = (module._modules, module._parameters, module._buffers)
    for name, (value, content) in before.items():
        if any(name in table for table in tables):  # not iterated over: TorchScript's cannot be
            continue
        if vars(module).get(name) is not value:
            vars(module)[name] = value
        if isinstance(content, list):
            value[:] = content
        elif content is not None and not holds_same(value, content):
            value.clear()
            value.update(content)


def holds_same(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    """Whether two dicts hold the very same objects."""
    return one.keys() == other.keys() and all(one[name] is other[name] for name in one)


def keeps_training(module: nn.Module) -> bool:
    """Whether a module stays in training mode: a recurrent one without dropout.

    The mode changes nothing in it, but cuDNN has a backward pass in training mode only.
    """
    return isinstance(module, nn.RNNBase) and not module.dropout


def restore_table(module: nn.Module, buffers: dict[str, Any], non_persistent: set[str]) -> None:
    """Put the buffers of a module back, if it has others now."""
    if holds_same(dict(module._buffers), buffers):
        return
    module._buffers.clear()
    module._buffers.update(buffers)
    module._non_persistent_buffers_set = non_persistent


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


def is_expanded(tensor: Tensor) -> bool:
    """Whether several elements share memory, so that the tensor cannot be written to in place."""
    return any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True))


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
