"""Count the images that a flow cannot perturb, and warn where these are many."""

from __future__ import annotations

import os
import warnings
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

SLOTS = 256  # counts of a process and its workers
ROWS = 64  # counters that share a block of memory, as each block keeps a file open
ENOUGH = 8  # images to warn after where none of them could be perturbed
JUDGED, MANY = 200, 0.1  # images to warn after where more than this share could not

_free: dict[int, list[Tensor]] = {}  # by process


class FallbackCounter:
    """Counts images that came back as they were, in loader workers too. Read it with `int`.

    The CPU's counts lie in shared memory, one for each worker, so that none is lost when several
    add at once. Those of an accelerator stay on it and in this process. A pickle or a copy begins
    anew. Only one that is sent to a process of multiprocessing goes on counting here.

    Attributes:
        shared: The counts on the CPU.
        counts: The counts on other devices.
        tried: The number of images so far, or None once the first ones are judged.
        found: How many of them came back.
    """

    def __init__(self, shared: Tensor | None = None) -> None:
        if shared is None:
            shared = allocate_counts()
        self.shared = shared
        self.counts: dict[torch.device, Tensor] = {}
        self.tried: int | None = 0
        self.found = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return FallbackCounter, ()

    def add(self, count: Tensor, tried: int = 0) -> None:
        """Add a 0-d tensor, the count among so many images, without waiting for its device."""
        if not count.is_cpu:
            before = self.counts.get(count.device)
            self.counts[count.device] = count if before is None else before + count
            return
        worker = get_worker_info()
        self.shared[0 if worker is None else 1 + worker.id % (SLOTS - 1)] += count
        if self.tried is not None:
            self.tried += tried
            self.found += int(count)
            self._judge(self.found, self.tried)

    def _judge(self, fallbacks: int, tried: int) -> None:
        """Warn once if all or many of the first images came back as they were."""
        useless = fallbacks == tried >= ENOUGH
        if useless or (tried >= JUDGED and fallbacks > MANY * tried):
            warnings.warn(
                f"{fallbacks} of {tried} images so far came back as they were: the flow "
                "cannot perturb them. They are far off the data that the flow was trained on, as "
                "noisy images are, or not finite, as in an attack the model's gradient may be; "
                "see `fallbacks`",
                stacklevel=2,
            )
        if useless or tried >= JUDGED:
            self.tried = None

    def __int__(self) -> int:
        return int(self.shared.sum()) + sum(int(count) for count in self.counts.values())


def allocate_counts() -> Tensor:
    """Give zeros (SLOTS,) in memory that other processes may share."""
    rows = _free.setdefault(os.getpid(), [])  # a fork does not give away its parent's
    if not rows:
        block = torch.zeros(ROWS, SLOTS, dtype=torch.int64, device="cpu").share_memory_()
        rows += block.unbind()
    return rows.pop()


def share_counter(counter: FallbackCounter) -> tuple[Any, ...]:
    """Tell multiprocessing how a counter is sent: with its memory."""
    return FallbackCounter, (counter.shared,)


ForkingPickler.register(FallbackCounter, share_counter)
