"""Arrange small data sets of others as train/ and test/, a folder for each class.

    python examples/paper/arrange.py faces SOURCE "$DATA/faces"

The sets are faces, hands, letters and nuclei. README.md names their sources. Nuclei are 32 x 32
squares about their centres, and need scipy.
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import is_image_file

NUCLEI = ("epithelial", "fibroblast", "inflammatory", "others")
MOST = 500  # nuclei of a class, in train/ and in test/
Placed = Iterator[tuple[Image.Image, str, str, str]]  # an image, its part, class and name


def place_halves(source: Path) -> Placed:
    """Folders of classes, half of each for tests."""
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        files = sorted(file for file in folder.rglob("*.*") if is_image_file(file.name))
        random.Random(0).shuffle(files)
        for number, file in enumerate(files):
            yield Image.open(file), "test" if number % 2 else "train", folder.name, file.stem


def place_letters(source: Path) -> Placed:
    """Folders alphabet/letter. The last ten of twenty who drew are for tests."""
    for file in sorted(source.glob("*/*/*.png")):
        drawer = int(file.stem.split("_")[1])
        kind = f"{file.parent.parent.name}-{file.parent.name}"
        yield Image.open(file).convert("L"), "test" if drawer > 10 else "train", kind, file.stem


def place_nuclei(source: Path) -> Placed:
    """Pictures of tissue in folders part/picture, and centres for each class."""
    from scipy.io import loadmat

    for kind in NUCLEI:
        for part in ("train", "test"):
            found = []
            for file in sorted(source.glob(f"{part}/*/*_{kind}.mat")):
                picture = Image.open(file.with_name(f"{file.parent.name}.bmp")).convert("RGB")
                for x, y in loadmat(file)["detection"].round().astype(int).tolist():
                    if 16 <= x <= picture.width - 16 and 16 <= y <= picture.height - 16:
                        square = picture.crop((x - 16, y - 16, x + 16, y + 16))
                        found.append((square, part, kind, f"{file.parent.name}-{x}-{y}"))
            random.Random(0).shuffle(found)
            yield from found[:MOST]


PLACES = {
    "faces": place_halves,
    "hands": place_halves,
    "letters": place_letters,
    "nuclei": place_nuclei,
}


def main() -> None:
    """Write the images."""
    name, source, target = sys.argv[1:]
    for image, part, kind, stem in PLACES[name](Path(source)):
        folder = Path(target) / part / kind
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{stem}.png")


if __name__ == "__main__":
    main()
