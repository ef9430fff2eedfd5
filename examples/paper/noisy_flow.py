"""The class-conditional flow trained on noisy images, as the authors' code does it.

    python examples/paper/noisy_flow.py DATA/fashion_mnist/train FOLDER/dense-noisy-fashion_mnist

Gaussian noise of 0.1 is added to the images, which are then clamped to [0, 1]. All else is as
`latent-aug train` has it with the settings in README.md. Stop it at any time; the same command goes
on.
"""

import argparse
from pathlib import Path

import torch
from protocol import read_images
from torch import Tensor
from torch.utils.data import TensorDataset

from latent_aug import TrainConfig, train_flow
from latent_aug.flows import ConditionalDenseFlow
from latent_aug.images import from_float

NOISE = 0.1
COPIES = 5  # of each image, with noise of its own: nearly as many as are trained on


def noisy(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """8-bit images with noise, 8-bit again."""
    x = pixels / 255
    x += NOISE * torch.randn(x.shape, generator=generator)
    return from_float(x, torch.uint8)


def main() -> None:
    """Train it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="a folder of <class>/<image>")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=2500, help="of 128 images each")
    args = parser.parse_args()
    images = read_images(args.images, channels=1)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.cat([noisy(images.pixels, generator) for _ in range(COPIES)])
    data = TensorDataset(pixels, images.labels.repeat(COPIES))
    torch.manual_seed(0)
    flow = ConditionalDenseFlow(*pixels.shape[1:], num_classes=images.classes)
    config = TrainConfig(
        output=args.output, steps=args.steps, batch_size=128, lr=1e-3, clip_norm=5, flip=False
    )
    train_flow(flow, data, config)


if __name__ == "__main__":
    main()
