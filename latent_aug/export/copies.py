"""Write perturbed copies of a data set to disk, for training loops that read files."""

from __future__ import annotations

import hashlib
import json
import operator
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from latent_aug.export.shards import Sample, encode_image, write_files, write_tar
from latent_aug.images.conversion import GREY_MODES
from latent_aug.images.datasets import (
    check_class_count,
    check_dataset,
    get_class_names,
    name_image_in_errors,
    spread_indices,
    to_uint8,
    word_stray,
)
from latent_aug.images.folders import EncodedImages
from latent_aug.images.orientation import UPRIGHT, read_orientation
from latent_aug.images.samples import get_image
from latent_aug.transforms.random import LatentPerturb
from latent_aug.utils.arguments import (
    require_choice,
    require_fields,
    require_natural,
    require_path,
    require_positive,
)
from latent_aug.utils.files import claim_directory, remove_partial, replace_file, write_whole
from latent_aug.utils.hashing import hash_tensors
from latent_aug.utils.randomness import get_rank_and_count, mix_seeds

SETTINGS_NAME, CLASSES_NAME, CLASSES_TEXT_NAME = "augment.json", "classes.json", "classes.txt"
SUFFIXES = {"png": "png", "jpeg": "jpg"}


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """The settings of `augment_images`.

    Args:
        output: The directory for the copies, empty or of the same job that was stopped before.
        copies: The number of perturbed copies of each image, at least 1.
        originals: Write each image itself as well, as copy 0.
        form: "shards" writes tars as WebDataset reads them, "folder" one folder for each class, as
            torchvision's ImageFolder reads them.
        shard_size: The number of images in a shard, which is written or missing as a whole.
        image_format: "png" is lossless, "jpeg" smaller.
        quality: The quality of "jpeg" files, 1 to 100.
        size: The side to resize and crop images to. By default images keep their size.
        batch_size: The number of images of one size that go through the flow together.
        seed: The seed of order and noise.
        skip_unreadable: Leave out images that cannot be read, with a warning, rather than stop.

    Raises:
        ValueError: An argument is out of range, or is no integer where one is needed.
        TypeError: `output` is no path.

    Example:
        >>> AugmentConfig(output="copies", copies=4, form="folder").image_format
        'png'
    """

    output: str | Path
    copies: int = 1
    originals: bool = False
    form: Literal["shards", "folder"] = "shards"
    shard_size: int = 1000
    image_format: Literal["png", "jpeg"] = "png"
    quality: int = 95
    size: int | None = None
    batch_size: int = 64
    seed: int = 0
    skip_unreadable: bool = False

    def __post_init__(self) -> None:
        require_fields(self, require_path, "output")
        require_fields(self, require_positive, "copies", "shard_size", "batch_size", "quality")
        if self.size is not None:
            require_fields(self, require_positive, "size")
        if self.quality > 100:
            raise ValueError(f"quality must lie in 1 to 100, got {self.quality!r}")
        require_choice("form", self.form, ("shards", "folder"))
        require_choice("image_format", self.image_format, ("png", "jpeg"))
        require_fields(self, require_natural, "seed")


@dataclass(frozen=True)
class AugmentReport:
    """The numbers of shards and images that one process dealt with.

    Attributes:
        written: The number of shards that it wrote.
        found: The number of its shards that were there already.
        images: The number of images in the shards that it wrote.
        fallbacks: The number of those images that stayed as they were.
        unreadable: The number of images that are missing, as they could not be read.
    """

    written: int
    found: int
    images: int
    fallbacks: int
    unreadable: int


class Item(NamedTuple):
    """An image of the data set as uint8 (C, H, W), with its label and its file's orientation."""

    image: Tensor
    label: int | None
    grey: bool
    orientation: int

    def hash(self) -> str:
        """Hash the pixels, and the orientation and the label where there are any."""
        tensors = [self.image]
        if self.orientation != UPRIGHT:
            tensors.append(torch.tensor(self.orientation, device="cpu"))
        if self.label is not None:  # of another shape, so that neither passes for the other
            tensors.append(torch.tensor([self.label], device="cpu"))
        return hash_tensors(tensors)


def augment_images(
    dataset: Any,
    transform: LatentPerturb,
    config: AugmentConfig,
    *,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> AugmentReport:
    """Write perturbed copies of a data set's images, with their labels, in shards.

    Each copy of the data set has an order of its own. A shard follows from the seed and its number
    alone, and is there as a whole or not at all. The same call again writes the shards that are
    missing. Several processes take the shards in turn and need not talk to each other. They need
    RANK and WORLD_SIZE in their environment, as torchrun and accelerate set them.

    Beside the shards lies ``augment.json`` with the settings. ``classes.json`` is the list of the
    class names in the order of the labels, and ``classes.txt`` has them a line each.

    Args:
        dataset: Images, or (image, label, ...): PIL, uint8, or float in [0, 1]. A flow of 3
            channels takes grey PIL images too, which come back grey. A flow of 1 channel refuses
            colours. Labels are class indices.
        transform: The perturbation. Its generator is not used.
        config: The settings of the copies.
        device: The device to perturb on. By default a CUDA GPU if there is one. The processes of a
            machine take its GPUs in turn.
        progress: Whether to show a progress bar, in the first process.

    Returns:
        The numbers of shards and images of this process.

    Raises:
        ValueError: The data set does not fit the flow, or `config.output` holds something else.
        TypeError: `transform` is no `LatentPerturb`, or an image is of a kind without a fixed
            range.
        OSError: An image cannot be read. The message names it. Mend or replace it and call again,
            or set `skip_unreadable`.

    Source: none in the paper, which perturbs in training.

    Example:
        >>> import tempfile
        >>> perturb = LatentPerturb(flow="glow-fashionmnist")
        >>> data = [(torch.rand(1, 28, 28), label) for label in range(4)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = AugmentConfig(output=folder, copies=2, shard_size=4)
        ...     augment_images(data, perturb, config, progress=False)
        ...     sorted(os.listdir(folder))
        AugmentReport(written=2, found=0, images=8, fallbacks=0, unreadable=0)
        ['augment.json', 'shard-000000.tar', 'shard-000001.tar']
    """
    job = Job(dataset, transform, config, device)
    job.write_settings()
    rank, count = get_rank_and_count()
    mine = range(rank, job.shard_count, count)
    missing = [shard for shard in mine if not job.get_path(shard).exists()]
    total = sum(len(job.get_places(shard)) for shard in missing)
    with tqdm(total=total, unit="image", disable=not progress or rank > 0) as bar:
        for shard in missing:
            job.write(shard, bar)
    fallbacks = job.transform.fallbacks
    lost = job.unreadable
    return AugmentReport(len(missing), len(mine) - len(missing), total - lost, fallbacks, lost)


class Job:
    """A data set's copies, shard by shard.

    Args:
        dataset: See `augment_images`.
        transform: See `augment_images`.
        config: See `augment_images`.
        device: See `augment_images`.
    """

    def __init__(
        self,
        dataset: Any,
        transform: LatentPerturb,
        config: AugmentConfig,
        device: str | torch.device | None,
    ) -> None:
        if not isinstance(transform, LatentPerturb):
            raise TypeError(f"transform must be a LatentPerturb, got {type(transform).__name__}")
        check_dataset("dataset", dataset)
        if callable(transform.mask):
            raise ValueError(
                "mask must be None or a tensor: a callable would see images and labels alone"
            )
        if isinstance(transform.mask, Tensor) and transform.mask.ndim > 2:
            raise ValueError(
                f"mask must be (H, W) for all images, got {tuple(transform.mask.shape)}: copies "
                "are made in another order"
            )
        if transform.flow.num_classes:
            check_class_count(dataset, transform.flow.num_classes)
        self.channels = transform.flow.channels
        if self.channels not in (1, 3):
            raise ValueError(f"files have 1 or 3 channels, the flow's images have {self.channels}")
        self.dataset, self.config, self.count = dataset, config, len(dataset)
        self.generator = torch.Generator()
        self.transform = transform.with_generator(self.generator)
        self.device = torch.device(device) if device else choose_device()
        self.output = Path(config.output)
        self.classes: list[str] = get_class_names(dataset)
        self.unreadable, self.left_out = 0, set[int]()  # samples, and the images that they are of
        self._order: tuple[int, list[int]] = (-1, [])  # the last one's copy and order
        self.sample_count = self.count * (config.copies + config.originals)
        self.shard_count = -(-self.sample_count // config.shard_size)

    def get_path(self, shard: int) -> Path:
        """Get the file that exists when a shard is complete."""
        folder = self.config.form == "folder"
        return self.output / (f".shard-{shard:06}.done" if folder else f"shard-{shard:06}.tar")

    def get_places(self, shard: int) -> range:
        """Get the places of a shard's images in all copies together."""
        first = shard * self.config.shard_size
        return range(first, min(first + self.config.shard_size, self.sample_count))

    def write(self, shard: int, bar: Any) -> None:
        """Make a shard and put it in its place."""
        path = self.get_path(shard)
        self.generator.manual_seed(mix_seeds(self.config.seed, shard))
        remove_partial(path)
        samples = self.make_samples(self.get_places(shard), bar)
        suffix = SUFFIXES[self.config.image_format]
        if self.config.form == "shards":
            write_tar(path, samples, suffix)
        else:
            write_files(self.output, samples, suffix, self.classes)
            with replace_file(path) as partial:
                partial.touch()

    def make_samples(self, places: range, bar: Any) -> Iterator[Sample]:
        """Perturb the images of a shard and encode them as files."""
        step = self.config.batch_size
        for first in range(places.start, places.stop, step):
            chosen = [self.choose(k) for k in range(first, min(first + step, places.stop))]
            found = ((key, self.read(key[0])) for key in chosen)
            read = {key: item for key, item in found if item is not None}
            self.unreadable += len(chosen) - len(read)
            groups: dict[Any, list[tuple[int, int]]] = {}
            for (index, copy), item in read.items():
                if copy:
                    groups.setdefault(item.image.shape, []).append((index, copy))
            for keys in groups.values():
                perturbed = self.perturb([read[key] for key in keys])
                for key, image in zip(keys, perturbed, strict=True):
                    read[key] = read[key]._replace(image=image)
            for (index, copy), item in read.items():
                yield Sample(f"{index:08}-{copy}", self.encode_file(item), item.label)
            bar.update(len(chosen))

    def choose(self, place: int) -> tuple[int, int]:
        """Choose the image at a place, and the number of its copy. Copy 0 is the image itself."""
        copy, own_place = divmod(place, self.count)
        return self.shuffle(copy)[own_place], copy + (not self.config.originals)

    def shuffle(self, copy: int) -> list[int]:
        """Shuffle the indices of the images for a copy, always in the same way."""
        if self._order[0] != copy:
            seed = mix_seeds(self.config.seed, copy, self.count)
            generator = torch.Generator().manual_seed(seed)
            self._order = (
                copy,
                torch.randperm(self.count, generator=generator, device="cpu").tolist(),
            )
        return self._order[1]

    def read(self, index: int) -> Item | None:
        """Read an image and its label. None stands for one that cannot be read."""
        try:
            sample = self.dataset[index]
        except OSError as error:
            if not self.config.skip_unreadable:
                raise OSError(
                    f"{error}; mend or replace the file and start again, which goes on from here, "
                    "or leave such images out: --skip-unreadable, in Python skip_unreadable=True"
                ) from error
            if index not in self.left_out:
                self.left_out.add(index)
                warnings.warn(f"left out: {error}", stacklevel=2)
            return None
        with name_image_in_errors(self.dataset, index):
            image = to_uint8(sample, self.channels, self.config.size)
        source = get_image(sample)
        is_pil = isinstance(source, Image.Image)
        return Item(
            image,
            self.read_label(sample, index),
            grey=is_pil and source.mode in GREY_MODES,
            orientation=read_orientation(source) if is_pil else UPRIGHT,
        )

    def read_label(self, sample: Any, index: int) -> int | None:
        """Read the label of a sample, or None where it has none."""
        if isinstance(self.dataset, EncodedImages):
            return None if self.dataset.labels is None else self.dataset.labels[index]
        if not isinstance(sample, (tuple, list)) or len(sample) < 2:
            return None
        try:
            return operator.index(sample[1])
        except TypeError as error:
            raise ValueError(
                f"labels must be class indices, image {index} has {sample[1]!r}"
            ) from error

    def perturb(self, items: list[Item]) -> Tensor:
        """Perturb images of one size."""
        batch = torch.stack([item.image for item in items]).to(self.device)
        labels = [item.label for item in items]
        if not self.transform.flow.num_classes:
            result: Tensor = self.transform(batch)
        elif None in labels:
            raise ValueError("the flow is conditional on classes, and the data set has no labels")
        else:
            result, _ = self.transform(batch, torch.tensor(labels, device=batch.device))
        return result.cpu()

    def encode_file(self, item: Item) -> bytes:
        """Encode an image as a file, in grey if it came in grey."""
        image = to_pil_image(item.image)
        if item.grey:
            image = image.convert("L")
        quality = self.config.quality if self.config.image_format == "jpeg" else None
        return encode_image(image, quality=quality, orientation=item.orientation)

    def write_settings(self) -> None:
        """Write the settings and the classes, or see that the output has the same.

        Raises:
            ValueError: The output holds copies of other settings, or something else.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        if stray := word_stray(self.dataset):
            warnings.warn(f"copies get no labels: {stray}", stacklevel=4)
        elif self.config.form == "folder" and not self.is_labelled():
            warnings.warn(
                "the images have no classes (their outermost folders), so that copies lie in "
                f"{self.output} itself, where ImageFolder does not look for them",
                stacklevel=4,
            )
        path = self.output / SETTINGS_NAME
        others = [p.name for p in self.output.iterdir() if not p.name.startswith(".")]
        if others and not path.exists():  # in this order: other workers write it first
            raise ValueError(f"output {self.output} must be empty, it holds {others[0]}")
        claim_directory(
            path,
            self.describe(),
            "copies",
            is_begun=self.has_begun(),
            remedy="use the same settings and images, or another output",
        )
        if self.classes:
            self.write_classes()

    def write_classes(self) -> None:
        """Write the names of the classes, as a JSON list and as text."""
        lines = [json.dumps(name) if needs_quotes(name) else name for name in self.classes]
        for name, text in (
            (CLASSES_NAME, json.dumps(self.classes, indent=1)),
            (CLASSES_TEXT_NAME, "\n".join(lines)),
        ):
            path, content = self.output / name, f"{text}\n".encode()
            if not path.exists() or path.read_bytes() != content:  # by another worker
                write_whole(path, content)

    def has_begun(self) -> bool:
        """Whether any copies lie in the output, and not its settings alone."""
        own = {SETTINGS_NAME, CLASSES_NAME, CLASSES_TEXT_NAME}
        names = {path.name for path in self.output.iterdir()} - own
        return any(not name.startswith(".") or name.endswith(".done") for name in names)

    def is_labelled(self) -> bool:
        """Whether the images have classes, by the first one where the data set names none."""
        first = None if self.classes else self.read(0)
        return bool(self.classes) or (first is not None and first.label is not None)

    def hash_labels(self) -> str:
        """Hash the classes, and each file's name and label where they are known."""
        known = self.dataset if isinstance(self.dataset, EncodedImages) else None
        parts = [self.classes, known and known.names, known and known.labels]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Describe all that decides the content of the shards."""
        mask = self.transform.mask
        free = ("output", "skip_unreadable")  # may differ when the job goes on
        config = {k: v for k, v in asdict(self.config).items() if k not in free}
        settings = self.transform.list_settings(with_flow=False)
        read = (self.read(index) for index in spread_indices(self.count, 16))
        own = {} if type(self.transform) is LatentPerturb else {"own": describe_own(self.transform)}
        return {
            **own,
            **config,
            "transform": f"{type(self.transform).__name__}({settings})",
            "away": self.transform.away,
            "mask": hash_tensors([mask]) if isinstance(mask, Tensor) else None,
            "flow": self.transform.flow.fingerprint(),
            "network_dtype": str(self.transform.flow.network_dtype or "float32"),
            "images": self.count,
            "data": [None if item is None else item.hash() for item in read],
            "labels": self.hash_labels(),
            "shards": self.shard_count,
        }


def describe_own(transform: LatentPerturb) -> dict[str, Any]:
    """Describe the settings of a user's transform: those of its own that are plain or tensors."""
    usual = vars(LatentPerturb(flow=transform.flow))
    own = {name: value for name, value in vars(transform).items() if name not in usual}
    tensors = {name: hash_tensors([v]) for name, v in own.items() if isinstance(v, Tensor)}
    plain = {name: v for name, v in own.items() if isinstance(v, (bool, int, float, str))}
    return {**plain, **tensors}


def needs_quotes(name: str) -> bool:
    """Whether a class's name would not be one line of UTF-8, or looks like a quoted one."""
    return not name.isprintable() or name.startswith('"')


def choose_device() -> torch.device:
    """Choose the accelerator for this process of its machine, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
