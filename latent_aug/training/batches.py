"""The images of a training step, and the draws for them, as functions of seed and step.

Neither depends on the number of processes. Each process takes its share of a step's batch, and the
draws for an image follow from its place in that batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_aug.utils.randomness import mix_seeds, sample_normal, sample_uniform


def make_order_generator(seed: int, number: int) -> torch.Generator:
    """Make the generator of an order of images, the same in every process.

    Args:
        seed: The seed of the run.
        number: -1 for the initialisation, -2 - epoch for an epoch.
    """
    # torch's CPU generator looks at 32 bits of a seed. The odd factor spreads seeds over them.
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + number) % 2**32)


def choose_places(count: int, rank: int, processes: int) -> range:
    """Choose the places in a batch of `count` images that one of several processes takes."""
    return range(rank * count // processes, (rank + 1) * count // processes)


class StepSampler:
    """The indices of one process's share of each batch, for the steps from `start` to `stop`.

    Each epoch has a permutation of its own. The images that do not fill a batch are left out.

    Args:
        count: The number of images in the data set.
        batch_size: The number of images a step, in all processes together.
        start: The first step.
        stop: The step after the last.
        seed: The seed of the order.
        rank: The rank of this process.
        processes: The number of processes that share a batch.
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
        self.places = choose_places(self.batch_size, rank, processes)

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.count // self.batch_size
        epoch, order = -1, torch.empty(0, device="cpu")
        for step in range(self.start, self.stop):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = torch.randperm(
                    self.count, generator=make_order_generator(self.seed, -2 - epoch), device="cpu"
                )
            first = step % per_epoch * self.batch_size
            yield order[first + self.places.start : first + self.places.stop].tolist()


class ImageDraws(NamedTuple):
    """The random numbers for the images of a batch."""

    mirrored: Tensor  # (B, 1, 1, 1) bool
    corners: Tensor  # (2, B): top and left of the crop
    uniform: Tensor  # (B, C, H, W), in [0, 1): dequantization
    gaussian: Tensor  # (B, C, H, W), noise on the images; (B,) zeros without


def sample_draws(
    seed: int,
    step: int,
    places: Iterable[int],
    shape: tuple[int, ...],
    *,
    padding: int = 0,
    noise: float = 0.0,
) -> ImageDraws:
    """Sample the draws of the images at some places of a step's batch.

    Args:
        seed: The seed of the run.
        step: The number of the step.
        places: The places of the images in the whole batch.
        shape: The shape (C, H, W) of an image.
        padding: The pixels by which the crop may move.
        noise: The standard deviation of the Gaussian noise.
    """
    each, like = [], torch.empty(0, dtype=torch.float32, device="cpu")
    for place in places:
        generator = torch.Generator().manual_seed(mix_seeds(seed, step, place))
        mirrored = sample_uniform((1, 1, 1), like, generator) < 0.5
        corner = torch.randint(0, 2 * padding + 1, (2,), generator=generator, device="cpu")
        uniform = sample_uniform(shape, like, generator)
        gaussian = noise * sample_normal(shape, like, generator) if noise else like.new_zeros(())
        each.append((mirrored, corner, uniform, gaussian))
    mirrored, corners, uniform, gaussian = (torch.stack(drawn) for drawn in zip(*each, strict=True))
    return ImageDraws(mirrored, corners.T, uniform, gaussian)


def flip_images(batch: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror the images of (B, C, H, W) where (B, 1, 1, 1) says so."""
    return torch.where(mirrored.to(batch.device), batch.flip(3), batch)


def crop_images(batch: Tensor, padding: int, corners: Tensor) -> Tensor:
    """Zero-pad (B, C, H, W) and cut out the windows whose top and left are `corners` (2, B)."""
    count, _, height, width = batch.shape
    padded = F.pad(batch, [padding] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2p+1, 2p+1, H, W), a view
    top, left = corners
    return windows[torch.arange(count, device=windows.device), :, top, left]
