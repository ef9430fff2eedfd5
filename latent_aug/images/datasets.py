"""Read folders, tars and data sets as uint8 tensors, with their labels."""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from functools import cache
from http.client import HTTPException
from lzma import LZMAError
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision import datasets
from torchvision.transforms.v2 import functional as tvf

from latent_aug.flows import Flow
from latent_aug.images.conversion import (
    check_mode,
    check_range,
    from_float,
    has_colour,
    pil_to_uint8,
)
from latent_aug.utils.arguments import require_positive

KEPT_BYTES = 2**30  # of decoded images
MOST_CLASSES = 1_000_000  # of a tar, whose largest number may be a mistake
EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
UNREAD = (".gif", ".heic", ".heif", ".avif", ".jfif", ".jp2", ".tga")  # images of other kinds


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
        ValueError: The file is no tar, or a ``.cls`` member is no number or missing. A class's
            folder holds images of kinds that are not read, and no others.
    """

    def __init__(self, path: str | Path) -> None:
        self.files: list[Path | bytes] = []
        path, numbers = Path(path), {}
        unread: list[str] = []
        if path.is_dir():
            found = [file.relative_to(path).as_posix() for file in sorted(list_files(path))]
            self.names = [name for name in found if is_image(name)]
            self.files += [path / name for name in self.names]
            unread = [name for name in found if name.lower().endswith(UNREAD)]
        elif path.is_file():
            try:
                content = read_tar(path)
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
        check_unread(path, self.names, unread)

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


def list_files(folder: Path) -> Iterator[Path]:
    """List the files of a folder tree, also through links, but no hidden ones."""
    resolved = cache(Path.resolve)
    for root, folders, names in os.walk(folder, followlinks=True):
        place = Path(root)
        if any(resolved(above) == resolved(place) for above in place.parents):
            folders.clear()  # a link to a folder that it lies in
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (place / name for name in names if not name.startswith("."))


def is_image(name: str) -> bool:
    """Whether the name of a file says that it is an image."""
    return name.lower().endswith(EXTENSIONS) and not Path(name).name.startswith(".")


def read_tar(path: Path) -> dict[str, bytes]:
    """Read the images and ``.cls`` members of a tar, by name."""
    content = {}
    with tarfile.open(path) as tar:
        for member in tar:
            if not (is_image(member.name) or member.name.endswith(".cls")):
                continue
            try:  # of a link, too
                file = tar.extractfile(member)
            except (KeyError, RecursionError) as error:
                raise ValueError(
                    f"{path}: {member.name} is a link to {member.linkname}, which is not there"
                ) from error
            if file is not None:
                name = posixpath.normpath(member.name)  # "./a.png" lies in no folder
                content[name] = file.read()
    return content


def get_sample_key(name: str) -> str:
    """Get the part of a name that members of one WebDataset sample share, up to the first dot."""
    folder, slash, end = name.rpartition("/")
    return folder + slash + end.partition(".")[0]


def label_by_folder(names: list[str]) -> tuple[list[str], list[int] | None]:
    """Give classes and labels by outermost folder. A folder around all others does not count."""
    parts = [name.split("/") for name in names]
    while all(len(part) > 2 and part[0] == parts[0][0] for part in parts):
        parts = [part[1:] for part in parts]
    if any(len(part) < 2 for part in parts):
        return [], None
    classes = sorted({part[0] for part in parts})
    index = {name: number for number, name in enumerate(classes)}
    return classes, [index[part[0]] for part in parts]


def check_unread(path: Path, names: list[str], unread: list[str]) -> None:
    """Refuse a folder with a class of which no image is read.

    Args:
        path: The folder.
        names: The images that are read.
        unread: Images of other kinds.

    Raises:
        ValueError: A class has images of other kinds alone.
    """
    classes, wanted = (set(label_by_folder(part)[0]) for part in (names, [*names, *unread]))
    if classes < wanted:
        raise ValueError(
            f"{path}: the images of {', '.join(sorted(wanted - classes))} are of kinds that are "
            f"not read ({', '.join(UNREAD)}): convert them to PNG, or take the folder away"
        )


def label_by_number(
    names: list[str], numbers: dict[str, bytes]
) -> tuple[list[str], list[int] | None]:
    """Give classes and labels by the ``.cls`` member of each image's sample."""
    labels = []
    for name in names:
        try:
            labels.append(int(numbers[get_sample_key(name)]))
        except (KeyError, ValueError) as error:
            message = f"image {name} has no .cls member with a class's number beside it"
            raise ValueError(message) from error
    if not -1 <= min(labels) <= max(labels) < MOST_CLASSES:
        raise ValueError(
            f"the .cls members must hold numbers from 0 to {MOST_CLASSES - 1}, or -1 for images "
            f"without a class, got {min(labels)} to {max(labels)}"
        )
    return [str(number) for number in range(max(labels) + 1)], labels


def open_images(source: str | Path, *, root: str | Path = "data", train: bool = True) -> Any:
    """Open a folder, a tar file, or "torchvision:NAME", which is downloaded to `root`.

    Raises:
        ValueError: torchvision has no such data set.
        FileNotFoundError: The path does not exist, or holds no image.
        OSError: The data set cannot be downloaded.
        ModuleNotFoundError: torchvision needs a package that is missing (SVHN: scipy).
    """
    kind, _, name = str(source).partition(":")
    if kind != "torchvision" or not name:
        return EncodedImages(source)
    builder = getattr(datasets, name, None)
    if not isinstance(builder, type) or not issubclass(builder, datasets.VisionDataset):
        raise ValueError(f"torchvision.datasets has no {name!r}; try CIFAR10 or FashionMNIST")
    split = (
        {"split": "train" if train else "test"} if name in {"SVHN", "STL10"} else {"train": train}
    )
    try:
        return builder(root, download=True, **split)
    except TypeError as error:
        raise ValueError(f"torchvision's {name} needs more than a root folder: {error}") from error
    except ImportError as error:
        raise ModuleNotFoundError(f"torchvision's {name} needs a package: {error}") from error
    except (RuntimeError, OSError, HTTPException) as error:
        raise OSError(f"torchvision's {name} cannot be downloaded to {root}: {error}") from error


def check_dataset(name: str, dataset: Any) -> None:
    """Refuse a dataset without items, or whose items cannot be read by index.

    Raises:
        ValueError: The length is 0, or there is none.
        TypeError: There is no access by index, as in a loader.
    """
    if not hasattr(dataset, "__len__") or len(dataset) == 0:
        raise ValueError(f"{name} must have a length above 0, got {type(dataset).__name__}")
    if not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"{name} must be a data set or a sequence of images, such as the dataset of a loader, "
            f"got a {type(dataset).__name__}"
        )


def get_image(sample: Any) -> Any:
    """Get the image of a sample, which is alone or first in a tuple."""
    return sample[0] if isinstance(sample, (tuple, list)) else sample


def spread_indices(length: int, count: int) -> list[int]:
    """Spread up to `count` indices evenly over a length, from the first to the last."""
    count = min(count, length)
    return [i * (length - 1) // max(count - 1, 1) for i in range(count)]


def to_uint8(sample: Any, channels: int, size: int | None = None) -> Tensor:
    """Convert the image of a sample to uint8 (channels, H, W).

    Args:
        sample: A PIL image or a uint8 or float [0, 1] tensor, or a tuple that begins with one.
        channels: The channels of the result. 3 converts a PIL image to RGB, 1 to grey where no
            colour is lost by it.
        size: The side of the square middle that is cropped after the shorter side was resized.

    Raises:
        ValueError: The image has other channels, colours for 1 channel, or is out of range.
        TypeError: The PIL mode or dtype has no fixed range.
    """
    image = get_image(sample)
    if isinstance(image, Image.Image):
        check_mode(image)
        if channels == 1 and has_colour(image):
            raise ValueError(
                "the images have colours, and the flow maps grey ones, of 1 channel: use a flow of "
                "3 channels, such as glow-photographs, or convert the images to grey before"
            )
        image = pil_to_uint8(image, {1: "L", 3: "RGB"}.get(channels, image.mode))
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != channels:
        found = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"a dataset of {channels}-channel images is needed, got {found}")
    if not image.is_floating_point() and image.dtype != torch.uint8:
        raise TypeError(
            f"images must be uint8, or float in [0, 1], got {image.dtype}: scale their values to "
            "8 bits and convert them with .to(torch.uint8)"
        )
    if size is not None:
        image = tvf.center_crop(tvf.resize(image, [size], antialias=True), [size])
    if not image.is_floating_point():
        return image
    check_range(image[None], "divide 8-bit values by 255; leave Normalize out of the data set")
    return from_float(image, torch.uint8)


class UInt8Images(Dataset[Tensor]):
    """A dataset's images as uint8 (C, H, W), decoded once and kept if all fit into `keep_bytes`.

    Args:
        dataset: A dataset with a length, whose items `to_uint8` understands.
        channels: The number of channels to convert to.
        size: The side to resize and crop to. None keeps the images as they are.
        keep_bytes: The memory that decoded images may take.
        num_classes: The number of classes. Above 0, classes are read as well, see `read_classes`.

    Attributes:
        labels: The classes (N,), or None.

    Raises:
        ValueError: The dataset is empty, an image has another size than the first, or an image has
            no class where one is needed.
    """

    def __init__(
        self,
        dataset: Any,
        channels: int,
        size: int | None = None,
        keep_bytes: int = KEPT_BYTES,
        *,
        num_classes: int = 0,
    ) -> None:
        check_dataset("dataset", dataset)
        if size is not None:
            require_positive("size", size)
        self.dataset, self.channels, self.size, self.count = dataset, channels, size, len(dataset)
        self.num_classes = num_classes
        self.kept: Tensor | None = None
        self.labels = read_classes(dataset, num_classes) if num_classes else None
        self.shape = to_uint8(self.read(0), channels, size).shape
        if self.count * self.shape.numel() <= keep_bytes:
            self.kept = torch.stack([self[i] for i in range(self.count)])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if self.kept is not None:
            return self.kept[index]
        image = to_uint8(self.read(index), self.channels, self.size)
        if image.shape != self.shape:
            raise ValueError(
                f"image {index} is {tuple(image.shape)}, the first one {tuple(self.shape)}; "
                "give a size to resize and crop to"
            )
        return image

    def read(self, index: int) -> Any:
        """Read a sample of the dataset.

        Raises:
            OSError: The file cannot be read.
        """
        try:
            return self.dataset[index]
        except OSError as error:
            raise OSError(f"{error}; mend the file, or take it out of the data") from error

    def get_classes(self, indices: list[int] | slice) -> Tensor | None:
        """Get the classes of some images as a flow takes them, None for an unconditional one."""
        return None if self.labels is None else self.labels[indices]

    def spread_indices(self, count: int) -> list[int]:
        """Spread up to `count` indices evenly, as a folder is sorted by class."""
        return spread_indices(self.count, count)

    def read_some(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Read up to `count` images, evenly spread, and their classes: (N, C, H, W) and (N,)."""
        places = self.spread_indices(count)
        return stack_images(self.__getitems__(places)), self.get_classes(places)

    def __getitems__(self, indices: Iterable[int]) -> list[Tensor] | Tensor:
        """Read a whole batch at once. The DataLoader calls this where it exists."""
        indices = list(indices)
        return self.kept[indices] if self.kept is not None else [self[i] for i in indices]


def get_class_names(dataset: Any) -> list[str]:
    """Get the names of a dataset's classes, in order, or none where it has no `classes`."""
    names = getattr(dataset, "classes", None)
    return [] if names is None else [str(name) for name in names]


def read_classes(dataset: Any, num_classes: int) -> Tensor:
    """Read the classes (N,) of a dataset.

    They are its `targets` or `labels`, or the second entries of its samples.

    Raises:
        ValueError: A sample has no class, or none in 0 to num_classes - 1, or the dataset names
            another number of classes.
    """
    check_class_count(dataset, num_classes)
    found = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if getattr(dataset, "target_transform", None) is not None:
        found = None  # samples have what it makes of these
    try:
        labels = torch.as_tensor(
            [int(dataset[i][1]) for i in range(len(dataset))] if found is None else found,
            device="cpu",
        )
    except (TypeError, IndexError, KeyError, ValueError) as error:
        raise ValueError(
            "a class-conditional flow needs (image, class) samples or a dataset with `targets` "
            "or `labels`"
        ) from error
    if labels.shape != (len(dataset),) or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"the dataset's classes must lie in 0 to {num_classes - 1}, the flow's, got "
            f"{sorted(set(labels.flatten().tolist()))[:20]}"
        )
    return labels.long()


def check_class_count(dataset: Any, num_classes: int) -> None:
    """Refuse a dataset that names another number of classes than a flow has.

    Raises:
        ValueError: It does.
    """
    names = get_class_names(dataset)
    if names and len(names) != num_classes:
        raise ValueError(
            f"the images are of {len(names)} classes ({', '.join(names[:5])}, ...), the "
            f"flow has {num_classes}: as classes are numbered in their order, all must be there"
        )


def check_same_classes(images: Any, held_out: Any) -> None:
    """Refuse held-out images of other classes, as classes are numbered in the order of their names.

    Raises:
        ValueError: Both datasets name their classes, and not the same.
    """
    own, others = (get_class_names(data) for data in (images, held_out))
    if own and others and own != others:
        odd = sorted(set(own) ^ set(others)) or others
        raise ValueError(
            f"validation must have the classes of the training images, {len(own)}, got "
            f"{len(others)}; of one of the two only: {', '.join(odd[:5])}"
        )


def stack_images(samples: Tensor | list[Tensor]) -> Tensor:
    """Stack images to a batch, which may have come as one."""
    return samples if isinstance(samples, Tensor) else torch.stack(samples)


def pair_with_classes(images: Tensor, y: Tensor | None) -> Any:
    """Make a data set of images, and of their classes where there are some."""
    return images if y is None else TensorDataset(images, y)


def read_images(
    flow: Flow, dataset: Any, size: int | None = None, *, keep_bytes: int = KEPT_BYTES
) -> UInt8Images:
    """Read the images of a dataset for a flow, with classes where the flow has some.

    With ``keep_bytes=0`` an image is read whenever it is asked for.
    """
    if isinstance(dataset, UInt8Images) and size is None:
        read_for = (dataset.channels, dataset.num_classes)
        if read_for == (flow.channels, flow.num_classes):
            return dataset
    return UInt8Images(dataset, flow.channels, size, keep_bytes, num_classes=flow.num_classes)


def check_size(images: UInt8Images, flow: Flow, name: str = "images") -> None:
    """Refuse images of another size than the one that a flow maps, if it maps one only."""
    height, width = images.shape[1:]
    if flow.size is not None and (height, width) != tuple(flow.size):
        raise ValueError(
            f"{name} are {height}x{width}, this flow maps {flow.size[0]}x{flow.size[1]} only: "
            "resize them, or use another flow"
        )


def check_sides(images: UInt8Images, flow: Flow, name: str = "images") -> None:
    """Refuse images whose height and width a flow does not map without padding."""
    check_size(images, flow, name)
    height, width = images.shape[1:]
    if height % flow.multiple or width % flow.multiple:
        raise ValueError(
            f"{name} are {height}x{width}, this flow needs sides that divide by {flow.multiple}: "
            "give a size that does, to resize to, or a flow of fewer levels"
        )


def hash_tensors(tensors: Iterable[Tensor]) -> str:
    """Hash the values of tensors."""
    sha = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy().tobytes())  # NumPy knows no bfloat16
    return sha.hexdigest()
