"""Image files with labels on disk: tars as WebDataset reads them, or a folder for each class."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from latent_aug.images.orientation import make_exif
from latent_aug.utils.files import replace_file

BARRED = r'\x00-\x1f\ud800-\udfff<>:"/\\|?*'  # on some system; surrogates are bytes, not UTF-8
FOLDER = re.compile(rf"(?!\.)[^{BARRED}]*[^{BARRED}. ]")


class Sample(NamedTuple):
    """An image to write: its name without a suffix, the encoded file, its class."""

    key: str
    data: bytes
    label: int | None


def encode_image(image: Image.Image, *, quality: int | None, orientation: int) -> bytes:
    """Encode an image as a PNG or JPEG file.

    Args:
        image: The image, in grey or RGB.
        quality: The quality of a JPEG, 1 to 100. None makes a PNG.
        orientation: The EXIF orientation. The file mentions it where it is not upright.
    """
    options: dict[str, Any] = {} if quality is None else {"quality": quality}
    file = io.BytesIO()
    image.save(file, "PNG" if quality is None else "JPEG", **options, **make_exif(orientation))
    return file.getvalue()


def write_tar(path: Path, samples: Iterable[Sample], suffix: str) -> None:
    """Write a tar as WebDataset reads it, the same bytes whenever the samples are the same."""
    with replace_file(path, flush=True) as partial, tarfile.open(partial, "w") as tar:
        for key, data, label in samples:
            add_member(tar, f"{key}.{suffix}", data)
            if label is not None:
                add_member(tar, f"{key}.cls", str(label).encode())


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file to a tar, without date and owner."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_files(output: Path, samples: Iterable[Sample], suffix: str, classes: list[str]) -> None:
    """Write image files, each in the folder of its class."""
    for key, data, label in samples:
        folder = output if label is None else output / name_folder(label, classes)
        folder.mkdir(exist_ok=True)
        with replace_file(folder / f"{key}.{suffix}") as partial:
            partial.write_bytes(data)


def name_folder(label: int, classes: list[str]) -> str:
    """Name the folder of a class: by its name, or by its number where names cannot be folders.

    Raises:
        ValueError: The label is negative, as it is for unlabelled images.
    """
    if label < 0:
        raise ValueError(
            f"a folder for each class needs labels of at least 0, got {label}: leave unlabelled "
            "images out, or write shards (form='shards'), which keep every label"
        )
    usable = label < len(classes) and are_folder_names(tuple(classes))
    return classes[label] if usable else f"{label:05}"


@cache
def are_folder_names(classes: tuple[str, ...]) -> bool:
    """Whether the names of classes can be folders on any file system, sorted in their order."""
    different = len({name.casefold() for name in classes}) == len(classes)
    in_order = list(classes) == sorted(classes)
    return different and in_order and all(map(FOLDER.fullmatch, classes))
