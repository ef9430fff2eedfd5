"""LatentAdversarial: gradient ascent on a classifier's loss in latent space (Adversarial-LA)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import tv_tensors

from latent_aug import functional as LF
from latent_aug.arguments import Range, distance, number_range, one_of, probability
from latent_aug.flows import Flow
from latent_aug.images import is_tv_tensor, to_float
from latent_aug.perturbation import UsesFlow

IMAGE_KEYS = ("pixel_values", "image", "images")
LABEL_KEYS = ("labels", "label")


class LatentAdversarial(UsesFlow):
    """Replace images by on-manifold adversarial ones: k ascent steps on the user's classifier.

    Searches, within a ball of radius eps around each image's latent, for the point whose decoded
    image the model classifies worst, by projected gradient ascent with normalized gradients.
    The model is left as it was: modes, buffers, gradients and flags, also after an exception.

    Args:
        model: The classifier: images (B, C, H, W) to logits (B, K). DataParallel and
            DistributedDataParallel wrappers are looked through.
        eps: Radius of the ball in standard deviations of the prior, or (low, high) to draw it
            per sample.
        alpha: Step size in the same unit, or (low, high).
        steps: Ascent steps, k.
        norm: "l2", "linf", or "rms" (l2 with eps and alpha times √d).
        flow: A `Flow`, or a name or path for `load_flow`.
        loss: Called with (logits, labels), gives a scalar or (B,); cross-entropy by default.
        labels: "true" raises the loss at the batch's labels, "predicted" at the model's own
            predictions on the clean images (the authors' code).
        normalize: v2.Normalize or (mean, std) that the images have been through already.
        p: Share of each batch that is perturbed, drawn at random; the cost falls with it.
        clip: Greatest distance from the original image, in [0, 1] units: per pixel for "linf",
            as l2 norm otherwise.
        random_start: Begin at a random point of the ball, not at its centre.
        model_mode: "eval" attacks the model in evaluation mode, "unchanged" in the mode it is in.
        labels_getter: "default" finds labels second in a tuple or list, or in a dict under
            "labels" or "label"; a callable takes the batch and returns them.
        generator: Where to draw from; torch's global generators by default.

    Raises:
        TypeError, ValueError: An argument or a batch is not as described.
        NotImplementedError: The flow is class-conditional.

    Source: the paper's §2.2; its CIFAR-10 setting is l2, eps 1.0, alpha 0.5, k = 3. p=0.5 is
    Stutz et al. 2019.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
        >>> attack = LatentAdversarial(model, steps=1, flow="glow-fashionmnist")
        >>> images, labels = attack.step((torch.rand(2, 1, 28, 28), torch.tensor([3, 7])))
        >>> images.shape, labels
        (torch.Size([2, 1, 28, 28]), tensor([3, 7]))
    """

    norm: LF.Norm

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: Range = 1.0,
        alpha: Range = 0.5,
        steps: int = 3,
        norm: str = "l2",
        flow: Flow | str | Path = "glow-cifar10",
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        labels: str = "true",
        normalize: Any = None,
        p: float = 1.0,
        clip: float | None = None,
        random_start: bool = True,
        model_mode: str = "eval",
        labels_getter: Any = "default",
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
        if labels_getter != "default" and not callable(labels_getter):
            raise TypeError(f"labels_getter must be 'default' or callable, got {labels_getter!r}")
        self.model, self.steps, self.random_start = model, steps, bool(random_start)
        self.eps, self.alpha = number_range("eps", eps), number_range("alpha", alpha)
        self.norm = one_of("norm", norm, ("linf", "l2", "rms"))
        self.labels = one_of("labels", labels, ("true", "predicted"))
        self.model_mode = one_of("model_mode", model_mode, ("eval", "unchanged"))
        self.p, self.clip = probability("p", p), distance("clip", clip)
        self.loss, self.labels_getter = loss, labels_getter
        self._use(flow, normalize, generator)

    def step(self, batch: Any) -> Any:
        """The batch with its images replaced; a new container of the same type.

        Args:
            batch: (images, labels, ...) as tuple, named tuple or list, or a mapping with images
                under "pixel_values", "image" or "images". Images (B, C, H, W) are float in
                [0, 1] or normalized as `normalize` says; labels are indices (B,) or
                probabilities (B, K).
        """
        key = image_key(batch)
        labels = self.labels_getter(batch) if callable(self.labels_getter) else find_labels(batch)
        return with_images(batch, key, self(batch[key], labels))

    def __call__(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Adversarial images (B, C, H, W) for labels (B,) or (B, K); the dtype stays."""
        self._check(images, labels)
        result = self._attack_some(images.detach().as_subclass(Tensor), labels)
        return tv_tensors.wrap(result, like=images) if is_tv_tensor(images) else result

    def _attack_some(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Attack a random share p of a batch."""
        count = self._how_many(len(images))
        if not count:
            return images
        if count == len(images):
            return self._attack(images, labels)
        order = self._draws.uniform((len(images),), to_float(images.new_empty(0))).argsort()
        chosen = order[:count]
        picked = labels[chosen] if isinstance(labels, Tensor) else None
        return images.index_copy(0, chosen, self._attack(images[chosen], picked))

    def _check(self, images: Tensor, labels: Tensor | None) -> None:
        """Refuse what the attack cannot work on."""
        if not isinstance(images, Tensor) or images.ndim != 4:
            found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(
                f"images must be a tensor (B, C, H, W), got {found}; a batch is (images, labels)"
            )
        if not images.is_floating_point():
            raise TypeError(
                f"images must be floating point, as the model takes them, got {images.dtype}; "
                "convert with v2.ToDtype(torch.float32, scale=True)"
            )
        if images.shape[1] != self.flow.channels:
            raise ValueError(
                f"the flow maps images of {self.flow.channels} channels, got {images.shape[1]}, "
                f"shape {tuple(images.shape)}"
            )
        if torch.is_inference_mode_enabled():
            raise RuntimeError("an attack needs gradients: call it outside torch.inference_mode()")
        if self.labels == "predicted":
            return
        if labels is None:
            raise ValueError(
                "labels='true' needs labels: second in a tuple, or in a mapping under one of "
                f"{LABEL_KEYS}; name them with labels_getter= otherwise"
            )
        if not isinstance(labels, Tensor) or labels.ndim < 1 or len(labels) != len(images):
            found = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(f"labels must be a tensor of {len(images)} entries, got {found}")

    def _how_many(self, count: int) -> int:
        """The share p of a batch; a fraction of a sample is rounded at random, right on average."""
        if self.p == 1:
            return count
        return int(self.p * count + float(self._draws.uniform((), torch.empty(()))))

    def _attack(self, original: Tensor, labels: Tensor | None) -> Tensor:
        """Adversarial versions of every image of a batch, in the units and dtype it came in."""
        x = self._unit_range(to_float(original))
        with torch.no_grad():
            z = self._encode(x)
        eps = self._draws.between(*self.eps, len(z), z)
        alpha = self._draws.between(*self.alpha, len(z), z)
        delta = self._start(z, eps)

        def images_at(delta: Tensor) -> Tensor:
            return self._image_at(z + delta, x).to(original.dtype)

        with attacked(self.model, self.model_mode) as model, torch.enable_grad():
            if self.labels == "predicted":
                with torch.no_grad():
                    labels = model(original.clone()).argmax(dim=1)  # it may work in place
            for _ in range(self.steps):
                delta.requires_grad_(True)
                loss = self._loss(model(images_at(delta)), labels)
                (grad,) = torch.autograd.grad(loss, delta)
                delta = LF.ascent_step(delta.detach(), grad, alpha, eps, self.norm)
        with torch.no_grad():
            return self._restore_unusable(images_at(delta), original, z)

    def _start(self, z: Tensor, eps: float | Tensor) -> Tensor:
        """Where the ascent begins."""
        if not self.random_start:
            return torch.zeros_like(z)
        return LF.random_start(z, eps, self.norm, generator=self._draws.current())

    def _loss(self, logits: Tensor, labels: Any) -> Tensor:
        """Summed over the samples, so that each one's gradient is its own."""
        if self.loss is not None:
            return self.loss(logits, labels).sum()
        return F.cross_entropy(logits.float(), labels, reduction="sum")


@contextmanager
def attacked(model: nn.Module, mode: str) -> Iterator[nn.Module]:
    """The bare model in the mode for an attack; modes and buffers are put back at the end."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    modes = [(module, module.training) for module in model.modules()]
    tables = [
        (module, dict(module._buffers), set(module._non_persistent_buffers_set))
        for module in model.modules()
    ]
    contents = [(b, b.clone()) for b in model.buffers() if not is_expanded(b)]
    try:
        if mode == "eval":
            model.eval()
        yield model
    finally:
        for module, training in modes:
            module.training = training
        for module, buffers, non_persistent in tables:
            module._buffers.clear()
            module._buffers.update(buffers)
            module._non_persistent_buffers_set = non_persistent
        for buffer, content in contents:
            # .data leaves the version counter alone: a forward pass of the user's that waits for
            # its backward pass may have saved this buffer.
            buffer.data.copy_(content)
        # A forward pass without gradients leaves autocast casts of the weights that have none.
        torch.clear_autocast_cache()


def is_expanded(tensor: Tensor) -> bool:
    """Whether several elements are one in memory, so that nobody can write to it in place."""
    return any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def image_key(batch: Any) -> Any:
    """Where a batch keeps its images: a key, or 0 for a tuple or list."""
    if isinstance(batch, Mapping):
        found = [key for key in IMAGE_KEYS if key in batch]
        if len(found) != 1:
            raise ValueError(
                f"a batch must have one of the keys {IMAGE_KEYS}, got {list(batch.keys())}"
            )
        return found[0]
    if not isinstance(batch, (tuple, list)) or not batch:
        raise TypeError(f"batch must be a tuple, list or mapping, got {type(batch).__name__}")
    return 0


def find_labels(batch: Any) -> Any:
    """The labels of a batch where they usually are; None where they are not."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in LABEL_KEYS if key in batch), None)
    return batch[1] if len(batch) > 1 else None


def with_images(batch: Any, key: Any, images: Tensor) -> Any:
    """A container of the batch's type with other images; the batch itself stays."""
    if isinstance(batch, Mapping):
        result: Any = copy.copy(batch)
        result[key] = images
        return result
    items = [images, *batch[1:]]
    return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
