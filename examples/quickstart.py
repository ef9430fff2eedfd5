"""What latent perturbations bring: a small classifier on 600 images of FashionMNIST, three ways.

    python examples/quickstart.py

Trains the CNN of the paper's Table 4 without augmentation, with LatentPerturb and with
LatentAdversarial, three seeds each, prints a table of test accuracies and draws originals, their
perturbed versions and the difference. Runs on a CPU, without a network, and first says how long it
will take. The images and the flow ship with the repository.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.datasets import FashionMNIST
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from latent_aug import LatentAdversarial, LatentPerturb, load_flow

HERE = Path(__file__).parent
TRAIN_IMAGES = 600  # of the 1,000 that ship; the rest is for trying settings of your own
Batch = tuple[Tensor, Tensor]
Augmentation = Callable[[Batch], Batch]

FLOW = load_flow("glow-fashionmnist")


def no_augmentation(model: nn.Module) -> Augmentation:
    """The baseline."""
    return lambda batch: batch


def random_latent(model: nn.Module, eps: float = 0.5) -> Augmentation:
    """Randomized-LA."""
    perturb = LatentPerturb(eps, flow=FLOW)
    return lambda batch: (perturb(batch[0]), batch[1])


def adversarial_latent(
    model: nn.Module, eps: float = 4.0, alpha: float = 2.0, steps: int = 2, p: float = 0.5
) -> Augmentation:
    """Adversarial-LA on half of each batch."""
    attack = LatentAdversarial(
        model, eps=eps, alpha=alpha, steps=steps, p=p, labels="true", flow=FLOW
    )
    return attack.step


METHODS = {
    "no augmentation": no_augmentation,
    "LatentPerturb": random_latent,
    "LatentAdversarial": adversarial_latent,
}


def load_images(train: bool) -> Batch:
    """Images (N, 1, 28, 28) in [0, 1] and labels (N,)."""
    data = FashionMNIST(HERE / "data", train=train)
    return data.data[:, None] / 255, data.targets


def table_4_cnn() -> nn.Module:
    """The classifier of Stutz et al. 2019, as the paper's Table 4 lists it."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(576, 100), nn.Linear(100, 10))


def train_classifier(
    images: Tensor,
    labels: Tensor,
    method: Callable[[nn.Module], Augmentation],
    *,
    seed: int,
    epochs: int,
) -> nn.Module:
    """An ordinary training loop; only the line with `augment` is ours."""
    torch.manual_seed(seed)
    model = table_4_cnn()
    augment = method(model)
    batches = max(1, len(images) // 100)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=epochs * batches)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).chunk(batches):
            x, y = augment((images[chosen], labels[chosen]))
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Measure the per cent of the images classified right."""
    return 100 * (model(images).argmax(dim=1) == labels).float().mean().item()


def run(name: str, seed: int, epochs: int) -> tuple[float, float, nn.Module]:
    """Train once. Give the test accuracy, the seconds and the classifier."""
    torch.set_num_threads(1)  # on layers this small threads mostly wait for each other
    images, labels = (t[:TRAIN_IMAGES] for t in load_images(train=True))
    started = time.perf_counter()
    model = train_classifier(images, labels, METHODS[name], seed=seed, epochs=epochs)
    seconds = time.perf_counter() - started
    return accuracy(model, *load_images(train=False)), seconds, model


def estimate_minutes(seeds: int, epochs: int, processes: int) -> float:
    """Measure one epoch of each method, and say how long all runs will take."""
    for name in METHODS:
        run(name, 0, 1)  # warms up
    return seeds * epochs * sum(run(name, 0, 1)[1] for name in METHODS) / processes / 60


def draw(model: nn.Module, images: Tensor, labels: Tensor, path: Path) -> None:
    """Originals, random and adversarial versions, and four times the differences in grey."""
    random = random_latent(model)((images, labels))[0]
    adversarial = adversarial_latent(model, p=1.0)((images, labels))[0]
    differences = [(other - images) * 4 + 0.5 for other in (random, adversarial)]
    change = "its change, 4 times"
    names = ["originals", "LatentPerturb", change, "LatentAdversarial", change]
    rows = [images, random, differences[0], adversarial, differences[1]]
    large = torch.cat(rows).clamp(0, 1).repeat_interleave(3, 2).repeat_interleave(3, 3)
    grid = to_pil_image(make_grid(large, nrow=len(images), padding=2))
    margin, height = 120, grid.height // len(rows)
    picture = Image.new("RGB", (grid.width + margin, grid.height), "white")
    picture.paste(grid, (margin, 0))
    for i, name in enumerate(names):
        ImageDraw.Draw(picture).text((5, i * height + height // 2 - 5), name, fill="black")
    picture.save(path)


def main() -> None:
    """Train, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=45, help="of each run (default: 45)")
    parser.add_argument("--seeds", type=int, default=3, help="runs a method (default: 3)")
    parser.add_argument(
        "--picture", type=Path, default=Path("quickstart.png"), help="where to draw"
    )
    args = parser.parse_args()
    if args.seeds < 1 or not args.picture.absolute().parent.is_dir():
        parser.error("--seeds must be at least 1, and the folder of --picture be there")
    runs = [(name, seed) for seed in range(args.seeds) for name in reversed(METHODS)]
    processes = min(len(runs), os.cpu_count() or 1, 4)
    minutes = estimate_minutes(args.seeds, args.epochs, processes)
    print(f"This takes about {minutes:.1f} minutes, with the machine as busy as it is now.")

    results = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool:
        futures = {pool.submit(run, *own, args.epochs): own for own in runs}
        for future in tqdm(as_completed(futures), total=len(runs), unit="run"):
            results[futures[future]] = future.result()
    test_images, test_labels = load_images(train=False)

    print(f"\nTest accuracy (%) on {len(test_images)} images, trained on {TRAIN_IMAGES},")
    print(f"{args.epochs} epochs, {args.seeds} seeds\n")
    print(f"{'':18} {'mean ± std':>12}   {'seeds':24} seconds")
    for name in METHODS:
        found, seconds, _ = zip(*(results[name, seed] for seed in range(args.seeds)), strict=True)
        accuracies = torch.tensor(found)
        spread = accuracies.std().item() if args.seeds > 1 else 0.0
        each, mean = " ".join(f"{r:.1f}" for r in found), accuracies.mean()
        print(f"{name:18} {mean:6.1f} ± {spread:3.1f}   {each:24} {sum(seconds) / args.seeds:6.0f}")
    model = results["LatentAdversarial", args.seeds - 1][2]
    draw(model, test_images[:10], test_labels[:10], args.picture)
    print(f"\n{args.picture} shows what both do to ten test images.")


if __name__ == "__main__":
    main()
