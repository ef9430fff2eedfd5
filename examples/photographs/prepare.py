"""Arrange the photographs of fine_tune_network.py as train/ and test/.

    python examples/photographs/prepare.py clothing CLOTHING PHOTOS/clothing
    python examples/photographs/prepare.py fruit GROCERIES PHOTOS/fruit
    python examples/photographs/prepare.py trash TRASH PHOTOS/trash

The sources are named in README.md. Clothing is tested on its validation and test images. Fruit are
the kinds with at least `FEWEST` photographs, in their own split without its validation images. Of
each class of trash a half is for tests.
"""

import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

FEWEST = 85
Placed = Iterator[tuple[Path, str, str]]  # a file, its part, its class


def place_clothing(source: Path) -> Placed:
    """Its folders are part/class."""
    for file in source.glob("*/*/*.jpg"):
        part = file.parent.parent.name
        yield file, "train" if part == "train" else "test", file.parent.name


def place_fruit(source: Path) -> Placed:
    """Its folders are dataset/part/Fruit/kind, sometimes with a variety below."""
    parts = ("train", "test")
    files = [f for part in parts for f in source.glob(f"dataset/{part}/Fruit/**/*.jpg")]
    numbers = Counter(name_kind(file) for file in files)
    for file in files:
        if numbers[name_kind(file)] >= FEWEST:
            yield file, file.relative_to(source / "dataset").parts[0], name_kind(file)


def name_kind(file: Path) -> str:
    """Royal-Gala of Royal-Gala_001.jpg."""
    return file.stem.rsplit("_", 1)[0]


def place_trash(source: Path) -> Placed:
    """Its folders are classes."""
    for folder in sorted(source.iterdir()):
        files = sorted(folder.iterdir())
        random.Random(0).shuffle(files)
        for number, file in enumerate(files):
            yield file, "test" if number % 2 else "train", folder.name


def main() -> None:
    """Copy the files."""
    places = {"clothing": place_clothing, "fruit": place_fruit, "trash": place_trash}
    name, source, target = sys.argv[1:]
    for file, part, kind in places[name](Path(source)):
        folder = Path(target) / part / kind
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder)


if __name__ == "__main__":
    main()
