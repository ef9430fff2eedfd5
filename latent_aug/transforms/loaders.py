"""Perturb whole batches: in a collate function, or between a loader and the training loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate, default_convert, get_worker_info
from torchvision import tv_tensors

from latent_aug.images.conversion import check_dimensions, is_tv_tensor
from latent_aug.images.samples import (
    get_image_key,
    has_one_each,
    map_tensors,
    rebuild_sequence,
    replace_images,
    replace_items,
)
from latent_aug.transforms.random import LatentPerturb
from latent_aug.transforms.schedule import LatentSchedule, holds_attack, walk_parts
from latent_aug.utils.arguments import require_natural
from latent_aug.utils.randomness import (
    get_rank,
    mix_seeds,
    number_copied_seed,
    sample_seed,
    use_seed,
)

EXCLUDED = ("sampler", "batch_size", "shuffle", "drop_last")  # arguments beside a batch_sampler


class LatentCollate:
    """A collate function that perturbs the batch which it has collated.

    One round trip of the flow for a whole batch costs a fraction of one for each image. Loader
    workers may run it on the CPU. On a GPU it runs in the main process only (``num_workers=0``).
    Use `LatentLoader` to have both workers and a GPU.

    A loader with ``batch_size=None`` gives it ready batches, which it perturbs as they are. A list
    of tensors alone is taken for samples, so give (images, others) as a tuple there.

    Args:
        transform: A `LatentPerturb`, a `LatentSchedule` of such, or any v2 transform of batches.
        collate: Makes the batch: (images, labels, ...), or a mapping with images under
            "pixel_values", "image", "images" or "img". A list or tuple of image tensors, as
            detection has it, is perturbed image by image.
        device: The device to perturb on, where the batch stays. None leaves it where it is.

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
        self.transform = require_transform(transform, "LatentCollate")
        if not callable(collate):
            raise TypeError(f"collate must be callable, got {collate!r}")
        self.collate, self.device = collate, None if device is None else torch.device(device)

    def __call__(self, samples: Any) -> Any:
        """Collate samples, move the batch and perturb it."""
        elsewhere = self.device is not None and self.device.type != "cpu"
        if elsewhere and get_worker_info() is not None:
            raise RuntimeError(
                f"LatentCollate cannot use {self.device} in a loader worker: wrap the loader in "
                "LatentLoader(loader, transform, device), which perturbs in the main process, or "
                "set num_workers=0"
            )
        is_default = self.collate is default_collate
        collate = default_convert if is_default and is_batch(samples) else self.collate
        return perturb_batch(self.transform, move_to(collate(samples), self.device))


class LatentLoader:
    """A data loader whose batches are perturbed in the main process, on the device.

    The workers load and decode images. Here the batch goes to the device and through the flow.
    On a GPU that happens one batch ahead on a stream of its own, while the training step runs.
    Give the loader ``pin_memory=True`` then. On a CPU it happens when the batch is asked for, as a
    thread beside the training step would take the cores that the step is using.

    The wrapped loader's attributes (`dataset`, `sampler`, `batch_size`, ...) are available too.
    Around a `DataLoader` it is one itself, and frameworks that build another loader of its parts
    get one that perturbs. Lightning's keeps to this class. Those of accelerate and of the Hugging
    Face Trainer perturb in their collate function: on a GPU, wrap the loader that they give
    instead, ``LatentLoader(accelerator.prepare(loader), transform, device)``.

    Each epoch draws from its own seed. It is one number from torch's global generator where the
    epoch begins, as `DataLoader` takes one for its workers, or follows from `seed` and the number
    of the epoch. The global generators stay as they are otherwise, and the draws do not depend on
    the number of workers. Ranks of distributed training differ. A transform with a `generator` of
    its own keeps drawing from that instead.

    Args:
        loader: Gives batches (images, labels, ...), or mappings with images under
            "pixel_values", "image", "images" or "img".
        transform: A `LatentPerturb`, a `LatentSchedule` of such, or any v2 transform of batches.
        device: The device to perturb on, where the batches stay. None leaves them where they are.
        seed: The seed of all epochs. By default every epoch takes one from torch. On another
            accelerator than CUDA its own generator draws, whatever the seed.
        **order: Another order of samples for the wrapped `DataLoader`, such as a `sampler`. This
            is for frameworks.

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

    def __new__(cls, loader: Any = None, *_: Any, **__: Any) -> LatentLoader:
        """Make a `DataLoader` around one: frameworks shard only those."""
        is_plain = cls is LatentLoader and isinstance(loader, DataLoader)
        return super().__new__(LatentDataLoader if is_plain else cls)

    def __init__(
        self,
        loader: DataLoader[Any],
        transform: Callable[..., Any],
        device: str | torch.device | None = None,
        *,
        seed: int | None = None,
        **order: Any,
    ) -> None:
        if not hasattr(loader, "__iter__"):
            raise TypeError(f"loader must be iterable, as a DataLoader is, got {loader!r}")
        self.seed = None if seed is None else require_natural("seed", seed)
        self.transform = require_transform(transform, "LatentLoader")
        perturbs = [p for p in walk_parts(transform) if isinstance(p, LatentPerturb)]
        if seed is not None and any(p.has_generator for p in perturbs):
            raise ValueError("seed and the transform's generator= are two sources: give one")
        self.loader = reorder_loader(loader, order) if order else loader
        self.device = None if device is None else torch.device(device)
        self._epoch = -1

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "__dataset":  # Lightning's name for it, where it makes loaders again
            return self.loader.dataset
        if name == "loader" or name.startswith("__"):  # while unpickling, or the loader's alone
            raise AttributeError(name)
        return getattr(self.loader, name)

    def set_epoch(self, epoch: int) -> None:
        """Tell loader, sampler, data set and transforms, and schedules in them, the next epoch.

        The transforms of a data set are its attributes `transform` and `transforms`. A schedule is
        found under any attribute, also inside a Compose.
        """
        self._epoch = epoch - 1
        loader: Any = self.loader
        batches = getattr(loader, "batch_sampler", None)
        collate = getattr(loader, "collate_fn", None)
        parts = [loader, getattr(loader, "sampler", None)]
        parts += walk_data(getattr(loader, "dataset", None))
        parts += [batches, getattr(batches, "sampler", None), *walk_parts(self.transform)]
        parts += walk_parts(collate.transform) if isinstance(collate, LatentCollate) else []
        for part in {id(part): part for part in parts}.values():
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        if self.device is not None and self.device.type == "cuda":
            torch.empty(0, device=self.device)  # says what is wrong where there is no GPU
        self._epoch += 1
        # Before the loader's own draws, whose order depends on its workers.
        if self.seed is None:
            rank = get_rank()
            number = number_copied_seed() if rank is None else rank
            seed = mix_seeds(sample_seed(), number or 0)
        else:
            seed = mix_seeds(self.seed, self._epoch, get_rank() or 0)
        batches = self._perturb(iter(self.loader), seed)
        # accelerate's loaders say which batch is the last one, of those they have given out.
        tells_its_end = hasattr(self.loader, "end_of_dataloader")
        if self.device is not None and self.device.type == "cuda" and not tells_its_end:
            return self._one_ahead(batches, torch.cuda.Stream(self.device))
        return batches

    def _perturb(self, batches: Iterator[Any], seed: int) -> Iterator[Any]:
        """Move the batches to the device and perturb each with draws of its own."""
        for number, batch in enumerate(batches):
            there = move_to(batch, self.device)
            images = get_images(there)
            device = (images if isinstance(images, Tensor) else images[0]).device
            with use_seed(mix_seeds(seed, number), device):
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
            batch, failure = keep_for_stream(ahead, current), None
            try:
                ahead = next_batch()
            except Exception as error:  # the batch that is ready comes first
                failure = error
            yield batch
            if failure is not None:
                raise failure


class LatentDataLoader(LatentLoader, DataLoader[Any]):  # type: ignore[misc]  # another iterator
    """A `LatentLoader` around a `DataLoader`, which is a `DataLoader` to frameworks.

    Its parts are those of the loader that it wraps.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        transform: Callable[..., Any],
        device: str | torch.device | None = None,
        *,
        seed: int | None = None,
        **order: Any,
    ) -> None:
        super().__init__(loader, transform, device, seed=seed, **order)
        # Lightning makes a loader anew of the arguments above and of the instance's own attributes.
        self.dataset = self.loader.dataset
        # From here on DataLoader refuses new settings, which would not reach the loader inside.
        self._DataLoader__initialized = True

    @property
    def collate_fn(self) -> LatentCollate:  # type: ignore[override]
        """The collate function for a loader that is built of this one's parts: it perturbs.

        Raises:
            ValueError: `seed` is given, which such a loader would not know.
        """
        if self.seed is not None:
            raise ValueError(
                "a LatentLoader with seed= cannot be built anew: give the framework the loader "
                "inside, and wrap what comes back, LatentLoader(loader, transform, seed=...)"
            )
        return LatentCollate(self.transform, self.loader.collate_fn, device=self.device)


def walk_data(data: Any) -> Iterator[Any]:
    """Walk over a data set, its transforms, schedules, and the data sets that it wraps."""
    yield data
    for name in ("transform", "transforms"):
        yield from walk_parts(getattr(data, name, None))
    for value in getattr(data, "__dict__", {}).values():
        yield from (part for part in walk_parts(value) if isinstance(part, LatentSchedule))
    inside = [getattr(data, "dataset", None)]  # of a Subset
    several = getattr(data, "datasets", None)  # of a ConcatDataset or a StackDataset
    several = list(several.values()) if isinstance(several, Mapping) else several
    inside += several if isinstance(several, (list, tuple)) else []
    for part in inside:
        if part is not None:
            yield from walk_data(part)


def reorder_loader(loader: Any, order: dict[str, Any]) -> DataLoader[Any]:
    """Make a `DataLoader` like another one, with another order of the samples.

    Raises:
        TypeError: It is of another class, whose arguments are not known.
    """
    if type(loader) is not DataLoader:
        raise TypeError(
            f"only a DataLoader can be given another sampler, got a {type(loader).__name__}: make "
            "it with its sampler for each rank, and let the framework leave it as it is, in "
            "Lightning with use_distributed_sampler=False"
        )
    names = inspect.signature(DataLoader).parameters
    if unknown := [name for name in order if name not in names]:
        raise TypeError(f"LatentLoader got an unexpected keyword argument {unknown[0]!r}")
    kept = {name: getattr(loader, name) for name in names if hasattr(loader, name)}
    batches = kept.pop("batch_sampler")
    if kept["batch_size"] is None and batches is not None:
        kept |= {"batch_size": batches.batch_size, "drop_last": batches.drop_last}
    arguments = {**kept, **order}
    if order.get("batch_sampler") is not None:  # it excludes the others
        arguments = {k: v for k, v in arguments.items() if k not in EXCLUDED}
    return DataLoader(**arguments)


def require_transform(transform: Any, user: str) -> Callable[..., Any]:
    """Require a transform that may run outside the training step."""
    if holds_attack(transform):
        raise TypeError(
            f"{user} is for transforms: an attack needs the model as it is in this very step, so "
            "call LatentAdversarial(model).step(batch) in the training loop"
        )
    if not callable(transform):
        raise TypeError(f"transform must be callable, got {transform!r}")
    return transform


def is_batch(samples: Any) -> bool:
    """Whether a collate function was given a ready batch, as with ``batch_size=None``.

    Samples come as a list. A list that begins with a tensor of batched images, and goes on with
    something else than more of them, is a batch: samples are all alike.
    """
    if not isinstance(samples, list):
        return True
    are_batched = [isinstance(part, Tensor) and part.ndim > 3 for part in samples]
    return are_batched[:1] == [True] and not all(are_batched)


def perturb_batch(transform: Callable[..., Any], batch: Any) -> Any:
    """Call a transform of samples on a batch. Its images are marked as such, labels pass."""
    if isinstance(batch, Tensor):
        return transform(batch)
    key, images = get_image_key(batch), get_images(batch)
    if not isinstance(images, Tensor):
        return perturb_each(transform, batch, key)
    # Of plain tensors a transform would take the first, which in a mapping may be the labels.
    marked = mark_images(images)
    if isinstance(batch, Mapping):  # torchvision looks into dicts only
        result = replace_items(batch, transform({**batch, key: marked}))
    else:
        result = transform(replace_images(batch, key, marked))
    return result if is_tv_tensor(images) else replace_images(result, key, unmark(result[key]))


def perturb_each(transform: Callable[..., Any], batch: Any, key: Any) -> Any:
    """Call a transform on each sample of a batch whose images are a list or tuple.

    Entries with a part for each image go with them. The transform may change those in lists, such
    as the boxes of targets.
    """
    count, is_mapping = len(batch[key]), isinstance(batch, Mapping)
    names = list(batch) if is_mapping else list(range(len(batch)))
    each = [name for name in names if has_one_each(batch[name], count)]
    lists = [name for name in each if isinstance(batch[name], (tuple, list))]
    changed: dict[Any, list[Any]] = {name: [] for name in lists}
    for place in range(count):
        sample = {name: batch[name][place] for name in each}
        image, sample[key] = sample[key], mark_images(sample[key])
        result = transform(sample if is_mapping else tuple(sample.values()))
        found = result if is_mapping else dict(zip(each, result, strict=True))
        found = found if is_tv_tensor(image) else {**found, key: unmark(found[key])}
        for name in lists:
            changed[name].append(found[name])
    entries = {name: type(batch[name])(values) for name, values in changed.items()}
    if is_mapping:
        return replace_items(batch, entries)
    return rebuild_sequence(batch, [entries.get(k, value) for k, value in enumerate(batch)])


def mark_images(images: Tensor) -> Tensor:
    """Mark a tensor as images, so that transforms of structures find them.

    Raises:
        ValueError: It cannot be images.
    """
    check_dimensions(images)
    return images if is_tv_tensor(images) else tv_tensors.Image(images, device=images.device)


def unmark(images: Tensor) -> Tensor:
    """Take the mark of a tv_tensor off."""
    return images.as_subclass(Tensor)


def get_images(batch: Any) -> Any:
    """Get the images of a batch: a tensor, or a list or tuple of tensors.

    Raises:
        TypeError: They are something else.
    """
    images = batch if isinstance(batch, Tensor) else batch[get_image_key(batch)]
    if isinstance(images, Tensor):
        return images
    is_sequence = isinstance(images, (tuple, list)) and len(images) > 0
    odd = [image for image in images if not isinstance(image, Tensor)] if is_sequence else [images]
    if odd:
        raise TypeError(
            "the images of a batch must be a tensor, or a list of tensors, got "
            f"{'a list with ' if is_sequence else ''}{type(odd[0]).__name__}; make tensors of "
            "them in the data set's transform, e.g. with v2.ToImage()"
        )
    return images


def move_to(batch: Any, device: torch.device | None) -> Any:
    """Move the tensors of a batch to a device, without waiting where the memory is pinned."""
    if device is None:
        return batch
    return map_tensors(batch, lambda t: t.to(device, non_blocking=device.type == "cuda"))


def keep_for_stream(batch: Any, stream: torch.cuda.Stream) -> Any:
    """Keep the memory of a batch until a stream is done with it, and return the batch."""

    def record(t: Tensor) -> Tensor:
        if t.is_cuda:  # a transform may have added another
            t.record_stream(stream)
        return t

    return map_tensors(batch, record)
