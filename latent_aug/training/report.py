"""The report of a training run: its log, bits/dim on held-out images, pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import save_image

from latent_aug.flows import Flow
from latent_aug.images.conversion import select_shown_channels
from latent_aug.images.datasets import UInt8Images, stack_images

LOG_NAME = "log.jsonl"
SAMPLES_NAME, PAIRS_NAME = "samples.png", "reconstructions.png"
PICTURE_NAME, FIGURES_NAME = "preview.png", "figures.json"  # of the card


def append_to_log(output: Path, entry: dict[str, Any]) -> None:
    """Append a line to the log of a run."""
    path = output / LOG_NAME
    torn = path.exists() and not path.read_bytes().endswith(b"\n")  # as the machine went down
    with path.open("a") as log:
        log.write("\n" * torn + json.dumps(entry) + "\n")


def is_log(path: Path) -> bool:
    """Whether a file is the log of a run."""
    if not path.is_file():
        return False
    with path.open(errors="replace") as log:
        return "train_bits_per_dim" in log.readline()


def read_minutes(output: Path) -> float:
    """Read the training time of the run in a directory from the last line of its log."""
    last = (output / LOG_NAME).read_text().splitlines()[-1]
    return float(json.loads(last)["minutes"])


@torch.no_grad()
def measure_bits_per_dim(flow: Flow, images: UInt8Images, count: int, seed: int) -> float:
    """Measure the mean bits/dim of up to `count` images that are spread over the data set.

    The dequantization noise follows from the seed, so that checkpoints can be compared.
    """
    generator = torch.Generator(flow.device).manual_seed(seed)
    chosen, total = images.spread_indices(count), 0.0
    for first in range(0, len(chosen), 100):
        x, y = read_floats(images, chosen[first : first + 100], flow.device)
        total += flow.bits_per_dim(x, y, generator=generator).sum().item()
    return total / len(chosen)


@torch.no_grad()
def save_pictures(flow: Flow, images: UInt8Images, output: Path, seed: int) -> None:
    """Save samples at temperature 0.7, and images beside their reconstructions."""
    x, y = read_floats(images, images.spread_indices(64), flow.device)
    height, width = x.shape[2:]
    generator = torch.Generator().manual_seed(seed)
    # A user's flow may have a `sample` of its own, with other arguments.
    drawn = Flow.sample(flow, len(x), y, size=(height, width), temperature=0.7, generator=generator)
    save_image(select_shown_channels(drawn), output / SAMPLES_NAME)
    pairs = torch.stack([x, flow.decode(flow.encode(x, y), y).clamp(0, 1)], dim=1).flatten(0, 1)
    save_image(select_shown_channels(pairs), output / PAIRS_NAME, nrow=16)


def read_floats(
    images: UInt8Images, indices: list[int], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Read some images as floats in [0, 1], and their classes where the flow needs them."""
    y = images.get_classes(indices)
    x = stack_images(images.__getitems__(indices)).to(device, torch.float32) / 255
    return x, None if y is None else y.to(device)
