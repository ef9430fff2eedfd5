"""Whether unlabelled images help: a small classifier on 100 labelled images of FashionMNIST.

    python examples/unlabelled.py

Trains the CNN of the quickstart on 100 labelled images, ten of each class: alone, and beside all
1,000 training images that ship, without their labels. There the classifier shall predict at a
changed image what it is rather sure of at the image: changed by crop and flip, or by LatentPerturb,
too. Prints a table of test accuracies. Runs on a CPU, without a network.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from quickstart import FLOW, Batch, accuracy, load_images, table_4_cnn
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2
from tqdm import tqdm

from latent_aug import LatentAdversarial, LatentPerturb

LABELLED = 100
WEIGHT = 2.0  # of the unlabelled images, from the middle of the training on
SURE = {"threshold": 0.6, "temperature": 0.0}  # pseudo-labels
METHODS: dict[str, dict[str, Any] | None] = {  # arguments of `consistency`
    "labelled images alone": None,
    "pseudo-labels, crop and flip": {**SURE, "perturb": nn.Identity()},
    "pseudo-labels, LatentPerturb": {**SURE, "perturb": LatentPerturb(0.5, flow=FLOW)},
}
EACH = v2.Compose([v2.RandomCrop(28, padding=2), v2.RandomHorizontalFlip()])


def augment(images: Tensor) -> Tensor:
    """Crop and mirror each image."""
    return torch.stack([EACH(image) for image in images])


def train_classifier(
    labelled: Batch,
    unlabelled: Tensor,
    options: dict[str, Any] | None,
    *,
    seed: int,
    epochs: int,
    on_epoch: Callable[[], object],
) -> nn.Module:
    """An ordinary training loop over two loaders; only the line with `consistency` is ours."""
    torch.manual_seed(seed)
    model = table_4_cnn()
    attack = LatentAdversarial(model, flow=FLOW)
    few = DataLoader(TensorDataset(*labelled), 50)
    many = DataLoader(TensorDataset(unlabelled), 100, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003, weight_decay=1e-4)
    steps = epochs * len(many)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.003, total_steps=steps)
    for epoch in range(epochs):
        weight = WEIGHT * min(1.0, 2 * epoch / epochs)
        for (images, labels), (others,) in zip(itertools.cycle(few), many, strict=False):
            loss = F.cross_entropy(model(augment(images)), labels)
            if options is not None and weight:
                loss = loss + weight * attack.consistency(others, augment=augment, **options)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        on_epoch()
    return model.eval()


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20, help="over the unlabelled images")
    parser.add_argument("--seeds", type=int, default=3, help="runs a method (default: 3)")
    args = parser.parse_args()
    if args.epochs < 1 or args.seeds < 1:
        parser.error("--epochs and --seeds must be at least 1")
    images, labels = load_images(train=True)
    test_images, test_labels = load_images(train=False)
    rows = []
    with tqdm(total=len(METHODS) * args.seeds * args.epochs, unit="epoch") as bar:
        for name, options in METHODS.items():
            bar.set_description(f"{name:28}")
            started, results = time.process_time(), []
            for seed in range(args.seeds):
                # each seed labels other images, ten of each class
                chosen = slice(seed % 10 * LABELLED, (seed % 10 + 1) * LABELLED)
                model = train_classifier(
                    (images[chosen], labels[chosen]),
                    images,
                    options,
                    seed=seed,
                    epochs=args.epochs,
                    on_epoch=bar.update,
                )
                results.append(accuracy(model, test_images, test_labels))
            rows.append((name, results, (time.process_time() - started) / args.seeds))

    print(f"\nTest accuracy (%) on {len(test_images)} images, trained on {LABELLED} labelled ones,")
    print(f"{args.epochs} epochs over {len(images)} unlabelled ones, {args.seeds} seeds\n")
    print(f"{'':28} {'mean':>5}   {'seeds':24} s of computation a run")
    for name, results, seconds in rows:
        each = " ".join(f"{r:.1f}" for r in results)
        print(f"{name:28} {sum(results) / len(results):5.1f}   {each:24} {seconds:6.0f}")


if __name__ == "__main__":
    main()
