"""Which images a training step sees, and what is drawn for them, as a function of seed and step.

Neither knows how many processes there are: each takes its share of a step's batch, and what is
drawn for an image follows from its place in that batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_aug.utils.randomness import mix_seeds


def generator_for(seed: int, step: int) -> torch.Generator:
    """The generator of one step (or, below 0, of one epoch): the same whenever it is asked for."""
    # torch's CPU generator looks at 32 bits of a seed; the odd factor spreads seeds over them.
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + step) % 2**32)


def share(count: int, rank: int, processes: int) -> range:
    """The places in a batch of `count` images that one of several processes takes."""
    return range(rank * count // processes, (rank + 1) * count // processes)


class StepSampler:
    """Index lists of one process's share of the batches of the steps from `start` to `stop`.

    Each epoch is a permutation of its own; the images that do not fill a batch are left out.

    Args:
        count: Images in the data set.
        batch_size: Images a step, of all processes.
        start: First step.
        stop: Step after the last.
        seed: Of the order.
        rank: Of this process.
        processes: How many share a batch.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        start: int,
        stop: int,
        seed: int,
        *,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.count, self.batch_size = count, min(batch_size, count)
        self.start, self.stop, self.seed = start, stop, seed
        self.places = share(self.batch_size, rank, processes)

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
            yield order[first + self.places.start : first + self.places.stop].tolist()


class ImageDraws(NamedTuple):
    """What was drawn for the images of a batch."""

    mirrored: Tensor  # (B, 1, 1, 1) bool
    corners: Tensor  # (2, B): top and left of the crop
    uniform: Tensor  # (B, C, H, W), in [0, 1): dequantization
    gaussian: Tensor  # (B, C, H, W), noise on the images; (B,) zeros without


def draws_for(
    seed: int,
    step: int,
    places: Iterable[int],
    shape: tuple[int, ...],
    *,
    padding: int = 0,
    noise: float = 0.0,
) -> ImageDraws:
    """The draws of the images at some places of a step's batch.

    Args:
        seed: Of the run.
        step: The step's number.
        places: Of the images in the whole batch.
        shape: Of an image (C, H, W).
        padding: Of the crop.
        noise: Standard deviation of the Gaussian noise.
    """
    each = []
    for place in places:
        generator = torch.Generator().manual_seed(mix_seeds(seed, step, place))
        mirrored = torch.rand(1, 1, 1, generator=generator) < 0.5
        corner = torch.randint(0, 2 * padding + 1, (2,), generator=generator)
        uniform = torch.rand(shape, generator=generator)
        gaussian = noise * torch.randn(shape, generator=generator) if noise else torch.zeros(())
        each.append((mirrored, corner, uniform, gaussian))
    mirrored, corners, uniform, gaussian = (torch.stack(drawn) for drawn in zip(*each, strict=True))
    return ImageDraws(mirrored, corners.T, uniform, gaussian)


def flipped(batch: Tensor, mirrored: Tensor) -> Tensor:
    """The images of (B, C, H, W) mirrored where (B, 1, 1, 1) says so."""
    return torch.where(mirrored.to(batch.device), batch.flip(3), batch)


def cropped(batch: Tensor, padding: int, corners: Tensor) -> Tensor:
    """Zero-pad (B, C, H, W) and cut out the windows whose top and left are `corners` (2, B)."""
    count, _, height, width = batch.shape
    padded = F.pad(batch, [padding] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2p+1, 2p+1, H, W), a view
    top, left = corners
    return windows[torch.arange(count), :, top, left]
