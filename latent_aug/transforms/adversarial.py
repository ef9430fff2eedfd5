"""LatentAdversarial: gradient ascent on a classifier's loss in latent space (Adversarial-LA)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latent_aug.flows import Flow
from latent_aug.images.conversion import image_size, to_float, wrap_like
from latent_aug.images.samples import get_image_key, replace_images, select_entry
from latent_aug.transforms import functional as LF
from latent_aug.transforms.ascent import (
    Loss,
    Objective,
    ascend,
    refuse_several_predicted,
    warn_of_steps,
)
from latent_aug.transforms.asking import Ask, Forward, build_ask
from latent_aug.transforms.batch_checks import check_images, check_labels, map_images
from latent_aug.transforms.classifier import has_company, mixes_samples, refuse_several, talks
from latent_aug.transforms.consistency import make_targets, measure_change
from latent_aug.transforms.labels import prepare_labels, read_labels
from latent_aug.transforms.latents import LatentTransform, find_layout, run_uncompiled
from latent_aug.transforms.lending import keep_statistics, lend, list_modules
from latent_aug.transforms.regions import Levels, Mask, build_mask, read_region, take_rows
from latent_aug.transforms.share import HIGHEST_SHARE, AdaptiveShare, count_right
from latent_aug.utils.arguments import (
    Range,
    require_choice,
    require_nonnegative,
    require_number,
    require_positive,
    require_probability,
    require_range,
)

USUAL_EPS = {"l2": 1.0, "linf": 0.018, "rms": 0.018}  # of one strength at 3 x 32 x 32
USUAL_DIMENSIONS = 3 * 32 * 32


class LatentAdversarial(LatentTransform):
    """Replace images by on-manifold adversarial ones: k ascent steps on the user's classifier.

    The attack searches a ball of radius eps around each image's latent for the point whose decoded
    image the model classifies worst. It takes projected ascent steps along normalized gradients.
    The model is left as it was, also after an exception: modes, buffers, gradients, flags, and
    public attributes, with the tensors, arrays and containers in them. So are modules that `loss`
    and `forward` reach. Other objects, private attributes, and parameters that a forward pass
    writes to are not put back. Threads that attack one model wait for each other.

    Images that the flow cannot perturb come back as they were, and `fallbacks` counts them.

    The model may run under autocast or in half precision. It may be compiled, or frozen in part.
    DataParallel and DistributedDataParallel are looked through. Where FSDP or, in training mode,
    SyncBatchNorm waits for other processes, each makes the passes even if it attacks nothing. Under
    float16 small gradients survive, as they are scaled up. Activation checkpointing needs
    ``use_reentrant=False``.

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
            do not sum to 1, as those of several labels per image: they need a `loss`.
        normalize: v2.Normalize or (mean, std) that the images have been through already.
        p: Share of each batch that is perturbed, drawn at random. The cost falls with it. None
            follows the model, and needs class labels. The share is nothing while the model is at
            chance. It grows towards one half as the model gets clean images right, in evaluation
            mode. `share` tells where it stands.
        clip: Greatest distance from the original image, in [0, 1] units: per pixel for "linf",
            as l2 norm otherwise. Rounding to 8 bits comes after it.
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
        p: float | None = None,
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
        self.alpha = alpha
        self._labels_given = labels is not None
        if labels is None:
            labels = "predicted" if loss is None else "true"
        self.labels = require_choice("labels", labels, ("true", "predicted"))
        if labels == "predicted":
            refuse_several_predicted(loss)
        self._seen_labels: set[torch.device] = set()
        self.random_start = bool(random_start)
        self.model_mode = require_choice("model_mode", model_mode, ("eval", "unchanged"))
        self._warn_of_size(
            dissolves=0.25,  # an attack's steps add up where noise's cancel
            slight=0.1,
            usual="usual for an attack are 1 for 'l2' at 32x32, some hundredths for 'linf' and "
            "'rms'",
        )
        warn_of_steps(self.alpha, self.eps, self.steps)
        self.gradient = require_choice("gradient", gradient, ("auto", "fast", "lean"))
        if gradient != "auto" and not has_argument(self.flow.decode, "gradient"):
            raise ValueError(
                f"{type(self.flow).__name__}.decode takes no gradient argument: leave "
                f"gradient='auto', got {gradient!r}"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what it has seen, as the accuracy that `share` follows."""
        adaptive = None if self._adaptive is None else AdaptiveShare()
        return super().__getstate__() | {"_seen_labels": set(), "_adaptive": adaptive}

    @property
    def share(self) -> float:
        """The share of a batch that is attacked now: p, or what follows the model's accuracy."""
        return self.p if self._adaptive is None else self._adaptive.value

    @property
    def p(self) -> float:
        """The greatest share of a batch that is attacked. Set anew it holds, or follows if None."""
        return self._p

    @p.setter
    def p(self, p: float | None) -> None:
        self._p = HIGHEST_SHARE if p is None else require_probability("p", p)
        self._adaptive = AdaptiveShare() if p is None else None

    @property
    def alpha(self) -> tuple[float, float]:
        """The step size as a range (low, high). It may be set anew."""
        if self._alpha is not None:
            return self._alpha
        return self._step_share * self.eps[0], self._step_share * self.eps[1]

    @alpha.setter
    def alpha(self, alpha: Range | None) -> None:
        self._alpha = None if alpha is None else require_range("alpha", alpha)

    @property
    def _step_share(self) -> float:
        """Usual step size as a share of eps: one step crosses the radius, several half of it."""
        return 1.0 if self.steps == 1 else 0.5

    @run_uncompiled
    def step(self, batch: Any) -> Any:
        """Replace the images of a batch by attacked ones, in a new container of the same type.

        Args:
            batch: (images, labels, ...) as tuple, named tuple or list, or a mapping with images
                under "pixel_values", "image", "images" or "img". Images (B, C, H, W) are float in
                [0, 1] or normalized as `normalize` says. Labels are indices (B,) or
                probabilities (B, K).
        """
        if isinstance(batch, Tensor):
            raise TypeError(
                "batch must be (images, labels, ...) or a mapping, got a tensor: for images alone "
                "call attack(images, labels)"
            )
        key, labels = get_image_key(batch), read_labels(batch, self.labels_getter)
        return replace_images(batch, key, self._replace(batch, key, labels))

    @run_uncompiled
    def __call__(self, images: Tensor, labels: Any = None) -> Tensor:
        """Attack images (B, C, H, W) with labels (B,) or (B, K), and keep their dtype.

        `mask` and `forward` get (images, labels) as the batch.
        """
        return self._replace((images, labels), 0, labels)

    @run_uncompiled
    def consistency(
        self,
        unlabelled: Any,
        *,
        threshold: float = 0.0,
        temperature: float = 1.0,
        entropy: float = 0.0,
        perturb: Callable[[Tensor], Tensor] | None = None,
        augment: Callable[[Tensor], Tensor] | None = None,
        update_statistics: bool = True,
    ) -> Tensor:
        """Compute the loss of unlabelled images, to be added to that of labelled ones.

        It is the divergence KL(clean, attacked), averaged over the batch. Clean is the model's
        prediction at an image, attacked the one at the attacked image. This is virtual adversarial
        training along the flow's images. The attack raises the same divergence. It begins at a
        random point of the ball, as the divergence has no gradient at the centre. Every image that
        counts is attacked, or the share `p` of them if you gave one.

        The clean prediction is a constant. It is made in the mode of the attack, `model_mode`, and
        leaves no trace. The last pass is an ordinary one through your model, wrapped as it is, in
        the mode that it is in. Its gradient reaches the weights, and BatchNorm sees its batch.

        Args:
            unlabelled: Images (B, C, H, W), or a batch as for `step`, whose labels are ignored.
            threshold: The least probability of the likeliest class with which an image counts, in
                [0, 1]. The others count as a loss of 0.
            temperature: Sharpens the clean prediction: its logits are divided by it. 0 keeps only
                the likeliest class.
            entropy: The weight of the entropy of the prediction at the attacked image.
            perturb: Perturbs images (B, C, H, W) in place of the attack, as a `LatentPerturb` does.
            augment: Augments the images, in the form that the model takes, before they are
                perturbed. The clean prediction is that of the images as they come.
            update_statistics: Whether the last pass moves the running statistics of BatchNorm.
                It always normalizes by those of its batch in training mode.

        Returns:
            The loss in nats, a scalar of at least float32.

        Raises:
            TypeError, ValueError: An argument or the batch is not as described. The attack has a
                loss of its own, a conditional flow, or no random start.

        Source: Miyato et al. 2018, there in pixels and with `entropy` 0 or 1. With ``perturb=lambda
        images: images``, an `augment`, `threshold` 0.95 and `temperature` 0 it is FixMatch's loss
        (Sohn et al. 2020).

        Example:
            >>> import torch
            >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
            >>> attack = LatentAdversarial(model, p=1.0, flow="glow-fashionmnist")
            >>> loss = attack.consistency(torch.rand(2, 1, 28, 28))
            >>> loss.backward()
            >>> loss.shape
            torch.Size([])
        """
        threshold = require_probability("threshold", threshold)
        temperature = require_nonnegative("temperature", temperature)
        entropy = require_nonnegative("entropy", entropy)
        self._check_consistency(attacks=perturb is None)
        batch: Any = (unlabelled, None) if isinstance(unlabelled, Tensor) else unlabelled
        key = get_image_key(batch)
        check_images(batch[key], self.flow.channels)
        images = batch[key].detach().as_subclass(Tensor)
        ask = build_ask(self.forward, batch, key)
        # Copies, as the model may change what it is given.
        clean = self._ask_without_trace(images.clone(), ask, mode=self.model_mode)
        targets, counted = make_targets(clean, threshold=threshold, temperature=temperature)
        if augment is not None:
            images = map_images("augment", augment, images)
        batch = replace_images(batch, key, images)
        if perturb is None:
            share = self.p if self._adaptive is None else 1.0
            among = counted[:, None].flatten(1).any(1).nonzero()[:, 0] if threshold else None
            images = self._attack_share(
                batch, key, targets, share=share, predicted=False, among=among
            )
        else:
            images = map_images("perturb", perturb, images).clone()
        reached = () if update_statistics else list_modules(self.model, (self.forward,))
        with keep_statistics(reached):
            logits = build_ask(self.forward, batch, key)(self.model, images)
        return measure_change(logits, targets, counted, entropy=entropy)

    def with_eps(self, eps: float) -> LatentAdversarial:
        """Copy the attack with this eps for every sample, and alpha in proportion.

        The copy counts for itself, its p is 1, and it has no `generator`.
        """
        result = super().with_eps(require_number("eps", eps))
        if self._alpha is not None:
            share = eps / self.eps[1] if self.eps[1] else 1.0
            result.alpha = (share * self.alpha[0], share * self.alpha[1])
        return result

    def _replace(self, batch: Any, key: Any, labels: Any) -> Tensor:
        """Attack a random share of the images of a batch, after a look at it."""
        given: Tensor = batch[key]
        check_images(given, self.flow.channels)
        if self.loss is None and isinstance(labels, Tensor):
            self._check_several(labels)
        predicted = self.labels == "predicted"
        if not predicted:
            check_labels(labels, len(given), anything=self.loss is not None)
        if self._adaptive is not None:
            self._follow_accuracy(self._adaptive, batch, key, labels)
        share = self.share
        attacked = self._attack_share(batch, key, labels, share=share, predicted=predicted)
        return wrap_like(attacked, given)

    def _follow_accuracy(self, adaptive: AdaptiveShare, batch: Any, key: Any, labels: Any) -> None:
        """See how many clean images the model has right, for the share that is attacked."""
        images = batch[key].detach().as_subclass(Tensor)
        if isinstance(labels, Tensor):
            check_labels(labels, len(images), anything=True)
        chosen = adaptive.select_probed(len(images), images.device)
        if len(chosen):
            ask = build_ask(self.forward, batch, key, chosen)
            # In training mode BatchNorm would see a few images alone.
            logits = self._ask_without_trace(images[chosen], ask, mode="eval")
            adaptive.update(count_right(logits, select_entry(labels, chosen, len(images))))

    def _attack_share(
        self,
        batch: Any,
        key: Any,
        labels: Any,
        *,
        share: float,
        predicted: bool,
        among: Tensor | None = None,
    ) -> Tensor:
        """Attack a random share of the images of a batch, as plain tensors.

        `among` holds the indices of those that may be attacked.
        """
        images = batch[key].detach().as_subclass(Tensor)
        region = read_region(self.mask, batch, images)
        candidates = len(images) if among is None else len(among)
        count = self._count_attacked(share * candidates)
        if not count and not (len(images) and self._is_waited_for()):
            self._to_unit_range(to_float(images))  # the wrong range is to be seen at once
            return images.clone()
        if count == len(images):
            ask = build_ask(self.forward, batch, key)
            return self._attack(images, labels, region, ask, predicted=predicted)
        like = to_float(images.new_empty(0))
        order = self._draws.sample_uniform((candidates,), like).argsort()
        chosen = order[:count] if among is None else among[order[:count]]
        if not count:  # other processes wait for the passes, whose result is dropped
            chosen = torch.zeros(1, dtype=torch.int64, device=images.device)
        if count <= 1:  # a single image may be too few for the model: another comes along
            chosen = torch.cat([chosen, (chosen + 1) % len(images)])
        attacked = self._attack(
            images[chosen].contiguous(memory_format=find_layout(images)),
            select_entry(labels, chosen, len(images)),
            take_rows(region, chosen),
            build_ask(self.forward, batch, key, chosen),
            predicted=predicted,
        )
        return images.clone().index_copy_(0, chosen[:count], attacked[:count])

    def _is_waited_for(self) -> bool:
        """Whether other processes wait for this one's passes."""
        if not has_company():
            return False
        return talks(list_modules(self.model, (self.loss, self.forward)), self.model_mode)

    def _check_several(self, labels: Tensor) -> None:
        """Refuse several labels per image, unless the predicted ones were asked for."""
        if self.labels == "predicted" and self._labels_given:
            return
        place = labels.device
        if labels.is_cpu or place not in self._seen_labels:  # elsewhere a check is a sync
            advice = "; to attack one prediction pass labels='predicted'"
            refuse_several(labels, unless="" if self._labels_given else advice)
            self._seen_labels.add(place)

    def _count_attacked(self, wanted: float) -> int:
        """Count the samples that are attacked.

        A fraction of a sample is rounded at random, so that the share is right on average.
        """
        if wanted != int(wanted):
            like = torch.empty((), dtype=torch.float32, device="cpu")
            wanted += float(self._draws.sample_uniform((), like))
        return int(wanted)

    def _attack(
        self, images: Tensor, labels: Any, region: Tensor | None, ask: Ask, *, predicted: bool
    ) -> Tensor:
        """Attack every image of a batch, and keep its units, dtype and memory layout."""
        y = prepare_labels(self.flow, labels, len(images), to_float(images))
        latents = self.encode(images, y=y, region=region)
        z, size = latents.z, image_size(latents.small)
        mask = build_mask(self.flow, z, region, self.levels, size=size)
        scale = (LF.dimensions(z, mask) / USUAL_DIMENSIONS) ** 0.5 if self.fits_size else 1.0
        eps = scale * self._draws.sample_between(*self.eps, len(z), z)
        if self._alpha is None:
            alpha = self._step_share * eps
        else:
            alpha = scale * self._draws.sample_between(*self._alpha, len(z), z)
        delta = self._start(z, eps, mask)
        lent = lend(self.model, self.model_mode, beside=(self.loss, self.forward))
        with lent as model, torch.enable_grad():
            samples = None if mixes_samples(model) else len(z)
            objective = Objective(self.loss, labels, predicted=predicted, samples=samples)
            delta = ascend(
                latents,
                delta,
                lambda moved: objective(ask(model, moved)),
                steps=self.steps,
                alpha=alpha,
                eps=eps,
                norm=self.norm,
                mask=mask,
            )
        with torch.no_grad():
            return latents.perturb(delta)

    def _ask_without_trace(self, images: Tensor, ask: Ask, *, mode: str) -> Tensor:
        """Ask the model for logits, in a mode as `model_mode` names it."""
        # Under no_grad autocast could cache half-precision weights that have no gradient, and the
        # pass with gradients would then take those.
        lent = lend(self.model, mode, beside=(self.forward,))
        with lent as model, torch.enable_grad():
            return ask(model, images).detach()

    def _check_consistency(self, *, attacks: bool) -> None:
        """Refuse settings with which unlabelled images have no loss, or none that can be raised."""
        if self.loss is not None:
            raise ValueError(
                "consistency has a loss of its own, the divergence between two predictions of one "
                "class per image: call it on a LatentAdversarial without loss="
            )
        if attacks and not self.random_start:
            raise ValueError(
                "consistency needs random_start=True: at the centre of the ball the divergence has "
                "no gradient"
            )
        if attacks and self.flow.num_classes:
            raise ValueError(
                f"consistency needs a flow without classes, as unlabelled images have none, got a "
                f"{type(self.flow).__name__} of {self.flow.num_classes}"
            )

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

    def __repr__(self) -> str:
        described = self.list_settings("alpha", "steps")
        return f"LatentAdversarial({described}{', at 3x32x32' if self.fits_size else ''})"

    def _word_share(self) -> str:
        return super()._word_share() if self._adaptive is None else f"None, now {self.share:g}"


def has_argument(function: Callable[..., Any], name: str) -> bool:
    """Whether a function takes an argument of this name."""
    return name in inspect.signature(function).parameters
