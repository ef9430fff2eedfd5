"""Perturbing larger images: at their own size, or a downscaled copy (`resolution=`).

    python examples/benchmarks/photos.py PHOTOS --small IMAGES --picture docs/pictures/photos.jpg

PHOTOS is a folder of photographs (for the figures kept here astronaut, chelsea and coffee.png of
scikit-image's skimage/data, free of copyright), IMAGES one of 64 x 64 images with a folder for each
class (the test images of tinyimagenet100_small).
Prints and keeps, for linf 0.25 and every resolution: milliseconds an image, the mean change of a
pixel, the share of saturated values and of images that fall back. The picture shows each photograph
and, for each resolution, what becomes of it and four times the difference. What it brings a
classifier is measured by the recipe tinyimagenet-resolution of examples/paper.
"""

import argparse
import json
from pathlib import Path

import torch
from contestants import seconds
from matplotlib.figure import Figure
from measurements import keep_measurement
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from latent_aug import LatentPerturb
from latent_aug.images.datasets import UInt8Images, open_images, stack_images

EPS, SMALL_COUNT = 0.25, 64


def read_photos(folder: Path, side: int) -> Tensor:
    """Every photograph, its shorter side resized, cropped to a square: (N, 3, side, side) uint8."""
    images = [Image.open(path).convert("RGB") for path in sorted(folder.iterdir())]
    return torch.stack(
        [F.pil_to_tensor(F.center_crop(F.resize(image, side), side)) for image in images]
    )


def perturbed(x: Tensor, resolution: int | None) -> tuple[Tensor, LatentPerturb]:
    """The batch after LatentPerturb, the same seed every time."""
    transform = LatentPerturb(EPS, resolution=resolution)
    torch.manual_seed(0)
    return transform(x), transform


def figures(x: Tensor, resolution: int | None) -> dict[str, float | int | None]:
    """Cost and effect of one resolution."""
    result, transform = perturbed(x, resolution)
    change = (result.float() - x.float()).abs()
    ends = ((result == 0) | (result == 255)) & (x > 0) & (x < 255)
    return {
        "side": x.shape[-1],
        "resolution": resolution,
        "images": len(x),
        "ms_per_image": round(1000 * seconds(lambda: transform(x), repeats=5) / len(x), 2),
        "mean_change": round(change.mean().item(), 2),
        "saturated": round(ends.float().mean().item(), 4),
        "fallbacks": perturbed(x, resolution)[1].fallbacks,
    }


def draw(x: Tensor, resolutions: list[int | None], picture: Path) -> None:
    """Two rows for each photograph."""
    figure = Figure(figsize=(2.2 * (len(resolutions) + 1), 4.5 * len(x)), layout="constrained")
    grid = figure.subplots(2 * len(x), len(resolutions) + 1, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, photo in enumerate(x):
        grid[2 * row, 0].imshow(photo.permute(1, 2, 0))
        for column, resolution in enumerate(resolutions, 1):
            result = perturbed(photo[None], resolution)[0][0]
            difference = 4 * (result.float() - photo.float()) / 255 + 0.5
            grid[2 * row, column].imshow(result.permute(1, 2, 0))
            grid[2 * row + 1, column].imshow(difference.clamp(0, 1).permute(1, 2, 0))
            if row == 0:
                name = f"resolution={resolution}" if resolution else f"native, {x.shape[-1]}"
                grid[row, column].set_title(name, fontsize=10)
    figure.savefig(picture, dpi=60)


def main() -> None:
    """Measure, print, draw, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--small", required=True)
    parser.add_argument("--side", type=int, default=256, help="of the photographs")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    photos = read_photos(args.photos, args.side)
    small = UInt8Images(open_images(args.small), 3)
    few = stack_images(small.__getitems__(small.spread_indices(SMALL_COUNT)))
    rows = [figures(few, resolution) for resolution in (None, 32)]
    resolutions = [None, 128, 64, 32]
    rows += [figures(photos, resolution) for resolution in resolutions]
    for row in rows:
        print(json.dumps(row))
    if args.picture:
        draw(photos, resolutions, args.picture)
    keep_measurement("photos", rows)


if __name__ == "__main__":
    main()
