"""How exact a flow stays on images far off its data, and what tells such images apart.

    python examples/benchmarks/off_data.py glow-cifar10 DIR

DIR is a folder of images of the flow's size. They are encoded and decoded with more and more
Gaussian noise on them, then sorted by the root mean square of their latents, whose prior has 1.
The limit `functional.FARTHEST_LATENT` comes from this table: above it, an 8-bit image no longer
comes back from float32 as it was.
"""

import itertools
import sys

import torch

from latent_aug import load_flow
from latent_aug.data import UInt8Images, open_images
from latent_aug.functional import root_mean_square

BINS = (0, 2, 3, 4, 5, 6, 8, 10, 15, 20, 1000)


@torch.no_grad()
def main(name: str, folder: str) -> None:
    """Print the table."""
    flow = load_flow(name)
    images = UInt8Images(open_images(folder), flow.channels)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(images), generator=generator)[:400].tolist()
    clean = torch.stack([images[i] for i in chosen])
    sizes, errors = [], []
    for std in (0, 2, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 60, 80):
        noise = std * torch.randn(clean.shape, generator=generator)
        x = (clean + noise).round().clamp(0, 255) / 255
        z = flow.encode(x)
        sizes.append(root_mean_square(z).flatten())
        errors.append(255 * (flow.decode(z) - x).abs().flatten(1).amax(dim=1))
        middle, largest = sizes[-1].median(), sizes[-1].max()
        print(
            f"noise of {std:2} grey levels: rms of the latents {middle:.2f}, at most {largest:.2f}"
        )
    size, error = torch.cat(sizes), torch.cat(errors)
    print("\n| rms of the latent | images | greatest error (grey levels) | not byte for byte |")
    print("|---|---|---|---|")
    for low, high in itertools.pairwise(BINS):
        inside = (size >= low) & (size < high)
        if inside.any():
            changed = (error[inside] >= 0.5).float().mean()
            print(f"| {low}-{high} | {inside.sum()} | {error[inside].max():.3g} | {changed:.1%} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
