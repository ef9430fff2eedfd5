"""Which images a training step sees, and how: a function of the seed and the step's number."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def generator_for(seed: int, step: int) -> torch.Generator:
    """The generator of one step (or, below 0, of one epoch): the same whenever it is asked for."""
    # torch's CPU generator looks at 32 bits of a seed; the odd factor spreads seeds over them.
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + step) % 2**32)


class StepSampler:
    """Index lists of the batches of the steps from `start` to `stop`.

    Each epoch is a permutation of its own; the images that do not fill a batch are left out.

    Args:
        count: Images in the data set.
        batch_size: Images a step.
        start: First step.
        stop: Step after the last.
        seed: Of the order.
    """

    def __init__(self, count: int, batch_size: int, start: int, stop: int, seed: int) -> None:
        self.count, self.batch_size = count, min(batch_size, count)
        self.start, self.stop, self.seed = start, stop, seed

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.count // self.batch_size
        epoch, order = -1, torch.empty(0)
        for step in range(self.start, self.stop):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = torch.randperm(self.count, generator=generator_for(self.seed, -2 - epoch))
            first = step % per_epoch * self.batch_size
            yield order[first : first + self.batch_size].tolist()


def random_flip(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image of (B, C, H, W) with probability ½."""
    mirrored = torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored.to(batch.device), batch.flip(3), batch)


def random_crop(batch: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Zero-pad (B, C, H, W) and cut a window of the old size out of each image at random."""
    count, _, height, width = batch.shape
    padded = F.pad(batch, [padding] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2p+1, 2p+1, H, W), a view
    top, left = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    return windows[torch.arange(count), :, top, left]
