"""Images beside their latents, and what the random and the adversarial perturbation share."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from latent_aug.flows import Flow, Glow
from latent_aug.flows.hub import HeldFlow
from latent_aug.images.conversion import (
    ERASED,
    WRONG_NORMALIZE,
    Normalization,
    add_difference,
    check_range,
    clamp_finite,
    downscale,
    fit_to_flow,
    image_size,
    to_float,
)
from latent_aug.transforms import functional as LF
from latent_aug.transforms.fallbacks import FallbackCounter
from latent_aug.transforms.regions import Levels, Mask, check_levels, check_mask
from latent_aug.utils.arguments import (
    Range,
    require_distance,
    require_positive,
    require_probability,
    require_range,
)
from latent_aug.utils.randomness import Draws

if TYPE_CHECKING:
    from typing_extensions import Self

Method = TypeVar("Method", bound=Callable[..., Any])


def run_uncompiled(method: Method) -> Method:
    """Make a method leave the graph of a compiled function that it is called in.

    Dynamo would follow it into every loop and context. `torch.compiler.disable` would do, but it
    imports Dynamo at once, which takes seconds and is not needed in loader workers.
    """
    disabled = _disable_dynamo(method)

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        return disabled(*args, **kwargs) if compiling else method(*args, **kwargs)

    return cast(Method, run)


@dataclass(frozen=True, eq=False)
class Latents:
    """A batch of images beside their latents: noise goes in, perturbed images come out.

    `LatentTransform.encode` makes them. `perturb` is the whole way back to images.

    Attributes:
        transform: The transform whose flow encoded them. Its `clip`, units and count are used.
        z: The latents (B, C, H', W').
        images: The images (B, C, H, W) as they came, perhaps normalized or in half precision.
        x: The same images in [0, 1], in float32 or float64.
        small: The copy of x that was encoded, downscaled to `resolution`, or x itself.
        y: The labels (B,) or (B, K), for a conditional flow.
        region: The pixels that may change, booleans (1 or B, 1, H, W). None for all.
    """

    transform: LatentTransform
    z: Tensor
    images: Tensor
    x: Tensor
    small: Tensor
    y: Tensor | None = None
    region: Tensor | None = None

    def perturb(self, noise: Tensor, *, counted: Tensor | None = None) -> Tensor:
        """Turn noise in the latents into perturbed images.

        An image that the flow cannot perturb comes back as it was, and is counted.

        Args:
            noise: The noise (B, C, H', W'), added to `z`.
            counted: Which of the images (B,) to count, by default all.

        Returns:
            Images like `images`: of their shape, dtype, units and memory layout.
        """
        perturbed = self.decode_with(noise)
        result, count = LF.restore_unusable(perturbed, self.images, self.z, counted=counted)
        self.transform.fallback_counter.add(count, len(self.z))
        return result if self.region is None else torch.where(self.region, result, self.images)

    def decode_with(self, noise: Tensor) -> Tensor:
        """Do the same without falling back or counting. Gradients reach the noise."""
        height, width = image_size(self.small)
        decoded = self.transform.decode(self.z + noise, self.y)
        moved = clamp_finite(decoded[..., :height, :width])
        if self.small is not self.x:
            moved = clamp_finite(add_difference(self.x, self.small, moved))
        if self.region is not None:
            moved = torch.where(self.region, moved, self.x)
        moved = LF.clip_change(moved, self.x, self.transform.clip, self.transform.norm)
        result = self.transform.normalization.apply(moved).to(self.images.dtype)
        return result.contiguous(memory_format=find_layout(self.images))


class LatentTransform:
    """A transform by way of a flow's latents: what `LatentPerturb` and `LatentAdversarial` share.

    The flow is held privately: neither `parameters()` nor `state_dict()` of a subclass know it.
    The arguments are those of the subclasses, which also say what they mean.

    Attributes:
        normalization: The normalization that images have been through.
        fallback_counter: The count of images that the flow could not perturb.
        fits_size: Whether eps is that of 3 x 32 x 32, and as strong at any other size.
    """

    fits_size = False

    def __init__(
        self,
        flow: Flow | str | Path,
        *,
        eps: Range,
        norm: LF.Norm | None,
        p: float | None,
        clip: float | None,
        resolution: int | None,
        normalize: Any,
        mask: Mask,
        levels: Levels,
        labels_getter: Any,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        if labels_getter != "default" and not callable(labels_getter):
            raise TypeError(f"labels_getter must be 'default' or callable, got {labels_getter!r}")
        self._held, self.labels_getter = HeldFlow(flow), labels_getter
        self.eps, self.norm = eps, norm
        self.p, self.clip = p, require_distance("clip", clip, norm)
        self.resolution = None if resolution is None else require_positive("resolution", resolution)
        self.normalization = Normalization(normalize, self.flow.channels)
        # In a tuple a mask that is a network stays out of a transform's parameters, as the flow.
        self._mask, self.levels = (check_mask(mask, self.flow),), check_levels(levels, self.flow)
        self._draws = Draws(generator)
        self.fallback_counter = FallbackCounter()
        self._checked_devices: set[torch.device] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what it has seen, so that its pickle and hash do not change by use."""
        return self.__dict__ | {"_checked_devices": set()}

    @property
    def eps(self) -> tuple[float, float]:
        """The size of a perturbation as a range (low, high). It may be set anew."""
        return self._eps

    @eps.setter
    def eps(self, eps: Range) -> None:
        self._eps, self.fits_size = require_range("eps", eps), False

    @property
    def p(self) -> float:
        """The share of the samples that is perturbed. It may be set anew."""
        return self._p

    @p.setter
    def p(self, p: float | None) -> None:
        self._p = require_probability("p", p)

    @property
    def flow(self) -> Flow:
        """The flow, which is shared, so treat it as read-only."""
        return self._held.flow

    @property
    def mask(self) -> Mask:
        """The argument `mask`."""
        return self._mask[0]

    @property
    def uses_norm(self) -> bool:
        """Whether `norm` says how large a perturbation of size `eps` is."""
        return True

    @property
    def has_generator(self) -> bool:
        """Whether it draws from a generator of its own."""
        return self._draws.generator is not None

    @property
    def normalizes(self) -> bool:
        """Whether images come normalized."""
        return self.normalization.mean_std is not None

    @property
    def fallbacks(self) -> int:
        """Samples that came back as they were, because the flow could not perturb them.

        Counted since the start, in this process and in the workers of its loaders. The processes
        of `datasets.Dataset.map` count for themselves.
        """
        return int(self.fallback_counter)

    def with_eps(self, eps: float) -> Self:
        """A copy that perturbs every sample by this eps: p is 1, and no `generator` is left.

        Its counts are its own.
        """
        result = self.with_generator(None)
        result.eps, result.p = eps, 1.0
        result.fits_size = self.fits_size
        return result

    def with_generator(self, generator: torch.Generator | None) -> Self:
        """A copy that draws from this generator, with counts of its own."""
        result = copy.copy(self)
        result._draws, result.fallback_counter = Draws(generator), FallbackCounter()
        return result

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        *,
        y: Tensor | None = None,
        region: Tensor | None = None,
        z: Tensor | None = None,
    ) -> Latents:
        """Encode a batch of images, to perturb them by `Latents.perturb`.

        Args:
            images: Images (B, C, H, W), float in [0, 1] or normalized as `normalize` says.
            y: The labels (B,) or (B, K), for a conditional flow.
            region: The pixels that may change, by `regions.read_region`.
            z: The latents, if they are known from an earlier call.

        Raises:
            ValueError: Values lie far outside [0, 1], or the flow does not map this size.
        """
        x = self._to_unit_range(to_float(images))
        small = downscale(x, self.resolution)
        if z is None:
            z = LF.encode(self.flow, fit_to_flow(small, self.flow), y)
        return Latents(self, z, images, x, small, y, region)

    def decode(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Decode latents to images in [0, 1], padded and not clamped."""
        return LF.decode(self.flow, z, y)

    def _to_unit_range(self, images: Tensor) -> Tensor:
        """Convert a float batch in the user's units to [0, 1], and check its range."""
        x = self.normalization.undo(images)
        if x.is_cpu or x.device not in self._checked_devices:  # elsewhere a check is a sync
            if self.normalizes:
                check_range(x, WRONG_NORMALIZE, allowed=ERASED)
            else:
                check_range(x)
            self._checked_devices.add(x.device)
        return x.clamp(0, 1)

    def _warn_of_size(self, *, dissolves: float, slight: float, usual: str) -> None:
        """Warn where eps looks like that of another norm, in a subclass's `__init__`.

        Args:
            dissolves: The eps of "linf", "rms" and None from which on images dissolve.
            slight: The l2 radius up to which images of 32 x 32 hardly change.
            usual: The usual eps, as the end of a message.
        """
        eps = self.eps[1]
        if self.norm != "l2" and eps >= dissolves:
            warnings.warn(
                f"eps={eps:g} with norm={self.norm!r} moves every component of a latent by about "
                "that many standard deviations, and images dissolve. Only a radius, as of "
                f"norm='l2', is as large; {usual}",
                stacklevel=3,
            )
        slight *= (self.resolution or 32) / 32  # at one radius a pixel changes by 1 / side
        whole = self.mask is None and self.levels is None
        # The latents of flows other than a Glow may have few components.
        if self.norm == "l2" and 0 < eps <= slight and whole and isinstance(self.flow, Glow):
            warnings.warn(
                f"eps={eps:g} with norm='l2' is the length of the whole perturbation, spread over "
                f"all components of a latent: it hardly changes an image; {usual}",
                stacklevel=3,
            )

    def list_settings(self, *more: str, with_flow: bool = True) -> str:
        """List the arguments that matter, those named and those shared, as `print` shows them."""
        loaded = self.flow.loaded_from
        norm = ("norm",) if self.uses_norm else ()
        values = {name: getattr(self, name) for name in ("eps", *more, *norm)}
        values = {name: v[0] if is_point(v) else v for name, v in values.items()}
        if with_flow:
            values["flow"] = loaded[0] if loaded else type(self.flow).__name__
        values |= {name: getattr(self, name) for name in ("p", "clip", "levels", "resolution")}
        shown = {name: repr(v) for name, v in values.items() if v is not None or name == "norm"}
        shown["p"] = self._word_share()
        given = {"normalize": self.normalizes, "mask": self.mask is not None}
        long = [f"{name}=..." for name, there in given.items() if there]
        return ", ".join([*(f"{name}={value}" for name, value in shown.items()), *long])

    def _word_share(self) -> str:
        """Say which share of the samples is perturbed, for `print`."""
        return repr(self.p)


def find_layout(images: Tensor) -> torch.memory_format:
    """Find the memory format of a batch: channels_last if it is so and not also contiguous."""
    last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def is_point(value: Any) -> bool:
    """Whether a (low, high) range is one number."""
    return isinstance(value, tuple) and value[0] == value[1]
