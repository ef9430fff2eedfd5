"""Which flow to ship: variants trained for the same CPU time, measured, and put to use.

    python examples/flows/choose.py train CIFAR10/train --runs FOLDER --minutes 15
    python examples/flows/choose.py judge CIFAR10/train CIFAR10/test --runs FOLDER
    python examples/flows/choose.py table

`train` gives each variant as many steps of 64 images as fit into the given minutes of CPU time,
measured on its first steps; a stopped script goes on where it was. `judge` looks at each trained
variant as `latent-aug check` does, on test images, and trains classifiers on 2,500 labelled
images with it, three seeds; their accuracy is that on 5,000 other training images. The eps of
LatentPerturb is the one that changes pixels by as much with every flow; --no-classifiers looks at
the flows alone, --precision is that of classifiers and of the flow in their use. `table` prints
what `judge` has left as Markdown.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from variants import VARIANTS, new_flow, recipe

from latent_aug import (
    Glow,
    LatentAdversarial,
    LatentPerturb,
    LatentSchedule,
    TrainConfig,
    train_flow,
)
from latent_aug.diagnostics.check import check_flow
from latent_aug.images.datasets import UInt8Images, open_images

sys.path.append(str(Path(__file__).parents[1] / "paper"))  # the same classifier as the tables'
from methods import Augmentation, Method
from protocol import Images, Protocol, labelled, read_images, run
from records import append_line, format_spread, read_lines

RESULTS = Path(__file__).parents[1] / "results" / "flow_choices.jsonl"
TIMED_STEPS = 30
PROTOCOL = Protocol(per_class=250, epochs=20, width=16)
VALIDATION = 500  # images of each class
SEEDS = (0, 1, 2)
ATTACK = {"eps": 1.0, "alpha": 0.5, "steps": 2, "p": 0.5}
NO_FLOW = "none"  # crop and flip alone, for comparison


def steps_within(seconds: float, name: str, images: UInt8Images) -> int:
    """Find how many steps of a variant take that much CPU time."""
    with tempfile.TemporaryDirectory() as folder:
        spent = []
        for steps in (TIMED_STEPS, 3 * TIMED_STEPS):  # the difference leaves out what is once
            config = TrainConfig(output=f"{folder}/{steps}", steps=steps, **recipe(name))
            started = time.process_time()
            train_flow(new_flow(name), images, config, progress=False)
            spent.append(time.process_time() - started)
    return int(seconds / (spent[1] - spent[0]) * 2 * TIMED_STEPS)


def slug(name: str) -> str:
    """A variant's name for files."""
    return name.replace(", ", "-").replace(" ", "-")


def train(name: str, images: UInt8Images, output: Path, minutes: float) -> None:
    """One variant, if it is not finished."""
    output.mkdir(parents=True, exist_ok=True)
    plan = output / "plan.json"
    if not plan.exists():
        steps = steps_within(60 * minutes, name, images)
        plan.write_text(json.dumps({"minutes": minutes, "steps": steps}))
    steps = json.loads(plan.read_text())["steps"]
    if not (output / "model.safetensors").exists():
        config = TrainConfig(output=output, steps=steps, **recipe(name))
        train_flow(new_flow(name), images, config, progress=False)


def trained(name: str, output: Path) -> Glow:
    """A variant's flow, frozen."""
    flow = new_flow(name)
    flow.load_state_dict(load_file(output / "model.safetensors"))
    return flow.requires_grad_(False).eval()


def method_with(make: Any) -> Method:
    """Crop, flip, and the perturbation that `make` gives for a classifier."""
    return lambda model, classes: Augmentation(LatentSchedule([(1, make(model))]), model, classes)


def accuracies(method: Method, data: tuple[Images, Images], protocol: Protocol) -> dict[str, Any]:
    """Measure one method on the validation images, a seed each."""
    runs = [run(method, *data, protocol, seed=seed) for seed in SEEDS]
    return {
        "accuracy": [round(r["accuracy"], 2) for r in runs],
        "seconds": [r["seconds"] for r in runs],
    }


def look(flow: Glow, plan: Path, test: UInt8Images) -> dict[str, Any]:
    """A trained variant's figures."""
    found = check_flow(flow, test, count=len(test))
    return {**json.loads(plan.read_text()), "linf": found.eps, **found.figures}


def gains(
    flow: Glow, eps: float, data: tuple[Images, Images], protocol: Protocol
) -> dict[str, Any]:
    """Measure what classifiers gain from a variant."""
    flow.network_dtype = torch.bfloat16 if protocol.precision == "bfloat16" else None
    random = LatentPerturb(eps, flow=flow)
    methods = {
        "LatentPerturb": method_with(lambda model: random),
        "LatentAdversarial": method_with(
            lambda model: LatentAdversarial(model, **ATTACK, flow=flow)
        ),
    }
    return {name: accuracies(method, data, protocol) for name, method in methods.items()}


def table() -> str:
    """Format what `judge` has left as Markdown, best bits/dim first."""
    rows, plain = read_lines(RESULTS), ""
    lines = [
        "| variant | steps | bits/dim | latents' std | error | eps | fall back | out of range "
        "| LatentPerturb | LatentAdversarial |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row.get("bits_per_dim", 0.0)):
        if row["name"] == NO_FLOW:
            plain = format_seeds(row)
            continue
        at_eps = row["perturbations"][1]
        lines.append(
            f"| {row['name']} | {row['steps']:,} | {row['bits_per_dim']:.3f} "
            f"| {', '.join(f'{s:.2f}' for s in row['latent_std'])} "
            f"| {row['round_trip_max_error']:.0e} | {row['linf']:.3g} "
            f"| {at_eps['fallbacks']:.1%} | {at_eps['saturated']:.1%} "
            f"| {format_seeds(row.get('LatentPerturb'))} "
            f"| {format_seeds(row.get('LatentAdversarial'))} |"
        )
    return "\n".join([*lines, *["", f"Crop and flip alone: {plain} %."] * bool(plain)])


def format_seeds(found: dict[str, Any] | None) -> str:
    """Format mean ± standard deviation; nothing where no classifier was trained."""
    return "" if found is None else format_spread(found["accuracy"])


def main() -> None:
    """Train, judge, or draw the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=("train", "judge", "table"))
    parser.add_argument("images", nargs="*", help="training images; to judge, test images as well")
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--count", type=int, default=2000, help="test images to look at")
    parser.add_argument("--no-classifiers", action="store_true")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    names = [NO_FLOW, *VARIANTS]
    parser.add_argument("--only", nargs="*", default=names, choices=names)
    args = parser.parse_args()
    if args.task == "table":
        print(table())
        return
    if args.runs is None or len(args.images) != (1 if args.task == "train" else 2):
        parser.error("train takes --runs and one folder of images, judge --runs and two")
    if args.task == "train":
        images = UInt8Images(open_images(args.images[0]), 3)
        for name in args.only:
            if name != NO_FLOW:
                train(name, images, args.runs / slug(name), args.minutes)
        return
    pool = labelled(read_images(Path(args.images[0])), Protocol(per_class=250 + VALIDATION))
    parts = (slice(None, 250 * pool.classes), slice(250 * pool.classes, None))
    first, second = (Images(pool.pixels[p], pool.labels[p], pool.classes) for p in parts)
    test = UInt8Images(open_images(args.images[1]), 3)
    test = UInt8Images(torch.stack([test[i] for i in test.spread_indices(args.count)]), 3)
    protocol = replace(PROTOCOL, precision=args.precision)
    judged = {row["name"] for row in read_lines(RESULTS)}
    for name in args.only:
        if name in judged:
            continue
        if name == NO_FLOW:
            plain = method_with(lambda model: None)
            row = {"name": name, **accuracies(plain, (first, second), protocol)}
        elif (args.runs / slug(name) / "model.safetensors").exists():
            flow = trained(name, args.runs / slug(name))
            row = {"name": name, **look(flow, args.runs / slug(name) / "plan.json", test)}
            if not args.no_classifiers:
                row |= gains(flow, row["linf"], (first, second), protocol)
        else:
            continue
        append_line(RESULTS, row, lock=args.runs / "results.lock")
        print(name, json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
