"""LatentSchedule: perturbations that follow one another over the epochs of a training."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from latent_aug.transforms.adversarial import LatentAdversarial
from latent_aug.transforms.latents import LatentTransform
from latent_aug.utils.arguments import require_natural, require_positive

Perturbation = Callable[..., Any] | LatentAdversarial | None


class LatentSchedule:
    """One perturbation after another: "multi-step training", usually from strong to weak.

    Call it as you would call its parts. A transform takes images or samples, a
    `LatentAdversarial` (its `step`) takes batches (images, labels) or mappings. Both return the
    structure that they were given, so they may follow each other.

    It stays in its first phase until `set_epoch` or `step` is called.

    The epoch lies in shared memory. Loader workers, persistent ones too, see what `set_epoch` and
    `step` do in the main process. Set it between epochs, as batches are prefetched.

    Args:
        phases: The (epochs, perturbation) pairs. A perturbation is a transform, a
            `LatentAdversarial`, or None for none. The last phase goes on beyond its epochs.

    Raises:
        TypeError, ValueError: The phases are not as described.

    Source: the paper's Table 8, rows marked with +.

    Example:
        >>> import torch
        >>> from latent_aug import LatentPerturb
        >>> strong, weak = (LatentPerturb(e, flow="glow-fashionmnist") for e in (0.5, 0.1))
        >>> schedule = LatentSchedule([(30, strong), (10, weak)])
        >>> schedule.set_epoch(35)
        >>> schedule.current is weak
        True
        >>> schedule(torch.rand(8, 1, 28, 28)).shape
        torch.Size([8, 1, 28, 28])
    """

    def __init__(self, phases: Iterable[tuple[int, Perturbation]]) -> None:
        if not isinstance(phases, Iterable):
            raise TypeError(f"phases must be (epochs, perturbation) pairs, got {phases!r}")
        self.phases = [require_phase(phase) for phase in phases]
        if not self.phases:
            raise ValueError("phases must hold at least one (epochs, perturbation), got none")
        self._starts = [0, *itertools.accumulate(epochs for epochs, _ in self.phases)][:-1]
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()

    @property
    def epoch(self) -> int:
        """The current epoch, counted from 0."""
        return int(self._epoch)

    @property
    def current(self) -> Perturbation:
        """The perturbation of this epoch."""
        return self.phases[bisect.bisect_right(self._starts, self.epoch) - 1][1]

    @property
    def fallbacks(self) -> int:
        """The number of samples that no flow in it could perturb, see `LatentPerturb`."""
        parts = {id(part): part for part in walk_parts(self)}  # one may be in two phases
        return sum(part.fallbacks for part in parts.values() if isinstance(part, LatentTransform))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0, as `DistributedSampler.set_epoch` does."""
        self._epoch.fill_(require_natural("epoch", epoch))

    def step(self) -> None:
        """Go to the next epoch, as a learning rate scheduler does."""
        self._epoch += 1

    def __call__(self, *inputs: Any) -> Any:
        """Apply the current perturbation to a sample or a batch."""
        sample = inputs if len(inputs) > 1 else inputs[0]
        current = self.current
        if isinstance(current, LatentAdversarial):
            return current.step(sample)
        return sample if current is None else current(*inputs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()  # a copy has memory of its own

    def __repr__(self) -> str:
        phases = ", ".join(f"({epochs}, {perturbation!r})" for epochs, perturbation in self.phases)
        return f"LatentSchedule([{phases}])"


def require_phase(phase: Any) -> tuple[int, Perturbation]:
    """Require an (epochs, perturbation) pair."""
    if not isinstance(phase, (tuple, list)) or len(phase) != 2:
        raise TypeError(f"phases must hold (epochs, perturbation) pairs, got {phase!r}")
    epochs, perturbation = phase
    if perturbation is not None and not callable(perturbation):
        raise TypeError(
            f"a phase holds a transform, a LatentAdversarial or None, got {perturbation!r}"
        )
    return require_positive("the epochs of a phase (epochs, perturbation)", epochs), perturbation


def walk_parts(transform: Any) -> Iterator[Any]:
    """Walk over a transform and all in it: phases of a schedule, transforms of a Compose."""
    yield getattr(transform, "__self__", transform)  # the attack of attack.step
    inside = getattr(transform, "transforms", [])
    if isinstance(transform, LatentSchedule):
        inside = [perturbation for _, perturbation in transform.phases]
    for part in inside if isinstance(inside, (list, tuple, nn.ModuleList)) else []:
        yield from walk_parts(part)


def holds_attack(transform: Any) -> bool:
    """Whether a transform is, or holds, a `LatentAdversarial`."""
    return any(isinstance(part, LatentAdversarial) for part in walk_parts(transform))
