"""What a training run leaves to look at: its log, bits/dim on held-out images, pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import save_image

from latent_aug.flows import Flow
from latent_aug.images.datasets import UInt8Images, as_batch

LOG_NAME = "log.jsonl"


def append_to_log(output: Path, entry: dict[str, Any]) -> None:
    """Add a line to the run's log."""
    path = output / LOG_NAME
    torn = path.exists() and not path.read_bytes().endswith(b"\n")  # as the machine went down
    with path.open("a") as log:
        log.write("\n" * torn + json.dumps(entry) + "\n")


def minutes_of(output: Path) -> float:
    """Training time of the run in a directory, from its log's last line."""
    last = (output / LOG_NAME).read_text().splitlines()[-1]
    return float(json.loads(last)["minutes"])


@torch.no_grad()
def mean_bits_per_dim(flow: Flow, images: UInt8Images, count: int, seed: int) -> float:
    """Mean bits/dim of up to `count` images spread over the data set, the same noise each time."""
    device = next(flow.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    chosen, total = images.spread(count), 0.0
    for first in range(0, len(chosen), 100):
        x, y = some_of(images, chosen[first : first + 100], device)
        total += flow.bits_per_dim(x, y, generator=generator).sum().item()
    return total / len(chosen)


@torch.no_grad()
def draw_pictures(flow: Flow, images: UInt8Images, output: Path, seed: int) -> None:
    """Write samples at temperature 0.7, and images beside their reconstructions."""
    device = next(flow.parameters()).device
    x, y = some_of(images, images.spread(64), device)
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
    save_image(flow.decode(0.7 * z, y).clamp(0, 1), output / "samples.png")
    pairs = torch.stack([x, flow.decode(flow.encode(x, y), y).clamp(0, 1)], dim=1).flatten(0, 1)
    save_image(pairs, output / "reconstructions.png", nrow=16)


def some_of(
    images: UInt8Images, indices: list[int], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Some images as floats in [0, 1], and their classes where the flow needs them."""
    y = images.classes_at(indices)
    x = as_batch(images.__getitems__(indices)).to(device) / 255
    return x, None if y is None else y.to(device)
