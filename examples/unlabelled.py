"""Whether unlabelled images help: a small classifier on 100 labelled images of FashionMNIST.

    python examples/unlabelled.py

Trains the CNN of the quickstart on 100 labelled images, ten of each class: alone, and with the
consistency loss of LatentAdversarial on all 1,000 training images that ship, without their labels.
Prints a table of test accuracies. Runs on a CPU, without a network.
"""

import argparse
import itertools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from quickstart import FLOW, Batch, accuracy, load_images, table_4_cnn
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from latent_aug import LatentAdversarial

LABELLED = 100
METHODS = {"labelled images alone": 0.0, "with consistency": 1.0}  # the weight of that loss


def train_classifier(
    labelled: Batch,
    unlabelled: Tensor,
    weight: float,
    *,
    seed: int,
    epochs: int,
    on_epoch: Callable[[], object],
) -> nn.Module:
    """An ordinary training loop over two loaders; only the line with `consistency` is ours."""
    torch.manual_seed(seed)
    model = table_4_cnn()
    attack = LatentAdversarial(model, eps=2.0, p=1.0, flow=FLOW)
    few = DataLoader(TensorDataset(*labelled), 50)
    many = DataLoader(TensorDataset(unlabelled), 100, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003, weight_decay=1e-4)
    steps = epochs * len(many)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.003, total_steps=steps)
    for _ in range(epochs):
        for (images, labels), others in zip(itertools.cycle(few), many, strict=False):
            loss = F.cross_entropy(model(images), labels)
            if weight:
                loss = loss + weight * attack.consistency(others, entropy=0.3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        on_epoch()
    return model.eval()


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10, help="over the unlabelled images")
    parser.add_argument("--seeds", type=int, default=3, help="runs a method (default: 3)")
    args = parser.parse_args()
    if args.epochs < 1 or args.seeds < 1:
        parser.error("--epochs and --seeds must be at least 1")
    images, labels = load_images(train=True)
    test_images, test_labels = load_images(train=False)
    rows = []
    with tqdm(total=len(METHODS) * args.seeds * args.epochs, unit="epoch") as bar:
        for name, weight in METHODS.items():
            bar.set_description(f"{name:21}")
            started, results = time.process_time(), []
            for seed in range(args.seeds):
                # each seed labels other images, ten of each class
                chosen = slice(seed % 10 * LABELLED, (seed % 10 + 1) * LABELLED)
                model = train_classifier(
                    (images[chosen], labels[chosen]),
                    images,
                    weight,
                    seed=seed,
                    epochs=args.epochs,
                    on_epoch=bar.update,
                )
                results.append(accuracy(model, test_images, test_labels))
            rows.append((name, results, (time.process_time() - started) / args.seeds))

    print(f"\nTest accuracy (%) on {len(test_images)} images, trained on {LABELLED} labelled ones,")
    print(f"{args.epochs} epochs over {len(images)} unlabelled ones, {args.seeds} seeds\n")
    print(f"{'':21} {'mean':>5}   {'seeds':24} s of computation a run")
    for name, results, seconds in rows:
        each = " ".join(f"{r:.1f}" for r in results)
        print(f"{name:21} {sum(results) / len(results):5.1f}   {each:24} {seconds:6.0f}")


if __name__ == "__main__":
    main()
