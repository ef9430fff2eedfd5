"""Few labels and many unlabelled images: consistency in the latent space beside its peers.

    python examples/paper/compare_unlabelled.py CIFAR10 --labels 250 [--validate] [--seeds SEED ...]
    python examples/paper/compare_unlabelled.py --table

CIFAR10 holds train/<class>/* and test/<class>/*. Each seed draws the labelled images anew, as many
of each class. All training images are unlabelled ones. Every method trains the network of the
recipe for CIFAR-10 with 1 % of the labels, at its batch size, for --minutes of computation. Its
weight decay, unless given, is the one chosen on validation images for as many labels. Where it
learns from unlabelled images, it first learns a third of that time from labelled ones alone, with
RandAugment, and then from both, at a smaller learning rate. It is tested after that. With
--validate it is tested on training images, which are not among the unlabelled ones then. --table
draws the table of docs/unlabelled.md from the runs at the defaults. What was run before is not run
again.
"""

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from records import (
    append_line,
    describe_machine,
    read_lines,
    read_recipes,
    write_spread,
    write_table,
)
from torch import Tensor, nn

from latent_aug import LatentAdversarial, LatentPerturb
from latent_aug.transforms.consistency import make_targets
from latent_aug.utils.files import replace_file

RESULTS = Path(__file__).parents[1] / "results" / "unlabelled.jsonl"
RUNS = Path(__file__).parents[2] / "runs" / "unlabelled"
PAGE = Path(__file__).parents[2] / "docs" / "unlabelled.md"
MARK = "drawn by examples/paper/compare_unlabelled.py"
RECIPE = "cifar10-1-percent"  # whose network and settings were chosen for labelled images
MANY_LABELS = 2500  # from which another weight decay is better, by the recipe tune-5-percent
MANY_LABELS_DECAY = 2e-3
MINUTES = 12.0  # of computation a run
UNLABELLED = 64  # a step, at most
CANDIDATES = 192  # a step, from which a method with a threshold takes those
FIRST = 1 / 3  # of the time, in which labelled images alone are learned
LATER_LR = 0.4  # the greatest learning rate after that, in parts of the recipe's
WARM_UP = 0.3  # of a cycle, over which the learning rate grows
FLOW = "glow-photographs"
FIXMATCH = {"threshold": 0.95, "temperature": 0.0}  # without the threshold all are taken


def randaugment(x: Tensor) -> Tensor:
    """Augment 8-bit images one by one, after crop and flip."""
    augment = PEERS["randaugment"](nn.Identity())
    return to_unit(torch.stack([augment(image) for image in crop_and_flip(x, True)]))


def common(x: Tensor) -> Tensor:
    """Crop and mirror 8-bit images."""
    return to_unit(crop_and_flip(x, True))


def make_term(
    model: nn.Module,
    *,
    flow: Any = FLOW,
    eps: float | None = None,
    p: float = 1.0,
    noise: float | None = None,
    strong: bool = False,
    threshold: float = 0.0,
    **options: Any,
) -> Callable[[Tensor], Tensor]:
    """Build the loss of 8-bit unlabelled images.

    Args:
        model: The classifier.
        flow: The flow that is attacked, or that noise goes through.
        eps: The radius of the attack, None for the default.
        p: The share of images that is attacked.
        noise: The eps of random noise in place of the attack, 0 for none.
        strong: Augment by RandAugment what is compared to the clean prediction.
        threshold: Take only images of whose class the model is as sure.
        options: Options of `LatentAdversarial.consistency`.
    """
    attack = LatentAdversarial(model, flow=flow, eps=eps, p=p)
    if noise is not None:
        options["perturb"] = LatentPerturb(noise, flow=flow) if noise else lambda images: images

    def term(x: Tensor) -> Tensor:
        if threshold:
            x = x[find_sure(model, to_unit(x), threshold)]
        x = x[:UNLABELLED]
        if len(x) < 2:  # BatchNorm has no statistics of a single sample
            return torch.zeros(())
        augment = (lambda _: randaugment(x)) if strong else None
        loss = attack.consistency(common(x), augment=augment, **options)
        return loss * len(x) / UNLABELLED

    return term


@torch.no_grad()
def find_sure(model: nn.Module, images: Tensor, threshold: float) -> Tensor:
    """Find the images of whose class the model is as sure, in evaluation mode."""
    model.eval()
    _, sure = make_targets(model(images), threshold=threshold)
    model.train()
    return sure


@dataclass(frozen=True)
class Training:
    """A way to train.

    Args:
        pixels: What is done to labelled images.
        attacked: Attack them after that.
        term: Options of `make_term`, the loss of unlabelled images. None learns from none.
    """

    pixels: Callable[[Tensor], Tensor] = randaugment
    attacked: bool = False
    term: dict[str, Any] | None = None

    def make_augmentation(self, model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        """Build the augmentation of labelled 8-bit images and their classes."""
        if not self.attacked:
            return lambda x, y: self.pixels(x)
        attack = LatentAdversarial(model, flow=FLOW)
        return lambda x, y: attack(self.pixels(x), y)


def learn_from_both(**options: Any) -> Training:
    """A method with a loss of unlabelled images."""
    return Training(term=options)


METHODS = {
    "supervised, crop and flip": Training(common),
    "supervised, RandAugment": Training(),
    "supervised, RandAugment and the attack": Training(attacked=True),
    "pseudo-labels": learn_from_both(noise=0.0, **FIXMATCH),
    "VAT in pixels": learn_from_both(flow=Pixels(3)),  # of l2 1.0, as in the latent
    "VAT in pixels, l2 0.25": learn_from_both(flow=Pixels(3), eps=0.25),
    "latent consistency, random": learn_from_both(noise=0.25),
    "latent consistency, adversarial": learn_from_both(),
    "consistency under RandAugment": learn_from_both(noise=0.0, strong=True),
    "consistency under RandAugment, then the attack": learn_from_both(strong=True),
    "consistency under RandAugment, then the attack on a quarter": learn_from_both(
        strong=True, p=0.25
    ),
    "consistency under RandAugment, the attack on labelled images": Training(
        attacked=True, term={"noise": 0.0, "strong": True}
    ),
    "FixMatch": learn_from_both(noise=0.0, strong=True, **FIXMATCH),
    "FixMatch, then LatentPerturb": learn_from_both(noise=0.25, strong=True, **FIXMATCH),
    "FixMatch, then the attack": learn_from_both(strong=True, **FIXMATCH),
    "FixMatch, then the attack on a quarter": learn_from_both(strong=True, p=0.25, **FIXMATCH),
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


def make_model(few: Images, protocol: Protocol) -> Standardized:
    """Build the network of the protocol."""
    network = NETWORKS[protocol.network](few.pixels.shape[1], few.classes, protocol.width)
    return Standardized(network, few.pixels, protocol.precision)


def train(
    model: nn.Module,
    method: Training,
    few: Images,
    many: Tensor,
    protocol: Protocol,
    *,
    lr: float,
    minutes: float,
) -> int:
    """Train the model by a method for one cycle of the learning rate, and return its steps."""
    optimizer = torch.optim.SGD(
        model.parameters(), 0.0, 0.9, nesterov=True, weight_decay=protocol.weight_decay
    )
    augment = method.make_augmentation(model)
    term = None if method.term is None else make_term(model, **method.term)
    started, share, steps = time.process_time(), 0.0, 0
    batches = draw_batches(len(few.labels), protocol.batch_size)
    for own, others in zip(batches, draw_batches(len(many), CANDIDATES), strict=False):
        x, y = few.pixels[own], few.labels[own]
        loss = F.cross_entropy(model(augment(x, y)), y)
        if term is not None:
            loss = loss + term(many[others])
        for group in optimizer.param_groups:
            group["lr"] = lr * choose_rate(share)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
        share = (time.process_time() - started) / (60 * minutes)
        if share >= 1:
            break
    return steps


def learn_first(
    model: nn.Module, path: Path, few: Images, many: Tensor, protocol: Protocol, *, minutes: float
) -> None:
    """Train the model on labelled images alone, or read what another method left at the path."""
    if not path.exists():
        train(model, Training(), few, many, protocol, lr=protocol.lr, minutes=minutes)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as partial:
            torch.save(model.state_dict(), partial)
    model.load_state_dict(torch.load(path))


def draw_table() -> list[str]:
    """Accuracies on test images, two columns for each number of labels, steps on average."""
    usual = {"minutes": MINUTES, "validate": False}
    rows = [row for row in read_lines(RESULTS) if usual.items() <= row.items()]
    decays = {count: choose_weight_decay(count) for count in {row["labels"] for row in rows}}
    rows = [row for row in rows if row["weight_decay"] == decays[row["labels"]]]
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


def choose_weight_decay(labels: int) -> float:
    """Choose the weight decay for a number of labelled images."""
    own: float = read_settings()["weight_decay"]
    return MANY_LABELS_DECAY if labels >= MANY_LABELS else own


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
    parser.add_argument("--weight-decay", type=float, help="another one than chosen")
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
    recipe, decay = read_settings(), args.weight_decay
    if decay is None:
        decay = choose_weight_decay(args.labels)
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
        torch.manual_seed(seed)
        model, lr, minutes = make_model(few, protocol), protocol.lr, args.minutes
        method = METHODS[name]
        if method.term is not None:
            first = RUNS / f"{args.labels}-{seed}-{minutes:g}-{decay:g}.pt"
            learn_first(model, first, few, many, protocol, minutes=FIRST * minutes)
            lr, minutes = LATER_LR * lr, (1 - FIRST) * minutes
            torch.manual_seed(seed)
        steps = train(model, method, few, many, protocol, lr=lr, minutes=minutes)
        accuracy, loss = evaluate(model, evaluated)
        row = {**key, "accuracy": round(accuracy, 2), "loss": round(loss, 4), "steps": steps}
        row |= describe_machine()
        append_line(RESULTS, row, lock=RUNS.with_suffix(".lock"))
        print(row, flush=True)


if __name__ == "__main__":
    main()
