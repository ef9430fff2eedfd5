"""Where random numbers come from: torch's generators, different in every loader worker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
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


def rank() -> int | None:
    """This process's rank in distributed training; None where it trains alone."""
    own, count = rank_and_count()
    return own if count > 1 else None


def rank_and_count() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) alone.

    Loader workers, where torch.distributed is not set up, know it from their environment, as do
    processes of torchrun or accelerate that do not set it up at all.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    own, count = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return (int(own), int(count)) if own.isdecimal() and count.isdecimal() else (0, 1)


def mixed(*numbers: int) -> int:
    """A seed of 32 bits, all that torch's CPU generator uses, in which every number counts."""
    seed = 0
    for number in numbers:
        seed = (seed ^ number) * 0x9E3779B1 % 2**32
        seed ^= seed >> 15
    return seed


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators of the CPU and a device start from a seed, and are put back.

    Of another accelerator than CUDA its own generator stays as it is.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        for there in devices:
            torch.cuda.default_generators[there.index].manual_seed(seed)
        yield


class Shared:
    """A user's generator; those of several `Draws` are one also where they are copied together.

    Pickling writes the generator's state as bytes, as torch's own way fails between spawned
    processes; once for all `Draws` of it, as it is this object that they refer to.
    """

    _of: ClassVar[WeakValueDictionary[int, Shared]] = WeakValueDictionary()

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self._of[id(generator)] = self  # which stays its id as long as this lives

    @classmethod
    def of(cls, generator: torch.Generator) -> Shared:
        """The one there is, or a new one."""
        return cls._of.get(id(generator)) or cls(generator)

    def __getstate__(self) -> dict[str, Any]:
        state = self.generator.get_state().numpy().tobytes()
        return {"device": str(self.generator.device), "state": state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        generator = torch.Generator(state["device"])
        generator.set_state(torch.frombuffer(bytearray(state["state"]), dtype=torch.uint8))
        Shared.__init__(self, generator)


class Draws:
    """Random tensors from a user's generator, or from torch's global one.

    Forked or spawned workers all begin with copies of the user's generator; the first draw in a
    worker re-seeds its copy with the worker's own seed, so that workers and epochs differ. The
    ranks of distributed training often share their seed: without a generator, each draw there is
    from a generator that is seeded from one number of the global one, which so stays in step
    between ranks, and the rank.

    Args:
        generator: The user's generator, or None for torch's global ones.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator or None, got {type(generator).__name__}"
            )
        self._shared = None if generator is None else Shared.of(generator)
        self._sender: int | None = None  # the rank of the process that sent it to this worker

    @property
    def generator(self) -> torch.Generator | None:
        """The user's generator."""
        return None if self._shared is None else self._shared.generator

    def normal(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """N(0, I) draws on like's device and in its dtype."""
        return normal(shape, like, self.current(like.device))

    def uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Uniform draws from [0, 1) on like's device and in its dtype."""
        return uniform(shape, like, self.current(like.device))

    def between(self, low: float, high: float, count: int, like: Tensor) -> float | Tensor:
        """One number per sample, (count, 1, 1, 1), uniform in [low, high]; low where they agree."""
        if low == high:
            return low
        return low + (high - low) * self.uniform((count, 1, 1, 1), like)

    def current(self, device: torch.device) -> torch.Generator | None:
        """The generator to draw from in this process; None for torch's global one."""
        worker = get_worker_info()
        own_rank = rank()
        if own_rank is None and worker is not None:
            own_rank = self._sender
        if self.generator is None and own_rank is not None:
            seed = int(torch.randint(2**31, ()))
            return torch.Generator(device).manual_seed(mixed(seed, own_rank))
        if self.generator is not None and worker is not None:
            seeded_for, _ = _reseeded.get(id(self.generator), (None, None))
            if seeded_for != worker.seed:
                # The generator's own seed is mixed in, so that two generators stay different.
                seed = mixed(worker.seed, self.generator.initial_seed(), own_rank or 0)
                self.generator.manual_seed(seed)
                _reseeded[id(self.generator)] = (worker.seed, self.generator)
        return self.generator

    def __getstate__(self) -> dict[str, Any]:
        return {"_shared": self._shared, "_sender": rank()}
