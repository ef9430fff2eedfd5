"""The training images of a flow for any small colour photograph, as one tar.

    python examples/flows/photographs.py DATA photographs.tar
    latent-aug train photographs.tar --validation DATA/cifar10/test ...

DATA holds cifar10/train, cifar100/train and tinyimagenet100_small/train, images by class. Every
image is written `COPIES` times, each copy cut out, resized and degraded at random, as photographs
from anywhere are: other resize filters, JPEG, a little blur or noise, other light. The draws follow
from the seed. Labels are not used.
"""

import argparse
import io
import random
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter
from tqdm import tqdm

from latent_aug.images.folders import EncodedImages

SIDE = 32
COPIES = {"cifar10": 1, "cifar100": 1, "tinyimagenet100_small": 4}
FILTERS = (
    Image.Resampling.BOX,
    Image.Resampling.BILINEAR,
    Image.Resampling.HAMMING,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)


def cut_out(image: Image.Image, draws: random.Random) -> Image.Image:
    """A square of 32 pixels: the image as it is, a part of it, or a part resized."""
    if draws.random() < (0.6 if min(image.size) == SIDE else 0.25):
        left, top = (draws.randint(0, side - SIDE) for side in image.size)
        return image.crop((left, top, left + SIDE, top + SIDE))
    side = draws.uniform(0.6, 1.0) * min(image.size)
    left, top = (draws.uniform(0, whole - side) for whole in image.size)
    box = (left, top, left + side, top + side)
    return image.resize((SIDE, SIDE), draws.choice(FILTERS), box=box)


def change_light(image: Image.Image, draws: random.Random) -> Image.Image:
    """Brightness, contrast and colour up to a half more or less; one in fifty becomes grey."""
    if draws.random() < 0.2:
        for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhancer(image).enhance(draws.uniform(0.5, 1.5))
    return image.convert("L").convert("RGB") if draws.random() < 0.02 else image


def add_noise(image: Image.Image, draws: random.Random) -> Image.Image:
    """Gaussian noise with a standard deviation of up to five grey levels."""
    noise = np.random.default_rng(draws.getrandbits(64)).normal(size=(SIDE, SIDE, 3))
    noisy = np.asarray(image) + draws.uniform(0, 5) * noise
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


def compress(image: Image.Image, draws: random.Random) -> Image.Image:
    """JPEG of quality 40 to 100, with whole or halved colour resolution."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=draws.randint(40, 100), subsampling=draws.choice((0, 2)))
    return Image.open(file).convert("RGB")


def degrade(image: Image.Image, draws: random.Random) -> Image.Image:
    """A square of 32 pixels of the image, as it might have come from elsewhere."""
    result = change_light(cut_out(image.convert("RGB"), draws), draws)
    if draws.random() < 0.15:
        result = result.filter(ImageFilter.GaussianBlur(draws.uniform(0.3, 0.8)))
    if draws.random() < 0.25:
        result = add_noise(result, draws)
    return compress(result, draws) if draws.random() < 0.5 else result


def write_image(tar: tarfile.TarFile, name: str, image: Image.Image) -> None:
    """Add an image to the tar, lossless."""
    file = io.BytesIO()
    image.save(file, "PNG")
    member = tarfile.TarInfo(name)
    member.size = file.tell()
    file.seek(0)
    tar.addfile(member, file)


def main() -> None:
    """Write the tar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tarfile.open(args.output, "w") as tar:
        for name, copies in COPIES.items():
            images = EncodedImages(args.data / name / "train")
            for index in tqdm(range(len(images)), desc=name, mininterval=10):
                for copy in range(copies):
                    draws = random.Random(f"{args.seed} {name} {index} {copy}")
                    changed = degrade(images[index], draws)
                    write_image(tar, f"{name}-{index:05d}-{copy}.png", changed)


if __name__ == "__main__":
    main()
