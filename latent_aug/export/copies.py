"""Perturbed copies of a data set on disk, for training loops that read files."""

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

from latent_aug.export.shards import Sample, image_file, write_files, write_tar
from latent_aug.images.conversion import GREY_MODES
from latent_aug.images.datasets import (
    EncodedImages,
    check_dataset,
    class_names,
    digest,
    image_of,
    spread,
    to_uint8,
)
from latent_aug.images.orientation import UPRIGHT, orientation_of
from latent_aug.transforms.random import LatentPerturb
from latent_aug.utils.arguments import (
    require_choice,
    require_fields,
    require_natural,
    require_positive,
)
from latent_aug.utils.files import read_json, remove_partial, replace_file, write_json, write_whole
from latent_aug.utils.randomness import get_rank_and_count, mix_seeds

SETTINGS_NAME, CLASSES_NAME = "augment.json", "classes.txt"
SUFFIXES = {"png": "png", "jpeg": "jpg"}


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What `augment_images` writes.

    Args:
        output: Directory for the copies; empty, or of the same job stopped before.
        copies: Perturbed copies of each image, at least 1.
        originals: Write each image itself as well, as copy 0.
        form: "shards" writes tars as WebDataset reads them, "folder" one folder for each class, as
            torchvision's ImageFolder reads them.
        shard_size: Images of a shard, which is written or missing as a whole.
        image_format: "png" is lossless, "jpeg" smaller.
        quality: Of "jpeg", 1 to 100.
        size: Resize and crop images to this side, in pixels; None keeps their sizes.
        batch_size: Images of one size that go through the flow together.
        seed: Of order and noise.
        skip_unreadable: Leave out images that cannot be read, with a warning, rather than stop.

    Raises:
        ValueError: An argument is out of range, or no integer where one is needed.

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
    """What one worker did.

    Attributes:
        written: Shards that it wrote.
        found: Shards that were there.
        images: Images in those it wrote.
        fallbacks: Those of them that stayed as they were.
        unreadable: Images missing in them, as they could not be read.
    """

    written: int
    found: int
    images: int
    fallbacks: int
    unreadable: int


class Item(NamedTuple):
    """An image of the data set: uint8 (C, H, W), its label, and what its file said of it."""

    image: Tensor
    label: int | None
    grey: bool
    orientation: int

    def digest(self) -> str:
        """A fingerprint of its pixels and of how they are turned."""
        turned = [torch.tensor(self.orientation)] if self.orientation != UPRIGHT else []
        return digest([self.image, *turned])


def augment_images(
    dataset: Any,
    transform: LatentPerturb,
    config: AugmentConfig,
    *,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> AugmentReport:
    """Write perturbed copies of a data set's images, with their labels, in shards.

    Each copy of the data set is in an order of its own. A shard follows from the seed and its
    number alone, and is there as a whole or not at all: the same call again writes those that are
    missing. Several processes with RANK and WORLD_SIZE in their environment, as torchrun and
    accelerate start them, take the shards in turn and need not talk to each other.

    Beside the shards lie ``augment.json``, the settings, and ``classes.txt``, a class a line in the
    order of the labels.

    Args:
        dataset: Images, or (image, label, ...): PIL, uint8, or float in [0, 1]. A flow of 3
            channels takes grey PIL images too, which come back grey; one of 1 channel refuses
            colours. Labels are class indices.
        transform: How to perturb; its generator is not used.
        config: What to write, and where.
        device: Where to perturb; by default a CUDA GPU if there is one, shared in turn by the
            processes of a machine.
        progress: Show a progress bar, in the first process.

    Returns:
        What this process did.

    Raises:
        ValueError: The data set does not fit the flow, or `config.output` holds something else.
        OSError: An image cannot be read; says which. Mend or replace it and call again, or set
            `skip_unreadable`.

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
    mine = range(rank, job.shards, count)
    missing = [shard for shard in mine if not job.path(shard).exists()]
    total = sum(len(job.items(shard)) for shard in missing)
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
        device: Where to perturb.
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
                "mask must be None or a tensor here, as copies are made of images and labels alone"
            )
        self.channels = transform.flow.channels
        if self.channels not in (1, 3):
            raise ValueError(f"files are of 1 or 3 channels, the flow's images of {self.channels}")
        self.dataset, self.config, self.count = dataset, config, len(dataset)
        self.generator = torch.Generator()
        self.transform = transform.with_generator(self.generator)
        self.device = torch.device(device) if device else own_device()
        self.output = Path(config.output)
        self.classes: list[str] = class_names(dataset)
        self.unreadable, self.left_out = 0, set[int]()  # samples, and the images that they are of
        self._order: tuple[int, list[int]] = (-1, [])  # the last one's copy and order
        self.samples = self.count * (config.copies + config.originals)
        self.shards = -(-self.samples // config.shard_size)

    def path(self, shard: int) -> Path:
        """The file that is there when a shard is."""
        folder = self.config.form == "folder"
        return self.output / (f".shard-{shard:06}.done" if folder else f"shard-{shard:06}.tar")

    def items(self, shard: int) -> range:
        """The images of a shard, counted over all copies."""
        first = shard * self.config.shard_size
        return range(first, min(first + self.config.shard_size, self.samples))

    def write(self, shard: int, bar: Any) -> None:
        """Make a shard and put it in its place."""
        self.generator.manual_seed(mix_seeds(self.config.seed, shard))
        remove_partial(self.path(shard))
        samples, suffix = self.perturbed(self.items(shard), bar), SUFFIXES[self.config.image_format]
        if self.config.form == "shards":
            write_tar(self.path(shard), samples, suffix)
        else:
            write_files(self.output, samples, suffix, self.classes)
            with replace_file(self.path(shard)) as partial:
                partial.touch()

    def perturbed(self, items: range, bar: Any) -> Iterator[Sample]:
        """The samples of a shard, encoded."""
        step = self.config.batch_size
        for first in range(items.start, items.stop, step):
            chosen = [self.chosen(k) for k in range(first, min(first + step, items.stop))]
            found = ((key, self.read(key[0])) for key in chosen)
            read = {key: item for key, item in found if item is not None}
            self.unreadable += len(chosen) - len(read)
            groups: dict[Any, list[tuple[int, int]]] = {}
            for (index, copy), item in read.items():
                if copy:
                    groups.setdefault(item.image.shape, []).append((index, copy))
            for keys in groups.values():
                moved = self.moved([read[key] for key in keys])
                for key, image in zip(keys, moved, strict=True):
                    read[key] = read[key]._replace(image=image)
            for (index, copy), item in read.items():
                yield Sample(f"{index:08}-{copy}", self.to_file(item), item.label)
            bar.update(len(chosen))

    def chosen(self, item: int) -> tuple[int, int]:
        """Which image and which copy of it; 0 is the image itself."""
        copy, place = divmod(item, self.count)
        return self.order(copy)[place], copy + (not self.config.originals)

    def order(self, copy: int) -> list[int]:
        """The order of the images in a copy."""
        if self._order[0] != copy:
            generator = torch.Generator().manual_seed(mix_seeds(self.config.seed, copy, self.count))
            self._order = copy, torch.randperm(self.count, generator=generator).tolist()
        return self._order[1]

    def read(self, index: int) -> Item | None:
        """An image and its label; None if it cannot be read and may be left out."""
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
        image = to_uint8(sample, self.channels, self.config.size)
        source = image_of(sample)
        is_pil = isinstance(source, Image.Image)
        return Item(
            image,
            self.label_of(sample, index),
            grey=is_pil and source.mode in GREY_MODES,
            orientation=orientation_of(source) if is_pil else UPRIGHT,
        )

    def label_of(self, sample: Any, index: int) -> int | None:
        """A sample's label, where it has one."""
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

    def moved(self, items: list[Item]) -> Tensor:
        """Images of one size, perturbed."""
        batch = torch.stack([item.image for item in items]).to(self.device)
        labels = [item.label for item in items]
        if not self.transform.flow.num_classes:
            result: Tensor = self.transform(batch)
        elif None in labels:
            raise ValueError("the flow is conditional on classes, and the data set has no labels")
        else:
            result, _ = self.transform(batch, torch.tensor(labels))
        return result.cpu()

    def to_file(self, item: Item) -> bytes:
        """An image file; a grey one of what came as grey."""
        image = to_pil_image(item.image)
        if item.grey:
            image = image.convert("L")
        quality = self.config.quality if self.config.image_format == "jpeg" else None
        return image_file(image, quality=quality, orientation=item.orientation)

    def write_settings(self) -> None:
        """Say what the output is of, or see that it is of the same.

        Raises:
            ValueError: It is not.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        if self.config.form == "folder" and not self.is_labelled():
            warnings.warn(
                "the images have no classes (their outermost folders), so that copies lie in "
                f"{self.output} itself, where ImageFolder does not look for them",
                stacklevel=4,
            )
        path = self.output / SETTINGS_NAME
        others = [p.name for p in self.output.iterdir() if not p.name.startswith(".")]
        if others and not path.exists():  # in this order: other workers write it first
            raise ValueError(f"output {self.output} must be empty, it holds {others[0]}")
        own = json.loads(json.dumps(self.settings()))
        if not path.exists():
            write_json(path, own)
        else:
            then = read_json(path)
            changed = [
                f"{name} other ones"
                if name in ("data", "labels", "flow")
                else f"{name} {then.get(name)!r} then, {value!r} now"
                for name, value in own.items()
                if not agree(then.get(name), value)
            ]
            if changed and not self.is_begun():
                write_json(path, own)
            elif changed:
                raise ValueError(
                    f"output {self.output} holds copies of another kind: {'; '.join(changed)}; use "
                    "the same settings and images, or another output"
                )
        if self.classes:
            names = "".join(f"{name}\n" for name in self.classes).encode()
            path = self.output / CLASSES_NAME
            if not path.exists() or path.read_bytes() != names:  # by another worker
                write_whole(path, names)

    def is_begun(self) -> bool:
        """Whether any copies lie in the output, and not its settings alone."""
        names = {path.name for path in self.output.iterdir()} - {SETTINGS_NAME, CLASSES_NAME}
        return any(not name.startswith(".") or name.endswith(".done") for name in names)

    def is_labelled(self) -> bool:
        """Whether the images have classes, by the first one where the data set names none."""
        first = None if self.classes else self.read(0)
        return bool(self.classes) or (first is not None and first.label is not None)

    def labels_digest(self) -> str:
        """A fingerprint of the classes, and of each file's name and label where they are known."""
        known = self.dataset if isinstance(self.dataset, EncodedImages) else None
        parts = [self.classes, known and known.names, known and known.labels]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def settings(self) -> dict[str, Any]:
        """What decides the shards' content."""
        mask = self.transform.mask
        free = ("output", "skip_unreadable")  # to be another when the job goes on
        config = {k: v for k, v in asdict(self.config).items() if k not in free}
        read = (self.read(index) for index in spread(self.count, 16))
        return {
            **config,
            "transform": repr(self.transform),
            "away": self.transform.away,
            "mask": digest([mask]) if isinstance(mask, Tensor) else None,
            "flow": self.transform.flow.fingerprint(),
            "network_dtype": str(self.transform.flow.network_dtype or "float32"),
            "images": self.count,
            "data": [None if item is None else item.digest() for item in read],
            "labels": self.labels_digest(),
            "shards": self.shards,
        }


def agree(then: Any, now: Any) -> bool:
    """Whether two settings are the same; in a list None is what could not be read."""
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        return all(a == b or None in (a, b) for a, b in zip(then, now, strict=True))
    return bool(then == now)


def own_device() -> torch.device:
    """The accelerator that falls to this process of its machine, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
