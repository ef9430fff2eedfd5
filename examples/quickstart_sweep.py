"""How the quickstart's settings were chosen, and what they give on the whole test set.

    python examples/quickstart_sweep.py DIR           # choose: 5,000 other training images
    python examples/quickstart_sweep.py DIR --test    # report: all 10,000 test images

DIR holds FashionMNIST as folders train/<class>/*.png and test/<class>/*.png. Every setting is
trained on the quickstart's 600 images. Validation images are training images that do not ship
with the repository; the test images are read with --test only. Results are appended to a JSON
file, one run each; runs that are in it already are not repeated.
"""

import argparse
import itertools
import json
import time
from functools import partial
from pathlib import Path

import torch
from quickstart import (
    TRAIN_IMAGES,
    accuracy,
    adversarial_latent,
    load_images,
    no_augmentation,
    random_latent,
    train_classifier,
)
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results" / "quickstart_sweep.json"
VALIDATION_IMAGES = 5000
CHOICES = {
    "none": (no_augmentation, [{}]),
    "random": (random_latent, [{"eps": eps} for eps in (0.15, 0.3, 0.5, 0.8, 1.2)]),
    "adversarial": (
        adversarial_latent,
        [
            {"eps": 1.0, "alpha": 0.5, "steps": 2, "p": 0.5},
            {"eps": 2.0, "alpha": 1.0, "steps": 2, "p": 0.5},
            {"eps": 4.0, "alpha": 2.0, "steps": 2, "p": 0.5},
            {"eps": 8.0, "alpha": 4.0, "steps": 2, "p": 0.5},
            {"eps": 1.0, "alpha": 0.5, "steps": 2, "p": 1.0},
        ],
    ),
}


def held_out(folder: Path, test: bool) -> tuple[Tensor, Tensor]:
    """All test images, or training images that do not ship, as (N, 1, 28, 28) and labels."""
    data = ImageFolder(folder / ("test" if test else "train"))
    shipped = {image.numpy().tobytes() for image in load_images(train=True)[0].mul(255).byte()}
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1)).tolist()
    images, labels = [], []
    for index in order if not test else range(len(data)):
        image, label = data[index]
        pixels = pil_to_tensor(image.convert("L"))
        if test or pixels.numpy().tobytes() not in shipped:
            images.append(pixels)
            labels.append(label)
        if not test and len(images) == VALIDATION_IMAGES:
            break
    return torch.stack(images) / 255, torch.tensor(labels)


def main() -> None:
    """Train what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--test", action="store_true", help="report on the test images")
    parser.add_argument("--epochs", type=int, nargs="+", default=[60])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(CHOICES), choices=CHOICES)
    parser.add_argument("--eps", type=float, nargs="+", help="only settings with this eps")
    args = parser.parse_args()
    images, labels = (t[:TRAIN_IMAGES] for t in load_images(train=True))
    others = held_out(args.folder, args.test)
    runs = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    split = "test" if args.test else "validation"

    wanted = []
    for name, epochs, seed in itertools.product(args.only, args.epochs, args.seeds):
        for settings in CHOICES[name][1]:
            if args.eps is None or settings.get("eps") in (None, *args.eps):
                wanted.append({"method": name, **settings, "epochs": epochs, "seed": seed})
    if not wanted:
        parser.error(f"--only {' '.join(args.only)} has no settings with that --eps")
    done = [
        {k: v for k, v in run.items() if k in wanted[0] or k in ("eps", "alpha", "steps", "p")}
        for run in runs
        if run["split"] == split
    ]
    for run in tqdm([run for run in wanted if run not in done]):
        settings = {k: v for k, v in run.items() if k not in ("method", "epochs", "seed")}
        method = partial(CHOICES[run["method"]][0], **settings)
        started = time.perf_counter()
        model = train_classifier(images, labels, method, seed=run["seed"], epochs=run["epochs"])
        seconds = time.perf_counter() - started
        figures = {"split": split, "images": len(others[0]), "accuracy": accuracy(model, *others)}
        runs.append({**run, **figures, "seconds": round(seconds, 1)})
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(runs, indent=1) + "\n")

    groups: dict[str, list[float]] = {}
    for run in runs:
        if run["split"] == split:
            settings = {k: run[k] for k in ("epochs", "eps", "alpha", "steps", "p") if k in run}
            groups.setdefault(f"{run['method']} {settings}", []).append(run["accuracy"])
    for setting, values in groups.items():
        accuracies = torch.tensor(values)
        print(f"{accuracies.mean():.2f} ± {accuracies.std():.2f} ({len(values)}) {setting}")


if __name__ == "__main__":
    main()
