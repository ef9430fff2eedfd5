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

from latent_aug.flows import Flow
from latent_aug.images.conversion import advise_conversion, image_size, to_float, wrap_like
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
    count_classes,
    is_multilabel,
    mixes_samples,
    refuse_several,
    scale_up,
)
from latent_aug.transforms.labels import prepare_labels, read_labels
from latent_aug.transforms.latents import LatentTransform, find_layout, run_uncompiled
from latent_aug.transforms.lending import lend
from latent_aug.transforms.regions import Levels, Mask, build_mask, read_region, take_rows
from latent_aug.utils.arguments import (
    Range,
    require_choice,
    require_number,
    require_positive,
    require_range,
)

Forward = Callable[[nn.Module, Any], Tensor]
Loss = Callable[[Tensor, Any], Tensor]
Ask = Callable[[nn.Module, Tensor], Tensor]  # from a model and images to logits

USUAL_EPS = {"l2": 1.0, "linf": 0.018, "rms": 0.018}  # of one strength at 3 x 32 x 32
USUAL_DIMENSIONS = 3 * 32 * 32

PREDICTED = "labels='predicted' gives loss= the predicted classes (B,)"
TRUE = "pass labels='true'"
DETACHED = "the loss has no gradient to the images: the model, forward= or loss= detaches it"


class LatentAdversarial(LatentTransform):
    """Replace images by on-manifold adversarial ones: k ascent steps on the user's classifier.

    The attack searches a ball of radius eps around each image's latent for the point whose decoded
    image the model classifies worst. It takes projected ascent steps along normalized gradients.
    The model is left as it was, also after an exception: modes, buffers, gradients, flags, and
    public attributes, with the tensors, arrays and containers in them. So are modules that `loss`
    and `forward` reach. Other objects, private attributes, and parameters that a forward pass
    writes to are not put back. Threads that attack one model wait for each other.

    Images that the flow cannot perturb come back as they were, and `fallbacks` counts them.

    The model may run under autocast, in half precision, compiled, or frozen in part. DataParallel
    and DistributedDataParallel are looked through. In "eval" mode the attack never talks to other
    processes, as SyncBatchNorm in training mode would. Under float16 small gradients survive, as
    they are scaled up. Activation checkpointing needs ``use_reentrant=False``.

    Args:
        model: The classifier: images (B, C, H, W) to logits (B, K).
        eps: Radius of the ball in standard deviations of the prior, or (low, high) to draw it
            per sample. None is an l2 radius of 1 at 3 x 32 x 32, and as strong at any other size.
        alpha: Step size in the same unit, or (low, high). None is eps for one step, else half of
            it.
        steps: Ascent steps, k.
        norm: "l2", "linf", or "rms" (l2 with eps and alpha times √d).
        flow: A `Flow`, or a name or path for `load_flow`.
        resolution: Attack in the latent of a copy of the images, downscaled to this many pixels on
            its shorter side, and add the upsampled difference. This is for photographs, which are
            larger than what the flow was trained on. Images no larger than that are attacked as
            they are.
        loss: A function that is called with (logits, labels) and gives a scalar or (B,). Labels may
            be anything then but None, or a tensor of another length. By default it is
            cross-entropy in float64, as confident samples have no loss in float32.
        labels: The labels whose loss is raised. "predicted" are the classes (B,) that the model
            predicts where the ascent begins, as in the authors' code. "true" are those of the
            batch. None is "predicted", and "true" with `loss`. It refuses labels (B, K) whose rows
            do not sum to 1, as those of several labels an image: they need a `loss`.
        normalize: v2.Normalize or (mean, std) that the images have been through already.
        p: Share of each batch that is perturbed, drawn at random. The cost falls with it.
        clip: Greatest distance from the original image, in [0, 1] units: per pixel for "linf",
            as l2 norm otherwise.
        random_start: Begin at a random point of the ball, not at its centre.
        model_mode: "eval" attacks the model in evaluation mode, "unchanged" in the mode it is in.
        mask: Zeros and ones, (H, W) or (B, H, W), or a callable that takes the batch and returns
            them. Latents move only at the pixels where it is 1. The other pixels come back exactly
            as they were.
        levels: The levels of the flow to perturb, an integer or several: 0 is the finest, -1 the
            coarsest. By default all move. "rms" counts only what may move.
        labels_getter: The place of the labels. "default" looks second in a tuple or list, or in a
            mapping under "labels" or "label". A callable takes the batch and returns them. A
            class-conditional flow is given the same labels.
        forward: For models of several inputs or outputs: called with (model, batch) in place of
            model(images), gives the logits. The batch is the user's with the images replaced
            and, where p is below 1, without the rows of the samples that are not attacked.
        gradient: How the gradient passes the flow: "fast" keeps activations, "lean" recomputes
            them in memory that does not grow with the flow's depth, "auto" decides by size
            (`Glow.decode`). Flows other than `Glow` may know only "auto".
        generator: The generator to draw from, by default torch's global ones. The ranks of
            distributed training may seed those alike. Seed your own by rank.

    Raises:
        TypeError, ValueError: An argument or a batch is not as described.

    Source: the paper's §2.2. Its setting for CIFAR-10 is ``norm="l2", eps=1.0, alpha=0.5, steps=3,
    p=1.0, labels="true"``. p=0.5 is Stutz et al. 2019.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
        >>> attack = LatentAdversarial(model, flow="glow-fashionmnist")
        >>> images, labels = attack.step((torch.rand(2, 1, 28, 28), torch.tensor([3, 7])))
        >>> images.shape, labels
        (torch.Size([2, 1, 28, 28]), tensor([3, 7]))
    """

    norm: LF.Norm

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: Range | None = None,
        alpha: Range | None = None,
        steps: int = 1,
        norm: str = "l2",
        flow: Flow | str | Path = "glow-photographs",
        resolution: int | None = None,
        loss: Loss | None = None,
        labels: str | None = None,
        normalize: Any = None,
        p: float = 0.5,
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
        known: LF.Norm = require_choice("norm", norm, ("linf", "l2", "rms"))
        super().__init__(
            flow,
            eps=USUAL_EPS[known] if eps is None else eps,
            norm=known,
            p=p,
            clip=clip,
            resolution=resolution,
            normalize=normalize,
            mask=mask,
            levels=levels,
            labels_getter=labels_getter,
            generator=generator,
        )
        self.fits_size = eps is None and norm == "l2"
        self.model, self.loss, self.forward = model, loss, forward
        self.steps = require_positive("steps", steps)
        self.alpha = self._choose_alpha() if alpha is None else require_range("alpha", alpha)
        self._chosen = labels is not None
        if labels is None:
            labels = "predicted" if loss is None else "true"
        self.labels = require_choice("labels", labels, ("true", "predicted"))
        if labels == "predicted" and is_multilabel(loss):
            raise ValueError(f"{PREDICTED}, and this loss= takes several labels an image; {TRUE}")
        self._seen_labels: set[torch.device] = set()
        self.random_start = bool(random_start)
        self.model_mode = require_choice("model_mode", model_mode, ("eval", "unchanged"))
        self._warn_of_size(
            dissolves=0.25,  # an attack's steps add up where noise's cancel
            slight=0.1,
            usual="usual for an attack are 1 for 'l2' at 32x32, some hundredths for 'linf' and "
            "'rms'",
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

    def _choose_alpha(self) -> tuple[float, float]:
        """Choose the step size: one step crosses the whole radius, several go half as far."""
        share = 1.0 if self.steps == 1 else 0.5
        return share * self.eps[0], share * self.eps[1]

    @run_uncompiled
    def step(self, batch: Any) -> Any:
        """Replace the images of a batch by attacked ones, in a new container of the same type.

        Args:
            batch: (images, labels, ...) as tuple, named tuple or list, or a mapping with images
                under "pixel_values", "image", "images" or "img". Images (B, C, H, W) are float in
                [0, 1] or normalized as `normalize` says. Labels are indices (B,) or
                probabilities (B, K).
        """
        key, labels = get_image_key(batch), read_labels(batch, self.labels_getter)
        return replace_images(batch, key, self._replace(batch, key, labels))

    def with_eps(self, eps: float) -> LatentAdversarial:
        """Copy the attack with this eps for every sample, and alpha in proportion.

        The copy counts for itself, its p is 1, and it has no `generator`.
        """
        result = super().with_eps(require_number("eps", eps))
        share = eps / self.eps[1] if self.eps[1] else 1.0
        result.alpha = (share * self.alpha[0], share * self.alpha[1])
        return result

    @run_uncompiled
    def __call__(self, images: Tensor, labels: Any = None) -> Tensor:
        """Attack images (B, C, H, W) with labels (B,) or (B, K), and keep their dtype.

        `mask` and `forward` get (images, labels) as the batch.
        """
        return self._replace((images, labels), 0, labels)

    def _replace(self, batch: Any, key: Any, labels: Any) -> Tensor:
        """Attack a random share p of the images of a batch."""
        given: Tensor = batch[key]
        self._check(given, labels)
        images = given.detach().as_subclass(Tensor)
        region = read_region(self.mask, batch, images)
        count = self._count_attacked(len(images))
        if not count:
            result = images.clone()
        elif count == len(images):
            result = self._attack(images, labels, region, self._build_ask(batch, key))
        else:
            like = to_float(images.new_empty(0))
            chosen = self._draws.sample_uniform((len(images),), like).argsort()[:count]
            attacked = self._attack(
                images[chosen].contiguous(memory_format=find_layout(images)),
                select_entry(labels, chosen, len(images)),
                take_rows(region, chosen),
                self._build_ask(batch, key, chosen),
            )
            result = images.clone().index_copy_(0, chosen, attacked)
        return wrap_like(result, given)

    def _build_ask(self, batch: Any, key: Any, chosen: Tensor | None = None) -> Ask:
        """Build the function that asks the model for the logits of attacked images.

        Only `forward` is given a batch: this one with the images replaced, and without the rows
        that are not `chosen`.
        """
        forward = self.forward
        if forward is None:
            return lambda model, images: check_logits(model(images))
        part = batch if chosen is None else select_rows(batch, chosen, len(batch[key]))
        return lambda model, images: check_logits(forward(model, replace_images(part, key, images)))

    def _check(self, images: Tensor, labels: Tensor | None) -> None:
        """Refuse images and labels that the attack cannot work on."""
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
                f"{advise_conversion(images.dtype)}"
            )
        if images.shape[1] != self.flow.channels:
            raise ValueError(
                f"the flow maps images of {self.flow.channels} channels, got {images.shape[1]}, "
                f"shape {tuple(images.shape)}; channels come before height and width; convert "
                "them, or pass flow= one of as many: 'glow-fashionmnist' of 1, 'glow-photographs' "
                "of 3"
            )
        if torch.is_inference_mode_enabled():
            raise RuntimeError("an attack needs gradients: call it outside torch.inference_mode()")
        if self.loss is None and isinstance(labels, Tensor):
            self._check_several(labels)
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

    def _check_several(self, labels: Tensor) -> None:
        """Refuse several labels an image, unless the predicted ones were asked for."""
        if self.labels == "predicted" and self._chosen:
            return
        place = labels.device
        if labels.is_cpu or place not in self._seen_labels:  # elsewhere a check is a sync
            unless = "" if self._chosen else "; to attack one prediction pass labels='predicted'"
            refuse_several(labels, unless=unless)
            self._seen_labels.add(place)

    def _count_attacked(self, count: int) -> int:
        """Count the samples that are attacked, a share p of `count`.

        A fraction of a sample is rounded at random, so that the share is right on average.
        """
        share = self.p * count
        if share != int(share):
            like = torch.empty((), dtype=torch.float32, device="cpu")
            share += float(self._draws.sample_uniform((), like))
        if int(share) == 1 and self.model_mode == "unchanged" and mixes_samples(self.model):
            return min(2, count)  # BatchNorm may have no statistics of a single sample
        return int(share)

    def _attack(self, images: Tensor, labels: Any, region: Tensor | None, ask: Ask) -> Tensor:
        """Attack every image of a batch, and keep its units, dtype and memory layout."""
        y = prepare_labels(self.flow, labels, len(images), to_float(images))
        latents = self.encode(images, y=y, region=region)
        z, size = latents.z, image_size(latents.small)
        mask = build_mask(self.flow, z, region, self.levels, size=size)
        scale = (LF.dimensions(z, mask) / USUAL_DIMENSIONS) ** 0.5 if self.fits_size else 1.0
        eps = scale * self._draws.sample_between(*self.eps, len(z), z)
        alpha = scale * self._draws.sample_between(*self.alpha, len(z), z)
        delta = self._start(z, eps, mask)
        beside = (self.loss, self.forward)
        lent = lend(self.model, self.model_mode, beside=beside)
        with lent as model, torch.enable_grad():
            samples = None if mixes_samples(model) else len(z)
            for number in range(self.steps):
                delta.requires_grad_(True)
                moved = latents.decode_with(delta)
                if not moved.requires_grad:
                    name = f"{type(self.flow).__name__}.decode"
                    raise ValueError(f"{name} detaches: it has no gradient")
                logits = ask(model, moved)
                if number == 0 and self.labels == "predicted":
                    labels = predict_classes(logits)
                loss = self._loss(logits, labels, samples)
                (grad,) = torch.autograd.grad(loss, delta, allow_unused=True)
                if grad is None:
                    raise ValueError(DETACHED)
                delta = LF.ascent_step(delta.detach(), grad, alpha, eps, self.norm, mask=mask)
        with torch.no_grad():
            return latents.perturb(delta)

    def decode(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Decode latents with the gradient that was asked for."""
        options = {} if self.gradient == "auto" else {"gradient": self.gradient}
        return LF.decode(self.flow, z, y, **options)

    def _start(self, z: Tensor, eps: float | Tensor, mask: Tensor | None) -> Tensor:
        """Choose where the ascent begins."""
        if not self.random_start:
            return torch.zeros_like(z)
        generator = self._draws.pick_generator(z.device)
        return LF.random_start(z, eps, self.norm, mask=mask, generator=generator)

    def _loss(self, logits: Tensor, labels: Any, samples: int | None) -> Tensor:
        """Compute the loss, summed over the samples, so that each one's gradient is its own.

        Args:
            logits: The model's output, in float32 or float64.
            labels: The labels of the batch, or the predicted ones.
            samples: The number of samples, if the model does not mix them, else None.
        """
        if self.loss is None and logits.device.type != "mps":
            # In float32 a sample classified with a margin above 16 has a loss of exactly 0, and
            # half of its gradient is lost. A fifth of a small training set can be like that.
            logits = logits.double()
        if logits.requires_grad:
            each = logits.ndim > 0 and len(logits) == samples
            logits.register_hook(partial(scale_up, each=each))
        if self.loss is None:
            loss = F.cross_entropy(logits, check_targets(logits, labels), reduction="sum")
        else:
            loss = self._call_loss(logits, labels)
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss must give a tensor, got {type(loss).__name__}")
        if not loss.requires_grad:
            raise ValueError(DETACHED)
        return loss.sum()

    def _call_loss(self, logits: Tensor, labels: Any) -> Tensor:
        """Call the user's loss, and say what it was given where it fails on predicted classes."""
        assert self.loss is not None
        try:
            return self.loss(logits, labels)
        except (ValueError, RuntimeError, TypeError, IndexError) as error:
            if self.labels != "predicted":
                raise
            raise ValueError(f"{PREDICTED}, and it fails: {error}; {TRUE}") from error

    def __repr__(self) -> str:
        described = self._describe("alpha", "steps")
        return f"LatentAdversarial({described}{', at 3x32x32' if self.fits_size else ''})"


def predict_classes(logits: Tensor) -> Tensor:
    """Return the class (B,) with the greatest logit of each sample."""
    count_classes(logits, "labels='predicted' takes the largest; use labels='true'")
    return logits.detach().argmax(dim=1)


def check_logits(logits: Any) -> Tensor:
    """Check what a model gave, and convert it to float32 at least."""
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"a tensor of logits is needed, got {type(logits).__name__}; pass a forward= that "
            "takes them out, e.g. lambda model, batch: model(batch[0]).logits, or "
            "model(**batch).logits for mappings"
        )
    return to_float(logits)


def has_argument(function: Callable[..., Any], name: str) -> bool:
    """Whether a function takes an argument of this name."""
    return name in inspect.signature(function).parameters
