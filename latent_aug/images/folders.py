"""Read the images of a folder or a tar, and label them by their names."""

from __future__ import annotations

import io
import os
import posixpath
import tarfile
import warnings
import zlib
from collections.abc import Iterator
from functools import cache
from lzma import LZMAError
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

from latent_aug.images.conversion import check_mode

MOST_CLASSES = 1_000_000  # of a tar, whose largest number may be a mistake
EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


class EncodedImages(Dataset[Image.Image]):
    """Images of one folder tree or one tar (also compressed), sorted by name.

    Items are images alone. Their labels are in `labels`. The members of a tar are kept in memory
    as they are, still encoded.

    Attributes:
        names: The names of the images, in the folder or the tar.
        classes: The outermost folders that differ, sorted. In a tar with ``.cls`` members, as
            WebDataset has them, the numbers up to the largest. Empty where an image lies in no
            folder.
        labels: The index of each image's class, or -1 for an image without one. None without
            classes.

    Raises:
        FileNotFoundError: The path does not exist, or holds no image.
        OSError: A folder cannot be read.
        ValueError: The file is no tar, or a ``.cls`` member is no number or missing. A sample of a
            tar with ``.cls`` members has several images.
    """

    def __init__(self, path: str | Path) -> None:
        self.files: list[Path | bytes] = []
        path, numbers, folders = Path(path).expanduser(), {}, None
        if path.is_dir():
            self.files += sorted(list_images(path))
            self.names = [Path(file).relative_to(path).as_posix() for file in self.files]  # type: ignore[arg-type]
        elif path.is_file():
            try:
                content, folders = read_tar(path)
            except (tarfile.TarError, EOFError, zlib.error, LZMAError) as error:
                raise ValueError(f"{path} is no folder and no readable tar") from error
            numbers = {get_sample_key(n): data for n, data in content.items() if not is_image(n)}
            self.names = sorted(name for name in content if is_image(name))
            self.files += [content[name] for name in self.names]
        else:
            raise FileNotFoundError(f"there is no folder and no tar {path}")
        if not self.files:
            raise FileNotFoundError(f"no images ({', '.join(EXTENSIONS)}) found in {path}")
        self.classes, self.labels = (
            label_by_number(self.names, numbers) if numbers else label_by_folder(self.names)
        )
        by_folder = self.classes and not numbers
        empty = find_without_images(self.names, path, folders) if by_folder else []
        if empty:
            warnings.warn(
                f"{path}: no image is read in {', '.join(empty)}, so that there is no such class; "
                f"read are {', '.join(EXTENSIONS)}",
                stacklevel=2,
            )

    @property
    def stray(self) -> list[str]:
        """The images in no folder where others lie in one: they are why there are no classes."""
        in_folders = self.labels is None and any("/" in name for name in self.names)
        return [name for name in self.names if "/" not in name] if in_folders else []

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Image.Image:
        file = self.files[index]
        try:
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
                image.load()
                check_mode(image)
                return image
        except Exception as error:  # a damaged file raises many kinds
            raise OSError(f"image {self.names[index]} cannot be read: {error}") from error


def list_images(folder: Path) -> Iterator[Path]:
    """List the image files of a folder tree, also through links, but no hidden ones.

    Raises:
        OSError: A folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    resolved = cache(Path.resolve)
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        place = Path(root)
        if any(resolved(above) == resolved(place) for above in place.parents):
            folders.clear()  # a link to a folder that it lies in
            continue
        folders[:] = [name for name in folders if not is_hidden(name)]
        yield from (place / name for name in names if is_image(name))


def is_image(name: str) -> bool:
    """Whether the name of a file says that it is an image."""
    return name.lower().endswith(EXTENSIONS) and not is_hidden(name)


def is_hidden(path: str) -> bool:
    """Whether a file is hidden, or a folder that it lies in."""
    return any(part.startswith(".") and part != ".." for part in path.split("/"))


def read_tar(path: Path) -> tuple[dict[str, bytes], set[str]]:
    """Read the images and ``.cls`` members of a tar, by name, and name its folders."""
    content, folders = {}, set[str]()
    with tarfile.open(path) as tar:
        for member in tar:
            name = posixpath.normpath(member.name)  # "./a.png" lies in no folder
            if is_hidden(name):
                continue
            folders.add(name if member.isdir() else posixpath.dirname(name))
            if not (is_image(name) or name.endswith(".cls")):
                continue
            try:  # of a link, too
                file = tar.extractfile(member)
            except (KeyError, RecursionError) as error:
                raise ValueError(
                    f"{path}: {member.name} is a link to {member.linkname}, which is not there"
                ) from error
            if file is not None:
                content[name] = file.read()
    return content, folders


def get_sample_key(name: str) -> str:
    """Get the part of a name that members of one WebDataset sample share, up to the first dot."""
    folder, slash, end = name.rpartition("/")
    return folder + slash + end.partition(".")[0]


def split_names(names: list[str]) -> tuple[list[str], list[list[str]]]:
    """Split names into the folders around all images, and the parts of each name below those."""
    around, parts = [], [name.split("/") for name in names]
    while all(len(part) > 2 and part[0] == parts[0][0] for part in parts):
        around.append(parts[0][0])
        parts = [part[1:] for part in parts]
    return around, parts


def label_by_folder(names: list[str]) -> tuple[list[str], list[int] | None]:
    """Give classes and labels by outermost folder. A folder around all others does not count."""
    _, parts = split_names(names)
    if any(len(part) < 2 for part in parts):
        return [], None
    classes = sorted({part[0] for part in parts})
    index = {name: number for number, name in enumerate(classes)}
    return classes, [index[part[0]] for part in parts]


def find_without_images(names: list[str], root: Path, folders: set[str] | None) -> list[str]:
    """Find the folders without images beside classes, and beside the folders around those.

    Args:
        names: The names of the images.
        root: What they lie in.
        folders: All folders there, where it is a tar.
    """
    around, parts = split_names(names)
    levels = [*({name} for name in around), {part[0] for part in parts}]
    found: list[str] = []
    for depth, read in enumerate(levels):
        above = around[:depth]
        if folders is None:
            there = {path.name for path in root.joinpath(*above).iterdir() if path.is_dir()}
        else:
            split = [folder.split("/") for folder in folders if folder]
            inside = [part for part in split if len(part) > depth and part[:depth] == above]
            there = {part[depth] for part in inside}
        empty = sorted(name for name in there - read if not is_hidden(name))
        found += ["/".join([*above, name]) for name in empty]
    return found


def label_by_number(
    names: list[str], numbers: dict[str, bytes]
) -> tuple[list[str], list[int] | None]:
    """Give classes and labels by the ``.cls`` member of each image's sample."""
    labels: list[int] = []
    images: dict[str, str] = {}
    for name in names:
        key = get_sample_key(name)
        first = images.setdefault(key, name)
        if first != name:
            raise ValueError(f"images {first} and {name} are of one sample: leave one in the tar")
        try:
            labels.append(int(numbers[key]))
        except (KeyError, ValueError) as error:
            message = f"image {name} has no .cls member with a class's number beside it"
            raise ValueError(message) from error
    if not -1 <= min(labels) <= max(labels) < MOST_CLASSES:
        raise ValueError(
            f"the .cls members must hold numbers from 0 to {MOST_CLASSES - 1}, or -1 for images "
            f"without a class, got {min(labels)} to {max(labels)}"
        )
    return [str(number) for number in range(max(labels) + 1)], labels
