"""LatentCache: a data set encoded once, perturbed and decoded in every epoch."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from latent_aug.flows import Flow
from latent_aug.images.conversion import from_float, is_tv_tensor, to_batch, to_float
from latent_aug.images.datasets import check_dataset, spread_indices
from latent_aug.images.samples import find_labels, get_image_key
from latent_aug.transforms.random import LatentPerturb
from latent_aug.utils.arguments import require_path, require_positive
from latent_aug.utils.files import claim_directory, write_whole

INDEX_NAME = "index.json"
SHARD = 1024  # samples a file: what a stopped encoding may have to do again

logger = logging.getLogger(__name__)


class LatentCache(Dataset[Any]):
    """A data set whose images were encoded once and come out perturbed, another way each time.

    For pipelines whose flow comes first: nothing random may happen to an image before it, so no
    crops and no flips (put them into `then`, after the flow). It saves reading and encoding the
    images, and encoding is half of the flow's work. Images come out as uint8 tensors (C, H, W). A
    `DataLoader` has a whole batch decoded at once.

    The directory keeps latents (float32), images and labels as safetensors, five bytes a value.
    A stopped encoding goes on where it was. The next run uses the cache again. It is refused if
    the flow, its precision, `resolution`, the number of samples or one of 16 compared samples has
    changed. If you corrected images or labels, delete the directory: the comparison may miss them.

    Args:
        dataset: Samples (image, label, ...) or images, of one size, uint8 or PIL. Labels must
            be numbers or tensors and are kept. Anything behind them is not.
        directory: The directory of the cache, which is made if it is missing.
        perturb: The transform whose flow encodes and decodes.
        then: A transform that is called with image and label, as v2 transforms may be, or with the
            image alone where there are no labels.
        batch_size: The number of images encoded at once.

    Raises:
        TypeError, ValueError: A sample cannot be cached, it is another one each time, or the
            directory holds another cache.

    Example:
        >>> import tempfile, torch
        >>> data = [(torch.randint(256, (1, 28, 28), dtype=torch.uint8), i) for i in range(6)]
        >>> perturb = LatentPerturb(flow="glow-fashionmnist")
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     image, label = LatentCache(data, directory, perturb)[2]
        >>> image.shape, image.dtype, label
        (torch.Size([1, 28, 28]), torch.uint8, tensor(2))
    """

    def __init__(
        self,
        dataset: Any,
        directory: str | Path,
        perturb: LatentPerturb,
        *,
        then: Callable[..., Any] | None = None,
        batch_size: int = 64,
    ) -> None:
        if not isinstance(perturb, LatentPerturb):
            raise TypeError(f"perturb must be a LatentPerturb, got {type(perturb).__name__}")
        if perturb.normalizes:
            raise ValueError("perturb must not have normalize=: put Normalize into then=")
        if perturb.flow.num_classes and perturb.labels_getter != "default":
            raise ValueError("perturb must not have labels_getter=: labels are second in a sample")
        check_dataset("dataset", dataset)
        if then is not None and not callable(then):
            raise TypeError(f"then must be callable or None, got {then!r}")
        require_positive("batch_size", batch_size)
        self.directory = require_path("directory", directory).absolute()
        self.perturb, self.then = perturb, then
        self.count = len(dataset)
        self._open: dict[int, Any] = {}
        self.directory.mkdir(parents=True, exist_ok=True)
        index = describe_cache(dataset, perturb.flow, perturb.resolution)
        new = not (self.directory / INDEX_NAME).exists()
        found = index["images"], index["labels"]
        if new and hash_samples(dataset, perturb.flow.channels) != found:
            raise ValueError(
                "dataset gives another image or label each time: leave random transforms out of "
                "it, and put them into then="
            )
        if isinstance(then, transforms.Compose) and find_labels(dataset[0]) is not None:
            raise TypeError("then must take image and label, as v2.Compose does, got a v1 Compose")
        is_begun = any(self.directory.glob("*.safetensors"))
        if new and is_begun:
            raise ValueError(
                f"{self.directory} holds safetensors and no {INDEX_NAME}: it is not a cache"
            )
        claim_directory(
            self.directory / INDEX_NAME,
            index,
            "a cache",
            is_begun=is_begun,
            remedy="choose another directory, or delete this one",
        )
        for start in range(0, self.count, SHARD):
            chosen = range(start, min(start + SHARD, self.count))
            if not is_whole(self._shard(start), len(chosen)):
                logger.info("encoding samples %d to %d of %d", start, chosen.stop, self.count)
                first = self._read(0) if start else {}
                tensors = encode_samples(dataset, chosen, perturb, batch_size, first)
                write_whole(self._shard(start), save(tensors))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Iterable[int]) -> list[Any]:
        """Perturb and decode the samples of a batch at once, for a `DataLoader`."""
        rows = [self._read(range(self.count)[index]) for index in indices]
        if not rows:
            return []
        read = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        x, labels = to_float(read["images"]), read.get("labels")
        sample = read["images"], labels
        perturbed = self.perturb.from_latents(read["latents"], x, sample)
        images = from_float(perturbed, torch.uint8)
        samples = images if labels is None else zip(images, labels, strict=True)
        return [self._finish(sample) for sample in samples]

    def _finish(self, sample: Any) -> Any:
        """Call `then` on a sample."""
        if self.then is None:
            return sample
        return self.then(*sample) if isinstance(sample, tuple) else self.then(sample)

    def _shard(self, start: int) -> Path:
        return self.directory / f"{start:09d}.safetensors"

    def _read(self, index: int) -> dict[str, Tensor]:
        """Read latent, image and label of one sample."""
        row = index % SHARD
        start = index - row
        if start not in self._open:
            self._open[start] = safe_open(self._shard(start), framework="pt")
        file = self._open[start]
        with torch.device("cpu"):  # safetensors follows the default device
            return {name: file.get_slice(name)[row : row + 1][0] for name in file.keys()}  # noqa: SIM118

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


def describe_cache(dataset: Any, flow: Flow, resolution: int | None) -> dict[str, Any]:
    """Describe what a cache is made of: the flow and its precision, some samples, their count.

    The samples are 16 spread over the data set: enough to tell another data set, or another
    order, and not the odd image that was replaced.
    """
    images, labels = hash_samples(dataset, flow.channels)
    return {
        "count": len(dataset),
        "flow": flow.fingerprint(),
        "images": images,
        "labels": labels,
        "resolution": resolution,
    }


def hash_samples(dataset: Any, channels: int) -> tuple[str, str]:
    """Hash the images and the labels of up to 16 samples, spread over the data set (SHA-256)."""
    images, labels = hashlib.sha256(), hashlib.sha256()
    for index in spread_indices(len(dataset), 16):
        pixels, label = read_sample(dataset[index], channels)
        images.update(f"{tuple(pixels.shape)}".encode() + pixels.cpu().numpy().tobytes())
        labels.update(repr(None if label is None else label.tolist()).encode())
    return images.hexdigest(), labels.hexdigest()


def read_sample(sample: Any, channels: int) -> tuple[Tensor, Tensor | None]:
    """Read the image (C, H, W) of a sample as uint8, and its label."""
    image, label = sample, find_labels(sample)
    if isinstance(sample, (tuple, list, Mapping)):
        image = sample[get_image_key(sample)]
    if (
        label is not None
        and not isinstance(label, (int, float, Tensor))
        and not hasattr(label, "item")
    ):
        raise TypeError(f"labels must be numbers or tensors, got {label!r}")
    if isinstance(label, Tensor) and is_tv_tensor(label):
        raise TypeError(
            f"labels must be numbers or plain tensors, got a {type(label).__name__}: a cache would "
            "give it without its type, so that crops and flips in then= would leave it where it is"
        )
    if isinstance(image, Tensor) and image.dtype != torch.uint8:
        raise TypeError(
            f"a cache is of uint8 or PIL images, got {image.dtype}: leave ToDtype and "
            "Normalize out of the data set, and put them into then="
        )
    x, _ = to_batch(image, channels)
    if len(x) != 1:
        raise ValueError(f"a sample must hold one image, got {tuple(x.shape)}")
    label = None if label is None else torch.as_tensor(label, device="cpu")
    return from_float(x[0], torch.uint8), label


def encode_samples(
    dataset: Any,
    chosen: range,
    perturb: LatentPerturb,
    batch_size: int,
    first: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Encode some samples: their latents, images and labels, alike and like the first one's."""
    images, labels = zip(
        *(read_sample(dataset[i], perturb.flow.channels) for i in chosen), strict=True
    )
    like = (first["images"], first.get("labels")) if first else (images[0], labels[0])
    if len(shapes := {tuple(image.shape) for image in (like[0], *images)}) > 1:
        raise ValueError(f"a cache is of images of one size, got {sorted(shapes)}; resize them")
    tensors = {"images": torch.stack(images)}
    if len({describe_label(label) for label in (like[1], *labels)}) > 1:
        raise ValueError("labels must be of one type and shape, and there for all samples or none")
    if labels[0] is not None:
        tensors["labels"] = torch.stack(labels)
    starts = range(0, len(images), batch_size)
    parts = [{k: t[i : i + batch_size] for k, t in tensors.items()} for i in starts]
    latents = [perturb.to_latents(to_float(part["images"]), part.get("labels")) for part in parts]
    return {**tensors, "latents": torch.cat(latents)}


def describe_label(label: Tensor | None) -> Any:
    """Describe what labels must have in common to be stacked."""
    return None if label is None else (label.dtype, label.shape)


def is_whole(shard: Path, rows: int) -> bool:
    """Whether a shard exists and holds so many samples, as a file that was cut off does not."""
    try:
        with safe_open(shard, framework="pt") as file:
            return all(file.get_slice(name).get_shape()[0] == rows for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return False
