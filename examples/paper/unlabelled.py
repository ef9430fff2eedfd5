"""Few labels and many unlabelled images: consistency in the latent space beside its peers.

    python examples/paper/unlabelled.py CIFAR10 --labels 2500 --minutes 8
    python examples/paper/unlabelled.py --table

CIFAR10 holds train/<class>/* and test/<class>/*. Each seed draws the labelled images anew, as many
of each class. All training images are unlabelled ones. Every method trains a small ResNet for
--minutes of computation, or for --steps, and is tested after that. Batches have 64 labelled images
and 64 unlabelled ones. Settings are defaults, or those of the methods' authors: none was chosen on
test images. What was run before is not run again.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from methods import PEERS, Pixels, crop_and_flip, to_unit
from networks import small_resnet
from protocol import Images, Protocol, Standardized, evaluate, labelled, read_images
from records import append_line, format_spread, read_lines
from torch import Tensor, nn

from latent_aug import LatentAdversarial, LatentPerturb

RESULTS = Path(__file__).parents[1] / "results" / "unlabelled.jsonl"
LOCK = Path(__file__).parents[2] / "runs" / "unlabelled.lock"
BATCH = 64
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
    if pixels == "attack":
        attack = LatentAdversarial(model, flow=FLOW)
        return lambda x, y: attack(common(x), y)
    return lambda x, y: randaugment(x) if pixels == "randaugment" else common(x)


def make_term(
    model: nn.Module,
    *,
    flow: Any = FLOW,
    noise: float | None = None,
    strong: bool = False,
    **options: Any,
) -> Callable[[Tensor], Tensor]:
    """Build the loss of 8-bit unlabelled images.

    Args:
        model: The classifier.
        flow: The flow that is attacked, or that noise goes through.
        noise: The eps of random noise in place of the attack, 0 for none.
        strong: Augment by RandAugment what is compared to the clean prediction.
        options: Options of `LatentAdversarial.consistency`.
    """
    attack = LatentAdversarial(model, flow=flow, p=1.0)
    if noise is not None:
        options["perturb"] = LatentPerturb(noise, flow=flow) if noise else lambda images: images

    def term(x: Tensor) -> Tensor:
        augment = (lambda _: randaugment(x)) if strong else None
        return attack.consistency(common(x), augment=augment, **options)

    return term


# What is done to labelled images, and the loss of unlabelled ones, if there is one.
METHODS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "supervised, crop and flip": ("common", None),
    "supervised, RandAugment": ("randaugment", None),
    "supervised, the attack": ("attack", None),
    "pseudo-labels": ("common", {"noise": 0.0, **FIXMATCH}),
    "VAT in pixels": ("common", {"flow": Pixels(3)}),
    "latent consistency, random": ("common", {"noise": 0.25}),
    "latent consistency, adversarial": ("common", {}),
    "FixMatch": ("common", {"noise": 0.0, "strong": True, **FIXMATCH}),
    "FixMatch, then the attack": ("common", {"strong": True, **FIXMATCH}),
}


def draw_batches(count: int) -> Iterator[Tensor]:
    """Draw indices of batches for ever, each image once an epoch."""
    for _ in itertools.count():
        yield from torch.randperm(count).split(BATCH)[: max(1, count // BATCH)]


def train(
    name: str,
    few: Images,
    many: Tensor,
    *,
    seed: int,
    width: int,
    budget: tuple[float, int | None],
) -> tuple[nn.Module, int, float]:
    """Train by a method, and return the model, its steps and seconds of computation."""
    torch.manual_seed(seed)
    model = Standardized(small_resnet(3, few.classes, width), many[:5000], "float32")
    optimizer = torch.optim.SGD(model.parameters(), 0.03, 0.9, nesterov=True, weight_decay=5e-4)
    pixels, options = METHODS[name]
    augment = make_augmentation(model, pixels)
    term = None if options is None else make_term(model, **options)
    minutes, steps = budget
    started, share, number = time.process_time(), 0.0, 0
    for own, others in zip(draw_batches(len(few.labels)), draw_batches(len(many)), strict=False):
        x, y = few.pixels[own], few.labels[own]
        loss = F.cross_entropy(model(augment(x, y)), y)
        if term is not None:
            loss = loss + min(1.0, share / RAMP) * term(many[others])
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * (1 - share) + 1e-4  # linear in the budget, whatever that is
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        number, spent = number + 1, time.process_time() - started
        share = number / steps if steps else spent / (60 * minutes)
        if share >= 1:
            break
    return model, number, spent


def draw_table() -> str:
    """Accuracies of each method by the number of labels and the budget."""
    rows = read_lines(RESULTS)
    columns = list(dict.fromkeys((row["labels"], row["budget"]) for row in rows))
    lines = [f"| method | {' | '.join(f'{n} labels, {b}' for n, b in columns)} | steps |"]
    lines += ["|---" * (len(columns) + 2) + "|"]
    for name in METHODS:
        own = [row for row in rows if row["method"] == name]
        cells = []
        for column in columns:
            found = [r["accuracy"] for r in own if (r["labels"], r["budget"]) == column]
            seeds = f" ({len(found)})" if found[1:] else ""
            cells.append(format_spread(found) + seeds if found else "")
        steps = ", ".join(str(row["steps"]) for row in own)
        lines.append(f"| {name} | {' | '.join(cells)} | {steps} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, nargs="?")
    parser.add_argument("--labels", type=int, default=2500)
    parser.add_argument("--minutes", type=float, default=8.0, help="of computation a run")
    parser.add_argument("--steps", type=int, help="in place of --minutes")
    parser.add_argument("--width", type=int, default=16, help="of the ResNet")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--only", nargs="*", default=list(METHODS), help="these methods")
    parser.add_argument("--table", action="store_true", help="print the table, run nothing")
    args = parser.parse_args()
    if args.table:
        print(draw_table())
        return
    if args.images is None:
        parser.error("CIFAR10 is needed")
    budget = f"{args.steps} steps" if args.steps else f"{args.minutes:g} minutes"
    shared = {"labels": args.labels, "budget": budget, "width": args.width}
    images, test = (read_images(args.images / part) for part in ("train", "test"))
    for seed, name in itertools.product(args.seeds, args.only):
        key = {"method": name, "seed": seed, **shared}
        if any(key.items() <= row.items() for row in read_lines(RESULTS)):
            continue
        few = labelled(images, Protocol(per_class=args.labels // images.classes, data_seed=seed))
        model, steps, seconds = train(
            name, few, images.pixels, seed=seed, width=args.width, budget=(args.minutes, args.steps)
        )
        accuracy, loss = evaluate(model, test)
        figures = {"accuracy": round(accuracy, 2), "loss": round(loss, 4), "steps": steps}
        row = {**key, **figures, "cpu_seconds": round(seconds, 1)}
        append_line(RESULTS, row, lock=LOCK)
        print(row, flush=True)


if __name__ == "__main__":
    main()
