"""Open data sets, and read them as uint8 tensors with their labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
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
    PIL_MODES,
    check_mode,
    check_range,
    from_float,
    has_colour,
    pil_to_uint8,
)
from latent_aug.images.folders import EncodedImages
from latent_aug.images.samples import get_image
from latent_aug.utils.arguments import require_positive

KEPT_BYTES = 2**30  # of decoded images


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
    kind = type(dataset).__name__
    if not hasattr(dataset, "__len__"):
        raise ValueError(f"{name} must have a length, got a {kind}: make a list of it")
    if len(dataset) == 0:
        raise ValueError(f"{name} must have a length above 0, got an empty {kind}")
    if not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"{name} must be a data set or a sequence of images, such as the dataset of a loader, "
            f"got a {kind}"
        )


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
        image = pil_to_uint8(image, PIL_MODES.get(channels, image.mode))
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != channels:
        found = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(
            f"an image must be a PIL image or a tensor ({channels}, H, W), got {found}: convert "
            "arrays with v2.ToImage(), or take a flow of other channels"
        )
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


def name_image(dataset: Any, index: int) -> str:
    """Name an image for a message: by its file, or by its index where it has none."""
    names = dataset.names if isinstance(dataset, EncodedImages) else None
    return f"image {index if names is None else names[index]}"


@contextmanager
def name_image_in_errors(dataset: Any, index: int) -> Iterator[None]:
    """Name the image in the errors that it gives rise to."""
    try:
        yield
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name_image(dataset, index)}: {error}") from error


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
        self.shape = self.convert(0).shape
        if self.count * self.shape.numel() <= keep_bytes:
            self.kept = torch.stack([self[i] for i in range(self.count)])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if self.kept is not None:
            return self.kept[index]
        image = self.convert(index)
        if image.shape != self.shape:
            raise ValueError(
                f"{name_image(self.dataset, index)} is {tuple(image.shape)}, the first one "
                f"{tuple(self.shape)}; give a size to resize and crop to"
            )
        return image

    def convert(self, index: int) -> Tensor:
        """Read an image as uint8 (C, H, W) of the wanted channels and size."""
        sample = self.read(index)
        with name_image_in_errors(self.dataset, index):
            return to_uint8(sample, self.channels, self.size)

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
        stray = word_stray(dataset)
        raise ValueError(
            "a class-conditional flow needs (image, class) samples or a dataset with `targets` "
            f"or `labels`{stray and '; ' + stray}"
        ) from error
    if labels.shape != (len(dataset),) or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"the dataset's classes must lie in 0 to {num_classes - 1}, the flow's, got "
            f"{sorted(set(labels.flatten().tolist()))[:20]}"
        )
    return labels.long()


def word_stray(dataset: Any) -> str:
    """Say why a folder has no classes though images lie in folders. Empty where that is not so."""
    stray = dataset.stray if isinstance(dataset, EncodedImages) else []
    if not stray:
        return ""
    others = f" and {len(stray) - 1} others" if len(stray) > 1 else ""
    return f"{stray[0]}{others} beside the folders of the classes: move what has no class away"


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
            f"{name} are {height}x{width}, this flow needs sides divisible by {flow.multiple}: "
            "give a size that does, to resize to, or a flow of fewer levels"
        )
