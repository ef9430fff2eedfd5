"""Perturbing whole batches: in a collate function, or between a loader and the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate, get_worker_info
from torchvision import tv_tensors

from latent_aug.images.conversion import is_tv_tensor
from latent_aug.images.samples import get_image_key, map_tensors, replace_images, replace_items
from latent_aug.transforms.random import LatentPerturb
from latent_aug.transforms.schedule import hooks_in, parts_of
from latent_aug.utils.arguments import require_natural
from latent_aug.utils.randomness import get_rank, mix_seeds, sample_seed, use_seed


class LatentCollate:
    """A collate function that perturbs the batch it has collated.

    One round trip of the flow for a whole batch costs a fraction of one for each image. Loader
    workers may run it on the CPU; on a GPU it runs in the main process only (``num_workers=0``),
    and `LatentLoader` is the way to have both workers and a GPU.

    Args:
        transform: A `LatentPerturb`, a `LatentSchedule` of such, or any v2 transform of batches.
        collate: Makes the batch: (images, labels, ...), or a mapping with images under
            "pixel_values", "image", "images" or "img".
        device: Where to perturb and leave the batch; None leaves it where it is.

    Raises:
        TypeError: `transform` is or holds a `LatentAdversarial`, which belongs in the training
            step.
        RuntimeError: The device is a GPU and the call comes from a worker.

    Example:
        >>> import torch
        >>> from latent_aug import LatentPerturb
        >>> collate = LatentCollate(LatentPerturb(flow="glow-fashionmnist"))
        >>> images, labels = collate([(torch.rand(1, 28, 28), label) for label in range(4)])
        >>> images.shape, labels
        (torch.Size([4, 1, 28, 28]), tensor([0, 1, 2, 3]))
    """

    def __init__(
        self,
        transform: Callable[..., Any],
        collate: Callable[[list[Any]], Any] = default_collate,
        *,
        device: str | torch.device | None = None,
    ) -> None:
        self.transform = check_transform(transform, "LatentCollate")
        if not callable(collate):
            raise TypeError(f"collate must be callable, got {collate!r}")
        self.collate, self.device = collate, None if device is None else torch.device(device)

    def __call__(self, samples: list[Any]) -> Any:
        """Collate samples, move the batch, perturb it."""
        elsewhere = self.device is not None and self.device.type != "cpu"
        if elsewhere and get_worker_info() is not None:
            raise RuntimeError(
                f"LatentCollate cannot use {self.device} in a loader worker: wrap the loader in "
                "LatentLoader(loader, transform, device), which perturbs in the main process, or "
                "set num_workers=0"
            )
        return perturb_batch(self.transform, moved(self.collate(samples), self.device))


class LatentLoader:
    """A data loader whose batches are perturbed in the main process, on the device.

    The workers load and decode images; here the batch goes to the device and through the flow.
    On a GPU that happens one batch ahead on a stream of its own, while the training step runs;
    give the loader ``pin_memory=True`` then. On a CPU it happens when the batch is asked for: a
    thread beside the training step would take the cores that the step is using.

    The wrapped loader's attributes (`dataset`, `sampler`, `batch_size`, ...) are available too.

    Each epoch draws from its own seed: one number from torch's global generator where the epoch
    begins, as `DataLoader` takes one for its workers, or the `seed` and the number of the epoch.
    The global generators stay as they are otherwise, and the draws do not depend on the number
    of workers. Ranks of distributed training differ. A transform with a `generator` of its own
    keeps drawing from that instead.

    Args:
        loader: Gives batches (images, labels, ...), or mappings with images under
            "pixel_values", "image", "images" or "img".
        transform: A `LatentPerturb`, a `LatentSchedule` of such, or any v2 transform of batches.
        device: Where to perturb and leave the batches; None leaves them where they are.
        seed: Of the draws of all epochs; by default every epoch takes one from torch. On another
            accelerator than CUDA its own generator draws, whatever the seed.

    Raises:
        TypeError: `transform` is or holds a `LatentAdversarial`: an attack one batch ahead would
            see weights that are out of date.
        ValueError: `seed` is given, and `transform` has a `generator` of its own.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from latent_aug import LatentPerturb
        >>> data = TensorDataset(torch.rand(6, 1, 28, 28), torch.arange(6))
        >>> loader = LatentLoader(DataLoader(data, 4), LatentPerturb(flow="glow-fashionmnist"))
        >>> len(loader), [labels.tolist() for images, labels in loader]
        (2, [[0, 1, 2, 3], [4, 5]])
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        transform: Callable[..., Any],
        device: str | torch.device | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        if not hasattr(loader, "__iter__"):
            raise TypeError(f"loader must be iterable, as a DataLoader is, got {loader!r}")
        self.seed = None if seed is None else require_natural("seed", seed)
        self.transform = check_transform(transform, "LatentLoader")
        perturbs = [p for p in parts_of(transform) if isinstance(p, LatentPerturb)]
        if seed is not None and any(p.has_generator for p in perturbs):
            raise ValueError("seed and the transform's generator= are two sources: give one")
        self.loader = loader
        self.device = None if device is None else torch.device(device)
        self._epoch = -1

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # while unpickling
            raise AttributeError(name)
        return getattr(self.loader, name)

    def set_epoch(self, epoch: int) -> None:
        """Tell loader, sampler and transform, and schedules in it, which epoch is next."""
        self._epoch = epoch - 1
        loader: Any = self.loader
        batches = getattr(loader, "batch_sampler", None)
        collate = getattr(loader, "collate_fn", None)
        parts = [loader, *(getattr(loader, name, None) for name in ("sampler", "dataset"))]
        parts += [batches, getattr(batches, "sampler", None), *parts_of(self.transform)]
        parts += parts_of(collate.transform) if isinstance(collate, LatentCollate) else []
        for part in {id(part): part for part in parts}.values():
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        if self.device is not None and self.device.type == "cuda":
            torch.empty(0, device=self.device)  # says what is wrong where there is no GPU
        self._epoch += 1
        # Before the loader's own draws, whose order depends on its workers.
        if self.seed is None:
            seed = mix_seeds(sample_seed(), get_rank() or 0)
        else:
            seed = mix_seeds(self.seed, self._epoch, get_rank() or 0)
        batches = self._perturbed(iter(self.loader), seed)
        # accelerate's loaders say which batch is the last one, of those they have given out.
        tells_its_end = hasattr(self.loader, "end_of_dataloader")
        if self.device is not None and self.device.type == "cuda" and not tells_its_end:
            return self._one_ahead(batches, torch.cuda.Stream(self.device))
        return batches

    def _perturbed(self, batches: Iterator[Any], seed: int) -> Iterator[Any]:
        """The batches on the device, each perturbed with draws of its own."""
        for number, batch in enumerate(batches):
            there = moved(batch, self.device)
            with use_seed(mix_seeds(seed, number), images_of(there).device):
                perturbed = perturb_batch(self.transform, there)
            yield perturbed

    def _one_ahead(self, batches: Iterator[Any], stream: torch.cuda.Stream) -> Iterator[Any]:
        """Work on the next batch on a side stream while the caller uses this one."""

        def next_batch() -> Any:
            # Weights may have been prepared, and memory freed, by what is under way there. The
            # step of the batch that is about to be given out is not, so the two overlap.
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                return next(batches, None)

        ahead = next_batch()
        while ahead is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(stream)
            batch, failure = recorded(ahead, current), None
            try:
                ahead = next_batch()
            except Exception as error:  # the batch that is ready comes first
                failure = error
            yield batch
            if failure is not None:
                raise failure


def check_transform(transform: Any, user: str) -> Callable[..., Any]:
    """A transform that may run outside the training step."""
    if hooks_in(transform):
        raise TypeError(
            f"{user} is for transforms: an attack needs the model as it is in this very step, so "
            "call LatentAdversarial(model).step(batch) in the training loop"
        )
    if not callable(transform):
        raise TypeError(f"transform must be callable, got {transform!r}")
    return transform


def perturb_batch(transform: Callable[..., Any], batch: Any) -> Any:
    """A transform of samples on a batch: its images are marked as such, labels pass through."""
    if isinstance(batch, Tensor):
        return transform(batch)
    key, images = get_image_key(batch), images_of(batch)
    # Of plain tensors a transform would take the first, which in a mapping may be the labels.
    marked = images if is_tv_tensor(images) else tv_tensors.Image(images, device=images.device)
    if isinstance(batch, Mapping):  # torchvision looks into dicts only
        result = replace_items(batch, transform({**batch, key: marked}))
    else:
        result = transform(replace_images(batch, key, marked))
    return result if is_tv_tensor(images) else replace_images(result, key, plain(result[key]))


def plain(images: Tensor) -> Tensor:
    """Without the mark of a tv_tensor."""
    return images.as_subclass(Tensor)


def images_of(batch: Any) -> Tensor:
    """The images of a batch.

    Raises:
        TypeError: They are not a tensor.
    """
    images = batch if isinstance(batch, Tensor) else batch[get_image_key(batch)]
    if not isinstance(images, Tensor):
        raise TypeError(
            f"the images of a batch must be a tensor, got {type(images).__name__}; make tensors of "
            "them in the data set's transform, e.g. with v2.ToImage()"
        )
    return images


def moved(batch: Any, device: torch.device | None) -> Any:
    """The tensors of a batch on a device, without waiting where the memory is pinned."""
    if device is None:
        return batch
    return map_tensors(batch, lambda t: t.to(device, non_blocking=device.type == "cuda"))


def recorded(batch: Any, stream: torch.cuda.Stream) -> Any:
    """The same batch, its memory kept until the stream is done with it."""

    def record(t: Tensor) -> Tensor:
        if t.is_cuda:  # a transform may have added another
            t.record_stream(stream)
        return t

    return map_tensors(batch, record)
