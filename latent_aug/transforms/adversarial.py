"""LatentAdversarial: gradient ascent on a classifier's loss in latent space (Adversarial-LA)."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import tv_tensors

from latent_aug.flows import Flow
from latent_aug.images.conversion import decoded, is_tv_tensor, to_float
from latent_aug.images.samples import (
    LABEL_KEYS,
    get_image_key,
    replace_images,
    select_entry,
    select_rows,
)
from latent_aug.transforms import functional as LF
from latent_aug.transforms.classifier import (
    check_targets,
    classes_of,
    lent,
    samples_meet,
    scaled_up,
)
from latent_aug.transforms.labels import condition, labels_in
from latent_aug.transforms.latents import UsesFlow
from latent_aug.transforms.regions import Levels, Mask, movable, pixels_of
from latent_aug.utils.arguments import (
    Range,
    require_choice,
    require_distance,
    require_number,
    require_positive,
    require_probability,
    require_range,
)

Forward = Callable[[nn.Module, Any], Tensor]
Loss = Callable[[Tensor, Any], Tensor]

DETACHED = "the loss has no gradient to the images: the model, forward= or loss= detaches it"


class LatentAdversarial(UsesFlow):
    """Replace images by on-manifold adversarial ones: k ascent steps on the user's classifier.

    Searches, within a ball of radius eps around each image's latent, for the point whose decoded
    image the model classifies worst, by projected gradient ascent with normalized gradients.
    The model is left as it was: modes, buffers, gradients and flags, also after an exception.

    Images that the flow cannot perturb come back as they were; `fallbacks` counts them.

    The model may run under autocast, in half precision, compiled, frozen in part, or wrapped in
    DataParallel or DistributedDataParallel, which is looked through: in "eval" mode the attack
    never talks to other processes (SyncBatchNorm in training mode would). Under float16 small
    gradients survive, as they are scaled up. Activation checkpointing needs
    ``use_reentrant=False``.

    Args:
        model: The classifier: images (B, C, H, W) to logits (B, K).
        eps: Radius of the ball in standard deviations of the prior, or (low, high) to draw it
            per sample.
        alpha: Step size in the same unit, or (low, high).
        steps: Ascent steps, k.
        norm: "l2", "linf", or "rms" (l2 with eps and alpha times √d).
        flow: A `Flow`, or a name or path for `load_flow`.
        loss: Called with (logits, labels), gives a scalar or (B,); labels may be anything then
            but None, or a tensor of another length. By default cross-entropy, in float64, as
            confident samples have no loss in float32.
        labels: "true" raises the loss at the batch's labels, "predicted" at the model's own
            predictions on the clean images (the authors' code), which are class indices (B,), for
            your `loss` too.
        normalize: v2.Normalize or (mean, std) that the images have been through already.
        p: Share of each batch that is perturbed, drawn at random; the cost falls with it.
        clip: Greatest distance from the original image, in [0, 1] units: per pixel for "linf",
            as l2 norm otherwise.
        random_start: Begin at a random point of the ball, not at its centre.
        model_mode: "eval" attacks the model in evaluation mode, "unchanged" in the mode it is in.
        mask: Perturb only where it is 1: zeros and ones (H, W) or (B, H, W), or a callable that
            takes the batch and returns them. Latents move at those pixels only, and the other
            pixels come back exactly as they were; all of them where it is 0 everywhere.
        levels: Perturb only these levels of the flow: 0 is the finest, -1 the coarsest; an
            integer or several. "rms" counts only what may move.
        labels_getter: "default" finds labels second in a tuple or list, or in a dict under
            "labels" or "label"; a callable takes the batch and returns them. A class-conditional
            flow is given the same labels.
        forward: For models of several inputs or outputs: called with (model, batch) in place of
            model(images), gives the logits. The batch is the user's with the images replaced
            and, where p is below 1, without the rows of the samples that are not attacked.
        gradient: How the gradient passes the flow: "fast" keeps activations, "lean" recomputes
            them in memory that does not grow with the flow's depth, "auto" decides by size
            (`Glow.decode`). Flows other than `Glow` may know only "auto".
        generator: Where to draw from; torch's global generators by default, which the ranks of
            distributed training may seed alike. Seed your own by rank.

    Raises:
        TypeError, ValueError: An argument or a batch is not as described.

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
    _dissolves_at = 0.25  # an attack's steps add up where noise's cancel
    _usual_eps = "usual for an attack are 1 for 'l2' at 32x32, some hundredths for 'linf' and 'rms'"
    _slight_below = 0.1

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: Range = 1.0,
        alpha: Range = 0.5,
        steps: int = 3,
        norm: str = "l2",
        flow: Flow | str | Path = "glow-cifar10",
        loss: Loss | None = None,
        labels: str = "true",
        normalize: Any = None,
        p: float = 1.0,
        clip: float | None = None,
        random_start: bool = True,
        model_mode: str = "eval",
        mask: Mask = None,
        levels: Levels = None,
        labels_getter: Any = "default",
        forward: Forward | None = None,
        gradient: str = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        for name, value in (("loss", loss), ("forward", forward)):
            if value is not None and not callable(value):
                raise TypeError(f"{name} must be callable or None, got {value!r}")
        self.model, self.steps = model, require_positive("steps", steps)
        self.random_start = bool(random_start)
        self.eps, self.alpha = require_range("eps", eps), require_range("alpha", alpha)
        self.norm = require_choice("norm", norm, ("linf", "l2", "rms"))
        self.labels = require_choice("labels", labels, ("true", "predicted"))
        self.model_mode = require_choice("model_mode", model_mode, ("eval", "unchanged"))
        self.p, self.clip = require_probability("p", p), require_distance("clip", clip, self.norm)
        self.loss, self.forward = loss, forward
        self._use(
            flow,
            normalize=normalize,
            mask=mask,
            levels=levels,
            labels_getter=labels_getter,
            generator=generator,
        )
        if self.alpha[1] > 2 * self.eps[1] > 0:
            warnings.warn(
                f"alpha={self.alpha[1]:g} is more than twice eps={self.eps[1]:g}: every step leads "
                "across the whole ball; alpha is usually half of eps, in the same norm",
                stacklevel=2,
            )
        if 2 * self.alpha[1] * self.steps < self.eps[0]:
            warnings.warn(
                f"{self.steps} steps of alpha={self.alpha[1]:g} do not get half as far as "
                f"eps={self.eps[0]:g}: alpha is usually half of eps",
                stacklevel=2,
            )
        self.gradient = require_choice("gradient", gradient, ("auto", "fast", "lean"))
        if gradient != "auto" and not has_argument(self.flow.decode, "gradient"):
            raise ValueError(
                f"{type(self.flow).__name__}.decode takes no gradient argument: leave "
                f"gradient='auto', got {gradient!r}"
            )

    def step(self, batch: Any) -> Any:
        """The batch with its images replaced; a new container of the same type.

        Args:
            batch: (images, labels, ...) as tuple, named tuple or list, or a mapping with images
                under "pixel_values", "image", "images" or "img". Images (B, C, H, W) are float in
                [0, 1] or normalized as `normalize` says; labels are indices (B,) or
                probabilities (B, K).
        """
        key = get_image_key(batch)
        labels = labels_in(batch, self.labels_getter)
        return replace_images(batch, key, self._replace(batch, key, labels))

    def with_eps(self, eps: float) -> LatentAdversarial:
        """A copy that perturbs every sample by this eps, alpha in proportion; counts of its own."""
        result = super().with_eps(require_number("eps", eps))
        share = eps / self.eps[1] if self.eps[1] else 1.0
        result.alpha = (share * self.alpha[0], share * self.alpha[1])
        return result

    def __call__(self, images: Tensor, labels: Any = None) -> Tensor:
        """Adversarial images (B, C, H, W) for labels (B,) or (B, K); the dtype stays.

        `mask` and `forward` get (images, labels) as the batch.
        """
        return self._replace((images, labels), 0, labels)

    def _replace(self, batch: Any, key: Any, labels: Any) -> Tensor:
        """The images of a batch with a random share p of them attacked."""
        given: Tensor = batch[key]
        self._check(given, labels)
        images = given.detach().as_subclass(Tensor)
        pixels = pixels_of(self.mask, batch, images)
        count = self._how_many(len(images))
        if not count:
            result = images
        elif count == len(images):
            result = self._attack(images, labels, pixels, batch, key)
        else:
            order = self._draws.sample_uniform(
                (len(images),), to_float(images.new_empty(0))
            ).argsort()
            chosen = order[:count]
            picked = self._attack(
                images[chosen].contiguous(memory_format=layout_of(images)),
                select_entry(labels, chosen, len(images)),
                pixels[chosen] if pixels is not None and len(pixels) > 1 else pixels,
                batch if self.forward is None else select_rows(batch, chosen, len(images)),
                key,
            )
            result = images.clone().index_copy_(0, chosen, picked)
        return tv_tensors.wrap(result, like=given) if is_tv_tensor(given) else result

    def _check(self, images: Tensor, labels: Tensor | None) -> None:
        """Refuse what the attack cannot work on."""
        if not isinstance(images, Tensor) or images.ndim != 4:
            found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(
                f"images must be a tensor (B, C, H, W), got {found}; call it as "
                "attack(images, labels), or attack.step(batch) with (images, labels) or a mapping, "
                "in the training step"
            )
        if not images.is_floating_point():
            raise TypeError(
                f"images must be floating point, as the model takes them, got {images.dtype}; "
                "convert with v2.ToDtype(torch.float32, scale=True)"
            )
        if images.shape[1] != self.flow.channels:
            raise ValueError(
                f"the flow maps images of {self.flow.channels} channels, got {images.shape[1]}, "
                f"shape {tuple(images.shape)}; channels come before height and width; convert "
                "them, or pass flow= one of as many: 'glow-fashionmnist' of 1, 'glow-cifar10' of 3"
            )
        if torch.is_inference_mode_enabled():
            raise RuntimeError("an attack needs gradients: call it outside torch.inference_mode()")
        if self.labels == "predicted":
            return
        if labels is None:
            raise ValueError(
                "labels='true' needs labels: second in a tuple, or in a mapping under one of "
                f"{LABEL_KEYS}; name them with labels_getter= otherwise, or call "
                "attack(images, labels)"
            )
        if self.loss is not None and not isinstance(labels, Tensor):
            return  # whatever it takes
        if not isinstance(labels, Tensor) or labels.ndim < 1 or len(labels) != len(images):
            found = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(
                f"labels must be a tensor of {len(images)} entries, got {found}; if they are not "
                "second in the batch, name labels_getter="
            )

    def _how_many(self, count: int) -> int:
        """The share p of a batch; a fraction of a sample is rounded at random, right on average."""
        share = self.p * count
        if share != int(share):
            share += float(
                self._draws.sample_uniform((), torch.empty((), dtype=torch.float32, device="cpu"))
            )
        if int(share) == 1 and self.model_mode == "unchanged" and samples_meet(self.model):
            return min(2, count)  # BatchNorm may have no statistics of a single sample
        return int(share)

    def _attack(
        self, original: Tensor, labels: Any, pixels: Tensor | None, batch: Any, key: Any
    ) -> Tensor:
        """Adversarial versions of every image of a batch, in the units and dtype it came in."""
        x = self._unit_range(to_float(original))
        with torch.no_grad():
            y = condition(self.flow, labels, len(x), x)
            z = self._encode(x, y)
        mask = movable(self.flow, z, pixels, self.levels)
        eps = self._draws.sample_between(*self.eps, len(z), z)
        alpha = self._draws.sample_between(*self.alpha, len(z), z)
        delta = self._start(z, eps, mask)
        decode = self._decode()

        def images_at(delta: Tensor) -> Tensor:
            moved = decoded(decode, z + delta, y)
            if delta.requires_grad and not moved.requires_grad:
                raise ValueError(f"{type(self.flow).__name__}.decode detaches: it has no gradient")
            images = self._to_image(moved, x, pixels).to(original.dtype)
            return images.contiguous(memory_format=layout_of(original))

        with lent(self.model, self.model_mode) as model, torch.enable_grad():
            samples = None if samples_meet(model) else len(z)

            def logits_of(images: Tensor) -> Tensor:
                return self._logits(model, replace_images(batch, key, images), key)

            if self.labels == "predicted":
                with torch.no_grad():
                    logits = logits_of(original.clone())  # it may work in place
                classes_of(logits, "labels='predicted' takes the largest; use labels='true'")
                labels = logits.argmax(dim=1)
            for _ in range(self.steps):
                delta.requires_grad_(True)
                loss = self._loss(logits_of(images_at(delta)), labels, samples)
                (grad,) = torch.autograd.grad(loss, delta, allow_unused=True)
                if grad is None:
                    raise ValueError(DETACHED)
                delta = LF.ascent_step(delta.detach(), grad, alpha, eps, self.norm, mask=mask)
        with torch.no_grad():
            return self._restore(images_at(delta), original, z, pixels)

    def _decode(self) -> Callable[[Tensor, Tensor | None], Tensor]:
        """The flow's decode, with the user's choice of gradient where there is one."""
        decode: Callable[..., Tensor] = self.flow.decode
        return decode if self.gradient == "auto" else partial(decode, gradient=self.gradient)

    def _start(self, z: Tensor, eps: float | Tensor, mask: Tensor | None) -> Tensor:
        """Where the ascent begins."""
        if not self.random_start:
            return torch.zeros_like(z)
        return LF.random_start(
            z, eps, self.norm, mask=mask, generator=self._draws.pick_generator(z.device)
        )

    def _logits(self, model: nn.Module, batch: Any, key: Any) -> Tensor:
        """The model's output for a batch, in float32 at least."""
        logits = model(batch[key]) if self.forward is None else self.forward(model, batch)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"a tensor of logits is needed, got {type(logits).__name__}; pass a forward= that "
                "takes them out, e.g. lambda model, batch: model(batch[0]).logits, or "
                "model(**batch).logits for mappings"
            )
        return to_float(logits)

    def _loss(self, logits: Tensor, labels: Any, samples: int | None) -> Tensor:
        """Summed over the samples, so that each one's gradient is its own.

        Args:
            logits: The model's.
            labels: As they came, or predicted.
            samples: How many there are, if they do not meet in the model.
        """
        if self.loss is None and logits.device.type != "mps":
            # In float32 a sample classified with a margin above 16 has a loss of exactly 0, and
            # half of its gradient is lost; a fifth of a small training set can be like that.
            logits = logits.double()
        if logits.requires_grad:
            each = logits.ndim > 0 and len(logits) == samples
            logits.register_hook(partial(scaled_up, each=each))
        if self.loss is None:
            loss = F.cross_entropy(logits, check_targets(logits, labels), reduction="sum")
        else:
            loss = self.loss(logits, labels)
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss must give a tensor, got {type(loss).__name__}")
        if not loss.requires_grad:
            raise ValueError(DETACHED)
        return loss.sum()

    def __repr__(self) -> str:
        return f"LatentAdversarial({self._describe('alpha', 'steps')})"


def layout_of(images: Tensor) -> torch.memory_format:
    """channels_last for what is so and not also contiguous."""
    last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def has_argument(function: Callable[..., Any], name: str) -> bool:
    """Whether a function takes an argument of this name."""
    return name in inspect.signature(function).parameters
