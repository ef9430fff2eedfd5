"""What a training epoch costs by the place of LatentPerturb, and with a latent cache.

    python examples/benchmarks/placement.py FOLDER

FOLDER holds 32 x 32 colour images as <class>/*.png. An epoch is 512 of them, decoded by two
workers, in batches of 64, and a training step of a ResNet with one block a stage; the default
flow perturbs each image. The places take turns, three rounds; medians of seconds are
kept. "thread" does what LatentLoader does, one batch ahead in a background thread.
"""

import argparse
import json
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from contestants import cifar_resnet
from measurements import keep_measurement
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from latent_aug import LatentCache, LatentCollate, LatentLoader, LatentPerturb

IMAGES, BATCH, WORKERS, ROUNDS = 512, 64, 2, 3
TO_FLOAT = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


class InThread:
    """A loader whose batches are made ready one ahead by a thread."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        ready: queue.Queue[Any] = queue.Queue(maxsize=1)

        def work() -> None:
            for batch in self.loader:
                ready.put(batch)
            ready.put(None)

        threading.Thread(target=work, daemon=True).start()
        while (batch := ready.get()) is not None:
            yield batch


def make_loader(data: Dataset[Any], **options: Any) -> DataLoader[Any]:
    """Two workers that stay, so that their start is not part of an epoch."""
    return DataLoader(
        data, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True, **options
    )


def places(folder: Path, cache: Path) -> dict[str, Iterable[Any]]:
    """Every way to the same perturbation."""
    perturb = LatentPerturb(0.25)

    def images(transform: Callable[..., Any] | None) -> Dataset[Any]:
        data = ImageFolder(folder, transform)
        chosen = torch.linspace(0, len(data) - 1, IMAGES).long().tolist()
        return Subset(data, chosen)

    cached = LatentCache(images(None), cache, perturb, then=lambda x, y: (TO_FLOAT(x), y))
    plain = images(TO_FLOAT)
    return {
        "no perturbation": make_loader(plain),
        "transform, in workers": make_loader(images(v2.Compose([perturb, TO_FLOAT]))),
        "LatentCollate, in workers": make_loader(plain, collate_fn=LatentCollate(perturb)),
        "LatentLoader, main process": LatentLoader(make_loader(plain), perturb),
        "LatentLoader, in a thread": InThread(LatentLoader(make_loader(plain), perturb)),
        "LatentCache, in workers": make_loader(cached),
    }


def epoch(loader: Iterable[Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Seconds of one."""
    started = time.perf_counter()
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return time.perf_counter() - started


def main() -> None:
    """Measure in turn, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    model = cifar_resnet((1, 1, 1, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        loaders = places(folder, Path(directory))
        encoding = time.perf_counter() - started
        seconds: dict[str, list[float]] = {name: [] for name in loaders}
        for turn in range(ROUNDS + 1):
            for name, loader in loaders.items():
                took = epoch(loader, model, optimizer)
                if turn:  # the first one starts the workers
                    seconds[name].append(took)
    result = {
        "images": IMAGES,
        "batch": BATCH,
        "workers": WORKERS,
        "threads": torch.get_num_threads(),
        "encoding_s": round(encoding, 2),
        "epoch_s": {name: round(statistics.median(s), 2) for name, s in seconds.items()},
    }
    print(json.dumps(result, indent=1))
    keep_measurement("placement", result)


if __name__ == "__main__":
    main()
