"""What becomes of images far off a flow's data, and what tells such images apart.

    python examples/benchmarks/off_data.py glow-cifar10 DIR

DIR is a folder of images of the flow's size. They are encoded with more and more Gaussian noise
on them, decoded as they are, and perturbed by linf 0.25. The first table is by noise, the second
by the root mean square of their latents, whose prior has 1; the limit
`functional.FARTHEST_LATENT` comes from them.
"""

import itertools
import sys

import torch

from latent_aug import load_flow
from latent_aug.diagnostics.measure import average_change
from latent_aug.images.datasets import UInt8Images, open_images
from latent_aug.transforms.functional import FARTHEST_LATENT, noise_of_norm, root_mean_square

BINS = (0, 2, 3, 4, 5, 6, 8, 10, 15, 20, 1000)


@torch.no_grad()
def main(name: str, folder: str) -> None:
    """Print the table."""
    flow = load_flow(name)
    images = UInt8Images(open_images(folder), flow.channels)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(images), generator=generator)[:400].tolist()
    clean = torch.stack([images[i] for i in chosen])
    sizes, errors, changes = [], [], []
    print("| noise (grey levels) | rms of the latents | fall back | mean change (grey levels) |")
    print("|---|---|---|---|")
    for std in (0, 2, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 60, 80):
        noise = std * torch.randn(clean.shape, generator=generator)
        x = (clean + noise).round().clamp(0, 255) / 255
        z = flow.encode(x)
        sizes.append(root_mean_square(z).flatten())
        errors.append(255 * (flow.decode(z) - x).abs().flatten(1).amax(dim=1))
        draws = torch.randn(z.shape, generator=generator)
        changes.append(average_change(flow.decode(z + noise_of_norm(draws, 0.25, "linf")), x))
        far = (sizes[-1] >= FARTHEST_LATENT).float().mean()
        print(f"| {std} | {sizes[-1].mean():.1f} | {far:.0%} | {changes[-1].mean():.0f} |")
    size, error, change = torch.cat(sizes), torch.cat(errors), torch.cat(changes)
    print(
        "\n| rms of the latent | images | greatest error (grey levels) | not byte for byte ", end=""
    )
    print("| mean change (grey levels) |\n|---|---|---|---|---|")
    for low, high in itertools.pairwise(BINS):
        inside = (size >= low) & (size < high)
        if inside.any():
            lost = (error[inside] >= 0.5).float().mean()
            print(
                f"| {low}-{high} | {inside.sum()} | {error[inside].max():.2g} | {lost:.1%} "
                f"| {change[inside].mean():.0f} |"
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
