"""Where random numbers come from: torch's generators, different in every loader worker.

Every tensor here has an explicit dtype and device, so that `torch.set_default_dtype` and
`torch.set_default_device` change no number.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import get_worker_info

CPU = torch.device("cpu")
UNSEEDED = 67280421310721  # the seed of torch's generator in every new process


def sample_normal(
    shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Draw from N(0, I), on like's device and in its dtype, by a generator of any device."""
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=like.dtype).to(like)


def sample_uniform(
    shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Draw uniformly from [0, 1), on like's device and in its dtype, by any generator."""
    device = like.device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=device, dtype=like.dtype).to(like)


def sample_seed() -> int:
    """Draw a seed from torch's global generator of the CPU."""
    return int(torch.randint(2**31, (), device=CPU))


# In a worker, by the id of a generator: the seed it was re-seeded for, and the generator itself.
# It is kept alive so that no other one takes its id.
_reseeded: dict[int, tuple[int, torch.Generator]] = {}


def get_rank() -> int | None:
    """Return this process's rank in distributed training, or None where it trains alone."""
    own, count = get_rank_and_count()
    return own if count > 1 else None


def get_rank_and_count() -> tuple[int, int]:
    """Return this process's rank and the number of processes, (0, 1) where it is alone.

    Loader workers know them from their environment, as torch.distributed is not set up there.
    The same holds for processes of torchrun or accelerate that never set it up.

    Raises:
        ValueError: The rank in the environment is not below the number of processes.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    given = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    own, count = map(int, given) if all(text.isdecimal() for text in given) else (0, 1)
    if own >= count:
        raise ValueError(f"RANK must lie in 0 to WORLD_SIZE - 1, which is {count - 1}, got {own}")
    return own, count


def mix_seeds(*numbers: int) -> int:
    """Mix numbers into one seed of 32 bits, which is all that torch's CPU generator uses."""
    seed = 0
    for number in numbers:
        seed = (seed ^ number) * 0x9E3779B1 % 2**32
        seed ^= seed >> 15
    return seed


# In a forked process: the seed of the global generator and the places, as its parent had them.
_inherited_seed: int | None = None
_inherited_places: list[tuple[int, ...]] = []


def note_fork() -> None:
    """Note in a forked process what it has in common with its parent."""
    global _inherited_seed, _inherited_places
    _inherited_seed, _inherited_places = torch.initial_seed(), find_places()
    for shared in list(SharedGenerator._known.values()):
        shared.inherited_seed = shared.generator.initial_seed()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=note_fork)


def find_starters() -> list[Any]:
    """Find the modules that may have started this process: multiprocessing, its fork."""
    names = ("multiprocessing", "multiprocess")
    return [sys.modules[name] for name in names if name in sys.modules]


def find_places() -> list[tuple[int, ...]]:
    """Find the place of this process among its siblings, as its starter counts them."""
    return [getattr(m.current_process(), "_identity", ()) for m in find_starters()]


def is_child_process() -> bool:
    """Whether this process was forked, or started by multiprocessing or its fork multiprocess."""
    started = any(module.parent_process() is not None for module in find_starters())
    return _inherited_seed is not None or started


def number_process() -> int:
    """Number this process among its siblings: the same in each run, where its starter counts."""
    places = [place for place in find_places() if place and place not in _inherited_places]
    return mix_seeds(*places[0]) if places else os.getpid()


def number_copied_seed() -> int | None:
    """Number this process where its global generator may draw what those of its siblings draw.

    None where it has a seed of its own.
    """
    copied = is_child_process() and torch.initial_seed() in (_inherited_seed, UNSEEDED)
    return number_process() if copied else None


@contextmanager
def use_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Start torch's global generators from a seed, and put them back at the end.

    Args:
        seed: The seed.
        device: A device whose generator starts from it as well, besides the CPU's. Accelerators
            other than CUDA keep theirs.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        for there in devices:
            torch.cuda.default_generators[there.index].manual_seed(seed)
        yield


class SharedGenerator:
    """A user's generator, which stays one when several `Draws` of it are copied together.

    It pickles the generator's state as bytes, since torch's own way fails between spawned
    processes. All `Draws` of a generator refer to one such object, so it is written once.
    """

    _known: ClassVar[WeakValueDictionary[int, SharedGenerator]] = WeakValueDictionary()

    def __init__(self, generator: torch.Generator, inherited_seed: int | None = None) -> None:
        self.generator, self.inherited_seed = generator, inherited_seed
        self._known[id(generator)] = self  # the id stays its own as long as this lives

    @classmethod
    def wrap(cls, generator: torch.Generator) -> SharedGenerator:
        """Return the one object for this generator."""
        return cls._known.get(id(generator)) or cls(generator)

    def __getstate__(self) -> dict[str, Any]:
        state = self.generator.get_state().numpy().tobytes()
        return {"device": str(self.generator.device), "state": state, "process": os.getpid()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        generator = torch.Generator(state["device"])
        generator.set_state(torch.frombuffer(bytearray(state["state"]), dtype=torch.uint8))
        is_sent = is_child_process() and state["process"] != os.getpid()
        SharedGenerator.__init__(self, generator, generator.initial_seed() if is_sent else None)


class Draws:
    """Random tensors from a user's generator, or from torch's global one.

    Forked or spawned workers all begin with copies of the user's generator. The first draw in a
    worker re-seeds its copy with the worker's own seed, so that workers and epochs differ.

    The processes of distributed training often share their seed. Without a user's generator, each
    draw there takes one number from the global generator, which stays in step between processes.
    That number and the process's rank seed the generator of the draw.

    Other processes that were forked or started with copies of these generators, such as those of
    `datasets.Dataset.map`, go by their number among their siblings in the same ways, or by their id
    where nobody counts them. Those that are seeded anew with another seed go by that alone.

    Args:
        generator: The user's generator, or None for torch's global ones.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator or None, got {type(generator).__name__}"
            )
        self._shared = None if generator is None else SharedGenerator.wrap(generator)
        self._sender: int | None = None  # the rank of the process that sent it to this worker

    @property
    def generator(self) -> torch.Generator | None:
        """The user's generator."""
        return None if self._shared is None else self._shared.generator

    def sample_normal(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Draw from N(0, I), on like's device and in its dtype."""
        return sample_normal(shape, like, self.pick_generator(like.device))

    def sample_uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Draw uniformly from [0, 1), on like's device and in its dtype."""
        return sample_uniform(shape, like, self.pick_generator(like.device))

    def sample_between(self, low: float, high: float, count: int, like: Tensor) -> float | Tensor:
        """Draw a number per sample uniformly from [low, high], shaped (count, 1, 1, 1).

        Where both are equal, that number is returned and nothing is drawn.
        """
        if low == high:
            return low
        return low + (high - low) * self.sample_uniform((count, 1, 1, 1), like)

    def pick_generator(self, device: torch.device) -> torch.Generator | None:
        """Return the generator to draw from in this process, None for torch's global one."""
        worker = get_worker_info()
        own_rank = get_rank()
        if own_rank is None:
            own_rank = self._sender if worker is not None else self._pick_number()
        if self.generator is None and own_rank is not None:
            return torch.Generator(device).manual_seed(mix_seeds(sample_seed(), own_rank))
        if self.generator is not None and worker is not None:
            seeded_for, _ = _reseeded.get(id(self.generator), (None, None))
            if seeded_for != worker.seed:
                # The generator's own seed is mixed in, so that two generators stay different.
                seed = mix_seeds(worker.seed, self.generator.initial_seed(), own_rank or 0)
                self.generator.manual_seed(seed)
                _reseeded[id(self.generator)] = (worker.seed, self.generator)
        return self.generator

    def _pick_number(self) -> int | None:
        """Return a number that tells this process from its siblings, None where none is needed.

        A user's generator that is still the parent's is seeded by it.
        """
        if self._shared is None:
            return number_copied_seed()
        generator = self._shared.generator
        if generator.initial_seed() == self._shared.inherited_seed:
            generator.manual_seed(mix_seeds(generator.initial_seed(), number_process()))
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {"_shared": self._shared, "_sender": get_rank()}
