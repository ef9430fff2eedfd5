"""When and how strongly to attack: strategies for short trainings on few labels.

    python examples/paper/strategies.py IMAGES --per-class 50 --epochs 20 [--channels 1 --size 28]
    python examples/paper/strategies.py --table

IMAGES holds a folder of images for each class. For each seed a ResNet of 16 channels is trained on
another draw of so many images a class, and tested on up to 5,000 of the others. Every attack takes
one step unless its name says otherwise, on half of each batch. What was run before is not run
again. --table prints every strategy, and draws the tables of docs/adversarial.md.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from methods import Augmentation
from protocol import Protocol, draw_images, read_images, round_figures, run
from records import append_line, read_lines, write_spread, write_table
from torch import Tensor, nn

from latent_aug import LatentAdversarial, LatentSchedule
from latent_aug.transforms import functional as LF
from latent_aug.transforms.share import HIGHEST_SHARE, AdaptiveShare

RESULTS = Path(__file__).parents[1] / "results" / "strategies.jsonl"
LOCK = Path(__file__).parents[2] / "runs" / "strategies.lock"
PAGE = Path(__file__).parents[2] / "docs" / "adversarial.md"
MARK = "drawn by examples/paper/strategies.py"
COMPARED = {  # on the page, by what is done in pixels before
    "common": {
        "none": "crop and flip",
        "the default": "the attack by default",
        "predicted labels": "with `p=0.5`",
    },
    "randaugment": {"none": "RandAugment", "the default": "the attack on its images"},
}
SETS = {  # on the page, and their classes
    "smiles": ("faces", 2),
    "nuclei, 32 a class": ("nuclei", 4),
    "trash, 20 a class": ("trash", 6),
    "hands": ("hands", 10),
    "clothing, 20 a class": ("clothing", 10),
    "mnist, 10 a class": ("MNIST", 10),
    "fashion, 60 a class": ("FashionMNIST", 10),
    "cifar10": ("CIFAR-10", 10),
    "signs, 10 a class": ("signs", 43),
    "Tiny ImageNet, 15 a class": ("Tiny ImageNet", 100),
    "cifar100, 20 a class": ("CIFAR-100", 100),
    "letters, 5 a class": ("letters", 136),
}
FLOWS = {1: "glow-fashionmnist", 3: "glow-photographs"}


class Strategy:
    """An attack on a batch, given the share of the training that is over: here the default."""

    def __init__(self, model: nn.Module, channels: int, **settings: Any) -> None:
        self.model = model
        self.attack = LatentAdversarial(model, flow=FLOWS[channels], **settings)

    def begin(self, share: float) -> None:
        """Begin an epoch, before which this share of all was trained."""

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Attack a batch."""
        return self.attack(x, y), y


class AtMost(Strategy):
    """The default with another greatest share, or a power of what the model has above chance."""

    def __init__(
        self, model: nn.Module, channels: int, *, highest: float, power: float = 1.0
    ) -> None:
        super().__init__(model, channels)
        self.attack._adaptive = ScaledShare(highest, power)


class ScaledShare(AdaptiveShare):
    """The share of `AtMost`."""

    def __init__(self, highest: float, power: float) -> None:
        super().__init__()
        self.highest, self.power = highest, power

    def update(self, tally: Tensor) -> None:
        """Take note of what the classifier has right."""
        super().update(tally)
        self.value = self.highest * (self.value / HIGHEST_SHARE) ** self.power


class Ramp(Strategy):
    """The share of attacked images grows over the first half of the training."""

    def begin(self, share: float) -> None:
        """Set the share."""
        self.attack.p = 0.5 * min(1.0, 2 * share)


class Feedback(Strategy):
    """The share grows while the model has its clean training images right, as in StyleGAN2-ADA.

    Right are enough if their share is `target` of the way from chance to 1, by a running mean.
    """

    memory = 0.8

    def __init__(
        self, model: nn.Module, channels: int, *, target: float = 0.6, **settings: Any
    ) -> None:
        super().__init__(model, channels, p=0.0, **settings)
        self.target, self.accuracy = target, 0.0

    def measure_skill(self) -> float:
        """The mean accuracy, counted from chance."""
        classes = self.model.network[-1].out_features
        return (classes * self.accuracy - 1) / (classes - 1)

    def adjust(self) -> None:
        """Set the share."""
        step = 0.05 if self.measure_skill() > self.target else -0.05
        self.attack.p = min(0.5, max(0.0, self.attack.p + step))

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Attack a batch, after a look at how many of its images the model has right."""
        right = float((predict(self.model, x) == y).float().mean())
        self.accuracy = self.memory * self.accuracy + (1 - self.memory) * right
        self.adjust()
        return super().__call__(x, y)


class Following(Feedback):
    """The share is some power of that skill, up to `most` where all is right."""

    memory = 0.9

    def __init__(
        self,
        model: nn.Module,
        channels: int,
        *,
        power: float = 1.0,
        most: float = 0.5,
        **settings: Any,
    ) -> None:
        super().__init__(model, channels, **settings)
        self.power, self.most = power, most

    def adjust(self) -> None:
        """Set the share."""
        self.attack.p = self.most * max(0.0, self.measure_skill()) ** self.power


class Patient(Strategy):
    """Feedback, and half of each batch after some steps, whatever the model has learned."""

    def __init__(
        self, model: nn.Module, channels: int, *, patience: int = 100, **settings: Any
    ) -> None:
        super().__init__(model, channels, p=0.5, **settings)
        self.early, self.left = Feedback(model, channels, **settings), patience

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Attack a batch."""
        self.left -= 1
        return self.early(x, y) if self.left >= 0 else super().__call__(x, y)


class Friendly(Strategy):
    """Half of a batch is attacked, each image while the model has it right (Zhang et al. 2020).

    In one step this attacks only what the model has right. What it has wrong gets random noise.
    """

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Attack the second half of a shuffled batch."""
        half = len(x) // 2
        return torch.cat([x[:half], self.ascend(x[half:], y[half:])]), y

    def weigh(self, logits: Tensor, y: Tensor) -> Tensor:
        """Weigh each image: how far it goes, as a share of the step."""
        return logits.argmax(dim=1) == y

    def ascend(self, x: Tensor, y: Tensor) -> Tensor:
        """Ascend the loss of each image until the model has it wrong."""
        latents = self.attack.encode(x)
        strength = (LF.dimensions(latents.z, None) / (3 * 32 * 32)) ** 0.5
        eps, alpha = (strength * size[1] for size in (self.attack.eps, self.attack.alpha))
        delta = LF.random_start(latents.z, eps, "l2")
        self.model.eval()
        for _ in range(self.attack.steps):
            delta = delta.detach().requires_grad_(True)
            logits = self.model(latents.decode_with(delta)).double()
            (grad,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), delta)
            share = self.weigh(logits.detach(), y).float()[:, None, None, None]
            moved = LF.ascent_step(delta.detach(), grad, alpha, eps, "l2")
            delta = torch.lerp(delta.detach(), moved, share)
        self.model.train()
        with torch.no_grad():
            return latents.perturb(delta)


class Sure(Friendly):
    """An image is attacked once the model is sure of its class, by a softmax above 0.8."""

    def weigh(self, logits: Tensor, y: Tensor) -> Tensor:
        """All or nothing."""
        return logits.softmax(dim=1).gather(1, y[:, None])[:, 0] > 0.8


class Confident(Friendly):
    """An image goes as far as the model is surer of its class than of any, of two at least."""

    def weigh(self, logits: Tensor, y: Tensor) -> Tensor:
        """Weigh from 0 at one half to 1."""
        right = logits.softmax(dim=1).gather(1, y[:, None])[:, 0]
        return (2 * right - 1).clamp(min=0)


class OwnStatistics(Strategy):
    """Attacked images have BatchNorms of their own, which are not used afterwards (AdvProp)."""

    def __init__(self, model: nn.Module, channels: int, **settings: Any) -> None:
        from timm.layers import convert_splitbn_model

        model.network = convert_splitbn_model(model.network, 2)
        super().__init__(model, channels, p=1.0, **settings)

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Attack the second half of a shuffled batch, for which timm's layer has a second norm."""
        half = len(x) // 2
        return torch.cat([x[:half], self.attack(x[half:], y[half:])]), y


STRATEGIES: dict[str, Callable[..., Strategy] | None] = {
    "none": None,
    "the default": Strategy,
    "the default, training mode": partial(Strategy, model_mode="unchanged"),
    "twice as strong": partial(Strategy, norm="rms", eps=2 / (3 * 32 * 32) ** 0.5),
    "at most a quarter": partial(AtMost, highest=0.25),
    "at most half, squared": partial(AtMost, highest=0.5, power=2.0),
    "predicted labels": partial(Strategy, p=0.5),
    "true labels": partial(Strategy, p=0.5, labels="true"),
    "predicted labels, training mode": partial(Strategy, p=0.5, model_mode="unchanged"),
    "true labels, training mode": partial(Strategy, p=0.5, labels="true", model_mode="unchanged"),
    "only what is right": partial(Friendly, labels="true"),
    "only what it is sure of": partial(Sure, labels="true"),
    "as far as it is sure": partial(Confident, labels="true"),
    "friendly, three steps": partial(Friendly, labels="true", steps=3),
    "ramp of p": partial(Ramp, p=0.0, labels="true"),
    "feedback on p above 0.6": Feedback,
    "feedback on p above 0.8": partial(Feedback, target=0.8),
    "feedback on p above 0.6, half of a batch from step 50": partial(Patient, patience=50),
    "feedback on p above 0.6, half of a batch from step 100": Patient,
    "p is half of skill": Following,
    "p is half of skill squared": partial(Following, power=2.0),
    "p is half of the root of skill": partial(Following, power=0.5),
    "p is skill": partial(Following, most=1.0),
    "own BatchNorm": partial(OwnStatistics, labels="true"),
    "predicted labels, every image": partial(Strategy, p=1.0),
    "true labels, every image, three steps": partial(Strategy, p=1.0, steps=3, labels="true"),
}
ON_RANDAUGMENT = (
    "none",
    "the default",
    "the default, training mode",
    "twice as strong",
    "predicted labels",
)


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Predict classes in evaluation mode."""
    model.eval()
    classes = model(x).argmax(dim=1)
    model.train()
    return classes


class StrategyAugmentation(Augmentation):
    """Crops, flips, perhaps RandAugment, then a strategy."""

    def __init__(self, strategy: Strategy | None, *args: Any, **kwargs: Any) -> None:
        super().__init__(LatentSchedule([(1, None)]), *args, **kwargs)
        self.strategy = strategy

    def begin(self, share: float) -> None:
        """Begin an epoch."""
        if self.strategy is not None:
            self.strategy.begin(share)

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """A batch, augmented."""
        x, y = super().__call__(x, y)
        return (x, y) if self.strategy is None else self.strategy(x, y)


def make_method(
    name: str, pixels: str, channels: int, flip: bool, model: nn.Module, classes: int
) -> StrategyAugmentation:
    """Put a strategy behind augmentation in pixels."""
    build = STRATEGIES[name]
    strategy = None if build is None else build(model, channels)
    return StrategyAugmentation(strategy, model, classes, pixels=pixels, flip=flip)


def draw_table() -> str:
    """Mean ± standard deviation of each strategy, a column for each set."""
    rows = read_lines(RESULTS)
    columns = list(dict.fromkeys((row["set"], row["pixels"]) for row in rows))
    heads = [f"{name}, RandAugment" if pixels != "common" else name for name, pixels in columns]
    lines = [f"| strategy | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for strategy in STRATEGIES:
        cells = []
        for column in columns:
            own = [
                row["accuracy"]
                for row in rows
                if (row["strategy"], row["set"], row["pixels"]) == (strategy, *column)
            ]
            cells.append(write_spread(own))
        lines.append(f"| {strategy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_page_table(pixels: str) -> list[str]:
    """The sets of the page, in draws of labelled images with which each of its methods was run."""
    compared = COMPARED[pixels]
    rows = [row for row in read_lines(RESULTS) if row["pixels"] == pixels]
    lines = [f"| images, labels | classes | draws | {' | '.join(compared.values())} |"]
    lines += ["|---" * (len(compared) + 3) + "|"]
    for name, (title, classes) in SETS.items():
        own = [row for row in rows if row["set"] == name]
        found = [
            {row["seed"]: row["accuracy"] for row in own if row["strategy"] == strategy}
            for strategy in compared
        ]
        seeds = set.intersection(*map(set, found))
        if seeds:
            cells = [write_spread([each[seed] for seed in sorted(seeds)]) for each in found]
            labels = f"{title}, {own[0]['per_class'] * classes:,}"
            lines.append(f"| {labels} | {classes} | {len(seeds)} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Run what is missing, or draw the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, nargs="?")
    parser.add_argument("--name", help="the name of the set, by default that of the folder")
    parser.add_argument("--per-class", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="*", default=(0, 1, 2))
    parser.add_argument("--no-flip", action="store_true", help="mirror no images, as of digits")
    parser.add_argument("--pixels", nargs="*", default=("common", "randaugment"))
    parser.add_argument("--only", nargs="*", default=list(STRATEGIES), help="these strategies")
    parser.add_argument("--table", action="store_true", help="draw the tables, run nothing")
    args = parser.parse_args()
    if args.table:
        print(draw_table())
        for pixels in COMPARED:
            write_table(PAGE, f"{MARK}: {pixels}", draw_page_table(pixels))
        return
    if args.images is None:
        parser.error("IMAGES is needed")
    images = read_images(args.images, args.size, args.channels)
    protocol = Protocol(
        per_class=args.per_class,
        epochs=args.epochs,
        width=16,
        precision="float32",
        batch_size=args.batch_size,
        channels=args.channels,
    )
    name = args.name or args.images.name
    methods = [(strategy, "common") for strategy in args.only]
    methods += [(strategy, "randaugment") for strategy in args.only if strategy in ON_RANDAUGMENT]
    methods = [method for method in methods if method[1] in args.pixels]
    for seed in args.seeds:
        train, test = draw_images(images, args.per_class, seed)
        for strategy, pixels in methods:
            key = {"set": name, "pixels": pixels, "strategy": strategy, "seed": seed}
            if any(key.items() <= row.items() for row in read_lines(RESULTS)):
                continue
            method = partial(make_method, strategy, pixels, args.channels, not args.no_flip)
            found = run(method, train, test, protocol, seed=seed)
            row = {
                **key,
                "per_class": args.per_class,
                "epochs": args.epochs,
                **round_figures(found),
            }
            append_line(RESULTS, row, lock=LOCK)
            print(row, flush=True)


if __name__ == "__main__":
    sys.exit(main())
