"""Few labels and many unlabelled images: consistency in the latent space beside its peers.

    python examples/paper/compare_unlabelled.py CIFAR10 --labels 250 [--validate] [--seeds SEED ...]
    python examples/paper/compare_unlabelled.py --table

CIFAR10 holds train/<class>/* and test/<class>/*. Each seed draws the labelled images anew, as many
of each class. All training images are unlabelled ones. Every method trains the network of the
recipe for CIFAR-10 with 1 % of the labels, at its batch size, greatest learning rate and weight
decay, for --minutes of computation. It is tested after that. With --validate it is tested on
training images, which are not among the unlabelled ones then. --table draws the table of
docs/unlabelled.md from the runs at the defaults. What was run before is not run again.
"""

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from methods import PEERS, Pixels, crop_and_flip, to_unit
from networks import NETWORKS
from protocol import (
    VALIDATION_IMAGES,
    Images,
    Protocol,
    Standardized,
    divide,
    evaluate,
    read_images,
    select,
)
from records import append_line, read_lines, read_recipes, write_spread, write_table
from torch import Tensor, nn

from latent_aug import LatentAdversarial, LatentPerturb

RESULTS = Path(__file__).parents[1] / "results" / "unlabelled.jsonl"
LOCK = Path(__file__).parents[2] / "runs" / "unlabelled.lock"
PAGE = Path(__file__).parents[2] / "docs" / "unlabelled.md"
MARK = "drawn by examples/paper/compare_unlabelled.py"
RECIPE = "cifar10-1-percent"  # whose network and settings were chosen for labelled images
MINUTES = 8.0  # of computation a run
UNLABELLED = 64  # a step
WARM_UP = 0.3  # of the training, over which the learning rate grows
RAMP = 0.25  # of the training, over which the weight of the unlabelled images grows
FLOW = "glow-photographs"
FIXMATCH = {"threshold": 0.95, "temperature": 0.0}


def randaugment(x: Tensor) -> Tensor:
    """Augment 8-bit images one by one, after crop and flip."""
    augment = PEERS["randaugment"](nn.Identity())
    return to_unit(torch.stack([augment(image) for image in crop_and_flip(x, True)]))


def common(x: Tensor) -> Tensor:
    """Crop and mirror 8-bit images."""
    return to_unit(crop_and_flip(x, True))


def make_augmentation(model: nn.Module, pixels: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Build what is done to labelled images and their classes."""
    if pixels == "both":
        attack = LatentAdversarial(model, flow=FLOW)
        return lambda x, y: attack(randaugment(x), y)
    return lambda x, y: randaugment(x) if pixels == "randaugment" else common(x)


def make_term(
    model: nn.Module,
    *,
    flow: Any = FLOW,
    p: float = 1.0,
    noise: float | None = None,
    strong: bool = False,
    **options: Any,
) -> Callable[[Tensor], Tensor]:
    """Build the loss of 8-bit unlabelled images.

    Args:
        model: The classifier.
        flow: The flow that is attacked, or that noise goes through.
        p: The share of images that is attacked.
        noise: The eps of random noise in place of the attack, 0 for none.
        strong: Augment by RandAugment what is compared to the clean prediction.
        options: Options of `LatentAdversarial.consistency`.
    """
    attack = LatentAdversarial(model, flow=flow, p=p)
    if noise is not None:
        options["perturb"] = LatentPerturb(noise, flow=flow) if noise else lambda images: images

    def term(x: Tensor) -> Tensor:
        augment = (lambda _: randaugment(x)) if strong else None
        return attack.consistency(common(x), augment=augment, **options)

    return term


# What is done to labelled images, and the loss of unlabelled ones, if there is one. The attack in
# pixels is of l2 1.0.
METHODS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "supervised, crop and flip": ("common", None),
    "supervised, RandAugment": ("randaugment", None),
    "supervised, RandAugment and the attack": ("both", None),
    "pseudo-labels": ("common", {"noise": 0.0, **FIXMATCH}),
    "VAT in pixels": ("common", {"flow": Pixels(3)}),
    "latent consistency, random": ("common", {"noise": 0.25}),
    "latent consistency, adversarial": ("common", {}),
    "FixMatch": ("common", {"noise": 0.0, "strong": True, **FIXMATCH}),
    "FixMatch, then the attack": ("common", {"strong": True, **FIXMATCH}),
    "FixMatch, then the attack on a quarter": ("common", {"strong": True, "p": 0.25, **FIXMATCH}),
}


def draw_batches(count: int, size: int) -> Iterator[Tensor]:
    """Draw indices of batches for ever, each image at most once an epoch."""
    for _ in itertools.count():
        yield from torch.randperm(count).split(size)[: max(1, count // size)]


def choose_rate(share: float) -> float:
    """The learning rate in parts of the greatest one, after this share of the training."""
    if share < WARM_UP:
        return share / WARM_UP + 1e-3
    return (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP))) / 2


def train(
    name: str, few: Images, many: Tensor, protocol: Protocol, *, seed: int, minutes: float
) -> tuple[nn.Module, int]:
    """Train by a method, and return the model and its steps."""
    torch.manual_seed(seed)
    network = NETWORKS[protocol.network](3, few.classes, protocol.width)
    model = Standardized(network, few.pixels, protocol.precision)
    optimizer = torch.optim.SGD(
        model.parameters(), 0.0, 0.9, nesterov=True, weight_decay=protocol.weight_decay
    )
    pixels, options = METHODS[name]
    augment = make_augmentation(model, pixels)
    term = None if options is None else make_term(model, **options)
    started, share, steps = time.process_time(), 0.0, 0
    batches = draw_batches(len(few.labels), protocol.batch_size)
    for own, others in zip(batches, draw_batches(len(many), UNLABELLED), strict=False):
        x, y = few.pixels[own], few.labels[own]
        loss = F.cross_entropy(model(augment(x, y)), y)
        if term is not None:
            loss = loss + min(1.0, share / RAMP) * term(many[others])
        for group in optimizer.param_groups:
            group["lr"] = protocol.lr * choose_rate(share)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
        share = (time.process_time() - started) / (60 * minutes)
        if share >= 1:
            break
    return model, steps


def draw_table() -> list[str]:
    """Accuracies on test images, two columns for each number of labels, steps on average."""
    usual = {"minutes": MINUTES, "weight_decay": read_settings()["weight_decay"], "validate": False}
    rows = [row for row in read_lines(RESULTS) if usual.items() <= row.items()]
    columns = sorted({row["labels"] for row in rows})
    heads = [f"{labels:,} labels | steps" for labels in columns]
    lines = [f"| method | {' | '.join(heads)} |", "|---" * (2 * len(heads) + 1) + "|"]
    for name in METHODS:
        own = [row for row in rows if row["method"] == name]
        each = [[row for row in own if row["labels"] == labels] for labels in columns]
        if own:
            cells = [cell for found in each for cell in write_cells(found)]
            lines.append(f"| {' | '.join([name, *cells])} |")
    return lines


def read_settings() -> dict[str, Any]:
    """Read the protocol of the recipe."""
    found: dict[str, Any] = read_recipes()[RECIPE]["protocol"]
    return found


def write_cells(rows: list[dict[str, Any]]) -> tuple[str, str]:
    """Accuracy and steps of some runs."""
    steps = f"{statistics.mean(row['steps'] for row in rows):,.0f}" if rows else ""
    return write_spread([row["accuracy"] for row in rows]), steps


def main() -> None:
    """Run what is missing, or draw the table of the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, nargs="?")
    parser.add_argument("--labels", type=int, default=250)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of computation a run")
    parser.add_argument("--weight-decay", type=float, help="another one than the recipe's")
    parser.add_argument("--validate", action="store_true", help="test on training images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--table", action="store_true", help="draw the table, run nothing")
    args = parser.parse_args()
    if args.table:
        write_table(PAGE, MARK, draw_table())
        return
    if args.images is None:
        parser.error("CIFAR10 is needed")
    recipe = read_settings()
    decay = recipe["weight_decay"] if args.weight_decay is None else args.weight_decay
    shared = {
        "labels": args.labels,
        "minutes": args.minutes,
        "weight_decay": decay,
        "validate": args.validate,
    }
    images = read_images(args.images / "train")
    if args.labels < images.classes or args.labels % images.classes:
        parser.error(f"--labels must be a multiple of {images.classes}, got {args.labels}")
    test = None if args.validate else read_images(args.images / "test")
    changes = {"per_class": args.labels // images.classes, "weight_decay": decay}
    for seed, name in itertools.product(args.seeds, args.only):
        key = {"method": name, "seed": seed, **shared}
        if any(key.items() <= row.items() for row in read_lines(RESULTS)):
            continue
        protocol = Protocol(**recipe | changes, data_seed=seed)
        own, others = divide(images, protocol)
        evaluated = test
        if evaluated is None:
            evaluated = select(images, others[:VALIDATION_IMAGES])
            others = others[VALIDATION_IMAGES:]
        few, many = select(images, own), images.pixels[torch.cat([own, others])]
        model, steps = train(name, few, many, protocol, seed=seed, minutes=args.minutes)
        accuracy, loss = evaluate(model, evaluated)
        row = {**key, "accuracy": round(accuracy, 2), "loss": round(loss, 4), "steps": steps}
        append_line(RESULTS, row, lock=LOCK)
        print(row, flush=True)


if __name__ == "__main__":
    main()
