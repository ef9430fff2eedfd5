"""Where random numbers come from: torch's generators, different in every loader worker."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info


def normal(
    shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """N(0, I) draws on like's device and in its dtype, by a generator of any device."""
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=like.dtype).to(like)


def uniform(
    shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Uniform draws from [0, 1) on like's device and in its dtype, by a generator of any device."""
    device = like.device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=device, dtype=like.dtype).to(like)


# In a worker: the seed that a generator was re-seeded for, and the generator, kept alive so that
# its id stays its own.
_reseeded: dict[int, tuple[int, torch.Generator]] = {}


class Draws:
    """Random tensors from a user's generator, or from torch's global one.

    Forked or spawned workers all begin with copies of the user's generator; the first draw in a
    worker re-seeds its copy with the worker's own seed, so that workers and epochs differ.

    Args:
        generator: The user's generator, or None for torch's global ones.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator or None, got {type(generator).__name__}"
            )
        self.generator = generator

    def normal(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """N(0, I) draws on like's device and in its dtype."""
        return normal(shape, like, self.current())

    def uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Uniform draws from [0, 1) on like's device and in its dtype."""
        return uniform(shape, like, self.current())

    def between(self, low: float, high: float, count: int, like: Tensor) -> float | Tensor:
        """One number per sample, (count, 1, 1, 1), uniform in [low, high]; low where they agree."""
        if low == high:
            return low
        return low + (high - low) * self.uniform((count, 1, 1, 1), like)

    def current(self) -> torch.Generator | None:
        """The generator to draw from in this process."""
        worker = get_worker_info()
        if self.generator is not None and worker is not None:
            seeded_for, _ = _reseeded.get(id(self.generator), (None, None))
            if seeded_for != worker.seed:
                # The generator's own seed is mixed in, so that two generators stay different.
                mixed = (worker.seed + 0x9E3779B1 * (self.generator.initial_seed() + 1)) % 2**32
                self.generator.manual_seed(mixed)
                _reseeded[id(self.generator)] = (worker.seed, self.generator)
        return self.generator

    def __getstate__(self) -> dict[str, Any]:
        """A generator as bytes: torch's own pickling fails between spawned processes."""
        if self.generator is None:
            return {"device": None}
        state = self.generator.get_state().numpy().tobytes()
        return {"device": str(self.generator.device), "state": state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.generator = None
        if state["device"] is not None:
            self.generator = torch.Generator(state["device"])
            self.generator.set_state(torch.frombuffer(bytearray(state["state"]), dtype=torch.uint8))
